"""Does the recipe for 427M pairs run, whole, where memory is short? InternImage-H, or B, on one machine's CPU.

    python benchmarks/real_steps.py h|b [--image-size 64] [--batch 4] [--steps 2] [--unbroken] [--folder FOLDER]
                                    [KEY=VALUE ...]

Runs the ordinary command with configs/internimage_h_m3i_427m.yaml (B: the same with model.name=internimage_b): 2 ranks,
ZeRO-3, bf16, activation checkpointing, the whole M3I-style objective with a text tower, AdamW, fp32 average and
teacher. Beside H the tower has 12 layers of 512: the recipe's 24 of 1024 are more than 24 GiB hold. Adam's moments and
the average lie in mapped files (training.offload_folder). The run makes `--steps` steps, saves and stops; the same
command goes on from there for as many again; --unbroken makes all of them in one go too, and compares the losses. The
rate is RATE, unscaled: the recipe's, scaled from its batch of thousands to 4, is below half a bf16 ulp of the weights,
so that they would hardly move and the comparison would show little. Data: OpenMoji drawings.

Memory is sampled every second over all processes together, from their proportional shares (smaps_rollup): anonymous,
which must fit, and mapped files, which the system may drop. A watchdog ends the run, not the machine, below
FLOOR of available memory; the ranks offer themselves first to the system's killer. The folder must lie on a disk, not
in memory (tmpfs), with room for the files and two checkpoints, one of them being written: about 55 GB for H, 24 GB for
B. It is deleted at the end. Results: benchmarks/results/real_steps_{h,b}.json, written only where every start ended as
it should; otherwise the exit code is 1.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from machine import machine

from data_pipeline.errors import STOPPED
from data_pipeline.preparation.sources.openmoji import build_openmoji
from pretrain.configuration import load_config
from pretrain.training.checkpoint.disk import describe_checkpoint, find_checkpoint
from pretrain.training.logging.record import environment

CONFIG, RANKS = "internimage_h_m3i_427m", 2
FLOOR = 1.2e9  # bytes of available memory below which the run is ended
RATE = 1e-4
DISK_GB = {"h": 55.0, "b": 24.0}  # 12 bytes a parameter in files, twice 16 in checkpoints, and what both round up to
GIGABYTE = 1e9


class Memory:
    """Peaks of a process and all below it, together, by phase; a context around them."""

    def __init__(self, root: int) -> None:
        self.root, self.phase, self.ended = psutil.Process(root), "start", False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peaks: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            here = {"anonymous": 0.0, "mapped_files": 0.0}
            family = self._family()
            for process in family:
                for line in _lines(f"/proc/{process.pid}/smaps_rollup"):
                    name, _, rest = line.partition(":")
                    if name in ("Pss_Anon", "Pss_Shmem"):
                        here["anonymous"] += 1024 * int(rest.split()[0]) / GIGABYTE
                    elif name == "Pss_File":
                        here["mapped_files"] += 1024 * int(rest.split()[0]) / GIGABYTE
            available = psutil.virtual_memory().available
            here["together"] = here["anonymous"] + here["mapped_files"]
            peaks = self.peaks.setdefault(self.phase, {})
            for name, value in here.items():
                peaks[name] = max(peaks.get(name, 0.0), round(value, 3))
            lowest = peaks.get("machine_available_lowest", float("inf"))
            peaks["machine_available_lowest"] = min(lowest, round(available / GIGABYTE, 3))
            if available < FLOOR:
                self.ended = True
                for process in family:
                    with contextlib.suppress(psutil.Error):  # it has just ended by itself
                        process.kill()
                return

    def _family(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return []


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # the process is gone
        return []


def _rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a JSON-lines file that another process may be writing."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _first_to_go() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")


def command(chosen: argparse.Namespace, shards: Path, run: Path, offload: Path, stop_after: int) -> list[str]:
    overrides = {
        "model.name": f"internimage_{chosen.model}",
        "data.sources": f"[{{path: {shards}}}]",
        "data.image_size": chosen.image_size,
        "data.workers": 0,
        "schedule.warmup_steps": 0,  # the recipe's 5,000 would leave these few steps without a rate
        "optimizer.lr": RATE,
        "optimizer.lr_batch": "null",
        "training.batch_size": chosen.batch,
        "training.zero_stage": 3,
        "training.offload_folder": offload,
        "training.log_every": 1,
        "training.stop_after": stop_after,
        "training.policy.hang_seconds": 7200,
        "training.policy.grace_seconds": 7200,
        "checkpoint.every_minutes": "null",
        "checkpoint.every_steps": "null",
        "checkpoint.keep": 1,
        # Small pieces: what is gathered, and the fp32 gradients of one piece, at a time.
        "deepspeed.zero_optimization.sub_group_size": 50_000_000,
        "deepspeed.zero_optimization.stage3_max_live_parameters": 50_000_000,
        "deepspeed.zero_optimization.stage3_max_reuse_distance": 0,
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size": 20_000_000,
        "deepspeed.zero_optimization.reduce_bucket_size": 30_000_000,
        **({"task.text.name": "null"} if chosen.model == "h" else {}),
    }
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    program = [sys.executable, "-m", "launch", "pretrain", CONFIG, "--output", str(run), "--processes", str(RANKS)]
    return [*program, *pairs, *chosen.overrides]


def go(argv: list[str], run: Path, log: Path) -> dict[str, Any]:
    """One start of the command, to its exit: times, losses, peaks."""
    began, before = time.time(), len(_rows(run / "metrics.jsonl"))
    with open(log, "ab") as sink:
        process = subprocess.Popen(argv, stdout=sink, stderr=sink, preexec_fn=_first_to_go)
        with Memory(process.pid) as memory:
            while process.poll() is None:
                time.sleep(0.5)
                started = any(
                    e["time"] >= began for e in _rows(run / "events.jsonl") if e["kind"] in ("start", "resume")
                )
                done = len(_rows(run / "metrics.jsonl")) - before
                wanted = int(next(a for a in argv if a.startswith("training.stop_after=")).partition("=")[2])
                last = done and _rows(run / "metrics.jsonl")[-1]["step"] >= wanted
                memory.phase = "save" if last else "steps" if started else "start"
    ended = time.time()
    events = [event for event in _rows(run / "events.jsonl") if event["time"] >= began]
    steps = [row for row in _rows(run / "metrics.jsonl") if row["time"] >= began]
    result: dict[str, Any] = {
        "exit_code": process.returncode,
        "ended_by_watchdog": memory.ended,
        "peak_gb": memory.peaks,
    }
    for event in events:
        if event["kind"] in ("start", "resume"):
            result[f"{event['kind']}_seconds"] = round(event["time"] - began, 1)
        if event["kind"] == "checkpoint" and steps:
            result["save_seconds"] = round(event["time"] - steps[-1]["time"], 1)
            result["checkpoint_gb"] = round(event["bytes"] / GIGABYTE, 3)
    named = ("step", "loss", "lr", "grad_norm", "step_ms", "data_wait_ms", "memory_mb", "tflops_per_rank")
    result["steps"] = [{k: v for k, v in row.items() if k in named or k.startswith("loss/")} for row in steps]
    result["whole_seconds"] = round(ended - began, 1)
    if process.returncode != STOPPED:
        result["log_tail"] = log.read_text(errors="replace")[-3000:]
    return result


def check_disk(folder: Path, model: str) -> None:
    """Ends the program with a word where `folder` cannot hold what a run leaves there."""
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    within = [parent for parent in (folder.resolve(), *folder.resolve().parents) if str(parent) in kinds]
    if within and kinds[str(within[0])] in ("tmpfs", "ramfs"):
        sys.exit(f"{folder} lies in memory ({kinds[str(within[0])]}), which this benchmark measures; give a --folder")
    free = shutil.disk_usage(folder).free / GIGABYTE
    if free < DISK_GB[model]:
        sys.exit(f"{folder} has {free:.1f} GB free, {DISK_GB[model]:.0f} GB are needed; give another --folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("h", "b"))
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="before the stop, and again after it")
    parser.add_argument("--unbroken", action="store_true", help="also without the stop, to compare the losses")
    parser.add_argument("--folder", type=Path, help="where shards, run and files go; a temporary one by default")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_intermixed_args()
    check_disk(chosen.folder or Path(tempfile.gettempdir()), chosen.model)
    about = machine()
    place = Path(tempfile.mkdtemp(prefix="real-steps-", dir=chosen.folder))
    result: dict[str, Any] = {}
    try:
        shards = build_openmoji(place / "shards", image_size=max(96, chosen.image_size), drawings_a_concept=1)["train"]
        run = place / "run"
        halves = []
        for stop_after in (chosen.steps, 2 * chosen.steps):
            halves.append(go(command(chosen, shards, run, place / "offload", stop_after), run, place / "log"))
            print(json.dumps(halves[-1], indent=1), flush=True)
            if halves[-1]["exit_code"] != STOPPED:
                break
        result = {"stopped_and_saved": halves[0], "resumed": halves[1] if len(halves) > 1 else None}
        if len(halves) > 1 and halves[1]["exit_code"] == STOPPED:
            found = describe_checkpoint(run)
            result["checkpoint"] = {k: found[k] for k in ("step", "parameters", "averaged", "tensors", "bytes")}
            result["checkpoint"]["adam_steps"] = find_checkpoint(run).state["adam_steps"]
        if chosen.unbroken and halves[-1]["exit_code"] == STOPPED:
            shutil.rmtree(run / "checkpoints")  # described above; the disk has no room for one run's more
            other = place / "unbroken"
            whole = go(command(chosen, shards, other, place / "offload", 2 * chosen.steps), other, place / "log")
            halves.append(whole)
            pieces = [row["loss"] for half in halves[:2] for row in half["steps"]]
            result["unbroken"] = whole | {"losses_equal": pieces == [row["loss"] for row in whole["steps"]]}
            print(json.dumps(result["unbroken"], indent=1), flush=True)
        argv = command(chosen, Path("SHARDS"), Path("RUN"), Path("OFFLOAD"), chosen.steps)
        result |= {"argv": ["internimage", *argv[3:]], "recipe": recipe(argv)}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if any(half["exit_code"] != STOPPED for half in halves):
        sys.exit("a start did not stop as asked, after saving (its log is above): no result was written")
    if chosen.unbroken and not result["unbroken"]["losses_equal"]:
        sys.exit("the unbroken run's losses are others: no result was written")
    del about["threads"]  # of this process; the ranks are others
    found = environment(RANKS, "cpu")
    result["machine"] = about | {key: found[key] for key in ("ranks", "packages")}
    result["command"] = ["python", "benchmarks/real_steps.py", *sys.argv[1:]]
    target = Path(__file__).parent / "results" / f"real_steps_{chosen.model}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)


def recipe(argv: list[str]) -> dict[str, Any]:
    config = load_config(CONFIG, [a for a in argv if "=" in a])
    training, adam = config.training, config.optimizer
    return {
        "model": config.model.name,
        "objective": f"{config.task.preset}: intra, inter, text, category, weights {config.task.weights}",
        "text_tower": config.task.text.model_dump(),
        "decoder": config.task.decoder.model_dump(),
        "optimizer": f"AdamW {adam.betas}, weight decay {adam.weight_decay}, clip {adam.clip_grad}, lr {adam.lr}",
        "average": f"fp32, momentum {training.ema.teacher_start} to {training.ema.teacher_end}",
        "teacher": "image encoder and projector, run every step in bf16, partitioned",
        "precision": training.precision,
        "zero_stage": training.zero_stage,
        "recompute": config.model.model_dump()["recompute"],
        "offload": "Adam's moments and the average in mapped files; weights, gradients, teacher in memory",
        "image_size": config.data.image_size,
        "batch_size": training.batch_size,
        "context_length": config.data.context_length,
    }


if __name__ == "__main__":
    main()
