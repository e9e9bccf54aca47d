"""What the launcher does with signals, with a controller that is gone, and when it is killed itself."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import spawn
from launch.stopping import Action, StopRequests
from launch.supervision import Patience

Program = Callable[[str], list[str]]
Launcher = Callable[..., "subprocess.Popen[str]"]
WaitFor = Callable[..., None]

SAVING_RANK = """
    seen = []
    def note(number, frame): seen.append(signal.Signals(number).name)
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(s, note)
    (out / f'pid-{r}').write_text(str(os.getpid()))
    (out / f'ready-{r}').touch()
    while not seen: time.sleep(.02)
    time.sleep(.8)  # saves
    (out / f'seen-{r}').write_text(' '.join(seen))
    sys.exit(75)
"""


def ready(folder: Path, ranks: int = 2) -> Callable[[], bool]:
    return lambda: all((folder / f"ready-{rank}").exists() for rank in range(ranks))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_decision_is_a_table() -> None:
    clock = Clock()
    requests = StopRequests(clock=clock)
    assert requests.decide(signal.SIGUSR1) is Action.FORWARD
    assert requests.decide(signal.SIGTERM) is Action.IGNORE
    clock.now = 100.0
    assert requests.decide(signal.SIGTERM) is Action.IGNORE
    assert requests.decide(signal.SIGINT) is Action.IGNORE  # the first Ctrl-C
    clock.now = 101.9
    assert requests.decide(signal.SIGINT) is Action.IGNORE
    clock.now = 102.0
    assert requests.decide(signal.SIGINT) is Action.KILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_signal_reaches_every_rank_once_and_the_code_is_75(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor, number: signal.Signals
) -> None:
    process = launcher(program(SAVING_RANK), 2)
    wait_for(ready(tmp_path))
    os.killpg(process.pid, number)  # to the launcher's whole group, as a terminal does
    assert process.wait(20) == 75
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)] == [number.name] * 2


def test_usr1_then_term_is_one_request(program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor) -> None:
    process = launcher(program(SAVING_RANK), 2)
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert (tmp_path / "seen-0").read_text() == "SIGUSR1"


def test_a_lost_terminal_asks_the_ranks_to_save(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor
) -> None:
    process = launcher(program(SAVING_RANK), 2)
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 75
    assert (tmp_path / "seen-1").read_text() == "SIGTERM"


def test_a_repeated_interrupt_kills_at_once_and_an_immediate_one_does_not(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor, alive: Callable[[int], bool]
) -> None:
    body = """
        for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
        (out / f'pid-{r}').write_text(str(os.getpid())); (out / f'ready-{r}').touch()
        time.sleep(60)
    """
    process = launcher(program(body), 2, patience="interrupt_again=0.5")
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not any(alive(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(2))


def test_ranks_of_a_killed_launcher_are_asked_to_save(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor, alive: Callable[[int], bool]
) -> None:
    process = launcher(program(SAVING_RANK), 2)
    wait_for(ready(tmp_path))
    process.kill()
    wait_for(lambda: (tmp_path / "seen-0").exists() and (tmp_path / "seen-1").exists())
    assert (tmp_path / "seen-0").read_text() == "SIGTERM"
    wait_for(lambda: not any(alive(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(2)))


def test_hung_ranks_of_a_killed_launcher_and_their_workers_are_killed_after_a_while(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor, alive: Callable[[int], bool]
) -> None:
    body = """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
        (out / f'pid-{r}').write_text(str(os.getpid())); (out / f'worker-{r}').write_text(str(worker.pid))
        (out / f'ready-{r}').touch()
        time.sleep(60)
    """
    process = launcher(program(body), 2, patience="orphans=0.5")
    wait_for(ready(tmp_path))
    processes = [int((tmp_path / f"{kind}-{rank}").read_text()) for kind in ("pid", "worker") for rank in range(2)]
    assert all(alive(p) for p in processes)
    process.kill()
    wait_for(lambda: not any(alive(p) for p in processes))


def test_the_control_line_carries_signals(program: Program, tmp_path: Path, wait_for: WaitFor) -> None:
    reader, writer = os.pipe()
    codes: list[int] = []
    argv = program(SAVING_RANK)
    thread = threading.Thread(target=lambda: codes.append(spawn(argv, 2, control=reader)))
    thread.start()
    wait_for(ready(tmp_path))
    os.write(writer, b"USR1\nTERM\n")
    thread.join(20)
    os.close(writer)
    os.close(reader)
    assert codes == [75]
    assert (tmp_path / "seen-0").read_text() == "SIGUSR1"


def test_the_end_of_the_control_line_stops_ranks_and_then_kills_them(
    program: Program, tmp_path: Path, wait_for: WaitFor
) -> None:
    reader, writer = os.pipe()
    codes: list[int] = []
    argv = program("signal.signal(signal.SIGTERM, signal.SIG_IGN); (out / f'ready-{r}').touch(); time.sleep(60)")
    patience = Patience(orphans=0.5)
    thread = threading.Thread(target=lambda: codes.append(spawn(argv, 2, control=reader, patience=patience)))
    thread.start()
    wait_for(ready(tmp_path))
    os.close(writer)
    thread.join(20)
    os.close(reader)
    assert codes == [1]


def test_a_request_before_a_rank_has_its_handlers_waits_for_them(
    program: Program, launcher: Launcher, tmp_path: Path, wait_for: WaitFor
) -> None:
    body = """
        (out / f'ready-{r}').touch()
        time.sleep(1)  # imports torch; no handler yet
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        time.sleep(30)
    """
    process = launcher(program(body), 2, options="hold_signals=True")
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
