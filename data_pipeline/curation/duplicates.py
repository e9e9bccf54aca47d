"""`internimage shards dedup`: leaves out copies of images, within a set, across sets, and of held-out sets' images.

    exact   group by 128 bits of the SHA-256, join, confirm by all of it
    near    equal PDQ hashes first; of what is left, band by band: group, join, keep pairs within the distance
            then by rank: a row goes where a row of better rank is near it and stays

Every row that goes names the row that stays in its place, and is within the distance of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.bands import BLOCK_BITS, Band, choose_bands, expected_recall
from data_pipeline.curation.catalogue import Catalogue, open_catalogue, quoted
from data_pipeline.curation.decisions import SetPath, decide, held_sets, open_settled
from data_pipeline.curation.fingerprints import add_hashes
from data_pipeline.curation.pictures import Picture, contact_sheet
from data_pipeline.curation.repacking import name_sources
from data_pipeline.errors import UserError
from data_pipeline.format.sidecar import DROPPED, PACKED, PDQ, PDQ_QUALITY

Keep = Literal["first", "largest", "longest_caption"]
_SCORES: Mapping[Keep, str] = {
    "first": "1",
    "largest": "1000000000000 - coalesce(width, 0)::BIGINT * coalesce(height, 0)",
    "longest_caption": "1000000000000 - coalesce(length(caption), 0)",
}
_HIGH = 1 << 64  # a rank is the score, then the row's id: smaller is better
_WORDS = tuple(f"w{n}" for n in range(4))
_DISTANCE = " + ".join(f"bit_count(xor(a.{word}, b.{word}))" for word in _WORDS)
_RECALL_AT = (8, 16, 24, 31)
_PREVIEWED = 100  # pairs


@dataclass(frozen=True)
class DuplicateRules:
    """What counts as a copy, and which one stays.

    near: also images whose PDQ hashes differ in at most `distance` of 256 bits, both of at least `min_quality`.
    keep: of copies, the one of the set named first and then of the smallest row; or the one with most pixels, or with
    the longest caption, ties as before. Held-out images always stay.
    bands: how many to look at; None chooses by the number of rows. bucket: rows of one band value that are compared;
    fuller buckets are passed over and counted.
    """

    near: bool = False
    distance: int = 31
    min_quality: int = 50
    keep: Keep = "first"
    bands: int | None = None
    bucket: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= 64:
            raise UserError(f"distance {self.distance}: 0 to 64 of 256 bits; unrelated images differ in about 128")


@dataclass(frozen=True)
class DedupSummary:
    """leaked: rows that went because a held-out set has a copy, by held-out set and set. recall: the expected share of
    near pairs found, by distance, for bits that differ anywhere. passed_over: rows in buckets that were too full."""

    rows: int
    exact: int
    near: int
    left: int
    dropped: Mapping[str, int]  # by set
    leaked: Mapping[str, Mapping[str, int]]
    applied: bool
    recall: Mapping[int, float] = field(default_factory=dict)
    bands: int = 0
    passed_over: int = 0
    without_hash: int = 0  # rows that could not be hashed, or are too plain to compare
    preview: Path | None = None


def dedup_sets(
    sets: Sequence[SetPath],
    rules: DuplicateRules,
    *,
    against: Sequence[SetPath] = (),
    dry_run: bool = False,
    preview: Path | None = None,
    workers: int | None = None,
    memory_gb: float = 1.0,
    progress: ProgressCallback | None = None,
) -> DedupSummary:
    """Drops the used rows of `sets` whose image is a copy of one that stays, in these sets or `against`.

    Hashes for `near` are made of rows that have none. preview: an HTML page of pairs. Raises UserError where a
    set does not exist or is being written.
    """
    folders = [(path.index_folder or path.folder).resolve() for path in (*sets, *against)]
    if len(set(folders)) < len(folders):
        raise UserError(f"a set is named twice: {', '.join(str(path.folder) for path in (*sets, *against))}")
    # Held-out sets are written to only where they lack hashes; without `near` they may lie on a read-only disk.
    with held_sets([*sets, *(against if rules.near else ())], progress) as held:
        shown = held[len(sets) :] if rules.near else [open_settled(path) for path in against]
        ordered = [*shown, *held[: len(sets)]]  # held-out sets first
        if rules.near:
            for one in ordered:
                add_hashes(one, workers, progress)
        scratch = held[0].index_folder
        with open_catalogue(ordered, memory_gb=memory_gb, scratch=scratch) as catalogue:
            search = _Search(catalogue, rules, len(against))
            search.exact()
            found: dict[str, Any] = search.near() if rules.near else {}
            counted = search.counts()
            if preview is not None:
                _preview(catalogue, preview)
            if counted["exact"] + counted["near"] and not dry_run:
                step = {
                    "what": "dedup",
                    "options": _changed(rules),
                    "against": [one.name for one in ordered[: len(against)]],
                }
                steps = [None] * len(against) + [
                    step | {"dropped": counted["dropped"].get(one.name, 0)} for one in held[: len(sets)]
                ]
                decide(catalogue, search.decisions(), steps, progress)
    return DedupSummary(**counted, **found, applied=not dry_run, preview=preview)


class _Search:
    """The tables of one search: `gone` gets id, keeper, distance of every row that goes (distance null: exact)."""

    def __init__(self, catalogue: Catalogue, rules: DuplicateRules, held_out: int) -> None:
        self._catalogue, self._rules, self._held_out = catalogue, rules, held_out
        self.names = [source.name for source in name_sources(list(catalogue.sets))]
        self._run = catalogue.connection.execute
        score = f"case when set < {held_out} then 0 else {_SCORES[rules.keep]} end"
        self._run(
            f"create view ranked as select *, ({score})::HUGEINT * {_HIGH} + id as rank from rows "
            f"where status = '{PACKED}'"
        )
        self._run("create temp table gone (id UBIGINT, keeper UBIGINT, distance INTEGER)")

    def exact(self) -> None:
        """Finds rows whose images are equal byte for byte. Grouping 128 bits and joining takes far less memory than a
        window over whole digests."""
        key = "('0x' || substr(sha256, 1, 32))::UHUGEINT"
        self._run(
            f"create temp table twice as select h from (select {key} as h from rows where status = '{PACKED}' "
            "and length(sha256) = 64) group by h having count(*) > 1"
        )
        self._run(
            f"create temp table members as select id, set, sha256, rank from ranked join twice on h = {key} "
            "where length(sha256) = 64"
        )
        self._run(
            "insert into gone select id, (kept % 18446744073709551616)::UBIGINT, null from members join "
            "(select sha256, min(rank) as kept from members group by sha256 having count(*) > 1) using (sha256) "
            f"where rank <> kept and set >= {self._held_out}"
        )
        self._run("drop table members; drop table twice")

    def near(self) -> dict[str, Any]:
        """Finds rows whose hashes are within the distance; returns what the summary says of the search."""
        rules, run, columns = self._rules, self._run, self._catalogue.columns()
        words = ", ".join(f"('0x' || substr({PDQ}, {1 + 16 * n}, 16))::UBIGINT as w{n}" for n in range(4))
        if PDQ not in columns:
            raise UserError("the sets hold no hashes")
        run(
            f"create temp table prints as select id, set, rank, {words} from ranked where {PDQ} is not null "
            f"and {PDQ_QUALITY} >= {rules.min_quality} and id not in (select id from gone)"
        )
        names = ", ".join(_WORDS)
        run(f"create temp table centres as select {names}, min(rank) as rank from prints group by {names}")
        run("create temp table pairs (a HUGEINT, b HUGEINT, distance INTEGER)")
        count = self._number("select count(*) from centres")
        bands = choose_bands(count, rules.bands)
        passed_over = sum(self._pairs_of(band) for band in bands)
        self._settle()
        return {
            "recall": {d: round(expected_recall(bands, d), 3) for d in _RECALL_AT if d <= rules.distance},
            "bands": len(bands),
            "passed_over": passed_over,
            "without_hash": self._number(
                f"select count(*) from ranked where {PDQ} is null or {PDQ_QUALITY} < {rules.min_quality}"
            ),
        }

    def counts(self) -> dict[str, Any]:
        """Counts for the summary."""
        rows = self._number(f"select count(*) from ranked where set >= {self._held_out}")
        exact = self._number("select count(*) from gone where distance is null")
        near = self._number("select count(*) from gone where distance is not null")
        dropped: dict[str, int] = {}
        leaked: dict[str, dict[str, int]] = {}
        names, locate = self.names, self._catalogue.locate
        firsts = self._run("select id >> 32, keeper >> 32, count(*) from gone group by 1, 2 order by 1, 2").fetchall()
        for sidecar, keeper, count in firsts:
            mine, kept = locate(sidecar << 32)[0], locate(keeper << 32)[0]
            dropped[names[mine]] = dropped.get(names[mine], 0) + count
            if kept < self._held_out:
                by_set = leaked.setdefault(names[kept], {})
                by_set[names[mine]] = by_set.get(names[mine], 0) + count
        left = rows - exact - near
        return {"rows": rows, "exact": exact, "near": near, "left": left, "dropped": dropped, "leaked": leaked}

    def decisions(self) -> str:
        """Returns the statement of id, status, reason of the rows that go."""
        names = " ".join(f"when {n} then {quoted(name)}" for n, name in enumerate(self.names))
        return (
            f"select gone.id, '{DROPPED}' as status, (case when distance is null then '' else 'near ' end) || "
            f"'duplicate of ' || (case kept.set {names} end) || '/' || kept.key || "
            "(case when distance is null then '' else ', ' || distance || ' bits' end) as reason "
            "from gone join rows kept on kept.id = gone.keeper"
        )

    def _pairs_of(self, band: Band) -> int:
        """Adds the pairs of one band; returns how many rows lie in buckets that are too full to compare."""
        run = self._run
        value = " | ".join(
            f"(((w{block // 4} >> {BLOCK_BITS * (block % 4)}) & 65535) << {BLOCK_BITS * place})"
            for place, block in enumerate(band)
        )
        run(
            f"create or replace temp table buckets as select ({value}) as band, count(*) as count from centres "
            "group by 1 having count(*) > 1"
        )
        run(
            f"create or replace temp table shared as select band, rank, {', '.join(_WORDS)} from centres "
            f"join buckets on band = ({value}) where buckets.count <= {self._rules.bucket}"
        )
        run(
            f"insert into pairs select a.rank, b.rank, {_DISTANCE} from shared a join shared b on a.band = b.band "
            f"and a.rank < b.rank where {_DISTANCE} <= {self._rules.distance}"
        )
        return self._number(f"select coalesce(sum(count), 0) from buckets where count > {self._rules.bucket}")

    def _settle(self) -> None:
        """Decides by rank which hash's rows go, and with them the rows of equal hash."""
        run, low = self._run, f"% {_HIGH}"
        nodes = run(
            f"select (rank {low})::UBIGINT as id, rank < {_HIGH} as fixed from "
            "(select a as rank from pairs union select b from pairs) order by rank"
        ).fetchnumpy()
        pairs = run(
            f"select (a {low})::UBIGINT as a, (b {low})::UBIGINT as b, min(distance) as distance "
            "from pairs group by pairs.a, pairs.b"
        ).fetchnumpy()
        ids = np.asarray(nodes["id"], dtype=np.uint64)
        order = np.argsort(ids)
        better, worse = (order[np.searchsorted(ids[order], np.asarray(pairs[side]))] for side in ("a", "b"))
        keepers, distances = settle(len(ids), better, worse, np.asarray(pairs["distance"]), np.asarray(nodes["fixed"]))
        going = np.flatnonzero(keepers >= 0)
        settled = pa.table({"id": ids[going], "keeper": ids[keepers[going]], "distance": distances[going]})
        self._catalogue.connection.register("settled", settled)
        match = " and ".join(f"p.{word} = c.{word}" for word in _WORDS)
        run(
            "insert into gone select p.id, coalesce(s.keeper, c.id), coalesce(s.distance, 0) from prints p "
            f"join (select *, (rank {low})::UBIGINT as id from centres) c on {match} "
            "left join settled s on s.id = c.id "
            f"where p.set >= {self._held_out} and (p.id <> c.id or s.keeper is not null)"
        )

    def _number(self, statement: str) -> int:
        row = self._run(statement).fetchone()
        assert row is not None
        return int(row[0])


def settle(
    count: int,
    better: NDArray[np.intp],
    worse: NDArray[np.intp],
    distances: NDArray[np.int32],
    fixed: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Decides which of `count` nodes, numbered by rank, go: those with a near node of better rank that stays.

    better, worse, distances: int [pairs]. fixed: nodes that stay whatever is near. Returns for every node the nearest
    better one that stays, else -1, and the distance to it. So nobody goes for a chain of likenesses: what goes is near
    to what stays.
    """
    keepers = np.full(count, -1, dtype=np.int64)
    nearest = np.zeros(count, dtype=np.int32)
    for pair in np.lexsort((better, distances, worse)).tolist():
        low, high = int(better[pair]), int(worse[pair])
        if keepers[high] < 0 and keepers[low] < 0 and not fixed[high]:
            keepers[high], nearest[high] = low, distances[pair]
    return keepers, nearest


def _changed(rules: DuplicateRules) -> dict[str, Any]:
    standard = asdict(DuplicateRules())
    return {name: value for name, value in asdict(rules).items() if value != standard[name]}


def _preview(catalogue: Catalogue, page: Path) -> None:
    """Draws pairs: the copy that goes beside the one that stays; near ones first, the farthest apart before others."""
    pairs = catalogue.connection.execute(
        "select id, keeper, distance from gone order by distance desc nulls last, id limit " + str(_PREVIEWED)
    ).fetchall()
    shown = []
    for row_id, keeper, distance in pairs:
        reason = "goes: equal" if distance is None else f"goes: {distance} bits"
        shown.append((Picture(*catalogue.locate(keeper), "stays"), Picture(*catalogue.locate(row_id), reason)))
    contact_sheet(page, "Copies", catalogue.sets, {"pairs": shown})
