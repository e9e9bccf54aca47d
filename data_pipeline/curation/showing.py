"""`internimage shards show`: a page of pictures of a set, chosen by status, reason or any condition."""

import re
from dataclasses import dataclass
from pathlib import Path

import duckdb

from data_pipeline.curation.catalogue import Catalogue, open_catalogue, quoted
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.curation.filters import DERIVED
from data_pipeline.curation.pictures import Picture, contact_sheet
from data_pipeline.errors import UserError

_NAMES_ANOTHER = re.compile(r"duplicate of ([^/]+)/(.+?)(?:, \d+ bits)?$")
_MOST_GROUPS = 20


@dataclass(frozen=True)
class ShowSummary:
    page: Path
    rows: int  # that match
    shown: int


def show_set(
    path: SetPath,
    page: Path,
    *,
    status: str | None = None,
    reason: str | None = None,
    where: str | None = None,
    limit: int = 200,
    others: tuple[SetPath, ...] = (),
) -> ShowSummary:
    """Draws rows of a set, grouped by status and reason; a copy stands beside what it is a copy of.

    reason: a pattern, as 'near*'. where: a condition over columns, as in `filter`. others: sets in which the originals
    of copies may be, besides the set itself. Rows are chosen by a hash of their place. Raises UserError for a condition
    that cannot be evaluated.
    """
    sets = [open_settled(one) for one in (path, *others)]
    with open_catalogue(sets) as catalogue:
        conditions = ["set = 0"]
        if status is not None:
            conditions.append(f"status = {quoted(status)}")
        if reason is not None:
            conditions.append(f"reason glob {quoted(reason)}")
        if where is not None:
            conditions.append(f"({where})")
        derived = "".join(f", {sql} as {name}" for name, sql in DERIVED.items() if name not in catalogue.columns())
        chosen = f"from (select *{derived} from rows) where {' and '.join(conditions)}"
        run = catalogue.connection.execute
        try:
            counted = run(f"select count(*) {chosen}").fetchone()
            rows = run(
                f"select id, status, reason, caption, url {chosen} order by hash(id), id limit {limit}"
            ).fetchall()
        except duckdb.Error as error:
            raise UserError(f"--where {where!r} cannot be evaluated: {str(error).splitlines()[0]}") from None
        originals = _originals(catalogue, [str(row[2]) for row in rows])
        groups: dict[str, list[Picture | tuple[Picture, Picture]]] = {}
        for row_id, found, why, caption, url in rows:
            kind = f"{found}: {why.partition(' of ')[0]}" if why else found
            picture = Picture(*catalogue.locate(row_id), why, caption, url)
            original = originals.get(why)
            group = kind if kind in groups or len(groups) < _MOST_GROUPS else "others"
            groups.setdefault(group, []).append(picture if original is None else (original, picture))
        contact_sheet(page, f"{sets[0].name}", sets, dict(sorted(groups.items())))
        return ShowSummary(page, int(counted[0]) if counted else 0, len(rows))


def _originals(catalogue: Catalogue, reasons: list[str]) -> dict[str, Picture]:
    """Finds the rows that reasons name as originals, in the sets at hand."""
    names = {one.name: number for number, one in enumerate(catalogue.sets)}
    wanted: dict[tuple[int, str], str] = {}
    for reason in reasons:
        match = _NAMES_ANOTHER.search(reason)
        if match is not None and match[1] in names:
            wanted[names[match[1]], match[2]] = reason
    if not wanted:
        return {}
    keys = ", ".join(sorted({quoted(key) for _, key in wanted}))
    found = catalogue.connection.execute(
        f"select id, set, key, caption, url from rows where key in ({keys}) and status <> 'rejected'"
    ).fetchall()
    return {
        wanted[number, key]: Picture(*catalogue.locate(row_id), "stays", caption, url)
        for row_id, number, key, caption, url in found
        if (number, key) in wanted
    }
