"""Means of what a step logs: each over the micro-batches that it was measured in."""

import torch

from pretrain.training.meter import Meter
from pretrain.training.processes import Processes


def test_a_diagnostic_measured_on_one_step_in_five_is_not_divided_by_five() -> None:
    meter = Meter(Processes(0, 1, torch.device("cpu"), None), batch_size=4)
    for step in range(5):
        metrics = {"intra/feature_std": torch.tensor(0.9)} if step == 4 else {}
        meter.add(torch.tensor(1.0), {"text": torch.tensor(float(step))}, metrics)
        loss = meter.loss()
        meter.end_step()
    values = meter.collect(loss, 0.1, 1.0, None)
    assert values["loss/text"] == 2.0  # mean of 0 .. 4
    assert abs(values["intra/feature_std"] - 0.9) < 1e-6
