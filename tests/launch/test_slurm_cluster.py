"""Jobs on a real Slurm with two nodes, started on this machine for the purpose (minutes; needs slurm-wlm and munge)."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.slurm import SlurmJob, submit

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str) -> ModuleType:
    """The module beside this file (tests are no package)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slurm_cluster = _load("slurm_cluster")
REASON = slurm_cluster.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}")]

RANK = """
    n = os.environ.get('SLURM_RESTART_COUNT', '0')
    stopped = []
    signal.signal(signal.SIGUSR1, lambda *_: stopped.append('USR1'))
    signal.signal(signal.SIGTERM, lambda *_: stopped.append('TERM'))
    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    place = {name: os.environ[name] for name in names}
    place['node'] = os.environ['SLURMD_NODENAME']
    import json; (out / f'ready-{r}-{n}').write_text(json.dumps(place))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def start(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def submit_job(command: list[str], **settings: Any) -> str:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        places = {"logs": str(tmp_path), "directory": str(ROOT), "script": str(tmp_path / "slurm.sh")}
        return submit(SlurmJob(**({"command": tuple(command), "nodes": 2, "ranks_per_node": 1} | places | settings)))

    return submit_job


def again_now(cluster: Any, job: str, wait_for: Callable[..., None]) -> None:
    """Slurm holds a requeued job for two minutes. A test ends that, but not at once: `Job credential revoked`."""
    wait_for(lambda: cluster.state(job)["JobState"] == "PENDING" and cluster.state(job)["Restarts"] != "0", 120)
    time.sleep(4)
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_every_rank_on_both_nodes_finds_its_place(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    job = start(program(RANK), ranks_per_node=2)
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"
    places = [json.loads((tmp_path / f"ready-{rank}-0").read_text()) for rank in range(4)]
    assert [p["RANK"] for p in places] == ["0", "1", "2", "3"]
    assert [p["LOCAL_RANK"] for p in places] == ["0", "1", "0", "1"]
    assert [p["node"] for p in places] == ["n1", "n1", "n2", "n2"]
    assert {p["MASTER_ADDR"] for p in places} == {"n1"}
    assert {(p["WORLD_SIZE"], p["LOCAL_WORLD_SIZE"]) for p in places} == {("4", "2")}


def test_before_its_time_limit_a_job_is_asked_to_save_and_then_starts_again(
    cluster: Any,
    start: Callable[..., str],
    program: Callable[[str], list[str]],
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    body = """
    if n == '0':
        while not stopped: time.sleep(.05)
        time.sleep(.5 * r)  # saving takes each its time
        (out / f'saved-{r}').write_text(stopped[0])
        sys.exit(75)
    """
    job = start(program(RANK + body), time="00:02:00", signal_seconds=110)
    wait_for(lambda: (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists(), 90)
    again_now(cluster, job, wait_for)
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
    assert (tmp_path / "saved-0").read_text() == "USR1"
    assert (tmp_path / "ready-1-1").exists()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("time.sleep(.2); sys.exit(3)", 3),
        ("sys.exit(4) if r else time.sleep(60)", 4),  # srun ends the other, whose 143 must not count
        ("time.sleep(60) if r else sys.exit(1)", 1),
    ],
)
def test_a_run_that_failed_is_not_started_again(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], body: str, code: int
) -> None:
    job = start(program(body))
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", f"{code}:0")


def test_a_killed_rank_ends_the_others_and_the_job_starts_again(
    cluster: Any,
    start: Callable[..., str],
    program: Callable[[str], list[str]],
    wait_for: Callable[..., None],
) -> None:
    job = start(program(RANK + "    if n == '0': time.sleep(.3); r and os.kill(os.getpid(), 9); time.sleep(60)"))
    again_now(cluster, job, wait_for)
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")


def test_a_run_that_its_user_stopped_ends_its_job(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    body = """
    line = {'kind': 'stopped', 'rank': 0, 'reason': 'stop file'}
    if r == 0: (out / 'events.jsonl').write_text(json.dumps(line) + '\\n')
    time.sleep(1)  # nobody leaves before everybody is done
    sys.exit(75)
    """
    job = start(program(RANK + body), run=str(tmp_path))
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "75:0")


def test_a_cancelled_job_stays_cancelled(
    cluster: Any,
    start: Callable[..., str],
    program: Callable[[str], list[str]],
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    job = start(program(RANK + "    while not stopped: time.sleep(.05)\n    sys.exit(75)"))
    wait_for(lambda: (tmp_path / "ready-1-0").exists(), 30)
    cluster.ask("scancel", job)
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")


def test_the_jobs_of_an_array_hand_over_and_end_when_the_run_is_done(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    body = """
    number = os.environ['SLURM_ARRAY_TASK_ID']
    (out / f'ran-{number}-{r}').touch()
    sys.exit(75 if number == '1' else 0)
    """
    job = start(program(RANK + body), array=4)
    deadline = time.monotonic() + 90
    while cluster.ask("squeue", "-h", "-j", job).stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert sorted(p.name for p in tmp_path.glob("ran-*-0")) == ["ran-1-0", "ran-2-0"]


def test_pretraining_on_two_nodes_stops_requeues_and_finishes(
    cluster: Any,
    start: Callable[..., str],
    tmp_path: Path,
    wait_for: Callable[..., None],
    tiny_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    config = tiny_run("schedule.steps=40", "checkpoint.every_steps=10")
    command = [sys.executable, "-m", "launch", "pretrain", str(config), "--output", str(run)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = start(command, run=str(run), logs=str(run / "logs"))
    wait_for(lambda: (run / "events.jsonl").exists(), 240)  # it trains, and is far from its end
    cluster.ask("scancel", "--signal=USR1", job)
    again_now(cluster, job, wait_for)
    state = cluster.wait(job, 300)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events if event["kind"] in ("start", "stopped", "resume", "done")]
    assert kinds == ["start", "stopped", "resume", "done"]
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
