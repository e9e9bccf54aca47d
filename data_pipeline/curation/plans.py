"""Which rows of old shards go to which new shard, and in what order: worked out once, kept beside the new shards.

    OUTPUT/.curation/plan.parquet    id, used: one row group a new shard, in the order of its rows
                     plan.json       the targets, and how many new shards each has

Rows that are used fill shards of equal size. Rows that are not used go along with their neighbours, so that every input
row is accounted for in the new set.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.curation.catalogue import WORK_FOLDER, Catalogue
from data_pipeline.durable import atomic_path, write_durably
from data_pipeline.errors import UserError
from data_pipeline.format import Manifest
from data_pipeline.format.sidecar import PACKED, SIDECAR_SCHEMA

FROM_SET, FROM_ROW, FROM_KEY = "from_set", "from_row", "from_key"
PROVENANCE = {FROM_SET: pa.string(), FROM_ROW: pa.int64(), FROM_KEY: pa.string()}


@dataclass(frozen=True)
class Target:
    """A new set below the output folder ("" is the output itself), and the number of its shards."""

    name: str
    shards: int


@dataclass(frozen=True)
class Plan:
    """The new shards of all targets, numbered through as units of work."""

    folder: Path
    targets: tuple[Target, ...]
    keys: str  # kept | by_set | by_shard: what makes keys unique in the new set

    @classmethod
    def read(cls, folder: Path) -> "Plan | None":
        """Returns the plan in an output folder, None where there is none yet."""
        try:
            content = json.loads((folder / WORK_FOLDER / "plan.json").read_bytes())
        except FileNotFoundError:
            return None
        return cls(folder, tuple(Target(**target) for target in content["targets"]), content["keys"])

    @property
    def units(self) -> int:
        return sum(target.shards for target in self.targets)

    def place(self, unit: int) -> tuple[Path, int]:
        """Returns the folder of a unit's set and the number of its shard there."""
        for target in self.targets:
            if unit < target.shards:
                return self.folder / target.name, unit
            unit -= target.shards
        raise IndexError(unit)

    def rows(self, unit: int) -> tuple[list[int], int, pa.Schema]:
        """Returns the ids of a unit's rows, the number of its first row in its set, and the columns of the set."""
        _, shard = self.place(unit)
        with pq.ParquetFile(self._table) as file:
            first = sum(file.metadata.row_group(unit - back).num_rows for back in range(1, shard + 1))
            schema = pa.ipc.read_schema(pa.py_buffer(file.schema_arrow.metadata[b"columns"]))
            return file.read_row_group(unit, columns=["id"])["id"].to_pylist(), first, schema

    @cached_property
    def _table(self) -> Path:
        return self.folder / WORK_FOLDER / "plan.parquet"


def make_plan(
    catalogue: Catalogue, folder: Path, names: Sequence[str], target: str, order: str, samples_per_shard: int
) -> Plan:
    """Works out and writes down the plan.

    target: SQL for the number of each row's target. order: SQL to sort a target's rows by. Both over `rows`.
    """
    work = folder / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    columns = pa.schema(
        [("id", pa.uint64()), ("used", pa.bool_())], {b"columns": _columns(catalogue.sets).serialize().to_pybytes()}
    )
    counts = dict.fromkeys(range(len(names)), 0)
    with atomic_path(work / "plan.parquet") as path, pq.ParquetWriter(path, columns) as writer:
        for number, ids, used in _shards(catalogue, target, order, samples_per_shard):
            counts[number] += 1
            writer.write_table(pa.table({"id": ids, "used": used}).cast(columns), row_group_size=max(1, len(ids)))
    plan = Plan(folder, tuple(Target(name, counts[n]) for n, name in enumerate(names)), _unique_keys(catalogue))
    content = {"targets": [asdict(one) for one in plan.targets], "keys": plan.keys}
    write_durably(work / "plan.json", json.dumps(content))
    return plan


def _shards(
    catalogue: Catalogue, target: str, order: str, samples_per_shard: int
) -> Iterator[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Yields target, ids and whether used of each new shard, in order; memory for two shards."""
    ordered = catalogue.connection.sql(
        f"select id, ({target})::INTEGER as target, status = '{PACKED}' as used from rows order by target, {order}, id"
    )
    held: list[tuple[int, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    taken: dict[int, int] = {}  # used rows so far, by target
    for batch in ordered.to_arrow_reader(100_000):
        targets, ids, used = (batch[name].to_numpy(zero_copy_only=False) for name in ("target", "id", "used"))
        for number in np.unique(targets).tolist():
            mine = np.flatnonzero(targets == number)
            upto = taken.get(number, 0) + np.cumsum(used[mine])
            shards = np.maximum(upto - 1, 0) // samples_per_shard
            taken[number] = int(upto[-1])
            for shard in np.unique(shards).tolist():
                chosen = mine[shards == shard]
                if held and held[0][:2] != (number, shard):
                    yield _joined(held)
                    held = []
                held.append((number, shard, ids[chosen], used[chosen]))
    if held:
        yield _joined(held)


def _joined(
    held: list[tuple[int, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return held[0][0], np.concatenate([part[2] for part in held]), np.concatenate([part[3] for part in held])


def _columns(sets: Sequence[Manifest]) -> pa.Schema:
    """Returns the columns of a new set: those of the contract, of any old shard, and where a row came from.

    From the files themselves: DuckDB, which knows no case, would give `WIDTH` beside `width` another name.
    """
    found: dict[str, pa.Field] = {}
    for one in sets:
        for entry in one.shards:
            for field in pq.read_schema(one.sidecar_path(entry)):
                known = found.setdefault(field.name, field)
                if known.type != field.type:
                    found[field.name] = _joined_field(known, field, one)
    further = sorted(name for name in found if name not in SIDECAR_SCHEMA.names and name not in PROVENANCE)
    origin = [pa.field(name, kind) for name, kind in PROVENANCE.items()]
    return pa.schema([*SIDECAR_SCHEMA, *(found[name].with_nullable(True) for name in further), *origin])


def _joined_field(left: pa.Field, right: pa.Field, one: Manifest) -> pa.Field:
    try:
        joined = pa.unify_schemas([pa.schema([left]), pa.schema([right])], promote_options="permissive")
        return joined.field(0)
    except pa.ArrowException:
        raise UserError(
            f"column {left.name} is {left.type} in some shards and {right.type} in others of {one.folder}; make it one"
        ) from None


def _unique_keys(catalogue: Catalogue) -> str:
    """Says how far keys must be told apart: not at all, by set, or by set and shard."""
    for columns, how in (("key", "kept"), ("set, key", "by_set")):
        repeated = f"select 1 from rows where status = '{PACKED}' group by {columns} having count(*) > 1 limit 1"
        if catalogue.connection.execute(repeated).fetchone() is None:
            return how
    return "by_shard"
