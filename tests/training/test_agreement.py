"""What the ranks agree on: how often they talk, and who looks at the disk."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, logs, metrics, run_ranks

from data_pipeline.errors import UserError
from pretrain.training.checkpoint.disk import complete_checkpoints
from pretrain.training.distributed import DistributedContext, check_devices, device_number
from pretrain.training.interfaces import interface_towards, name_interfaces


@pytest.mark.slow
def test_a_step_takes_one_small_reduction_of_the_ranks_talk(tmp_path: Path) -> None:
    """Calls of each collective in 2 runs of 2 ranks, of which the second takes 10 steps more."""
    script = Path(__file__).with_name("counting_rank.py")
    counts: dict[int, Counter[str]] = {}
    for steps in (6, 16):
        output = tmp_path / str(steps)
        quiet = {"training__log_every": 1000, "checkpoint__every_steps": None, "checkpoint__every_minutes": 60.0}
        config = configuration(schedule__steps=steps, training__zero_stage=1, **quiet)
        codes = run_ranks(config, output, 2, script=str(script), COUNT_TO=str(output.parent / f"counts-{steps}"))
        assert codes == [0, 0], logs(output)[-3000:]
        lines = (tmp_path / f"counts-{steps}").read_text().split()
        counts[steps] = Counter(lines)
    per_step = {name: (counts[16][name] - counts[6][name]) / 10 for name in counts[16]}
    assert per_step.pop("talk_7") == 1, "loss, stop, due, seen, bad, written, failed: in one"
    assert not any(value for name, value in per_step.items() if name.startswith("talk")), per_step


@pytest.mark.slow
def test_a_late_directory_listing_does_not_make_ranks_resume_apart(tmp_path: Path) -> None:
    """Rank 1 sees the folder as it was before the last save, as a client of a network file system may."""
    output = tmp_path / "run"
    config = configuration(training__stop_after=8)
    assert run_ranks(config, output, 2) == [75, 75], logs(output)[-3000:]
    script = Path(__file__).with_name("counting_rank.py")
    codes = run_ranks(configuration(), output, 2, script=str(script), STALE_LISTING="step-00000008")
    assert codes == [0, 0], logs(output)[-3000:]
    assert [e["step"] for e in events(output, "resume")] == [8]
    whole = tmp_path / "whole"
    assert run_ranks(configuration(), whole, 2) == [0, 0]
    assert [row["loss"] for row in metrics(output)] == [row["loss"] for row in metrics(whole)]
    assert complete_checkpoints(output)[0].step == 12


def test_what_the_leader_could_not_read_fails_on_every_rank() -> None:
    alone = DistributedContext(0, 1, torch.device("cpu"), None)
    assert alone.from_leader(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        alone.from_leader(lambda: (_ for _ in ()).throw(UserError("no")))


def test_a_task_with_one_visible_gpu_takes_it_and_shared_ones_are_refused() -> None:
    assert [device_number(rank, 1) for rank in (0, 3, 7)] == [0, 0, 0]
    assert [device_number(rank, 8) for rank in (0, 3, 7)] == [0, 3, 7]
    with pytest.raises(UserError, match="rank 4 of this machine has no GPU: 4 visible"):
        device_number(4, 4)
    check_devices([("n1", "a"), ("n1", "b"), ("n2", "a")])
    with pytest.raises(UserError, match="ranks 1 and 3 have the same GPU of n1"):
        check_devices([("n1", "a"), ("n1", "b"), ("n2", "a"), ("n1", "b")])


def test_the_interface_towards_the_first_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_towards("127.0.0.1") is None and interface_towards("no such host") is None
    monkeypatch.setattr("pretrain.training.interfaces.interface_towards", lambda address: "ib0")
    many: dict[str, str] = {"MASTER_ADDR": "n1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert name_interfaces(many) == "ib0" and many["GLOO_SOCKET_IFNAME"] == many["NCCL_SOCKET_IFNAME"] == "ib0"
    given = many | {"NCCL_SOCKET_IFNAME": "eth7"}
    name_interfaces(given)
    assert given["NCCL_SOCKET_IFNAME"] == "eth7", "what the user says stays"
    alone = {"MASTER_ADDR": "n1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert name_interfaces(alone) is None and "GLOO_SOCKET_IFNAME" not in alone
