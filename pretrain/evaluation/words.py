"""Lists of words that an evaluation is given: class names and templates of prompts, from a file or by a known name."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import UserError

IMAGENET = {"imagenet-1k": "imagenet-1k", "imagenet-22k": "imagenet-22k", "imagenet-12k": "imagenet-12k"}


def class_names(source: str) -> tuple[str, ...]:
    """One a line of a text file, or timm's list: imagenet-1k, -12k, -22k (WordNet identifiers, as ImageNet's folders).

    Raises UserError where there is neither.
    """
    if source in IMAGENET:
        from timm.data import ImageNetInfo

        return tuple(ImageNetInfo(IMAGENET[source]).label_names())
    return _lines(source, f"a file with a class name a line, or one of {', '.join(IMAGENET)}")


def templates(source: str) -> tuple[str, ...]:
    """One a line of a text file, each with a {}, or open_clip's: openai (80 of ImageNet), simple (7)."""
    if source in ("openai", "simple"):
        import open_clip

        found: list[Callable[[str], str]] = list(
            open_clip.OPENAI_IMAGENET_TEMPLATES if source == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        return tuple(template("{}") for template in found)
    return _lines(source, "a file with a template a line, each with a {}, or openai or simple")


def _lines(source: str, expected: str) -> tuple[str, ...]:
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: {expected} was expected")
    return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
