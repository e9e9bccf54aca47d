"""ZeRO 0 to 3, with and without accumulation and activation checkpointing, against a loop in plain PyTorch."""

from pathlib import Path

import pytest
import torch
from training_fakes import EPOCH, FakeBatch, FakeTask, configuration, logs, metrics, run_ranks, sample

from pretrain.tasks.module import StepKeys
from pretrain.training.checkpoint.disk import load_weights
from pretrain.training.distributed import seed_step
from pretrain.training.schedule import ema_decay, resolve_schedule

STEPS, BATCH = 20, 16
VARIANTS = [
    (stage, accumulation, checkpointing)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
    for checkpointing in (False, True)
]


def config_of(stage: int, accumulation: int, checkpointing: bool):
    return configuration(
        schedule__steps=STEPS,
        training__zero_stage=stage,
        training__accumulation=accumulation,
        model__recompute="blocks" if checkpointing else "none",
        checkpoint__every_steps=None,
    )


def plain(accumulation: int) -> tuple[list[float], list[float], dict, dict]:
    """Losses, gradient norms, final weights and their average, from torch alone: one process, the joined batch."""
    config = config_of(0, accumulation, False)
    schedule = resolve_schedule(config.schedule, config.optimizer, batch_size=BATCH, epoch_samples=EPOCH)
    seed_step(config.training.seed, -1, 0)
    task = FakeTask()
    teacher = task.teacher()
    decay = [p for p in task.parameters() if p.requires_grad and p.dim() == 2]
    others = [p for p in task.parameters() if p.requires_grad and p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    average = {name: p.detach().clone() for name, p in task.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = schedule.lr(step)
        size, loss = BATCH // accumulation, 0.0
        for micro in range(accumulation):
            positions = range(step * BATCH + micro * size, step * BATCH + (micro + 1) * size)
            pairs = [sample(p) for p in positions]
            batch = FakeBatch(
                torch.tensor(list(positions)), torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
            )
            keys = StepKeys(0, step, micro)
            out = task(batch, keys, task.teacher_targets(teacher, batch, keys))
            (out.total / accumulation).backward()
            loss += out.total.item() / accumulation
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for p in task.parameters() if p.requires_grad], 1.0)))
        adam.step()
        adam.zero_grad()
        rate = ema_decay(step, STEPS, config.training.ema, teacher=True)
        for name, p in task.named_parameters():
            average[name] = rate * average[name] + (1 - rate) * p.detach()
        teacher.load_state_dict({k: v for k, v in average.items() if k.startswith("body.")}, strict=False)
        teacher.body.mean.copy_(task.body.mean)  # statistics are copied, not averaged
        losses.append(loss)
    weights = {name: p.detach() for name, p in task.named_parameters()}
    return losses, norms, weights | {"body.mean": task.body.mean}, average


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equal")
    work = {folder / "-".join(map(str, map(int, v))): config_of(*v) for v in VARIANTS}
    codes = run_ranks(work, folder / "all", 2)
    assert codes == [0, 0], logs(folder / "all")[-3000:]
    return folder


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    return {accumulation: plain(accumulation) for accumulation in (1, 2)}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"stage{v[0]}-accumulation{v[1]}-recompute{int(v[2])}")
def test_the_curve_of_20_steps_and_the_average_equal_a_plain_loop(runs: Path, plain_runs: dict, variant: tuple) -> None:
    losses, norms, weights, average = plain_runs[variant[1]]
    output = runs / "-".join(map(str, map(int, variant)))
    found = metrics(output)
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in found] == pytest.approx(losses, abs=1e-5)
    assert [entry["grad_norm"] for entry in found] == pytest.approx(norms, rel=1e-4)
    for which, expected in (("model", weights), ("ema", average)):
        loaded, _ = load_weights(output, which)
        assert set(expected) <= set(loaded)
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_plain_loop_learns_something(plain_runs: dict) -> None:
    losses = plain_runs[1][0]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
