"""A run that is killed, anywhere, ends bit for bit where an unbroken one ends."""

import random
import time
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, finish, lineage, logs, metrics, run_ranks, start_ranks

from pretrain.training.checkpoints import OpenFiles, complete_checkpoints, find_checkpoint, load_weights

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


def kill_until_done(output: Path, seed: int, kills: int) -> int:
    """Kill -9 one rank or both at random instants of training, `kills` times, then let it end; how many hit a write."""
    chance, inside = random.Random(seed), 0
    for _ in range(kills):
        started = len(events(output)) if (output / "events.jsonl").exists() else 0
        ranks = start_ranks(config(), output, 2, FAKE_WIDTH=WIDTH, FAKE_LINEAGE=str(output.parent / "lineage"),
                            FAKE_SLEEP="0.01")  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(r.poll() is None for r in ranks):
            if (output / "events.jsonl").exists() and len(events(output)) > started:
                break
            time.sleep(0.01)
        wait = chance.random() * 1.2
        aim_at_write = chance.random() < 0.5
        until = time.monotonic() + wait
        while time.monotonic() < until and all(r.poll() is None for r in ranks):
            time.sleep(0.001)
        while aim_at_write and time.monotonic() < until + 2 and all(r.poll() is None for r in ranks):
            if list((output / "checkpoints").glob(".writing-*")):
                inside += 1
                break
        for rank in ranks if chance.random() < 0.5 else [chance.choice(ranks)]:
            rank.kill()
        codes = finish(ranks, timeout=30)
        for checkpoint in complete_checkpoints(output):
            checkpoint.verify()  # whatever has a manifest is whole
        if codes == [0, 0]:
            break
    codes = run_ranks(config(), output, 2, FAKE_WIDTH=WIDTH, FAKE_LINEAGE=str(output.parent / "lineage"))
    assert codes == [0, 0], logs(output)[-3000:]
    return inside


def assert_no_sample_repeated_or_missed(lineage_path: Path) -> None:
    """What the surviving line of training saw: for each (rank, step, micro) always the same rows, all of them once."""
    seen: dict[tuple[int, int, int], tuple[int, ...]] = {}
    for rank, step, micro, positions in lineage(lineage_path):
        assert seen.setdefault((rank, step, micro), positions) == positions
    assert sorted(p for positions in seen.values() for p in positions) == list(range(STEPS * BATCH))


def test_killed_at_random_instants_it_ends_bit_for_bit_where_the_unbroken_run_ends(
    unbroken: Path, tmp_path: Path
) -> None:
    kill_until_done(tmp_path / "run", seed=1, kills=3)
    assert_same_end(tmp_path / "run", unbroken)
    assert_no_sample_repeated_or_missed(tmp_path / "lineage")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_40_times_it_ends_bit_for_bit_where_the_unbroken_run_ends(unbroken: Path, tmp_path: Path) -> None:
    inside = killed = 0
    for seed in range(10):
        folder = tmp_path / str(seed)
        inside += kill_until_done(folder / "run", seed=100 + seed, kills=4)
        killed += 4
        assert_same_end(folder / "run", unbroken)
        assert_no_sample_repeated_or_missed(folder / "lineage")
    assert killed == 40 and inside > 0


def test_other_numbers_of_ranks_and_other_stages_continue_the_same_run(tmp_path: Path) -> None:
    def part(stage: int, until: int | None):
        return configuration(
            schedule__steps=STEPS, training__zero_stage=stage, training__batch_size=12, training__stop_after=until
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
        step: list(range(step * 12, step * 12 + 12)) for step in range(STEPS)
    }
    assert [(e["ranks"], e["stage"], e["step"]) for e in events(output) if e["kind"] in ("start", "resume")] == [
        (2, 1, 0), (1, 3, 8), (3, 2, 16),
    ]  # fmt: skip
