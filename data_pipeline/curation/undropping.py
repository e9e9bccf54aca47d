"""`internimage shards undrop`: takes back what filter and dedup decided, whose samples still lie in their shards.

What was taken down stays out. A sample that is used again has no reason; what packing had noted of it there is gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.catalogue import open_catalogue, quoted
from data_pipeline.curation.decisions import SetPath, decide, held_sets
from data_pipeline.errors import UserError
from data_pipeline.format.sidecar import DROPPED, PACKED, TAKEN_DOWN


@dataclass(frozen=True)
class UndropSummary:
    """reasons: rows that are used again, by the reason for which they were not. left_out: rows that still are not."""

    folder: Path
    undropped: int
    reasons: Mapping[str, int]
    left_out: int
    applied: bool


def undrop(
    path: SetPath,
    patterns: Sequence[str],
    *,
    dry_run: bool = False,
    memory_gb: float = 1.0,
    progress: ProgressCallback | None = None,
) -> UndropSummary:
    """Uses the dropped rows of a set again whose reason matches a pattern (`filter: min_side*`, `duplicate*`).

    Raises UserError where no pattern is given, and where none matches.
    """
    if not patterns:
        raise UserError("name the reasons that are taken back, as 'filter: min_side*' or 'near duplicate*'; '*' is all")
    with held_sets([path], progress) as (one,), open_catalogue([one], memory_gb=memory_gb) as catalogue:
        run = catalogue.connection.execute
        dropped = f"status = '{DROPPED}' and not starts_with(reason, '{TAKEN_DOWN}')"
        matches = " or ".join(f"reason glob {quoted(pattern)}" for pattern in patterns)
        run(f"create temp table back as select id, reason from rows where {dropped} and ({matches})")
        kind = "split_part(reason, ' of ', 1)"  # a copy's reason goes on with the name of the one that stays
        counted = run(f"select {kind}, count(*) from back group by 1 order by 2 desc, 1").fetchall()
        reasons = {str(reason): int(count) for reason, count in counted}
        undropped = sum(reasons.values())
        found = run(f"select count(*) from rows where status not in ('{PACKED}', 'rejected')").fetchone()
        assert found is not None
        if not undropped:
            raise UserError(
                f"{one.folder}: no row was dropped for {', '.join(patterns)}; see `internimage shards stats`"
            )
        if not dry_run:
            step = {"what": "undrop", "options": {"reasons": list(patterns)}, "rows": undropped}
            decide(catalogue, f"select id, '{PACKED}' as status, '' as reason from back", [step], progress)
        return UndropSummary(one.folder, undropped, reasons, int(found[0]) - undropped, not dry_run)
