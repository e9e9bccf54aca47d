"""Means of what a step logs: each over the micro-batches that it was measured in."""

import torch

from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.meter import Meter, peak_flops


def test_a_diagnostic_measured_on_one_step_in_five_is_not_divided_by_five() -> None:
    meter = Meter(DistributedContext(0, 1, torch.device("cpu"), None), batch_size=4, precision="fp32")
    for step in range(5):
        metrics = {"intra/feature_std": torch.tensor(0.9)} if step == 4 else {}
        meter.add(torch.tensor(1.0), {"text": torch.tensor(float(step))}, metrics)
        loss = meter.loss()
        meter.end_step()
    values = meter.collect(loss, 0.1, 1.0, None)
    assert values["loss/text"] == 2.0  # mean of 0 .. 4
    assert abs(values["intra/feature_std"] - 0.9) < 1e-6


def test_the_peak_of_a_device_is_that_of_the_precision_that_runs_on_it() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert [peak_flops(name, precision) for precision in ("bf16", "fp16", "fp32")] == [989e12, 989e12, 67e12]
    assert peak_flops(name, "fp32", tf32=True) == 494e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("a device of next year", "bf16") is None
