"""`internimage embed`: one vector a sample of a set, for search, curation, and whatever else starts from vectors.

    FILE.parquet                 key, shard, row, vector (float16 [D], unit length), in the order of the set
    FILE.npy, FILE.keys.txt      the vectors float16 [N, D]; SHARD/KEY a line
    FILE.parts/                  what is done so far: about.json and part-*.parquet; gone at the end

A part is a fixed range of the set, whoever computes it, so that a run that stops goes on with any number of ranks.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.durable import atomic_path, write_durably
from data_pipeline.errors import UserError
from data_pipeline.reading import SampleRef, normalize
from pretrain.evaluation.encoding import device_of, inference, set_batches
from pretrain.evaluation.sets import describe_set
from pretrain.evaluation.subject import Subject, open_subject
from pretrain.tasks.module import TaskModule, image_of
from pretrain.training.checkpoint.disk import AUTO
from pretrain.training.sharing import sharing

SUFFIXES = (".parquet", ".npy")
FEATURES = ("auto", "text", "mean")
PART = 8192  # samples


def embed(
    checkpoint: Path | str,
    data: Path | str,
    to: Path | str,
    *,
    features: str = "auto",
    which: str = "ema",
    choice: str = AUTO,
    batch_size: int = 64,
    part_samples: int = PART,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the vectors of every readable sample of `data` to `to`, and go on where an earlier call stopped.

    features: "text", the pooled vector that meets the text; "mean", the last map averaged over space; "auto", the first
    where the run has a text tower. Ranks within `shared_by` take parts in turn; the leader joins them.

    Raises UserError for another suffix, for parts of other weights, another set or other features, and where the model
    has no vector of the kind.
    """
    to, ranks = Path(to), sharing()
    if to.suffix not in SUFFIXES:
        raise UserError(f"{to}: a file ending in {' or '.join(SUFFIXES)} was expected")
    subject, about = open_subject(checkpoint, which, choice), describe_set(data)
    kind, function = _function(subject.module, features)
    say(f"embedded: {about.name}, {about.samples} samples, {kind} of {subject.checkpoint}, {subject.weights}")
    parts = max(1, -(-about.samples // part_samples))
    folder = to.with_name(f"{to.name}.parts")
    if ranks.leader:
        told = {
            "set": about.name,
            "samples": about.samples,
            "parts": parts,
            "features": kind,
            "checkpoint": subject.checkpoint,
            "weights": subject.weights,
            "digest": _digest(subject.module),
        }
        _begin(folder, told)
    ranks.barrier()
    for part in range(ranks.rank, parts, ranks.world_size):
        if not (path := _part(folder, part)).exists():
            table = _embedded(subject, function, data, part, parts, batch_size)
            with atomic_path(path) as temporary:
                pq.write_table(table, temporary)
            say(f"part {part + 1} of {parts}: {table.num_rows} vectors")
    ranks.barrier()
    if ranks.leader:
        _join([_part(folder, part) for part in range(parts)], to)
        shutil.rmtree(folder)
    ranks.barrier()
    return to


def _function(module: TaskModule, features: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the vectors are, and images -> unit vectors."""
    if features not in FEATURES:
        raise UserError(f"features {features!r}: choose one of {', '.join(FEATURES)}")
    image, text = image_of(module), "text" in dict(module.named_children())
    if features == "text" and not text:
        raise UserError("features text: this model was trained without texts; choose mean")
    if features == "mean" or not text:
        return "mean features", lambda images: F.normalize(image.forward_features(images).mean((2, 3)), dim=1)
    return "text vectors", lambda images: F.normalize(
        image.clip_projector(image.forward_fused(images).flatten(1, 2)), dim=1
    )


def _digest(module: TaskModule) -> str:
    """Of the image model's weights: a sum that other weights do not have, in float64."""
    return repr(sum(float(value.double().sum()) for value in image_of(module).state_dict().values()))


def _begin(folder: Path, told: dict[str, Any]) -> None:
    file = folder / "about.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and (found := json.loads(file.read_text(encoding="utf-8"))) != told:
        differing = [key for key in told if found.get(key) != told[key]]
        raise UserError(
            f"{folder} holds parts of another embedding ({', '.join(f'{k}: {found.get(k)}' for k in differing)}); "
            "delete it, or write to another file"
        )
    write_durably(file, json.dumps(told, indent=1))


def _part(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.parquet"


def _embedded(
    subject: Subject, function: Callable[[Tensor], Tensor], data: Path | str, part: int, parts: int, batch_size: int
) -> pa.Table:
    """The rows of one part: contiguous, and of equal size but for one."""
    config, device = subject.config.data, device_of(subject.module)
    vectors: list[Tensor] = []
    samples: list[SampleRef] = []
    with inference(subject.module):
        for batch in set_batches(data, config.image_size, batch_size, part, parts):
            images = normalize(batch.views[:, 0].to(device), config.mean, config.std)
            vectors.append(function(images).half().cpu())
            samples += batch.samples
    joined = torch.cat(vectors).numpy() if vectors else np.zeros((0, 1), np.float16)
    return pa.table(
        {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "shard": pa.array([sample.shard for sample in samples], pa.string()),
            "row": pa.array([sample.row for sample in samples], pa.int64()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(joined.reshape(-1)), joined.shape[1]),
        }
    )


def _join(parts: list[Path], to: Path) -> None:
    """All parts as one file, never more than one of them in memory."""
    filled = [part for part in parts if pq.read_metadata(part).num_rows] or parts[:1]
    with atomic_path(to) as temporary:
        if to.suffix == ".parquet":
            with pq.ParquetWriter(temporary, pq.read_schema(filled[0])) as writer:
                for table in _tables(filled):
                    writer.write_table(table)
            return
        rows = sum(pq.read_metadata(part).num_rows for part in filled)
        width = pq.read_schema(filled[0]).field("vector").type.list_size
        matrix = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(rows, width))
        start, keys = 0, []
        for table in _tables(filled):
            vectors = table.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, width)
            matrix[start : start + len(vectors)] = vectors
            start += len(vectors)
            pairs = zip(table.column("shard").to_pylist(), table.column("key").to_pylist(), strict=True)
            keys += [f"{shard}/{key}" if shard else key for shard, key in pairs]
        matrix.flush()
        write_durably(to.with_suffix(".keys.txt"), "".join(f"{key}\n" for key in keys))


def _tables(parts: list[Path]) -> Iterator[pa.Table]:
    for part in parts:
        yield pq.read_table(part)
