"""Which column of a table is what: named by the user, found by the field's names, or by the layout of a known list."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.format.sidecar import ANNOTATION_COLUMNS, PDQ_COLUMNS, SIDECAR_SCHEMA
from data_pipeline.preparation.sources.cells import CAPTION_NAMES, CaptionRule

# Names that columns go by in the field's data sets, in lower case; first match wins.
IMAGE_NAMES = ("image", "image_path", "path", "file", "filepath", "file_path", "filename", "file_name", "img", "jpg")
LABEL_NAMES = ("label", "class", "category", "labels", "cls", "class_name")
URL_NAMES = ("url", "image_url", "link")
HASH_NAMES = ("sha256", "md5", "sha1")  # `hash` is none: LAION's is over URL and caption
_NAMES = {"image": IMAGE_NAMES, "caption": CAPTION_NAMES, "label": LABEL_NAMES, "url": URL_NAMES, "hash": HASH_NAMES}

NOT_KEPT = "_"  # a column of a headerless file that is passed over
NO_COLUMN = "none"

# Lists without a header: their columns in order, and whether their texts are percent-encoded.
_YFCC = (
    "line photo_id photo_hash user_nsid user_nickname date_taken date_uploaded capture_device title description "
    "user_tags machine_tags longitude latitude accuracy page_url url licence licence_url server_id farm_id secret "
    "secret_original extension marker"
)
PRESETS: dict[str, tuple[tuple[str, ...], bool]] = {
    "cc3m": (("caption", "url"), False),
    "cc12m": (("url", "caption"), False),
    "yfcc100m": (tuple(_YFCC.split()), True),
}


@dataclass(frozen=True)
class Columns:
    """Column names of a table; None finds them by name (and goes without, except for the one that must be there).

    hash: of the digest (MD5, SHA-1 or SHA-256) that the image's bytes must have; "none" checks none
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    url: str | None = None
    hash: str | None = None


@dataclass(frozen=True)
class TableFormat:
    """How a table is read; None finds out by its name and first bytes.

    quoting: csv (quotes doubled inside quotes), backslash (escaped by one), none; a TSV has none, a CSV has csv
    names: of the columns of a file that has no header; "_" passes one over
    preset: a list without a header by name: cc3m, cc12m, yfcc100m
    captions: what is taken of a caption cell that is a list or a struct
    max_caption: characters; a row whose caption has more is rejected
    keep: whether further columns go into the sidecar, or which
    """

    delimiter: str | None = None
    encoding: str | None = None
    quoting: str | None = None
    names: tuple[str, ...] | None = None
    preset: str | None = None
    captions: CaptionRule = "first"
    max_caption: int = 32_768
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UserError(f"delimiter {self.delimiter!r}: give one character")
        if self.quoting not in (None, "csv", "backslash", "none"):
            raise UserError(f"quoting {self.quoting!r}: give csv, backslash or none")
        if self.captions not in ("first", "join", "random"):
            raise UserError(f"captions {self.captions!r}: give first, join or random")
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r} is not known; known are {', '.join(PRESETS)}")
        if self.preset is not None and self.names is not None:
            raise UserError("preset and names both say which columns a file without a header has; give one of them")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise UserError(f"encoding {self.encoding!r} is not known; give one such as utf-8 or cp1252") from None

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns of a file without a header."""
        return PRESETS[self.preset][0] if self.preset is not None else self.names

    @property
    def percent_encoded(self) -> bool:
        return self.preset is not None and PRESETS[self.preset][1]


def check_header(where: str, header: Sequence[str]) -> None:
    """Raises UserError for a header without names, or that names a column twice."""
    if not any(header):
        raise UserError(f"table {where} is empty; its first line must name the columns")
    named = [name for name in header if name not in ("", NOT_KEPT)]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"table {where} names the column {twice!r} twice; rename one of the two")


def check_names(where: str, header: Sequence[str]) -> None:
    """Raises UserError for a first line that names no columns, but is a row already."""
    if any(name.startswith(("http://", "https://")) for name in header):
        raise UserError(
            f"{where} has no header: its first line is a row ({', '.join(header)[:200]}); name the columns in their "
            "order, as `--columns url,caption`, or the list, as `--preset cc12m`"
        )


def resolve(where: str, present: Sequence[str], columns: Columns, *, needs: str) -> Columns:
    """Finds the column of each role. `needs`: the role that must have one.

    Raises UserError where a given column is missing, where two columns fit one role alike, or where the one that is
    needed cannot be found.
    """
    found: dict[str, str | None] = {}
    for role in (field.name for field in fields(Columns)):
        given = getattr(columns, role)
        if given == NO_COLUMN and given not in present:
            found[role] = None
        elif given is not None and given not in present:
            raise UserError(f"{where} has no column {given!r}; its columns are {', '.join(map(repr, present))}")
        else:
            found[role] = given if given is not None else _by_name(where, present, role)
    if found[needs] is None:
        raise UserError(
            f"{where}: no column looks like the {needs} (columns: {', '.join(present)}); name the one that is"
        )
    return Columns(**found)


def further_columns(
    where: str, schema: pa.Schema, taken: Sequence[str | None], keep: Sequence[str] | None
) -> tuple[dict[str, str], list[str]]:
    """Chooses the columns that go into the sidecar: the sidecar's name by the table's, and names of those left out
    because they hold bytes or what Parquet's plain types cannot.

    taken: the columns of the roles; keep: names, or None for all. Raises UserError for a name that is not there.
    """
    names = [name for name in schema.names if name not in taken and name not in ("", NOT_KEPT)]
    if keep is not None:
        for name in keep:
            if name not in schema.names:
                raise UserError(f"{where} has no column {name!r} to keep; its columns are {', '.join(schema.names)}")
        names = [name for name in names if name in keep]
    left_out = [name for name in names if not _plain(schema.field(name).type)]
    reserved = {field.name for field in (*SIDECAR_SCHEMA, *ANNOTATION_COLUMNS, *PDQ_COLUMNS)}
    chosen: dict[str, str] = {}
    for name in names:
        if name not in left_out:
            own = name
            while own in reserved:
                own = f"input_{own}"
            reserved.add(own)
            chosen[name] = own
    return chosen, left_out


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type that a further column has in the sidecar."""
    if pa.types.is_dictionary(kind):
        return stored_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return pa.float32() if pa.types.is_float16(kind) else kind


def _plain(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        return all(_plain(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_timestamp(kind):
        return bool(kind.unit != "ns")
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_date, types.is_decimal, types.is_null)
    return types.is_string(kind) or types.is_large_string(kind) or any(test(kind) for test in plain)


def _by_name(where: str, present: Sequence[str], role: str) -> str | None:
    for name in _NAMES[role]:
        fitting = [column for column in present if column.strip().lower() == name]
        if len(fitting) > 1:
            raise UserError(f"{where}: {' and '.join(map(repr, fitting))} both look like the {role}; name one of them")
        if fitting:
            return fitting[0]
    return None
