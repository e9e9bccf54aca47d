"""`internimage shards takedown`: leaves out what a list names, for good, and erases its bytes on request.

https://host/picture.jpg      a URL, as the set's table had it        domain:example.org    with its sub-domains
sha256:0123...                of the image's bytes in the shard       pdq:0123...           whatever looks like it
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.catalogue import Catalogue, open_catalogue
from data_pipeline.curation.decisions import SetPath, decide, held_sets
from data_pipeline.curation.filters import DERIVED
from data_pipeline.curation.fingerprints import add_hashes
from data_pipeline.durable import file_sha256
from data_pipeline.errors import UserError
from data_pipeline.format.sidecar import DROPPED, ERASED, PDQ, REJECTED, TAKEN_DOWN

_KINDS = ("url", "sha256", "domain", "pdq")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TakedownSummary:
    """named: entries of the list, by kind. matched: rows, by kind, whatever their status. tombstones: of these, rows
    that never had an image and will not be asked for again. erased: rows whose bytes are zeros now."""

    named: Mapping[str, int]
    matched: Mapping[str, int]
    tombstones: int
    dropped: int
    erased: int
    applied: bool


def take_down(
    sets: Sequence[SetPath],
    wanted: Path,
    *,
    erase: bool = False,
    distance: int = 31,
    dry_run: bool = False,
    workers: int | None = None,
    memory_gb: float = 1.0,
    progress: ProgressCallback | None = None,
) -> TakedownSummary:
    """Drops every row of `sets` that the list `wanted` names, and leaves its reason as a tombstone.

    erase: zeroes image, text, JSON and annotation in the shards now. distance: bits in which a named PDQ hash and an
    image's may differ. Raises UserError for a list that cannot be read, naming the line.
    """
    named = read_list(wanted)
    with held_sets(sets, progress) as held:
        if named["pdq"]:
            for one in held:
                add_hashes(one, workers, progress)
        with open_catalogue(held, memory_gb=memory_gb) as catalogue:
            _match(catalogue, named, distance, erase)
            run = catalogue.connection.execute
            counts = {
                (status, kind): count
                for status, kind, count in run("select status, kind, count(*) from hit group by all").fetchall()
            }
            total = dict.fromkeys(_KINDS, 0)
            for kind, count in run("select kind, count(*) from matched group by 1").fetchall():
                total[kind] = count
            if counts and not dry_run:
                content = {"name": wanted.name, "sha256": file_sha256(wanted)}
                step: dict[str, Any] = {"what": "takedown", "list": content, "erase": erase}
                changed = dict(run("select set, count(*) from hit group by 1").fetchall())
                steps = [step | {"rows": changed[n]} if n in changed else None for n in range(len(held))]
                decide(catalogue, f"select id, status, '{TAKEN_DOWN}: ' || kind as reason from hit", steps, progress)

    def number(wanted_status: str) -> int:
        return sum(count for (status, _), count in counts.items() if status == wanted_status)

    return TakedownSummary(
        named={kind: len(values) for kind, values in named.items()},
        matched=total,
        tombstones=number(REJECTED),
        dropped=number(DROPPED),
        erased=number(ERASED),
        applied=not dry_run,
    )


def read_list(path: Path) -> dict[str, list[str]]:
    """Reads a takedown list, one entry a line; blank lines and those that begin with # say nothing."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"takedown list {path} cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        kind, colon, value = entry.partition(":")
        if "://" in entry and kind not in _KINDS:
            kind, value = "url", entry
        value = value.strip() if kind == "url" else value.strip().lower()
        if not colon or kind not in _KINDS or not value or (kind in ("sha256", "pdq") and not _HEX.fullmatch(value)):
            raise UserError(
                f"{path}, line {number}: {entry[:80]!r} is no URL and none of domain:NAME, sha256: or pdq: with 64 "
                "hexadecimal digits"
            )
        found[kind].append(value.removeprefix("*.").strip(".") if kind == "domain" else value)
    if not any(found.values()):
        raise UserError(f"takedown list {path} names nothing")
    return {kind: sorted(set(values)) for kind, values in found.items()}


def _match(catalogue: Catalogue, named: Mapping[str, list[str]], distance: int, erase: bool) -> None:
    """Makes the tables `matched` (id, set, status, kind: rows that the list names) and `hit` (those that change)."""
    connection, run = catalogue.connection, catalogue.connection.execute
    for kind, values in named.items():
        connection.register(f"named_{kind}", pa.table({"value": pa.array(values, pa.string())}))
    host = DERIVED["domain"]
    # A host and every parent of it: a.b.org, b.org, org.
    parents = "list_transform(range(1, len(labels) + 1), lambda n: array_to_string(labels[n:], '.'))"
    matches = [
        "select id, 0 as rule from rows semi join named_url on url = value",
        "select id, 1 as rule from rows semi join named_sha256 on sha256 = value",
        f"select distinct id, 2 as rule from (select id, unnest({parents}) as parent from "
        f"(select id, string_split({host}, '.') as labels from rows where url is not null)) "
        "semi join named_domain on parent = value",
    ]
    if named["pdq"]:
        apart = f"bit_count(xor(unhex({PDQ})::BIT, unhex(value)::BIT))"
        matches.append(
            f"select distinct id, 3 as rule from (select id, {PDQ} from rows where {PDQ} is not null) "
            f"join named_pdq on {apart} <= {distance}"
        )
    kinds = " ".join(f"when {n} then '{kind}'" for n, kind in enumerate(_KINDS))
    run(
        "create temp table matched as select rows.id, set, status, reason, (case rule "
        f"{kinds} end) as kind from rows join (select id, min(rule) as rule from ({' union all '.join(matches)}) "
        "group by id) using (id)"
    )
    gone = ERASED if erase else DROPPED
    run(
        f"create temp table hit as select id, set, kind, (case status when '{REJECTED}' then '{REJECTED}' "
        f"else '{gone}' end) as status from matched where status <> '{ERASED}' "
        f"and (not starts_with(reason, '{TAKEN_DOWN}') or (status = '{DROPPED}' and '{gone}' = '{ERASED}'))"
    )
