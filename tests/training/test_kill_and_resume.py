"""A run that is killed, anywhere, ends bit for bit where an unbroken one ends."""

import itertools
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, finish, lineage, logs, metrics, run_ranks, start_ranks

from pretrain.configuration import load_config
from pretrain.training.checkpoint.disk import OpenFiles, complete_checkpoints, find_checkpoint, load_weights

Ranks = list[subprocess.Popen[str]]
STEPS, BATCH, WIDTH = 24, 16, "257"  # wide enough that a checkpoint takes a while to write


def config():
    return configuration(
        schedule__steps=STEPS, training__zero_stage=2, checkpoint__every_steps=2, training__accumulation=2
    )


def everything(output: Path) -> dict[str, torch.Tensor]:
    """Weights, average and moments of the newest checkpoint."""
    checkpoint, files, found = find_checkpoint(output), OpenFiles(), {}
    for name, entry in checkpoint.index["parameters"].items():
        for kind in ("param", "ema", "exp_avg", "exp_avg_sq") if entry["ema"] else ("param",):
            flat = torch.empty(torch.Size(entry["shape"]).numel())
            checkpoint.read_into(flat, kind, name, 0, files)
            found[f"{kind}/{name}"] = flat
    return found


def assert_same_end(output: Path, unbroken: Path) -> None:
    one, other = everything(output), everything(unbroken)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
    for which in ("model", "ema"):
        a, b = load_weights(output, which)[0], load_weights(unbroken, which)[0]
        assert all(torch.equal(a[name], b[name]) for name in a)
    curve = [(e["step"], e["loss"]) for e in metrics(unbroken)]
    assert [(e["step"], e["loss"]) for e in metrics(output)] == curve


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run_ranks(config(), output, 2, FAKE_WIDTH=WIDTH) == [0, 0], logs(output)[-3000:]
    return output


def starts(output: Path) -> int:
    path = output / "events.jsonl"
    return sum(event["kind"] in ("start", "resume") for event in events(output)) if path.exists() else 0


def kill_until_done(start: Callable[..., Ranks], output: Path, seed: int, kills: int) -> Counter[str]:
    """Kill -9 one rank or both at random instants until that has hit `kills` times, or until the run has ended first;
    then let it end. Where it hit, and how often: "start-up" (meeting, loading, restoring), "training", "write".
    """
    chance, hit, start_up = random.Random(seed), Counter[str](), 6.0
    trace = {"FAKE_LINEAGE": str(output.parent / "lineage")}

    def writing() -> bool:
        return bool(list((output / "checkpoints").glob(".writing-*")))

    while hit.total() < kills:
        before, began, aim = starts(output), time.monotonic(), chance.choice(("start-up", "training", "write"))
        ranks = start(output, FAKE_SLEEP="0.03", **trace)

        def wait(seconds: float, until: Callable[[], bool] = lambda: False, ranks: Ranks = ranks) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not until() and all(rank.poll() is None for rank in ranks):
                time.sleep(0.001)

        if aim == "start-up":
            wait(chance.random() * start_up)
        else:
            wait(60, lambda before=before: starts(output) > before)
            start_up = time.monotonic() - began
            wait(chance.random() * 1.2)
            wait(2 if aim == "write" else 0, writing)
        where = "start-up" if starts(output) == before else "write" if writing() else "training"
        chosen = ranks if chance.random() < 0.5 else [chance.choice(ranks)]
        for rank in chosen:
            rank.kill()
        codes = finish(ranks, timeout=30)
        for checkpoint in complete_checkpoints(output):
            checkpoint.verify()  # whatever has a manifest is whole
        if any(rank.returncode == -9 for rank in chosen):
            hit[where] += 1
        if codes == [0, 0]:
            break
    codes = finish(start(output, **trace), timeout=400)
    assert codes == [0, 0], logs(output)[-3000:]
    return hit


def start_small(output: Path, **environment: str) -> Ranks:
    return start_ranks(config(), output, 2, FAKE_WIDTH=WIDTH, **environment)


def assert_no_sample_repeated_or_missed(lineage_path: Path) -> None:
    """What the surviving line of training saw: for each (rank, step, micro) always the same rows, all of them once."""
    seen: dict[tuple[int, int, int], tuple[int, ...]] = {}
    for rank, step, micro, positions in lineage(lineage_path):
        assert seen.setdefault((rank, step, micro), positions) == positions
    assert sorted(p for positions in seen.values() for p in positions) == list(range(STEPS * BATCH))


def test_killed_at_random_instants_it_ends_bit_for_bit_where_the_unbroken_run_ends(
    unbroken: Path, tmp_path: Path
) -> None:
    hit = kill_until_done(start_small, tmp_path / "run", seed=1, kills=3)
    assert hit.total() == 3, hit
    assert_same_end(tmp_path / "run", unbroken)
    assert_no_sample_repeated_or_missed(tmp_path / "lineage")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_40_times_it_ends_bit_for_bit_where_the_unbroken_run_ends(unbroken: Path, tmp_path: Path) -> None:
    hit: Counter[str] = Counter()
    for seed in itertools.count(100):
        if hit.total() >= 40:
            break
        folder = tmp_path / str(seed)
        hit += kill_until_done(start_small, folder / "run", seed=seed, kills=min(4, 40 - hit.total()))
        assert_same_end(folder / "run", unbroken)
        assert_no_sample_repeated_or_missed(folder / "lineage")
    assert hit.total() == 40 and set(hit) == {"start-up", "training", "write"}, hit


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_task_over_the_real_reader_killed_ends_bit_for_bit_where_the_unbroken_run_ends(
    tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ("data.workers=1", "training.zero_stage=2", "training.log_every=1", "checkpoint.every_steps=2")
    real = load_config(str(tiny_run(*settings, "training.accumulation=2", "schedule.steps=16")))

    def start(output: Path, **environment: str) -> Ranks:
        return start_ranks(real, output, 2, script=str(Path(__file__).with_name("real_rank.py")), **environment)

    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    assert finish(start(whole, FAKE_LINEAGE=str(whole.parent / "lineage")), timeout=400) == [0, 0], logs(whole)[-3000:]
    hit = kill_until_done(start, broken, seed=7, kills=5)
    assert hit.total() == 5, hit
    assert_same_end(broken, whole)
    expected = {key: rows for *key_, rows in lineage(whole.parent / "lineage") for key in [tuple(key_)]}
    positions = sorted(position for rows in expected.values() for position, _ in rows)
    assert positions == list(range(16 * 8)), "every position once: five epochs of 24 samples and a third"
    for *key, rows in lineage(broken.parent / "lineage"):
        assert expected[tuple(key)] == rows, "the same pictures, changed in the same way"


def test_other_numbers_of_ranks_and_other_stages_continue_the_same_run(tmp_path: Path) -> None:
    def part(stage: int, until: int | None):
        return configuration(
            schedule__steps=STEPS,
            training__zero_stage=stage,
            training__batch_size=24,
            training__accumulation=2,
            training__stop_after=until,
        )

    whole = tmp_path / "whole"
    assert run_ranks(part(1, None), whole, 2) == [0, 0], logs(whole)[-3000:]
    output, trace = tmp_path / "changing", str(tmp_path / "lineage")
    for ranks, stage, until, code in ((2, 1, 8, 75), (1, 3, 16, 75), (3, 2, None, 0)):
        codes = run_ranks(part(stage, until), output, ranks, FAKE_LINEAGE=trace)
        assert codes == [code] * ranks, logs(output)[-3000:]
    assert [e["loss"] for e in metrics(output)] == pytest.approx([e["loss"] for e in metrics(whole)], abs=1e-4)
    expected = load_weights(whole)[0]
    for name, value in load_weights(output)[0].items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
    rows: dict[int, list[int]] = {}
    for _, step, _, positions in lineage(Path(trace)):
        rows.setdefault(step, []).extend(positions)
    assert {step: sorted(r) for step, r in rows.items()} == {
        step: list(range(step * 24, step * 24 + 24)) for step in range(STEPS)
    }
    assert [(e["ranks"], e["stage"], e["step"]) for e in events(output) if e["kind"] in ("start", "resume")] == [
        (2, 1, 0), (1, 3, 8), (3, 2, 16),
    ]  # fmt: skip
