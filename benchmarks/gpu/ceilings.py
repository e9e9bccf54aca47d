"""What the GPU can do at best, to hold the operator against: bytes copied, products, reductions a second."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import Case
from record import headline, record, small
from steps import HERE
from timing import copy_bandwidth, milliseconds

STEP = "ceilings"
KINDS = ["f32", "v2.f32", "v4.f32", "bf16x2", "v4.bf16x2"]  # in the order of atomics.cu
BYTES = [4, 8, 16, 4, 16]
ADDITIONS = [1, 2, 4, 2, 8]


def matmul(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """FLOPs a second of a square product, of normal random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [milliseconds(lambda: torch.mm(a, b, out=out), 5, device) for _ in range(8)]
    return 2 * size**3 / statistics.median(times[2:]) * 1e3


def corner_rows(case: Case, device: torch.device) -> torch.Tensor:
    """The rows (pixel, group) of the value's gradient that backward adds to, in its order: [N*H*W*G*9*4] int32."""
    size, groups = case.size, case.groups
    shift = case.inputs(device).offset.float().view(case.batch, size, size, groups, 9, 2)
    axis = torch.arange(size, device=device)
    cell = torch.arange(9, device=device)
    x = (axis[:, None, None] + cell // 3 - 1 + shift[..., 0]).floor()
    y = (axis[:, None, None, None] + cell % 3 - 1 + shift[..., 1]).floor()
    corners = [
        ((y + h).clamp(0, size - 1) * size + (x + w).clamp(0, size - 1)) * groups
        + torch.arange(groups, device=device)[:, None]
        for h in (0, 1)
        for w in (0, 1)
    ]
    rows = torch.stack(corners, -1).long()
    images = torch.arange(case.batch, device=device).view(-1, 1, 1, 1, 1, 1) * size**2 * groups
    return (rows + images).flatten().int()


def library() -> ctypes.CDLL:
    """atomics.cu, compiled for this GPU. CalledProcessError where the compiler refuses."""
    folder = Path(tempfile.mkdtemp(prefix="atomics-"))
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([*command, "-o", str(folder / "atomics.so"), str(HERE / "atomics.cu")], check=True, timeout=60)
    loaded = ctypes.CDLL(str(folder / "atomics.so"))
    pointer = ctypes.c_void_p
    loaded.reductions.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_longlong, ctypes.c_int, pointer]
    return loaded


def reductions(functions: ctypes.CDLL, device: torch.device) -> dict[str, float]:
    """Record a row for each kind of reduction and pattern of rows; "pattern, kind" -> reductions a second."""
    case = Case("T", 1, "bfloat16", 64)
    scattered = corner_rows(case, device)
    count = case.batch * case.size**2 * case.groups
    patterns = {
        "in a row": torch.arange(count, device=device, dtype=torch.int32),
        "as backward": scattered,
        "anywhere": torch.randint(count, (8 * count,), device=device, dtype=torch.int32),
    }
    stream = torch.cuda.current_stream().cuda_stream
    best: dict[str, float] = {}
    for pattern, rows in patterns.items():
        for kind, name in enumerate(KINDS):
            row_bytes = case.group_channels * (2 if "bf16" in name else 4)
            pieces = row_bytes // BYTES[kind]
            target = torch.zeros(count * row_bytes, dtype=torch.uint8, device=device)

            def run(kind: int = kind, rows: torch.Tensor = rows, pieces: int = pieces, to: Any = target) -> None:
                log2 = pieces.bit_length() - 1
                error = functions.reductions(kind, to.data_ptr(), rows.data_ptr(), len(rows), log2, stream)
                if error:
                    raise RuntimeError(f"CUDA error {error} at the launch")

            run()
            times = [milliseconds(run, 3, device) for _ in range(7)]
            spent = statistics.median(times[1:]) / 1e3
            rate = len(rows) * pieces / spent
            row = {"reduction": name, "pattern": pattern, "rows": len(rows), "row_bytes": row_bytes}
            row |= {"ms": round(spent * 1e3, 4), "billions_a_second": round(rate / 1e9, 2)}
            row |= {
                "additions_billions_a_second": round(rate * ADDITIONS[kind] / 1e9, 2),
                "gb_per_s": round(rate * BYTES[kind] / 1e9, 1),
            }
            record(STEP, row)
            best[f"{pattern}, {name}"] = rate
    return best


def index_add(device: torch.device, case: Case) -> None:
    """PyTorch's own scatter of rows, which needs no compiler."""
    rows = corner_rows(case, device)
    source = torch.randn(len(rows), case.group_channels, device=device)
    target = torch.zeros(case.batch * case.size**2 * case.groups, case.group_channels, device=device)
    times = [milliseconds(lambda: target.index_add_(0, rows, source), 2, device) for _ in range(5)]
    spent = statistics.median(times[1:]) / 1e3
    rate = source.numel() / spent / 1e9
    record(STEP, {"reduction": "index_add_", "ms": round(spent * 1e3, 4), "billions_a_second": round(rate, 3)})


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = small() or device.type != "cuda"
    bandwidth = copy_bandwidth(device, 1 << 22 if tiny else 1 << 30)
    record(STEP, {"copy_gb_per_s": round(bandwidth / 1e9, 1)})
    words = [f"copy {bandwidth / 1e9:.0f} GB/s"]
    headline(STEP, words[0])
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rate = matmul(dtype, 128 if tiny else 8192, device)
        record(STEP, {"matmul": name, "size": 128 if tiny else 8192, "teraflops": round(rate / 1e12, 3)})
        words.append(f"{name} {rate / 1e12:.0f} TFLOPS")
    headline(STEP, ", ".join(words))
    if tiny:
        index_add(device, Case("T", 4, "float32", 1))
        return
    index_add(device, Case("T", 1, "bfloat16", 8))
    try:
        functions = library()
    except (OSError, subprocess.SubprocessError) as error:
        record(STEP, {"error": f"atomics.cu was not compiled: {error}"[:300]})
        return
    rate = reductions(functions, device)["as backward, v4.f32"]
    words.append(f"v4.f32 reductions as backward's {rate / 1e9:.1f} G/s")
    headline(STEP, ", ".join(words))


if __name__ == "__main__":
    main()
