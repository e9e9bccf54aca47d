"""launch.local with real processes: environment, exit codes, logs, free ports."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import spawn
from launch.ports import ReservedPort
from launch.ranks import Placement, rank_environment
from launch.supervision import Patience, combined_code

Program = Callable[[str], list[str]]
QUICK = Patience(failure=0.3, terminate=0.3, orphans=1.0)


@pytest.fixture(autouse=True)
def _no_launcher_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_every_rank_finds_its_place_in_the_environment(program: Program, tmp_path: Path) -> None:
    argv = program("import json; (out / f'{r}.json').write_text(json.dumps(dict(os.environ)))")
    assert spawn(argv, 3) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, environment in enumerate(seen):
        assert environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert len({environment["MASTER_PORT"] for environment in seen}) == 1
    assert int(seen[0]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_a_second_machine_continues_the_numbering_and_keeps_the_callers_threads() -> None:
    environment = rank_environment({"OMP_NUM_THREADS": "5"}, Placement(8, 16, "node1", 29400), 3, 8, 29400, cores=64)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("11", "3", "16")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node1", "29400")
    assert environment["OMP_NUM_THREADS"] == "5"
    assert rank_environment({}, Placement(), 0, 8, 1, cores=64)["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if r else 0)", 75),
        ("sys.exit(2)", 2),
        ("sys.exit(4 if r else 0)", 4),
        ("os.kill(os.getpid(), signal.SIGKILL) if r else sys.exit(75)", 137),
        ("sys.exit(1) if r == 0 else (time.sleep(.1), sys.exit(3))", 3),
    ],
)
def test_the_ranks_codes_become_one(program: Program, body: str, code: int) -> None:
    assert spawn(program(body), 2, patience=QUICK) == code


def test_a_meaningful_code_wins_over_the_partners_that_failed_with_it() -> None:
    assert combined_code([1, 137, 3]) == 3
    assert combined_code([1, 143]) == 1
    assert combined_code([75, 75]) == 75
    assert combined_code([75, 1]) == 1
    assert combined_code([0, 0]) == 0


def test_the_first_failing_rank_ends_the_others(program: Program, tmp_path: Path) -> None:
    body = """
        if r == 1: sys.exit(9)
        signal.signal(signal.SIGTERM, lambda *_: (out / 'terminated').touch())  # and goes on
        while True: time.sleep(.05)
    """
    start = time.monotonic()
    assert spawn(program(body), 2, patience=QUICK) == 9
    assert time.monotonic() - start < 5
    assert (tmp_path / "terminated").exists()  # asked first, killed after


def test_what_a_rank_leaves_behind_ends_with_it(
    program: Program, tmp_path: Path, wait_for: Callable[..., None], alive: Callable[[int], bool]
) -> None:
    argv = program("""
        import subprocess
        worker = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
        (out / f'worker-{r}').write_text(str(worker.pid))
        os._exit(0)
    """)
    assert spawn(argv, 2) == 0
    workers = [int((tmp_path / f"worker-{rank}").read_text()) for rank in range(2)]
    wait_for(lambda: not any(alive(worker) for worker in workers))


def test_rank_0_speaks_here_and_the_others_in_logs_whose_end_is_quoted(
    program: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = program("print('rank', r, 'says hello', flush=True); sys.exit('rank 1 is out of luck' if r == 1 else 0)")
    assert spawn(argv, 2, logs=tmp_path / "logs", patience=QUICK) == 1
    captured = capfd.readouterr()
    assert captured.out == "rank 0 says hello\n"
    assert "rank 1 ended with exit code 1" in captured.err
    assert "rank 1 is out of luck" in captured.err
    assert "rank 1 says hello" in (tmp_path / "logs" / "rank-00001.log").read_text()


def test_an_error_that_rank_0_has_told_is_not_told_twice(
    program: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert spawn(program("print('no such key', file=sys.stderr); sys.exit(2)"), 2, logs=tmp_path / "logs") == 2
    assert capfd.readouterr().err == "no such key\n"


def test_ports_are_not_given_twice_nor_from_the_kernels_own_range() -> None:
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with ReservedPort() as first, ReservedPort() as second:
        assert first.number != second.number
        assert max(first.number, second.number) < max(ephemeral, 32000)
        with socket.socket() as probe:
            probe.bind(("", first.number))  # really free


def test_a_port_that_is_taken_or_claimed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with ReservedPort() as claimed, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        candidates = [claimed.number, taken, claimed.number + 1]
        monkeypatch.setattr("random.SystemRandom.sample", lambda self, population, k: candidates)
        with ReservedPort() as port:
            assert port.number == claimed.number + 1


def test_master_port_in_the_environment_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "23456")
    with ReservedPort() as port:
        assert port.number == 23456
