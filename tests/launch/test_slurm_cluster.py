"""Jobs on a real Slurm with two nodes, started on this machine for the purpose (minutes; needs slurm-wlm and munge)."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.cli import run
from launch.job import SlurmJob
from launch.restarting import HISTORY, Budget
from launch.slurm import submit

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "training" / "training_fakes.py"


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
        ("time.sleep(60) if r else sys.exit(2)", 2),
    ],
)
def test_an_end_that_would_repeat_is_not_started_again(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], body: str, code: int
) -> None:
    job = start(program(body))
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", f"{code}:0")


def test_a_failing_rank_restarts_all_ranks_in_the_job_then_requeues(
    cluster: Any,
    start: Callable[..., str],
    program: Callable[[str], list[str]],
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    """One abort, one kill, then another job: exit codes 134 and 137 of rank 1 while rank 0 waits."""
    body = """
    with open(out / f'starts-{r}', 'a') as file: file.write(place['MASTER_PORT'] + chr(10))
    starts = len((out / f'starts-{r}').read_text().splitlines())
    if starts < 3: time.sleep(.3); (os.abort() if starts == 1 else os.kill(os.getpid(), 9)) if r else time.sleep(60)
    """
    job = start(program(RANK + body), nodes=1, ranks_per_node=2, restarts=Budget(pause=0.1))
    again_now(cluster, job, wait_for)
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
    ports = [(tmp_path / f"starts-{rank}").read_text().split() for rank in range(2)]
    assert ports[0] == ports[1] and len(set(ports[0])) == 3, "all ranks, at a new meeting point each time"
    ends = [json.loads(line) for line in (tmp_path / f".{HISTORY}").read_text().splitlines()]
    assert [(e["code"], e["node"], e["rank"], e["action"]) for e in ends] == [
        (134, "n1", 1, "restart"), (137, "n1", 1, "requeue"), (0, None, None, "end"),
    ]  # fmt: skip
    assert ends[1]["avoid"] == ["n1"], "twice the first to fail"
    places = [json.loads((tmp_path / f"ready-0-{start}").read_text())["node"] for start in (0, 1)]
    assert places == ["n1", "n2"], "and Slurm was told, before it looked for nodes again"


def test_a_node_whose_gate_fails_is_left_out_for_the_spare(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    fit = 'n=$SLURMD_NODENAME; [ $n != n1 ] || { echo slow disk > "$WORD.unfit.$n"; exit 1; }; : > "$WORD.fit.$n"'
    settings = {"nodes": 1, "spare_nodes": 1, "gate": ("bash", "-c", fit), "restarts": Budget(pause=0.1)}
    job = start(program(RANK), **settings)
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"
    place = json.loads((tmp_path / "ready-0-0").read_text())
    assert (place["node"], place["MASTER_ADDR"], place["WORLD_SIZE"]) == ("n2", "n2", "1")
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert "slow disk" in log and "avoiding n1" in log


def test_a_preempted_job_saves_and_goes_on_afterwards(
    cluster: Any,
    start: Callable[..., str],
    program: Callable[[str], list[str]],
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    body = """
    if n == '0':
        while not stopped: time.sleep(.05)
        (out / f'saved-{r}').write_text(stopped[0]); time.sleep(.5)
        sys.exit(75)
    """
    job = start(program(RANK + body), extra=("--partition=main",))
    wait_for(lambda: (tmp_path / "ready-1-0").exists(), 60)
    urgent = cluster.ask("sbatch", "--parsable", "-p", "urgent", "-N2", "-n4", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists(), 60)
    assert cluster.wait(urgent.stdout.strip(), 90)["JobState"] == "COMPLETED"
    again_now(cluster, job, wait_for)
    assert cluster.wait(job, 90)["JobState"] == "COMPLETED"
    assert (tmp_path / "ready-1-1").exists()


@pytest.mark.parametrize("awkward", ["a b 'c' \"d\" $(touch x) `e`", "100%j %% é", "- # ; & * ~ ="])
def test_awkward_names_pass_through_sbatch(
    cluster: Any, start: Callable[..., str], program: Callable[[str], list[str]], tmp_path: Path, awkward: str
) -> None:
    place = tmp_path / awkward
    place.mkdir()
    logs = {"logs": str(place / "logs"), "run": str(place), "directory": str(place), "script": str(place / "slurm.sh")}
    job = start(
        [*program("(out / f'cwd-{r}').write_text(os.getcwd() + '|' + sys.argv[1])"), awkward], name=awkward, **logs
    )
    state = cluster.wait(job, 60)
    assert state["JobState"] == "COMPLETED"
    assert (tmp_path / "cwd-1").read_text() == f"{place}|{awkward}"
    assert f"job {job}: exit code 0" in (place / "logs" / f"slurm-{job}.out").read_text()
    assert (place / "logs" / "rank-00001.log").is_file()
    name = cluster.ask("squeue", "-h", "--states=all", "-j", job, "-o", "%j").stdout.rstrip("\n")
    assert name == awkward


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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run of the fakes, by two processes that nothing disturbs."""
    whole = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKES.parent))
        from training_fakes import configuration, logs, run_ranks

        assert run_ranks(configuration(), whole, 2) == [0, 0], logs(whole)[-3000:]
    return whole


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], list[str]]:
    """(run, fault) -> the command of a rank. A fault of the first start is not made again, as a node's is not."""
    monkeypatch.syspath_prepend(str(FAKES.parent))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FAKES.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from training_fakes import configuration

    from pretrain.configuration import dump_config

    def command(run: Path, fault: str) -> list[str]:
        (tmp_path / "c.yaml").write_text(dump_config(configuration(training__policy={"hang_seconds": 15.0})))
        program = [sys.executable, str(FAKES), str(tmp_path / "c.yaml"), str(run)]
        return ["bash", "-c", f'[ "$START" != 0 ] || export {fault}; exec "$@"', "once", *program]

    return command


def assert_ends_like(run: Path, unbroken: Path) -> None:
    from pretrain.training.checkpoint.disk import load_weights

    for which in ("model", "ema"):
        one, other = load_weights(run, which)[0], load_weights(unbroken, which)[0]
        assert all((one[name] == other[name]).all() for name in other)


@pytest.mark.parametrize(("fault", "code"), [("FAKE_CRASH=6", 1), ("FAKE_ABORT=6", 134), ("FAKE_HANG=6", 5)])
def test_training_through_a_fault_ends_with_the_unbroken_weights(
    cluster: Any,
    start: Callable[..., str],
    train: Callable[[Path, str], list[str]],
    unbroken: Path,
    tmp_path: Path,
    fault: str,
    code: int,
) -> None:
    from training_fakes import events

    run = tmp_path / "run"
    job = start(train(run, fault), run=str(run), logs=str(run / "logs"), restarts=Budget(pause=0.1))
    assert cluster.wait(job, 300)["JobState"] == "COMPLETED"
    ends = [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]
    assert [(e["code"], e["action"]) for e in ends] == [(code, "restart"), (0, "end")]
    assert [e["step"] for e in events(run, "resume")] == [4]
    assert_ends_like(run, unbroken)


def test_a_full_disk_ends_the_job_with_4_and_room_ends_the_run(
    cluster: Any,
    start: Callable[..., str],
    train: Callable[[Path, str], list[str]],
    unbroken: Path,
    tmp_path: Path,
) -> None:
    """The run's folder, with its logs, lies on a disk that is filled to its last byte at step 6."""
    from training_fakes import events

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        run, ballast = disk / "run", disk / "ballast"
        settings = {"run": str(run), "logs": str(run / "logs"), "restarts": Budget(pause=0.1)}
        job = start(train(run, f"FAKE_FILL=6 FAKE_BALLAST={ballast}"), **settings)
        state = cluster.wait(job, 300)
        assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "4:0")
        assert ballast.stat().st_size > 500_000
        ballast.unlink()
        assert cluster.wait(start(train(run, "SOUND=1"), **settings), 300)["JobState"] == "COMPLETED"
        assert [e["step"] for e in events(run, "resume")] == [4]
        assert_ends_like(run, unbroken)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_chain_pretrains_finetunes_and_evaluates(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, each job behind its health gate, with cores and memory by the recipe."""
    for folder in ("finetuning", "evaluation"):
        monkeypatch.syspath_prepend(str(ROOT / "tests" / folder))
    from evaluation_shapes import write_set
    from finetuning_configurations import tiny_configuration

    from pretrain.configuration import dump_config

    for name, value in (cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    shapes = write_set(tmp_path / "shapes", name="shapes")
    for name, preset in (("first", "m3i"), ("second", "supervised")):
        (tmp_path / f"{name}.yaml").write_text(
            dump_config(tiny_configuration(shapes, preset, 2, training__batch_size=8))
        )
    monkeypatch.chdir(tmp_path)
    words = ["--nodes", "2", "--mem", "900M", "--chain", f"first.yaml,second.yaml,evaluate:{shapes}"]
    assert run(["launch", "slurm", *words, "--output", "runs"]) == 0
    jobs = re.findall(r"submitted job (\d+)", capsys.readouterr().out)
    assert len(jobs) == 3
    states = [cluster.wait(job, 400)["JobState"] for job in jobs]
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.rglob("slurm-*.out"))
    assert states == ["COMPLETED"] * 3, logs
    assert list((tmp_path / "runs" / "second" / "evaluation").glob("*.json")), "the scores of the last stage"


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


def test_a_node_that_dies_gives_its_job_back_to_the_queue(
    cluster: Any,
    start: Callable[..., str],
    train: Callable[[Path, str], list[str]],
    unbroken: Path,
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    """Slurm itself requeues; where rank 0 notices first, the script does, too, after a start without the node. The last
    test here, for the node is down for a while.
    """
    from training_fakes import events

    run = tmp_path / "run"
    job = start(train(run, "FAKE_SLEEP=3"), run=str(run), logs=str(run / "logs"), restarts=Budget(pause=0.1))
    wait_for(lambda: (run / "checkpoints" / "step-00000004").is_dir(), 240)
    cluster.crash_node("n2")
    wait_for(lambda: cluster.state(job)["JobState"] == "PENDING", 120)
    cluster.start_node("n2")
    cluster.until_idle()
    again_now(cluster, job, wait_for)
    state = cluster.wait(job, 300)
    assert state["JobState"] == "COMPLETED" and state["Restarts"] in ("1", "2")
    assert min(e["step"] for e in events(run, "resume")) >= 4, "from the newest checkpoint, not afresh"
    assert_ends_like(run, unbroken)
