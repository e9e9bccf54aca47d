"""Ranks on several machines by ssh, from a hostfile in DeepSpeed's format.

    node1 slots=8      # a comment
    node2 slots=8

One ssh a machine runs `internimage launch local` there. Its standard input is the control line: first the environment
as one line of JSON, so that no secret stands in a command line that every user of the machine can list; then signal
names; and its end - we are gone, or the connection is - makes the far side stop and clean up.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import OTHER, UserError
from launch.invocation import own_command
from launch.supervision import Patience, signals_into, watch

_SSH_FAILED = 255
# What a run may depend on and a non-interactive ssh does not bring.
_CARRIED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "CUDA_", "HF_", "TRITON_", "INTERNIMAGE_")
_PATHS = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")  # before Python starts there
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Raises UserError naming the line that is not `HOST slots=N`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error.strerror})") from None
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit() or words[1] == "slots=0":
            raise UserError(f"{path}, line {number}: expected `HOST slots=N`, found {line.strip()!r}")
        if words[0] in [host.name for host in hosts]:
            raise UserError(f"{path}, line {number}: {words[0]} is named twice")
        hosts.append(Host(words[0], int(words[1][6:])))
    if not hosts:
        raise UserError(f"--hostfile {path}: no host in it; expected lines as `node1 slots=8`")
    return hosts


def carried_environment(environment: Mapping[str, str], names: Sequence[str] = ()) -> dict[str, str]:
    """The variables that go along: communication settings, where Python is, and `names`."""
    for name in names:
        if name not in environment:
            raise UserError(f"--export {name}: no such variable in this environment")
    chosen = (*_PATHS, *names)
    return {k: v for k, v in sorted(environment.items()) if k in chosen or k.startswith(_CARRIED_PREFIXES)}


def masked(environment: Mapping[str, str]) -> dict[str, str]:
    """For people: the values of what may be a secret are left out."""
    return {name: "(hidden)" if _SECRET.search(name) else value for name, value in environment.items()}


def remote_commands(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    master_addr: str | None = None,
    master_port: int = 29400,
    logs: Path | None = None,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """One shell command a host, in the hostfile's order; ranks are numbered in that order.

    environment: of it, the search paths alone stand in the command; `run_hosts` sends the rest.
    """
    world_size = sum(host.slots for host in hosts)
    assignments = [f"{name}={value}" for name, value in (environment or {}).items() if name in _PATHS]
    commands, first_rank = [], 0
    for host in hosts:
        arguments = ["launch", "local", "--processes", str(host.slots), "--first-rank", str(first_rank)]
        arguments += ["--world-size", str(world_size), "--master-addr", master_addr or hosts[0].name]
        arguments += ["--master-port", str(master_port), "--control"]
        arguments += ["--logs", str(logs)] if logs is not None else []
        words = ["env", *assignments, *own_command([*arguments, "--", *command])]
        commands.append(f"cd {shlex.quote(directory or os.getcwd())} && exec {shlex.join(words)}")
        first_rank += host.slots
    return commands


def run_hosts(
    hosts: Sequence[Host],
    commands: Sequence[str],
    ssh: Sequence[str],
    environment: Mapping[str, str] | None = None,
    patience: Patience | None = None,
) -> int:
    """Start every host's command with `environment`, pass signals on; one exit code, as of `local.spawn`."""
    patience = patience or Patience()
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_into(received))
        nodes: list[Node] = []
        stack.callback(_end_all, nodes, patience.terminate)
        for host, command in zip(hosts, commands, strict=True):
            nodes.append(Node(host.name, [*ssh, host.name, command], environment or {}))
        return watch(nodes, received, patience)


class Node:
    """A machine's launcher at the end of an ssh connection."""

    log: Path | None = None

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = f"host {name}"
        self.code: int | None = None
        self._process = subprocess.Popen(list(argv), stdin=subprocess.PIPE, process_group=0)
        self._write(json.dumps(dict(environment)))

    def poll(self) -> int | None:
        if self.code is None and (code := self._process.poll()) is not None:
            if code == _SSH_FAILED:
                print(f"internimage: {self.name}: the ssh connection failed or was lost", flush=True)
                code = OTHER
            self.code = code if code >= 0 else 128 - code
        return self.code

    def send(self, number: int) -> None:
        self._write(signal.Signals(number).name.removeprefix("SIG"))

    def _write(self, line: str) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(line.encode() + b"\n")
                stdin.flush()

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def last_words(self) -> str:
        return ""

    def end(self, patience: float) -> None:
        """The far launcher kills its ranks; a connection that does not answer is cut."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def receive_environment(control: int) -> dict[str, str]:
    """At the far side: the first line of the control line. Raises UserError where something else comes."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(control, 1)):
        line += byte
    try:
        return {str(name): str(value) for name, value in json.loads(line).items()}
    except (ValueError, AttributeError):
        raise UserError("--control is of `launch hostfile`, which sends the environment by standard input") from None


def _end_all(nodes: list[Node], patience: float) -> None:
    for node in nodes:
        if node.poll() is None:
            node.kill()
    for node in nodes:
        node.end(patience)
