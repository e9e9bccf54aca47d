"""A real Slurm with two nodes on this machine, for one test session. Needs root, munge and slurm-wlm."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")

CONFIGURATION = """\
ClusterName=house
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmctldPort={first}
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=1
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{second}-{third}] CPUs=2 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=9
"""


def why_not() -> str | None:
    """The reason that no cluster can be started here, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root here"
    hosts = Path("/etc/hosts")
    if not any(resolves(name) for name in ("n1",)) and not os.access(hosts, os.W_OK):
        return "n1 and n2 are no names of this machine and /etc/hosts cannot be written"
    return None


def resolves(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


class Cluster:
    def __init__(self, folder: Path, first_port: int = 26817) -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(folder=folder, first=first_port, second=first_port + 4, third=first_port + 5)
        )
        self.environment = os.environ | {
            "SLURM_CONF": str(configuration),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        if not resolves("n1") or not resolves("n2"):
            with Path("/etc/hosts").open("a") as hosts:
                hosts.write("127.0.0.1 n1 n2\n")
        if subprocess.run(["munge", "-n"], capture_output=True).returncode != 0:
            subprocess.run("mkdir -p /run/munge && chown munge:munge /run/munge", shell=True, check=True)
            self._start(["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground"])
            self._until(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0)
        self._start(["slurmctld", "-D", "-c"])
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
            self.start_node(node)
        self.until_idle()
        return self

    def start_node(self, node: str) -> None:
        self.nodes[node] = self._start(["slurmd", "-D", "-N", node])

    def crash_node(self, node: str) -> None:
        """The node's daemon and every step on it, as at a power cut."""
        self.nodes[node].kill()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
                mine = f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes()
                of_cluster = f"SLURM_CONF={self.folder}".encode() in (process / "environ").read_bytes()
            except OSError:
                continue
            if of_cluster and (mine or (words.startswith(b"slurmstepd") and node.encode() in words)):
                os.kill(int(process.name), 9)

    def until_idle(self, seconds: float = 60.0) -> None:
        self._until(
            lambda: set(self.ask("sinfo", "-h", "-p", "main", "-N", "-o", "%T").stdout.split()) == {"idle"}, seconds
        )

    def __exit__(self, *error: object) -> None:
        self.ask("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, as a dictionary."""
        answer = self.ask("scontrol", "-o", "show", "job", job).stdout
        return dict(word.partition("=")[::2] for word in answer.split() if "=" in word)

    def wait(self, job: str, seconds: float) -> dict[str, str]:
        """Until the job has ended for good; `sbatch --wait` would look every 10 s only."""
        self._until(lambda: self.state(job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds)
        return self.state(job)

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        log = (self.folder / "daemons.log").open("ab")
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        return self.daemons[-1]

    def _until(self, condition: object, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"Slurm did not get there; see {self.folder}"
            time.sleep(0.1)
