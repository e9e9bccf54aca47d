"""Names of a classifier's rows. Two lists of classes are matched by name; their order alone says nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import UserError, first_ten


def row_names(classes: Sequence[str] | None, rows: int) -> tuple[str, ...] | None:
    """A name for each row of a classifier; None where there is no classifier or no name. Rows beyond the classes of
    the data, which nothing has trained, are called `unnamed row N`.
    """
    if not classes or not rows:
        return None
    if len(classes) > rows:
        raise UserError(f"{len(classes)} classes are named ({first_ten(classes)}), but the classifier has {rows} rows")
    return (*classes, *(f"unnamed row {row}" for row in range(len(classes), rows)))


def rows_by_name(rows: Sequence[str], wanted: Sequence[str], *, have: str = "the source", want: str = "") -> Tensor:
    """int64 [len(wanted)]: for each wanted class its place in `rows`.

    have, want: whose lists these are, for the message. Raises UserError with both lists where `rows` lacks a class.
    """
    place = {name: i for i, name in enumerate(rows)}
    if absent := [name for name in wanted if name not in place]:
        raise UserError(
            f"{len(absent)} of {len(wanted)} classes{want and ' of '}{want} are not among those of {have}: "
            f"{first_ten(absent)}\n  wanted ({len(wanted)}): {first_ten(wanted)}\n"
            f"  {have} ({len(rows)}): {first_ten(rows)}"
        )
    return torch.tensor([place[name] for name in wanted], dtype=torch.int64)
