"""DeepSpeed on one GPU: ZeRO 0 to 3 in bf16 against a plain loop; a save, a SIGKILL, a resume.

    python benchmarks/gpu/zero_stages.py [--out FOLDER]

Twenty steps of a small InternImage with the whole M3I-style objective (teacher, text tower, drop of half the image)
through pretrain.training, at every stage, and the same twenty in plain PyTorch: fp32 masters, bf16 module, AdamW, the
average, the teacher filled from it.

Tolerance: activations and gradients have 8 bits, so a master that differs in its last bit may round to another weight,
and AdamW takes the sign of a gradient near zero at face value; sums whose order is not fixed (atomics in the
operator's backward pass) start this. So losses agree within LOSS, relatively, and the way that the weights have gone,
norm of the difference over norm of the way, within WAY; the plain loop run twice is the first row, and shows how much
of that is the machine's own. A wrong rate, decay, clip or average is far outside: it moves the way by its full share.

A child process is killed by SIGKILL in step 13 (saves after 5, 10, 15, 20); the resumed run must have every step once
and end where the unbroken one ends: to the bit on a CPU, on a GPU within the same tolerance (its row says whether to
the bit). fp16 with its loss scale runs at stages 0 and 2 on a GPU: losses stay finite and the run ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from needs import packages
from record import headline, record, small
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.configuration import RunConfig

STEP = "zero"
LOSS, WAY = 0.02, 0.15
KILLED_AT, KILLED_STAGE = 13, 2
Weights = dict[str, Tensor]


@dataclass
class Curve:
    """What a run leaves: losses of its steps, weights and their average in fp32 on the CPU."""

    losses: list[float]
    weights: Weights
    average: Weights


def plain(config: RunConfig) -> tuple[Curve, Weights]:
    """The run in plain PyTorch on this machine's device; and the weights before its first step."""
    from training_runs import CLASSES, MadeUpReader

    from pretrain.tasks.module import StepKeys
    from pretrain.tasks.task import module_of
    from pretrain.training.distributed import seed_step
    from pretrain.training.parameter_groups import parameter_groups
    from pretrain.training.schedule import ema_decay, resolve_schedule
    from pretrain.training.zero.engine import compute_dtype

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reader, dtype, size = MadeUpReader(config), compute_dtype(config.training.precision), config.training.batch_size
    schedule = resolve_schedule(config.schedule, config.optimizer, batch_size=size, epoch_samples=reader.epoch_samples)
    seed_step(config.training.seed, -1, 0)
    module = module_of(config, classes=CLASSES)
    teacher = module.teacher()
    assert teacher is not None
    module.to(device, dtype)
    teacher.to(device, dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float() for name, p in trained.items()}
    first = {name: master.cpu().clone() for name, master in masters.items()}
    average = {name: master.clone() for name, master in masters.items()}
    groups = parameter_groups({n: tuple(p.shape) for n, p in trained.items()}, config.optimizer, module.backbone())
    adam = torch.optim.AdamW(
        [{"params": [masters[n] for n in group.names], "weight_decay": group.weight_decay} for group in groups],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )
    batches, losses = reader.batches(0), []
    own = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(average[name])
    for step in range(schedule.total_steps):
        seed_step(config.training.seed, step, 0)
        for group, merged in zip(adam.param_groups, groups, strict=True):
            group["lr"] = schedule.lr(step) * merged.lr_scale
        batch, keys = next(batches).to(device), StepKeys(config.training.seed, step, 0)
        out = module(batch, keys, module.teacher_targets(teacher, batch, keys))
        out.total.backward()
        for name, parameter in trained.items():
            masters[name].grad = torch.zeros_like(masters[name]) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), config.optimizer.clip_grad or torch.inf)
        adam.step()
        decay = ema_decay(step, schedule.total_steps, config.training.ema, teacher=True)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
                average[name].lerp_(masters[name], 1 - decay)
            for name, parameter in own.items():
                parameter.copy_(average[name])
        losses.append(float(out.total.detach()))
    ends = [{name: value.detach().cpu() for name, value in which.items()} for which in (masters, average)]
    return Curve(losses, *ends), first


def trained_by_the_product(config: RunConfig, output: Path) -> Curve:
    """The same through pretrain.training, in this process; goes on where `output` holds a checkpoint."""
    from training_runs import made_up

    from pretrain.training import run

    code = run(made_up(config), output)
    if code != 0:
        raise RuntimeError(f"training ended with exit code {code}")
    return curve_of(output)


def curve_of(output: Path) -> Curve:
    from pretrain.training.checkpoint.disk import load_weights

    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise RuntimeError(f"{output}: steps are missing or repeated: {[row['step'] for row in rows]}")
    return Curve([float(row["loss"]) for row in rows], load_weights(output, "model")[0], load_weights(output, "ema")[0])


def way(one: Weights, other: Weights, first: Weights) -> float:
    """Norm of the difference over norm of the way that `other` has gone from `first`."""
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in first)
    gone = sum(float((other[name] - first[name]).double().square().sum()) for name in first)
    return (apart / gone) ** 0.5


def compared(one: Curve, other: Curve, first: Weights) -> dict[str, Any]:
    """Differences of `one` from `other`, and whether they are within the tolerance."""
    pairs = list(zip(one.losses, other.losses, strict=True))
    loss = max(abs(a - b) / abs(b) for a, b in pairs)
    weights, average = way(one.weights, other.weights, first), way(one.average, other.average, first)
    bits = one.losses == other.losses and all(torch.equal(one.weights[n], other.weights[n]) for n in first)
    return {
        "loss_first": one.losses[0],
        "loss_last": one.losses[-1],
        "loss_difference": loss,
        "weights_difference": weights,
        "average_difference": average,
        "equal_to_the_bit": bits,
        "within": loss <= LOSS and max(weights, average) <= WAY,
    }


def start_killed(output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--be-killed", str(output)])


def be_killed(output: Path) -> None:
    from training_runs import made_up, tiny

    from pretrain.training import run

    run(made_up(tiny(zero_stage=KILLED_STAGE), killed_at=KILLED_AT), output)
    raise SystemExit("Error: the kill did not come")


class Check:
    """The comparisons, a row each; `wrong` names what was outside the tolerance."""

    def __init__(self, folder: Path, stages: tuple[int, ...]) -> None:
        self.folder, self.stages = folder, stages
        self.wrong: list[str] = []
        self.done: list[str] = []

    def judge(self, name: str, row: dict[str, Any]) -> None:
        record(STEP, {"run": name, **row, "tolerance": {"loss": LOSS, "way": WAY}})
        self.done.append(name)
        if not row["within"]:
            self.wrong.append(name)
        headline(STEP, f"outside the tolerance: {', '.join(self.wrong)}" if self.wrong else ", ".join(self.done))

    def run(self) -> None:
        from training_runs import tiny

        killed = start_killed(self.folder / "killed")
        try:
            reference, first = plain(tiny())
            if not small():
                self.judge("plain loop again", compared(plain(tiny())[0], reference, first))
            found: dict[int, Curve] = {}
            for stage in self.stages:
                # DeepSpeed's stage 3 replaces torch's linear for the rest of the process, by one that rounds to bf16
                # once more: everything else comes before.
                if stage == 3:
                    self.resume(killed, found[KILLED_STAGE], first)
                    self.half_precision()
                started = time.perf_counter()
                found[stage] = trained_by_the_product(tiny(zero_stage=stage), self.folder / f"stage{stage}")
                row = compared(found[stage], reference, first)
                self.judge(f"ZeRO {stage}", row | {"seconds": round(time.perf_counter() - started, 1)})
        finally:
            killed.kill()
            killed.wait()

    def resume(self, killed: subprocess.Popen[bytes], unbroken: Curve, first: Weights) -> None:
        from training_runs import tiny

        output = self.folder / "killed"
        if (status := killed.wait(timeout=120)) != -9:
            record(STEP, {"run": "killed", "error": f"the run that should be killed ended with {status}"})
            self.wrong.append("kill")
            return
        before = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
        row = compared(trained_by_the_product(tiny(zero_stage=KILLED_STAGE), output), unbroken, first)
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        where = [event["step"] for event in events if event["kind"] == "resume"]
        row["within"] &= where in ([5], [10]) and (torch.cuda.is_available() or row["equal_to_the_bit"])
        self.judge("killed and resumed", row | {"checkpoints_at_the_kill": before, "resumed_at": where})

    def half_precision(self) -> None:
        """fp16 at stages 0 and 2 on a GPU; DeepSpeed refuses it on a CPU."""
        from training_runs import tiny

        for stage in (0, 2) if torch.cuda.is_available() else ():
            name = f"fp16 ZeRO {stage}"
            try:
                found = trained_by_the_product(tiny(zero_stage=stage, precision="fp16"), self.folder / name)
            except Exception as error:
                self.judge(name, {"error": f"{type(error).__name__}: {error}", "within": False})
                continue
            finite = all(abs(loss) < 1e4 for loss in found.losses)  # also false for NaN
            self.judge(name, {"loss_first": found.losses[0], "loss_last": found.losses[-1], "within": finite})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--be-killed", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="stages 2 and 3")
    options = parser.parse_args()
    if options.be_killed is not None:
        return be_killed(options.be_killed)
    with packages(STEP), tempfile.TemporaryDirectory() as folder:
        from pretrain.training.zero.engine import import_deepspeed

        import_deepspeed()
        check = Check(Path(folder), (2, 3) if small() else (0, 1, 2, 3))
        check.run()
    if check.wrong:
        raise SystemExit(f"Error: outside the tolerance: {', '.join(check.wrong)}")
    headline(STEP, f"equal a plain loop in bf16: {', '.join(check.done)}")


if __name__ == "__main__":
    main()
