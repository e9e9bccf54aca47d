"""The head's BatchNorm sees the global batch, keeps its statistics in fp32, and is torch's where there is one rank."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.models.layers import GlobalBatchNorm

SCRIPT = Path(__file__).with_name("batch_norm_rank.py")
_spec = importlib.util.spec_from_file_location("batch_norm_rank", SCRIPT)
rank_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rank_script)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of two ranks found, by case."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / "0.json", folder / "1.json"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(port), str(out)], cwd=root, env=environment)
        for rank, out in enumerate(outs)
    ]
    try:
        assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize(
    ("case", "tolerance", "of_statistics"),
    [
        ("float32", 1e-5, 1e-5),
        ("float32, compiled", 1e-5, 1e-5),
        ("float64", 1e-12, 1e-12),
        ("bfloat16", 2**-8, 1e-5),  # outputs and gradients are rounded once, statistics never
    ],
)
def test_two_ranks_give_the_outputs_gradients_and_statistics_of_one_batch(case, tolerance, of_statistics, answers):
    dtype, _ = rank_script.CASES[case]
    parts = [answer[case] for answer in answers]
    x = rank_script.inputs(dtype).requires_grad_()
    expected = nn.BatchNorm2d(4).double()
    y = expected(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    rank_script.loss(y, slice(None), dtype).backward()

    def close(ours, theirs, tolerance):
        error = torch.tensor(ours, dtype=torch.float64) - theirs.detach()
        assert error.abs().max() <= tolerance * theirs.abs().max()

    close(parts[0]["y"] + parts[1]["y"], y, tolerance)
    close(parts[0]["grad_x"] + parts[1]["grad_x"], x.grad, tolerance)
    # a parameter's gradient is of the rank's own loss terms; training sums or averages over ranks
    summed = [a + b for a, b in zip(parts[0]["grad_weight"], parts[1]["grad_weight"], strict=True)]
    close(summed, expected.weight.grad, tolerance)
    for part in parts:
        close(part["mean"], expected.running_mean, of_statistics)
        close(part["var"], expected.running_var, of_statistics)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("training", [True, False])
def test_one_rank_is_torchs_batch_norm(training, dtype, tolerance):
    x = rank_script.inputs().to(dtype)
    ours, theirs = GlobalBatchNorm(4).to(dtype).train(training), nn.BatchNorm1d(4).to(dtype).train(training)
    for _ in range(2):
        torch.testing.assert_close(ours(x).flatten(0, 2), theirs(x.flatten(0, 2)), rtol=tolerance, atol=tolerance)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def test_statistics_stay_fp32_and_exact_when_the_model_is_cast_to_bf16():
    norm = GlobalBatchNorm(4)
    norm.running_mean.fill_(1 / 3)
    norm = norm.to(torch.bfloat16)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32 and norm.running_mean[0] == torch.tensor(1 / 3)
    y = norm(torch.randn(8, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    assert norm.double().running_mean.dtype == torch.float64 and norm.half().running_mean.dtype == torch.float32


def test_a_large_mean_does_not_spoil_the_variance():
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    y = GlobalBatchNorm(4)(x)
    assert abs(y.std().item() - 1) < 0.02
