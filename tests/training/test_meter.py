"""Means of what a step logs: each over the micro-batches that it was measured in."""

import math

import pytest
import torch

from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.meter import Meter, peak_flops
from pretrain.training.logging.rank_times import RankTimes


def meter(**weights: float) -> Meter:
    return Meter(DistributedContext(0, 1, torch.device("cpu"), None), 4, "fp32", weights)


def take(watch: Meter, step: int, *, applied: bool = True, metrics: dict[str, torch.Tensor] | None = None) -> None:
    """One step of two micro-batches; its total is text + 2 category."""
    for micro in range(2):
        parts = {"text": torch.tensor(1.0 + step + micro), "category": torch.tensor(10.0 / (1 + step))}
        watch.add(parts["text"] + 2 * parts["category"], parts)
        watch.measure(metrics or {})
    loss = float(watch.micro_loss())
    watch.end_step(applied=applied, loss=loss, norm=float(step))


def test_a_diagnostic_measured_on_one_step_in_five_is_not_divided_by_five() -> None:
    watch = meter()
    for step in range(5):
        take(watch, step, metrics={"intra/feature_std": torch.tensor(0.9)} if step == 4 else {})
    values = watch.collect(0.1, None)
    assert values["loss/text"] == 3.5  # mean of 1.5 .. 5.5
    assert abs(values["intra/feature_std"] - 0.9) < 1e-6
    assert values["grad_norm"] == 2


def test_the_loss_is_what_its_weighted_parts_add_up_to() -> None:
    watch = meter(category=2.0)
    for step in range(7):
        take(watch, step)
    values = watch.collect(0.1, None)
    assert values["weighted/text"] == values["loss/text"] and values["weighted/category"] == 2 * values["loss/category"]
    assert math.isclose(values["loss"], values["weighted/text"] + values["weighted/category"], rel_tol=1e-6)


def test_a_step_that_changed_no_weights_counts_in_no_mean_of_losses() -> None:
    watch, without = meter(), meter()
    for step in range(4):
        take(watch, step, applied=step != 2)
        if step != 2:
            take(without, step)
    watched, expected = watch.collect(0.1, None), without.collect(0.1, None)
    assert {k: watched[k] for k in ("loss", "loss/text", "grad_norm")} == {
        k: expected[k] for k in ("loss", "loss/text", "grad_norm")
    }
    take(watch, 9, applied=False)
    values = watch.collect(0.1, None)
    assert values["loss"] == 12.5 and "loss/text" not in values, "a lone step is shown as it was"


def test_an_interval_that_a_resume_cuts_is_logged_as_an_unbroken_one() -> None:
    unbroken, before, after = meter(), meter(), meter()
    for step in range(5):
        take(unbroken, step)
        take(before if step < 3 else after, step)
        if step == 2:
            after.load(before.state())
    said = unbroken.collect(0.1, None)
    assert {k: v for k, v in after.collect(0.1, None).items() if "/" in k or k in ("loss", "grad_norm")} == {
        k: v for k, v in said.items() if "/" in k or k in ("loss", "grad_norm")
    }


def test_the_peak_of_a_device_is_that_of_the_precision_that_runs_on_it() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert [peak_flops(name, precision) for precision in ("bf16", "fp16", "fp32")] == [989e12, 989e12, 67e12]
    assert peak_flops(name, "fp32", tf32=True) == 494e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("a device of next year", "bf16") is None


def test_a_rank_that_is_slow_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.training.logging.rank_times.socket.gethostname", lambda: "n2")
    said: list[str] = []
    context = DistributedContext(0, 4, torch.device("cpu"), None)
    others = [(100.0, 1.0, "n1"), (102.0, 1.0, "n1"), (300.0, 1.0, "n2")]
    monkeypatch.setattr(DistributedContext, "gather", lambda self, mine: [*others[:2], mine, others[2]])
    times = RankTimes(context, said.append)
    for _ in range(2):
        times.started()
        times.forwarded(last=True)
        found = times.collect()
    assert (found["slowest_rank"], found["slowest_rank_ms"]) == (3.0, 300.0)
    assert said == ["rank 3 on n2 computes 300 ms a step, where the median over ranks is 101"]
