"""Tells a set that nobody can use from a success."""

from data_pipeline.errors import BadDataError, first_ten
from data_pipeline.preparation.fetching.fetch import FetchSummary
from data_pipeline.preparation.inspection import IndexSummary
from data_pipeline.preparation.packing.pack import PackSummary
from data_pipeline.preparation.packing.parts import FinishSummary


def check_usable(summary: PackSummary | FetchSummary | IndexSummary | FinishSummary, least: float = 0.0) -> None:
    """Raises BadDataError where no sample is usable, or a smaller share of the rows than `least`, with the reasons.

    The set itself is whole: rows can be retried by their reasons.
    """
    packed = summary.samples if isinstance(summary, (IndexSummary, FinishSummary)) else summary.packed
    rows = packed + sum(summary.rejected.values())
    if packed > 0 and packed >= least * rows:
        return
    where = summary.folder if isinstance(summary, IndexSummary) else summary.output
    reasons = first_ten([f"{count:,} {reason}" for reason, count in summary.rejected.items()])
    share = f"only {packed:,}" if packed else "none"
    raise BadDataError(
        f"{where}: {share} of {rows:,} rows can be used ({reasons}); mend the cause, then `--retry` its reason"
    )
