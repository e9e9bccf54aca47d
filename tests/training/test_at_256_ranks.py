"""What one of 256 ranks sends and asks of the file system, counted on torch's fake process group."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_fakes import configuration

from pretrain.configuration.schema import CheckpointConfig
from pretrain.training import run
from pretrain.training.agreement import Said, begin_agreement
from pretrain.training.checkpoint import disk
from pretrain.training.checkpoint.retention import Kept, to_delete
from pretrain.training.distributed import DistributedContext
from pretrain.training.zero import gathered
from pretrain.training.zero.teacher import WholeTeacher

RANKS = 256


@pytest.fixture
def fake_ranks() -> Iterator[DistributedContext]:
    dist.init_process_group("fake", rank=3, world_size=RANKS, store=FakeStore())
    yield DistributedContext(3, RANKS, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By collective: calls, and bytes of the largest buffer."""
    found: Counter[str] = Counter()
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list", "barrier"):
        original = getattr(dist, name)

        def call(*arguments, name=name, original=original, **named):  # type: ignore[no-untyped-def]
            found[name] += 1
            if arguments and isinstance(arguments[0], torch.Tensor):
                size = arguments[0].nbytes
                found[f"{name} bytes"] = max(found[f"{name} bytes"], size)
            return original(*arguments, **named)

        monkeypatch.setattr(dist, name, call)
    return found


@pytest.mark.slow  # a process has one default group, and other fast tests have runs in theirs
def test_a_step_agrees_in_one_sum_of_56_bytes(fake_ranks: DistributedContext, calls: Counter[str]) -> None:
    said = Said(False, True, 64.0, 0.0, False, False)
    begin_agreement(fake_ranks, torch.tensor(1.5), said)()
    assert calls == {"all_reduce": 1, "all_reduce bytes": 7 * 8}


@pytest.mark.slow  # a process has one default group, and other fast tests have runs in theirs
def test_the_teacher_is_refreshed_in_few_calls_and_bounded_memory(
    fake_ranks: DistributedContext, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,499 parameters, cut over 256 ranks as ZeRO cuts a flat buffer, whatever their sizes."""
    module = nn.ParameterDict({f"p{n}": nn.Parameter(torch.zeros(400 + 7 * (n % 50))) for n in range(1499)})
    names, sizes = zip(*((name, p.numel()) for name, p in module.named_parameters()), strict=True)
    total = sum(sizes)
    share = -(-total // RANKS)
    layouts: list[list[tuple[str, int, int]]] = [[] for _ in range(RANKS)]
    place = 0
    for name, size in zip(names, sizes, strict=True):
        start = 0
        while start < size:
            rank = (place + start) // share
            length = min(size - start, (rank + 1) * share - place - start)
            layouts[rank].append((name, start, length))
            start += length
        place += size
    mine = layouts[3]
    ema = SimpleNamespace(
        fragments=[SimpleNamespace(name=name, start=start, length=length) for name, start, length in mine],
        values=[torch.ones(length) for *_, length in mine],
    )
    engine = SimpleNamespace(compute_dtype=torch.bfloat16, module=module)
    monkeypatch.setattr(DistributedContext, "gather", lambda self, value: layouts)
    monkeypatch.setattr(gathered, "LARGEST_RECEIVED", total // 3)
    copies = 0
    original = torch._foreach_copy_

    def counted(*arguments: object) -> object:
        nonlocal copies
        copies += 1
        return original(*arguments)  # type: ignore[arg-type]

    teacher = WholeTeacher(module, engine, ema, fake_ranks)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    teacher.refresh()
    teacher.ready()
    chunks = math.ceil(share / (total // 3 // RANKS))
    assert calls["all_gather_into_tensor"] == chunks <= 5 and copies == chunks + 1
    assert calls["all_gather_into_tensor bytes"] <= 2 * (total // 3), "received at once, of all ranks together"


def test_256_ranks_look_at_each_file_of_a_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(configuration(training__stop_after=1), tmp_path / "run") == 75
    checkpoint = disk.find_checkpoint(tmp_path / "run")
    shard = checkpoint.path / "rank-00000.safetensors"
    entry = checkpoint.manifest["files"][shard.name]
    files = {f"rank-{rank:05d}.safetensors": entry for rank in range(RANKS)}
    files |= {name: one for name, one in checkpoint.manifest["files"].items() if name != shard.name}
    for name in files:
        if name != shard.name and name.startswith("rank-"):
            (checkpoint.path / name).hardlink_to(shard)
    kept = {k: v for k, v in json.loads((checkpoint.path / disk.MANIFEST).read_text()).items() if k != "digest"}
    (checkpoint.path / disk.MANIFEST).write_text(disk.sealed(kept | {"files": files}))
    looked: Counter[str] = Counter()
    digest = disk.file_sha256
    monkeypatch.setattr(disk, "file_sha256", lambda path: (looked.update([path.name]), digest(path))[1])
    for rank in range(RANKS):
        disk.Checkpoint(checkpoint.path).verify(part=rank, parts=RANKS)
    assert looked == dict.fromkeys(files, 1)
    (checkpoint.path / "rank-00200.safetensors").unlink()
    with pytest.raises(disk.DamagedError, match=r"rank-00200\.safetensors is missing"):
        for rank in range(RANKS):
            disk.Checkpoint(checkpoint.path).verify(part=rank, parts=RANKS)


def test_milestones_are_thinned_to_their_budget_and_stay_spread_over_the_run() -> None:
    there = [Kept(step, 10**9) for step in range(0, 10_001, 500)]
    settings = CheckpointConfig(keep=2, keep_every=1000, keep_gigabytes=4.0)
    left = sorted({one.step for one in there} - set(to_delete(there, settings, best=3500)))
    assert left[-2:] == [9500, 10_000] and 3500 in left
    milestones = [step for step in left if step % 1000 == 0 and step < 9500]
    assert len(milestones) == 4 and milestones[0] == 0 and milestones[-1] == 9000
    assert max(b - a for a, b in pairwise(milestones)) <= 5000
    forever = CheckpointConfig(keep=2, keep_every=1000)
    assert [s for s in to_delete(there, forever, None) if s % 1000 == 0] == []
