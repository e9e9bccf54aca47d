"""From labels as they stand in the input to class numbers. Numbers stay numbers; names are numbered as they sort."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_pipeline.errors import UserError
from data_pipeline.format.labels import LABEL_INVALID, LARGEST_CLASS_COUNT, InvalidLabelError, read_label
from data_pipeline.preparation.sources.rows import Row, Source

UNKNOWN_LABEL = "label_unknown"


def survey(source: Source, classes: Sequence[str] | None) -> tuple[int, tuple[str, ...] | None]:
    """Counts the rows and names the classes: those given, else those found, sorted; None where no row has a label.

    Raises UserError where the labels are partly numbers and partly names, or mostly what no class can have.
    """
    labels = source.labels()
    if classes is not None or labels is None:
        return source.count(), None if classes is None else tuple(classes)
    count, usable, refused = 0, 0, 0
    names: dict[str, int] = {}  # and the row of each
    largest, largest_row, first_refused = -1, 0, (0, "")
    for count, label in enumerate(labels, 1):
        try:
            found = read_label(label)
        except InvalidLabelError as error:
            first_refused = first_refused if refused else (count - 1, str(error))
            refused += 1
            continue
        usable += found is not None
        if isinstance(found, str):
            names.setdefault(found, count - 1)
            if len(names) > LARGEST_CLASS_COUNT:
                raise UserError(f"more than {LARGEST_CLASS_COUNT:,} different labels: name another column as the label")
        elif found is not None and found > largest:
            largest, largest_row = found, count - 1
    if refused > usable and 2 * refused > count:
        row, why = first_refused
        raise UserError(
            f"{refused:,} of {refused + usable:,} labels are no classes, the first in row {row}: {why}; "
            "give the class names in their order, name another column as the label, or go without (none)"
        )
    if names and largest >= 0:
        name, row = next(iter(names.items()))
        raise UserError(
            f"labels are partly numbers and partly names ({largest} in row {largest_row}, {name!r} in row {row}); "
            "use one of the two"
        )
    if names:
        return count, tuple(sorted(names))
    return count, tuple(map(str, range(largest + 1))) if largest >= 0 else None


def numbered(rows: Iterator[Row], classes: Sequence[str] | None) -> Iterator[Row]:
    """Yields rows with class numbers for labels. A name goes before a number; a label of no class rejects the row."""
    numbers = {name: number for number, name in enumerate(classes or ())}
    for row in rows:
        if row.label is None:
            yield row
            continue
        number, reason = _number(row.label, numbers)
        yield replace(row, label=number, reason=row.reason or reason)


def _number(label: object, numbers: dict[str, int]) -> tuple[int | None, str]:
    """Returns the number of a label, or the reason why it has none; neither where the label means "not labelled"."""
    if isinstance(label, str) and label.strip() in numbers:  # the text itself: 007 may be a name
        return numbers[label.strip()], ""
    try:
        found = read_label(label)
    except InvalidLabelError:
        return None, LABEL_INVALID
    if found is None:
        return None, ""
    if str(found) in numbers:
        return numbers[str(found)], ""
    if isinstance(found, int) and found < len(numbers):
        return found, ""
    return None, UNKNOWN_LABEL
