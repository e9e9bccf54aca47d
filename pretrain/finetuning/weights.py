"""Which weights a fine-tuning starts from: the backbone as it is, a new classifier, or rows of the old one."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError, first_ten
from pretrain.handoff import read_backbone
from pretrain.models import InternImage, official
from pretrain.tasks.class_names import rows_by_name

_log = logging.getLogger(__name__)
CLASSIFIER = "head."
BY_NAME = "names"
# What stands between the stages and the classifier, by official key. A pretraining with text pools otherwise than
# InternImage-T to -XL classify: where the file has none of a part, the model keeps its own, new one.
POOLING = (("conv_head.",), ("dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.", "fc_norm."))


def load_into(
    model: InternImage,
    source: Path | str,
    *,
    head_rows: Tensor | Path | str | None = None,
    classes: Sequence[str] | None = None,
    which: str = "ema",
    say: Callable[[str], None] = _log.info,
) -> list[str]:
    """Put the image encoder of `source` into `model`; its classifier stays new without `head_rows`.

    Args:
        source: run directory, checkpoint, exported folder or file (.safetensors, .pth), or an official checkpoint.
        head_rows: the row of the source's classifier that each class starts from, int64 [num_classes], or how
            `read_rows` finds it.
        classes: names of the data's classes.
        say: told which weights these are, and what is new.

    Returns the official keys of the model that are new. Raises UserError where the backbones differ.
    """
    backbone = read_backbone(source, which)
    state = official.normalize_layout(backbone.state)
    own = official.state_dict(model)
    rows = head_rows if isinstance(head_rows, Tensor) else None
    if isinstance(head_rows, (str, Path)):
        rows = read_rows(head_rows, model.num_classes, classes, backbone.classes)
    if rows is not None and len(rows) != model.num_classes:
        raise UserError(
            f"head_rows: {len(rows)} rows were given for {model.num_classes} classes; one row a class is needed"
        )
    allow = set()
    if head_rows is None:
        state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
        allow.add(CLASSIFIER)
    for part in POOLING:
        held = [key for key in state if key.startswith(part)]
        wanted = [key for key in own if key.startswith(part)]
        if wanted and not held:
            allow |= set(wanted)
        elif held and not wanted:
            allow |= set(held)
    try:
        listing = official.load_state_dict(model, state, allow=allow, head_rows=rows)
    except UserError as error:
        raise UserError(f"{source} does not fit the model that is configured to be fine-tuned: {error}") from None
    new = sorted(listing.missing)
    say(f"started from {backbone.source}; new: {first_ten(new) or 'nothing'}")
    return new


def read_rows(
    how: Path | str, rows: int, classes: Sequence[str] | None = None, theirs: Sequence[str] | None = None
) -> Tensor:
    """The row of the source's classifier that each of `rows` classes starts from: int64 [rows].

    Args:
        how: "names", each class is the source's of the same name; or a text file with a row number a line, line i for
            class i; or one with a table, CLASS, a tab, and the source's class or row number.
        classes: names of the data's classes. theirs: of the source's rows.

    Raises UserError where a class has no row, naming those; and where names are needed and one side has none.
    """
    if str(how) == BY_NAME:
        return rows_by_name(_named(theirs, "the source's classifier"), _named(classes, "the data"), have="the source")
    try:
        lines = [line for line in Path(how).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{how}: a text file of rows was expected, or the word {BY_NAME}: {error}") from None
    if any("\t" in line for line in lines):
        return _rows_of_table(how, lines, classes, theirs)
    try:
        found = torch.tensor([int(line) for line in lines])
    except ValueError as error:
        raise UserError(f"{how}: a text file with one row number a line was expected: {error}") from None
    if len(found) != rows:
        raise UserError(f"{how}: {len(found)} rows for {rows} classes; one row a class is needed")
    return found


def _rows_of_table(
    how: Path | str, lines: Sequence[str], classes: Sequence[str] | None, theirs: Sequence[str] | None
) -> Tensor:
    pairs = [line.partition("\t") for line in lines]
    table = {name.strip(): source.strip() for name, _, source in pairs}
    wanted = _named(classes, "the data")
    if absent := [name for name in wanted if name not in table]:
        raise UserError(f"{how}: {len(absent)} of {len(wanted)} classes of the data are not in it: {first_ten(absent)}")
    place = {name: str(row) for row, name in enumerate(theirs or ())}
    given = [place.get(table[name], table[name]) for name in wanted]
    if unknown := [row for row in given if not row.isdecimal()]:
        raise UserError(f"{how}: {len(unknown)} are no classes of the source and no row numbers: {first_ten(unknown)}")
    return torch.tensor([int(row) for row in given])


def _named(names: Sequence[str] | None, whose: str) -> Sequence[str]:
    if not names:
        raise UserError(f"rows of a classifier by name: {whose} has no class names; give a file of row numbers")
    return names
