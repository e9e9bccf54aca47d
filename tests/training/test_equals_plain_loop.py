"""ZeRO 0 to 3, with and without accumulation and activation checkpointing, against a loop in plain PyTorch; AdamW and
Muon.
"""

from pathlib import Path

import pytest
import torch
from training_fakes import EPOCH, FakeBatch, FakeTask, configuration, logs, metrics, run_ranks, sample

from data_pipeline.errors import UserError
from pretrain.tasks.module import StepKeys
from pretrain.training import run
from pretrain.training.checkpoint.disk import OpenFiles, find_checkpoint, load_weights
from pretrain.training.distributed import seed_step
from pretrain.training.schedule import ema_decay, resolve_schedule

STEPS, BATCH = 20, 16
VARIANTS = [
    (stage, accumulation, checkpointing)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
    for checkpointing in (False, True)
]


MUON = [(0, 1, "fp32"), (1, 2, "fp32"), (2, 1, "fp32"), (0, 1, "bf16"), (1, 1, "bf16")]


def config_of(stage: int, accumulation: int, checkpointing: bool, optimizer: str = "adamw", **changes: object):
    return configuration(
        optimizer__name=optimizer,
        schedule__steps=STEPS,
        training__zero_stage=stage,
        training__accumulation=accumulation,
        model__recompute="blocks" if checkpointing else "none",
        checkpoint__every_steps=None,
        **changes,
    )


def plain(accumulation: int, optimizer: str = "adamw") -> tuple[list[float], list[float], dict, dict]:
    """Losses, gradient norms, final weights and their average, from torch alone: one process, the joined batch."""
    config = config_of(0, accumulation, False, optimizer)
    schedule = resolve_schedule(config.schedule, config.optimizer, batch_size=BATCH, epoch_samples=EPOCH)
    seed_step(config.training.seed, -1, 0)
    task = FakeTask()
    teacher = task.teacher()
    decay = [p for p in task.parameters() if p.requires_grad and p.dim() == 2]
    others = [p for p in task.parameters() if p.requires_grad and p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    groups = list(adam.param_groups)
    muon = None
    if optimizer == "muon":  # which the classifier's weight is not for
        decay[:] = [task.head.weight]
        adam.param_groups[0]["params"] = decay
        matrices = [task.body.inner.weight, task.body.outer.weight]
        muon = torch.optim.Muon(matrices, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        groups += muon.param_groups
    average = {name: p.detach().clone() for name, p in task.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        for group in groups:
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
        if muon is not None:
            muon.step()
        task.zero_grad()
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
    work |= {
        folder / f"muon-{stage}-{accumulation}-{precision}": config_of(
            stage, accumulation, False, "muon", training__precision=precision
        )
        for stage, accumulation, precision in MUON
    }
    work[folder / "secondary"] = config_of(
        3,
        1,
        False,
        training__secondary_partition=2,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # every parameter is cut
    )
    parts = [(folder / "parts", config_of(1, 2, False, "muon", training__stop_after=until)) for until in (7, None)]
    codes = run_ranks([*work.items(), *parts], folder / "all", 2)
    assert codes == [0, 0], logs(folder / "all")[-3000:]
    return folder


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    return {accumulation: plain(accumulation) for accumulation in (1, 2)}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"stage{v[0]}-accumulation{v[1]}-recompute{int(v[2])}")
def test_the_curve_of_20_steps_and_the_average_equal_a_plain_loop(runs: Path, plain_runs: dict, variant: tuple) -> None:
    losses, norms, weights, average = plain_runs[variant[1]]
    assert_equal(runs / "-".join(map(str, map(int, variant))), losses, norms, weights, average)


def test_a_secondary_partition_equals_a_plain_loop(runs: Path, plain_runs: dict) -> None:
    assert_equal(runs / "secondary", *plain_runs[1])
    settings = configuration(training__zero_stage=3, training__secondary_partition=2)
    with pytest.raises(UserError, match="secondary_partition 2 does not divide 1 ranks"):
        run(settings, runs / "alone")
    with pytest.raises(UserError, match=r"secondary_partition is of training\.zero_stage 3"):
        configuration(training__secondary_partition=2)


def assert_equal(output: Path, losses: list[float], norms: list[float], weights: dict, average: dict) -> None:
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


@pytest.mark.parametrize("variant", MUON, ids=str)
def test_muon_equals_a_plain_loop_with_cut_matrices_too(runs: Path, variant: tuple[int, int, str]) -> None:
    """Two ranks: the second matrix lies on both. Muon's products are in bf16, whatever the precision."""
    stage, accumulation, precision = variant
    losses, norms, weights, _ = plain(accumulation, "muon")
    output, loose = runs / f"muon-{stage}-{accumulation}-{precision}", 1 if precision == "fp32" else 30
    found = metrics(output)
    assert [entry["loss"] for entry in found] == pytest.approx(losses, abs=2e-3 * loose)
    assert [entry["grad_norm"] for entry in found] == pytest.approx(norms, rel=0.01 * loose)
    loaded, _ = load_weights(output, "model")
    for name, value in weights.items():
        torch.testing.assert_close(loaded[name], value, atol=2e-3 * loose, rtol=0.02 * loose)


def test_muon_stops_and_resumes_exactly(runs: Path) -> None:
    for which in ("model", "ema"):
        whole, parts = (load_weights(runs / name, which)[0] for name in ("muon-1-2-fp32", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    files = OpenFiles()
    checkpoint = find_checkpoint(runs / "parts")
    kinds = {name.split("/")[0] for path in checkpoint.path.glob("rank-*") for name in files.get(path).keys()}  # noqa: SIM118
    assert kinds == {"param", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema", "buffer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__zero_stage": 3}, "stage 3 cuts every matrix over all ranks"),
        ({"training__offload_optimizer": True}, "products of matrices would run on the host"),
    ],
)
def test_where_muon_cannot_run_it_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration(optimizer__name="muon", **changes)


def test_an_optimizer_is_not_changed_within_a_run(runs: Path) -> None:
    changed = config_of(1, 2, False, training__allow_changes=["optimizer"])
    with pytest.raises(UserError, match=r"optimizer\.name: 'muon' there, 'adamw' now"):
        run(changed, runs / "parts")
