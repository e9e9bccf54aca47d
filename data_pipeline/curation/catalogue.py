"""The rows of some sets as one DuckDB table that need not fit in memory.

rows    id      UBIGINT: number of the sidecar, over all sets, times 2^32, plus the row's place in that sidecar
        set     number of the set, in the order given
        ...     every sidecar column; one that a shard lacks is null there
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format import Manifest, ShardEntry

WORK_FOLDER = ".curation"  # in a set's index folder, while a decision is made and carried out
_PLACE_BITS = 32


@dataclass(frozen=True)
class Catalogue:
    """A DuckDB connection with the table `rows`, and where each row's `id` leads."""

    connection: duckdb.DuckDBPyConnection
    sets: tuple[Manifest, ...]
    _shards: tuple[tuple[int, int], ...]  # by number of the sidecar: set, shard of the manifest

    def locate(self, row_id: int) -> tuple[int, int, int]:
        """Returns set, shard and place in the sidecar of a row's id."""
        number, place = divmod(row_id, 1 << _PLACE_BITS)
        return *self._shards[number], place

    def entry(self, row_id: int) -> tuple[Manifest, ShardEntry]:
        number, shard, _ = self.locate(row_id)
        return self.sets[number], self.sets[number].shards[shard]

    def columns(self) -> list[str]:
        """Returns the names that an expression may use."""
        return [str(row[0]) for row in self.connection.execute("describe rows").fetchall()]


@contextmanager
def open_catalogue(
    sets: Sequence[Manifest],
    *,
    further: Sequence[Path] = (),
    memory_gb: float = 1.0,
    threads: int | None = None,
    scratch: Path | None = None,
) -> Iterator[Catalogue]:
    """Opens the sidecars of `sets` as one table; what does not fit into `memory_gb` goes to the folder `scratch`, by
    default that of the first set.

    further: files that statements may read besides. Nothing else can be read or written by an expression, wherever it
    comes from. Raises UserError where there are no shards, BadDataError where a sidecar is damaged.
    """
    places = [(number, shard) for number, one in enumerate(sets) for shard in range(len(one.shards))]
    if not places:
        raise UserError("there are no shards to look at; check the paths of the sets")
    work = (scratch or sets[0].index_folder) / WORK_FOLDER
    work.mkdir(exist_ok=True)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": str(work / "spilled"),
        "memory_limit": f"{int(memory_gb * 1000)}MB",
        "preserve_insertion_order": False,
        "autoload_known_extensions": False,
        "autoinstall_known_extensions": False,
    }
    if threads is not None:
        settings["threads"] = threads
    with duckdb.connect(config=settings) as connection:
        paths = [sets[number].sidecar_path(sets[number].shards[shard]) for number, shard in places]
        listed = ", ".join(quoted(str(path)) for path in paths)
        folders = sorted({str(one.index_folder) for one in sets} | {str(path.parent) for path in further})
        firsts = [next((i for i, place in enumerate(places) if place[0] == n), 0) for n in range(len(sets))]
        which = " ".join(f"when file_index >= {first} then {n}" for n, first in reversed(list(enumerate(firsts))))
        try:
            connection.execute(
                "create view rows as select ((file_index << 32) | file_row_number)::UBIGINT as id, "
                f"(case {which} end)::INTEGER as set, * from read_parquet([{listed}], union_by_name = true)"
            )
        except duckdb.Error as error:
            raise BadDataError(
                f"the sidecars of {sets[0].index_folder} cannot be read together ({str(error).splitlines()[0]}); "
                "look at them with `internimage shards verify`"
            ) from None
        connection.execute(f"set allowed_directories = [{', '.join(quoted(folder + '/') for folder in folders)}]")
        connection.execute("set enable_external_access = false")
        yield Catalogue(connection, tuple(sets), tuple(places))


def quoted(text: str) -> str:
    """Writes a string as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
