"""Times of calls by turns: CUDA graphs between events where there is a GPU, plain calls on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], object]


def milliseconds(run: Run, calls: int, device: torch.device) -> float:
    """Time of one call, from `calls` of them."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) * 1e3 / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def calls_for(one: float, turn: float) -> int:
    """Calls that fill a turn of so many milliseconds where one takes `one`."""
    return max(1, min(1000, round(turn / max(one, 1e-3))))


def captured(runs: Sequence[Run], device: torch.device) -> tuple[Run, str]:
    """(all runs in a row, how): "graph" replays them without Python's part of the time, "calls" where capture fails."""

    def every() -> None:
        for run in runs:
            run()

    if device.type != "cuda":
        every()
        return every, "calls"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every()
        every()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            every()
    except RuntimeError:
        torch.cuda.synchronize()
        return every, "calls"
    return graph.replay, "graph"


def compare(
    contenders: Mapping[str, Sequence[Run]], device: torch.device, rounds: int, turn: float = 10.0
) -> dict[str, dict[str, Any]]:
    """Name -> {ms, quartiles, timed} of one run, in turns of `turn` milliseconds; one that fails -> {error}.

    A contender is a row of runs on inputs of their own, so that a cache does not keep what memory has to bring.
    """
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Run, int]] = {}
    for name, runs in contenders.items():
        try:
            call, how = captured(runs, device)
            milliseconds(call, 1, device)
            ready[name] = call, calls_for(milliseconds(call, 1, device), turn)
            found[name] = {"timed": how}
        except Exception as error:  # a peer may raise anything
            found[name] = {"error": (str(error).splitlines() or [""])[0][:200] or type(error).__name__}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for name, (call, calls) in ready.items():
            spent = milliseconds(call, calls, device) / len(contenders[name])
            if number > 0:  # the first turn warms up
                times[name].append(spent)
    for name, spent in times.items():
        low, middle, high = statistics.quantiles(spent, method="inclusive") if len(spent) > 1 else [spent[0]] * 3
        found[name] |= {"ms": round(middle, 5), "quartiles": [round(low, 5), round(high, 5)]}
    return found


def ratios(found: Mapping[str, Mapping[str, Any]], base: str = "ours") -> dict[str, float]:
    """Name -> its time over the base's, where both were timed."""
    if "ms" not in found.get(base, {}):
        return {}
    own = found[base]["ms"]
    return {name: round(its["ms"] / own, 3) for name, its in found.items() if name != base and "ms" in its}


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), 5, device) for _ in range(12)]
    return 2 * source.numel() / statistics.median(times[2:]) * 1e3
