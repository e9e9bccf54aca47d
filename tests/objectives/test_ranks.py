"""The gradient of N ranks is that of their joined batch: real processes over gloo, with unequal counts of captions."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from objective_samples import make_batch
from rank_gradients import CASES, ROWS, gradients

HERE = Path(__file__).parent


@cache
def of_one_rank():
    return gradients(0, 1)


@pytest.fixture(scope="module", params=[2, 3])
def of_ranks(request, tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank_gradients.py"), str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        logs = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("case", list(CASES))
def test_the_gradient_is_that_of_the_joined_batch(of_ranks, case):
    ours, joined = of_ranks[case], of_one_rank()[case]
    assert ours.keys() == joined.keys()
    largest = max(float(value.abs().max()) for value in joined.values())
    for name, value in joined.items():
        # To 1e-6 of the parameter's own largest gradient. The attention pool's softmax and, more so, the batch norm
        # are fp32 by design: below this floor a gradient cannot be told from 0.
        floor = 1e-7 if case == "supervised with mixup and cutmix" else 1e-9
        share = 1e-5 if name.endswith("/rank") else 1e-6  # of fp32 eigenvalues
        allowed = share * float(value.abs().max()) + floor * largest
        torch.testing.assert_close(ours[name], value, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


def test_the_batch_is_as_uneven_as_it_claims():
    batch = make_batch(ROWS)
    for world in (2, 3):
        captions = batch.targets.has_text.view(world, -1).sum(1).tolist()
        labels = batch.targets.has_label.view(world, -1).sum(1).tolist()
        assert len(set(captions)) > 1 and len(set(labels)) > 1
    assert batch.targets.has_label.view(3, -1).sum(1)[2] == 0
    texts = [tuple(row) for row in batch.targets.tokens.tolist()]
    assert texts[1] == texts[ROWS - 2] and batch.targets.has_text[1] and batch.targets.has_text[ROWS - 2], (
        "a duplicate across ranks"
    )
