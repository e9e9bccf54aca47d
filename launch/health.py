"""`internimage doctor --distributed`: every node and GPU of a job, measured and compared; the slow ones are named.

    each rank    matmul rate, copy rate, free disk and shared memory, clock, versions
    together     all-reduce inside a node and between nodes
    then         findings, by a pure function: who is below the others, who differs

As a gate before a job (`--gate`) each node that is fit leaves a file for the sbatch script, any other a word why not.
"""

import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

SLOW = 0.8  # of the median rate of all ranks
CLOCKS_APART = 2.0  # seconds, beyond the time that asking takes
CPU = "cpu"
_LEAST_SHARED, _LEAST_DISK = 2**30, 5 * 2**30  # bytes
_MATMUL = 4096  # on a GPU: 137 GFLOP a product
_SECONDS = 0.5  # of measuring, each
_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reading:
    """Of one rank. Rates: TFLOP/s of a matrix product, GB/s of a copy on the device and to it, GB/s of an all-reduce
    (bytes over time) inside its node and over all nodes (None where there is one).
    """

    rank: int
    node: str
    device: str
    tflops: float
    copy: float
    upload: float
    inside: float | None
    between: float | None
    free_memory: int
    shared: int
    disk: int
    clock: float  # seconds apart from rank 0's
    versions: str
    problem: str | None = None
    interface: str | None = None  # over which it talks to other nodes

    @property
    def comparable(self) -> bool:
        """A processor's rates depend on who else uses it, and say nothing of its health."""
        return self.problem is None and self.device != CPU


def findings(readings: Sequence[Reading]) -> dict[str, list[str]]:
    """By node: what is wrong with it, in sentences. Pure."""
    found: dict[str, list[str]] = {}

    def say(reading: Reading, text: str) -> None:
        found.setdefault(reading.node, []).append(f"rank {reading.rank} ({reading.device}): {text}")

    for name, what, unit in (
        ("tflops", "matrix products", "TFLOP/s"),
        ("copy", "copies on the device", "GB/s"),
        ("upload", "copies to the device", "GB/s"),
    ):
        rates = [float(getattr(reading, name)) for reading in readings if reading.comparable]
        median = statistics.median(rates) if rates else 0.0
        for reading in readings:
            if reading.comparable and getattr(reading, name) < SLOW * median:
                say(reading, f"{what} at {getattr(reading, name):.3g} {unit}, the median is {median:.3g}")
    inside = [reading.inside for reading in readings if reading.comparable and reading.inside is not None]
    for reading in readings:
        if reading.comparable and reading.inside is not None and reading.inside < SLOW * statistics.median(inside):
            text = f"all-reduce inside the node at {reading.inside:.3g} GB/s, the median is "
            say(reading, f"{text}{statistics.median(inside):.3g}")
        if reading.problem is not None:
            say(reading, reading.problem)
        if reading.shared < _LEAST_SHARED:
            say(reading, f"/dev/shm has {reading.shared / 2**30:.1f} GiB free: loader workers need more")
        if reading.disk < _LEAST_DISK:
            say(reading, f"the temporary folder has {reading.disk / 2**30:.1f} GiB free")
        if abs(reading.clock) > CLOCKS_APART:
            say(reading, f"its clock is {reading.clock:+.1f} s apart from rank 0's")
    if readings:
        usual = statistics.mode(reading.versions for reading in readings)
        for reading in readings:
            if reading.versions != usual:
                say(reading, f"other versions: {reading.versions}; the others have {usual}")
    return found


def measure(timeout_seconds: float = 120.0) -> list[Reading]:
    """The readings of all ranks, on every rank. Collective; each rank finds its place in the environment."""
    import torch
    import torch.distributed as dist

    from pretrain.training.distributed import join

    context = join(timeout_seconds)
    rank, world = context.rank, context.world_size
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problem, tflops, copy, upload = None, 0.0, 0.0, 0.0
    try:
        tflops, copy, upload = _device_rates(context.device)
    except RuntimeError as error:  # a broken device is what this looks for
        problem = f"the device fails: {str(error).splitlines()[0]}"
    inside = between = None
    if world > 1:
        groups = [
            dist.new_group(list(range(first, min(first + per_node, world)))) for first in range(0, world, per_node)
        ]
        if per_node > 1:
            mine_too = groups[rank // per_node]
            assert isinstance(mine_too, dist.ProcessGroup), "this rank is a member of its node's group"
            inside = _reduce_rate(mine_too, context.device)
        if world > per_node:
            between = _reduce_rate(None, context.device)
    before = context.gather(time.time())
    clock = time.time() - before[0] if world > 1 else 0.0
    free = torch.cuda.mem_get_info(context.device)[0] if context.device.type == "cuda" else 0
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else CPU
    mine = Reading(
        rank,
        node,
        f"{name} {context.device.index}" if context.device.type == "cuda" else name,
        tflops,
        copy,
        upload,
        inside,
        between,
        free,
        shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else _LEAST_SHARED,
        shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free,
        clock,
        f"python {platform.python_version()}, torch {torch.__version__}, driver {_driver()}",
        problem,
        os.environ.get("GLOO_SOCKET_IFNAME"),
    )
    return context.gather(mine)


def leave_word(readings: Sequence[Reading], word: str) -> bool:
    """For the gate: WORD.fit.NODE of a node without findings, WORD.unfit.NODE with them. True: this node is fit.

    Every rank writes of its own node only, so that a node whose rank never got here leaves nothing.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    wrong = findings(readings).get(node)
    if wrong:
        Path(f"{word}.unfit.{node}").write_text("\n".join(f"{node}: {text}" for text in wrong) + "\n")
        return False
    Path(f"{word}.fit.{node}").touch()
    return True


def _device_rates(device: "torch.device") -> tuple[float, float, float]:
    """TFLOP/s, and GB/s of a copy on the device and to it."""
    import torch

    cuda = device.type == "cuda"
    size = _MATMUL if cuda else 256
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    source = torch.empty(_BYTES if cuda else _BYTES // 16, dtype=torch.uint8, device=device)
    host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty_like(source)
    product = _per_second(lambda: left @ left, device)
    if not bool(torch.isfinite(left @ left).all()):
        raise RuntimeError("a product of finite matrices is not finite")
    copy = _per_second(lambda: target.copy_(source), device)
    upload = _per_second(lambda: target.copy_(host, non_blocking=True), device)
    gigabytes = source.numel() / 1e9
    return product * 2 * size**3 / 1e12, copy * gigabytes, upload * gigabytes


def _per_second(call: Callable[[], object], device: "torch.device") -> float:
    import torch

    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS or count == 0:
        for _ in range(8):
            call()
        count += 8
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / elapsed


def _reduce_rate(group: "ProcessGroup | None", device: "torch.device") -> float:
    """GB of the buffer a second, of 8 all-reduces."""
    import torch
    import torch.distributed as dist

    buffer = torch.ones((_BYTES if device.type == "cuda" else _BYTES // 64) // 4, device=device)
    dist.all_reduce(buffer, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(8):
        dist.all_reduce(buffer, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 8 * buffer.numel() * 4 / 1e9 / (time.perf_counter() - start)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "none"
    words = text.split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
