"""A run forced to collapse raises the alarm; the same run left alone does not."""

import pytest
import torch
from objective_samples import make_batch, make_task

from pretrain.objectives.keys import StepKeys
from pretrain.objectives.metrics import collapse_alarms
from pretrain.objectives.pooled import BatchNorm
from pretrain.tasks.pretraining.module import PATIENCE


def pictures(step: int):
    """Images that have content: 4 x 4 patches of colour, the two views alike but for noise."""
    batch = make_batch(12, step=step)
    batch.positions.add_(12 * step)
    coarse = torch.randint(0, 236, (12, 1, 4, 4, 3), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
    noise = torch.randint(0, 20, batch.views.shape, generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
    batch.views.copy_(coarse.repeat_interleave(16, 2).repeat_interleave(16, 3) + noise)
    return batch


def train(task, steps: int, decay: float) -> list[list[str]]:
    """Alarms of every step. decay: what the projector's matrices are multiplied by after a step."""
    teacher = task.teacher()
    own = dict(task.named_parameters())
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    alarms = []
    for step in range(steps):
        batch = pictures(step)
        keys = StepKeys(0, step)
        out = task(batch, keys, task.teacher_targets(teacher, batch, keys) if teacher is not None else None)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in task.named_parameters():
                if name.startswith(("projector.", "pooled_projector.")) and parameter.ndim == 2:
                    parameter.mul_(decay)
            for name, parameter in teacher.named_parameters() if teacher is not None else ():
                parameter.lerp_(own[name], 0.3 if decay < 1 else 0.02)
        alarms.append(task.alarms({name: float(value) for name, value in out.metrics.items()}))
    return alarms


@pytest.fixture
def task():
    decoder = {"dim": 64, "heads": 2, "layers": 1, "projector_layers": 0}
    return make_task("m3i", dtype=torch.float32, decoder=decoder).train()


def test_a_healthy_run_raises_no_alarm(task):
    assert not any(train(task, 20, decay=1.0))


def test_a_run_forced_to_collapse_raises_the_alarm(task):
    alarms = train(task, 25, decay=0.1)
    assert not any(alarms[:2]), "not before several measurements agree"
    said = " ".join(alarms[-1])
    assert "intra: targets near constant" in said and "inter: targets near constant" in said
    assert "few directions" in said


SELF_SUPERVISED = ("siamese", "data2vec", "byol", "moco", "simclr", "simsiam")


def make(preset: str):
    decoder = {"dim": 64, "heads": 2, "layers": 1, "projector_layers": 0}
    return make_task(preset, dtype=torch.float32, decoder=decoder).train()


@pytest.mark.parametrize("preset", SELF_SUPERVISED)
def test_a_healthy_run_of_each_self_supervised_preset_is_silent(preset):
    assert not any(train(make(preset), 20, decay=1.0))


@pytest.mark.parametrize("preset", SELF_SUPERVISED)
def test_a_collapse_of_each_self_supervised_preset_raises_its_alarm(preset):
    """simmim is not among them: its targets are pixels, which no encoder can make constant."""
    alarms = train(make(preset), 25, decay=0.1)
    assert not any(alarms[:2]) and "near constant" in " ".join(alarms[-1])


def test_pooled_targets_near_constant_or_in_one_direction_raise_an_alarm():
    values = {"pooled/feature_std": 0.6, "pooled/rank": 9.0, "pooled/cos": 0.98}
    assert collapse_alarms(values, 64, 0.0) == {}
    assert list(collapse_alarms(values | {"pooled/feature_std": 0.03}, 64, 0.0)) == ["pooled/constant"]
    assert list(collapse_alarms(values | {"pooled/rank": 1.4}, 64, 0.0)) == ["pooled/rank"]


def test_a_batch_norm_of_pooled_heads_is_torchs():
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = BatchNorm(8).double(), torch.nn.BatchNorm1d(8).double()
    for found, expected in zip((ours(x), *torch.autograd.grad(ours(x).tanh().sum(), x)),
                               (theirs(x), *torch.autograd.grad(theirs(x).tanh().sum(), x)), strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def healthy() -> dict[str, float]:
    return {
        f"{name}/{kind}": value
        for name in ("intra", "inter")
        for kind, value in {
            "feature_std": 0.9, "rank": 60.0, "content_share": 0.7, "cos": 0.8, "positive": 0.5, "negative": 0.02,
        }.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"intra/feature_std": 0.03}, "intra/constant"),
        ({"inter/rank": 4.0}, "inter/rank"),
        ({"inter/content_share": 0.01}, "inter/position"),
        ({"intra/cos": 0.99, "intra/positive": 0.88, "intra/negative": 0.06}, "intra/loss"),
    ],
)
def test_each_sign_of_collapse_has_its_alarm(change, kind):
    assert collapse_alarms(healthy(), 768, 0.02) == {}
    assert list(collapse_alarms(healthy() | change, 768, 0.02)) == [kind]


def test_an_alarm_waits_for_measurements_in_a_row(task):
    sick = healthy() | {"intra/feature_std": 0.03}
    said = [bool(task.alarms(values)) for values in [sick] * (PATIENCE - 1) + [healthy()] + [sick] * PATIENCE]
    assert said == [False] * (len(said) - 1) + [True]


def test_a_step_without_dense_losses_ends_no_row_of_measurements(task):
    sick, without = healthy() | {"intra/feature_std": 0.03}, {"text/accuracy": 0.5}
    said = [bool(task.alarms(values)) for values in [sick, without] * (PATIENCE - 1) + [sick, without]]
    assert said == [False] * (len(said) - 2) + [True, False]
    assert not task.alarms(healthy()) and not task.alarms(without)


def test_gradient_norms_of_the_losses_are_noted_apart(task):
    batch, keys = make_batch(12), StepKeys(0, 0)
    norms = {}
    for scale in (1.0, 2.0):
        task.weights["inter"] = scale
        out = task(batch, keys, task.teacher_targets(task.teacher(), batch, keys))
        assert "grad_norm/inter" not in out.metrics, "the backward pass adds them"
        out.total.backward()
        norms[scale] = {name: float(out.metrics[f"grad_norm/{name}"]) for name in ("intra", "inter")}
    assert norms[2.0]["inter"] == pytest.approx(2 * norms[1.0]["inter"], rel=1e-4)
    assert norms[2.0]["intra"] == pytest.approx(norms[1.0]["intra"], rel=1e-4)
