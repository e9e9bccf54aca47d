"""A plan for people: what `launch.planning.plan_run` gives, as lines."""

from typing import Any

from launch.display import columns

_SUMS = ("trainable", "frozen", "teacher")
_NAMES = ("parameters", "gradients", "optimizer", "average", "teacher", "buckets", "activations", "update", "total")


def as_text(result: dict[str, Any]) -> str:
    sizes = result["parameters"]
    total = sizes["trainable"] + sizes["frozen"]
    parts = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items() if k not in _SUMS and v > 1e5)
    recompute = result["recompute"]
    recomputed = f"{recompute['budget_gb']:g} GB of activations" if isinstance(recompute, dict) else recompute
    head = [
        f"{total / 1e6:.1f} M parameters ({parts}); the teacher's copy has {sizes['teacher'] / 1e6:.1f} M",
        f"{result['gpus']} ranks, micro-batch {result['micro_batch']}, {result['precision']}, recompute "
        f"{recomputed}: {result['activations_per_sample'] / 1e6:.0f} MB of activations a sample",
        "",
        "GB a rank, estimated; total: the larger one of backward pass and update. GB sent and exposed seconds a step:",
    ]
    rows = [
        [
            f"ZeRO {stage['stage']}{'*' if stage['stage'] == result['configured_stage'] else ' '}",
            *(f"{stage[name] / 1e9:.2f}" for name in _NAMES),
            {True: "fits", False: "too much", None: ""}[stage["fits"]],
            "-" if stage["largest_micro_batch"] is None else str(stage["largest_micro_batch"]),
            f"{stage['sent'] / 1e9:.2f}",
            _range(stage["exposed_seconds"], ".3f"),
        ]
        for stage in result["stages"]
    ]
    heads = ["EMA" if name == "average" else name for name in _NAMES]
    table = columns(rows, ("", *heads, "", "largest micro-batch", "sent", "exposed"))
    configured = next(stage for stage in result["stages"] if stage["stage"] == result["configured_stage"])
    beside = (
        f"Beside that, a rank as configured: {configured['host'] / 1e9:.2f} GB of the machine's memory (what is "
        f"offloaded, the copy for asynchronous checkpoints), {configured['files'] / 1e9:.2f} GB of files"
    )
    tail = [_advice(result), _time(result), *_scaling(result), _storage(result), _divisors(result)]
    assumed = ["Assumed:", *(f"  {line}" for line in result["assumptions"])] if result["assumptions"] else []
    return "\n".join([*head, table, "* configured", beside, "", *tail, *assumed])


def _range(pair: list[float] | None, form: str) -> str:
    if pair is None:
        return "-"
    low, high = (format(value, form) for value in sorted(pair))
    return low if low == high else f"{low} to {high}"


def _advice(result: dict[str, Any]) -> str:
    if result["device_memory"] is None:
        return "Whether that fits, and what is fastest: name the devices (--gpu h100, or --memory)."
    room = f"{result['device_memory'] / 1e9:.0f} GB, of which {result['usable_share']:.0%} are planned with"
    if result["advice"] is None:
        return f"Nothing fits in {room}: use more devices, model.recompute, or offloading."
    advice = result["advice"]
    kind = "First as fast as any" if advice["exposed_seconds"] is not None else "Smallest"
    return (
        f"{kind} that fits in {room}: training.zero_stage={advice['zero_stage']} "
        f"training.accumulation={advice['accumulation']}"
    )


def _time(result: dict[str, Any]) -> str:
    flops, executed = result["flops_per_sample"] / 1e9, result["executed_flops_per_sample"] / 1e9
    work = f"{flops:.1f} GFLOP a sample of the model's"
    if executed > flops:
        work += f", {executed:.1f} executed with recomputation"
    if result["images_per_second"] is None:
        return f"{work}. Days: name the devices (--gpu), or give --peak and --mfu."
    speed = f"{work}; {_range(result['images_per_second'], '.0f')} images/s as configured"
    if result["days"] is None:
        return f"{speed}. Days: the size of an epoch is not known here; give --samples."
    return f"{speed}, {result['samples']:,} samples in {_range(result['days'], '.2f')} days, if no step waits for data."


def _scaling(result: dict[str, Any]) -> list[str]:
    if len(result["scaling"]) < 2:
        return []
    rows = [
        [
            *(str(row[name]) for name in ("gpus", "zero_stage", "accumulation", "micro_batch")),
            f"{row['total'] / 1e9:.1f}",
            _range(row["exposed_seconds"], ".3f"),
            _range(row["days"], ".2f"),
        ]
        for row in result["scaling"]
    ]
    heads = ("GPUs", "ZeRO", "accumulation", "micro-batch", "GB a rank", "exposed s a step", "days")
    return ["", columns(rows, heads), ""]


def _storage(result: dict[str, Any]) -> str:
    each, kept, files = result["checkpoint_bytes"] / 1e9, result["checkpoints_kept"], result["files_a_save"]
    words = [f"Storage: {each:.1f} GB a checkpoint in {files} files, {each * kept:.1f} GB for {kept} at once"]
    if result["data_bytes"]:
        words.append(f"shards {result['data_bytes'] / 1e9:.1f} GB")
    if result["data_bytes_per_second"]:
        words.append(f"read at {_range([v / 1e6 for v in result['data_bytes_per_second']], '.0f')} MB/s")
    cores = f"{result['cores_per_rank']} cores a rank by data.workers"
    return "; ".join([*words, f"{cores} (`internimage inspect loader` measures what they read)"]) + "."


def _divisors(result: dict[str, Any]) -> str:
    near = [n for n in result["divides_the_batch"] if result["gpus"] / 4 <= n <= result["gpus"] * 4]
    return f"Numbers of ranks that divide the batch: {', '.join(map(str, near[:12]))}."
