"""Launching over ssh, with a stand-in for ssh that runs the command here, as a machine at the other end would."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch import hostfile
from launch.cli import run
from launch.hostfile import Host, carried_environment, read_hostfile, remote_commands

ROOT = Path(__file__).resolve().parents[2]
HOSTS = "n1 slots=1  # the first\n\nn2 slots=2\n"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.txt"
    path.write_text(HOSTS)
    return path


@pytest.fixture
def far_side(tmp_path: Path) -> str:
    """`ssh HOST COMMAND`, with the host in the environment."""
    path = tmp_path / "fake-ssh"
    path.write_text('#!/bin/bash\nexport FAR_HOST=$1\nexec bash -c "$2"\n')
    path.chmod(0o755)
    return str(path)


def start(hosts: Path, far_side: str, *command: str) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    words = [sys.executable, "-m", "launch", "launch", "hostfile", "--hostfile", str(hosts), "--ssh", far_side]
    return subprocess.Popen(
        [*words, "--master-addr", "127.0.0.1", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_hostfile_is_read(hosts: Path) -> None:
    assert read_hostfile(hosts) == [Host("n1", 1), Host("n2", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1\n", "line 1: expected `HOST slots=N`"),
        ("n1 slots=2\nn2 slots=many", "line 2"),
        ("n1 slots=0", "line 1"),
        ("n1 slots=1\nn1 slots=1", "n1 is named twice"),
        ("# nothing", "no host in it"),
    ],
)
def test_a_mistake_in_a_hostfile_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(path)


def test_ranks_are_numbered_across_hosts_and_paths_are_quoted() -> None:
    found = [Host("n1", 8), Host("n2", 4)]
    first, second = remote_commands(
        found, ["python", "a b.py"], directory="/my project", environment={"NCCL_DEBUG": "INFO", "PYTHONPATH": "/x"}
    )
    assert first.startswith("cd '/my project' && exec env PYTHONPATH=/x ") and "NCCL_DEBUG" not in first
    assert "--processes 8 --first-rank 0 --world-size 12 --master-addr n1" in first
    assert "--processes 4 --first-rank 8 --world-size 12 --master-addr n1" in second
    assert second.endswith("-- python 'a b.py'")


def test_communication_settings_travel_and_secrets_do_not() -> None:
    here = {"NCCL_SOCKET_IFNAME": "ib0", "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "MINE": "1"}
    assert carried_environment(here) == {"NCCL_SOCKET_IFNAME": "ib0", "PATH": "/bin"}
    assert carried_environment(here, ["MINE"])["MINE"] == "1"
    with pytest.raises(UserError, match="--export OTHER"):
        carried_environment(here, ["OTHER"])


def test_dry_run_shows_one_ssh_a_host(hosts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "hostfile", "--hostfile", str(hosts), "--dry-run", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ssh", "ssh", "with,"]
    assert " n1 " in lines[0] and " n2 " in lines[1]


def test_a_secret_reaches_the_ranks_and_stands_in_no_command_line(
    hosts: Path,
    far_side: str,
    program: Callable[[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_TOKEN", "MY_OWN"):
        monkeypatch.setenv(name, f"s3cret-{name}")
    body = """
        lines = b' '.join(p.read_bytes() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline') if p.exists())
        (out / f'seen-{r}').write_text(os.environ['HF_TOKEN'] + ' ' + os.environ['MY_OWN'] + str(b's3cret' in lines))
    """
    process = start(hosts, far_side, "--export", "MY_OWN", *program(body))
    assert process.wait(60) == 0
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(3)] == ["s3cret-HF_TOKEN s3cret-MY_OWNFalse"] * 3
    assert run(["launch", "hostfile", "--hostfile", str(hosts), "--dry-run", "true"]) == 0
    shown = capsys.readouterr().out
    assert "HF_TOKEN=(hidden)" in shown.replace("'", "") and "s3cret" not in shown


def test_hosts_start_again_together_while_the_run_moves_on(
    hosts: Path, far_side: str, program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    body = """
        place = os.environ['MASTER_PORT'] + ' ' + os.environ['WORLD_SIZE']
        with open(out / f'starts-{r}', 'a') as file: file.write(place + '\\n')
        first = len((out / f'starts-{r}').read_text().splitlines()) == 1
        sys.exit(0) if not first else os.abort() if r == 2 else time.sleep(60)
    """
    process = start(hosts, far_side, "--restart-pause", "0", *program(body))
    assert process.wait(120) == 0
    starts = [(tmp_path / f"starts-{rank}").read_text().splitlines() for rank in range(3)]
    assert starts == [["29400 3", "29401 3"]] * 3, "all ranks of all hosts, at a new meeting point"


def test_ranks_on_all_hosts_run_and_their_code_comes_back(
    hosts: Path, far_side: str, program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    body = "(out / f'ran-{r}').write_text(os.environ['FAR_HOST'] + os.environ['LOCAL_RANK']); sys.exit(75)"
    process = start(hosts, far_side, *program(body))
    assert process.wait(60) == 75
    assert [(tmp_path / f"ran-{rank}").read_text() for rank in range(3)] == ["n10", "n20", "n21"]


def test_a_signal_reaches_the_ranks_of_every_host_once(
    hosts: Path, far_side: str, program: Callable[[str], list[str]], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    process = start(
        hosts,
        far_side,
        *program("""
            seen = []
            for s in (signal.SIGTERM, signal.SIGUSR1): signal.signal(s, lambda n, _: seen.append(n))
            (out / f'ready-{r}').touch()
            while not seen: time.sleep(.02)
            time.sleep(.5); (out / f'seen-{r}').write_text(str(len(seen))); sys.exit(75)
        """),
    )
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)), 60)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(3)] == ["1", "1", "1"]


def test_when_the_launcher_dies_the_far_ranks_are_asked_to_save(
    hosts: Path, far_side: str, program: Callable[[str], list[str]], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    process = start(
        hosts,
        far_side,
        *program("""
            signal.signal(signal.SIGTERM, lambda *_: ((out / f'saved-{r}').touch(), sys.exit(75)))
            (out / f'ready-{r}').touch(); time.sleep(60)
        """),
    )
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)), 60)
    process.kill()
    wait_for(lambda: all((tmp_path / f"saved-{rank}").exists() for rank in range(3)), 30)


def test_a_host_that_cannot_be_reached_is_named(
    hosts: Path, program: Callable[[str], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    quick = hostfile.Patience(failure=0.2, terminate=0.2)
    code = hostfile.run_hosts(read_hostfile(hosts), ["x", "x"], ["bash", "-c", "exit 255", "ssh"], {}, quick)
    assert code == 1
    assert "host n1: the ssh connection failed or was lost" in capfd.readouterr().out
