"""Checkpoints on the disk: what a complete one is, finding the newest, reading it by parameter. Needs no DeepSpeed
and no ranks.

    RUN/checkpoints/
        step-00001000/
            rank-00000.safetensors   kind/name -> flat fp32 values: param, exp_avg, exp_avg_sq, ema; buffers with rank 0
            rank-00001.safetensors
            index.json               name -> shape and [file, start, length] of every fragment
            state.json               step, counters, policy, sizes, class names and sets the run was saved with
            config.yaml
            manifest.json            every file, its size and digest; written last
        latest                       "step-00001000"
        .writing-step-00002000/      never read, deleted at the next start; .deleting-... alike

Any number of ranks at any ZeRO stage reads any range of any parameter, since a fragment is addressed by parameter and
position, not by rank. A folder gets its name by rename after its manifest is on the disk, and loses it by rename before
it is deleted, so nothing that a crash leaves looks like a checkpoint, and a `step-*` without a manifest is damaged.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.durable import file_sha256, write_durably
from data_pipeline.errors import UserError, first_ten
from data_pipeline.reading.order.course import samples_before
from pretrain import __version__
from pretrain.configuration import RunConfig, parse_config
from pretrain.training.checkpoint.trained_on import TrainedOn
from pretrain.training.segments import from_json

SCHEMA = 2
VERSIONS = {"1": "0.1.0"}  # of programs whose manifests did not name theirs, by schema
FOLDER, LATEST, BEST, WRITING, DELETING = "checkpoints", "latest", "best", ".writing-", ".deleting-"
LARGEST_MAPPED = 1 << 28  # bytes
AUTO = "auto"  # the best checkpoint where there is one, else the latest
MANIFEST, INDEX, STATE, CONFIG = "manifest.json", "index.json", "state.json", "config.yaml"


class DamagedError(UserError):
    """A checkpoint whose files are not what its manifest says."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def writing_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies until it is complete."""
    return checkpoints / f"{WRITING}{step_name(step)}"


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with its own digest in it."""
    return json.dumps({**manifest, "digest": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.partition("-")[2])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises DamagedError where it is not what was written, UserError where another program wrote it."""
        path = self.path / MANIFEST
        found = _read_json(path)
        digest = found.pop("digest", None)
        if digest not in (None, _digest(found)) or not isinstance(found.get("files"), dict):
            raise DamagedError(f"checkpoint file {path} does not have the digest that it says")
        if (schema := found.get("schema")) != SCHEMA:
            theirs = found.get("version") or VERSIONS.get(str(schema), f"of schema {schema!r}")
            raise (UserError if digest else DamagedError)(
                f"{path} was written by internimage-pretrain {theirs}; this is {__version__}, which does not read it. "
                f"End the run with {theirs}, or export its image model with that version (internimage export) and "
                "start a new run from it (initialize_from)"
            )
        return found

    @property
    def bytes(self) -> int:
        """Of all files that the manifest names."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @cached_property
    def index(self) -> dict[str, Any]:
        """{"parameters": {name: {"shape", "fragments": [[file, start, length], ...]}}, "buffers": [names]}"""
        return _read_json(self.path / INDEX)

    @cached_property
    def state(self) -> dict[str, Any]:
        return _read_json(self.path / STATE)

    @property
    def samples(self) -> int:
        """That the run had read when this was saved."""
        segments = from_json(self.state.get("segments", ()))
        return samples_before(segments, self.step) if segments else self.step * self.config.training.batch_size

    @cached_property
    def trained_on(self) -> TrainedOn:
        return TrainedOn.from_json(self.state["data"])

    @cached_property
    def config(self) -> RunConfig:
        return parse_config(yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8")), str(self.path / CONFIG))

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Sizes and digests of every `parts`-th file from the `part`-th on (the ranks share the work: were each to look
        at all files, 256 ranks would ask a shared file system 66,000 times). Raises DamagedError naming the file.
        """
        for number, (name, expected) in enumerate(sorted(self.manifest["files"].items())):
            if number % parts != part:
                continue
            path = self.path / name
            if not path.is_file():
                raise DamagedError(f"checkpoint {self.path}: {name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise DamagedError(
                    f"checkpoint {self.path}: {name} has {path.stat().st_size} bytes, "
                    f"its manifest says {expected['bytes']}"
                )
            if file_sha256(path) != expected["sha256"]:
                raise DamagedError(f"checkpoint {self.path}: {name} does not have the digest its manifest says")

    @property
    def title(self) -> str:
        """As people are told of it: `step 500 (best)`."""
        best = self.path.parent / BEST
        chosen = best.is_file() and best.read_text().strip() == self.path.name
        return f"step {self.step}{' (best)' if chosen else ''}"

    def weights_title(self, which: str) -> str:
        """What `load(which)` gives: a run without an EMA has its trained weights alone."""
        kept = any(entry["ema"] for entry in self.index["parameters"].values())
        if which == "ema":
            return "EMA weights" if kept else "trained weights (the run keeps no EMA)"
        return "trained weights"

    def load(self, which: str = "ema", prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Full fp32 tensors by the task's state-dict names (parameters and buffers), every digest checked.

        which: "ema" (the EMA of the weights; a parameter without one, as a frozen one, itself) or "model".
        prefixes: of the names that are wanted; little more memory is used than their values take.
        Raises DamagedError.
        """
        if which not in ("ema", "model"):
            raise UserError(f"weights {which!r}: choose 'ema' or 'model'")
        self.verify()
        files, weights, mapped = OpenFiles(), {}, 0
        for name, entry in self.index["parameters"].items():
            if not name.startswith(prefixes):
                continue
            kind = "ema" if which == "ema" and entry["ema"] else "param"
            flat = torch.empty(torch.Size(entry["shape"]).numel(), dtype=torch.float32)
            mapped += flat.nbytes
            if mapped > LARGEST_MAPPED:  # what is read stays in memory while its file is open
                files, mapped = OpenFiles(), flat.nbytes
            self.read_into(flat, kind, name, 0, files)
            weights[name] = flat.view(entry["shape"])
        for name, file in self.index["buffers"].items():
            if name.startswith(prefixes):
                weights[name] = files.get(self.path / file).get_tensor(f"buffer/{name}")
        return weights

    def outline(self) -> dict[str, Tensor]:
        """Every parameter by name, as a tensor of its shape on the meta device: no file is read."""
        shapes = {name: entry["shape"] for name, entry in self.index["parameters"].items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def read_into(self, target: Tensor, kind: str, name: str, start: int, files: "OpenFiles") -> None:
        """Fill `target` (1-D) with values [start, start + len) of `kind` of parameter `name`.

        kind: param, exp_avg, exp_avg_sq, ema. Raises DamagedError where the fragments do not cover the range.
        """
        end, filled = start + target.numel(), 0
        for file, first, length in self.index["parameters"][name]["fragments"]:
            low, high = max(start, first), min(end, first + length)
            if low < high:
                piece = files.get(self.path / file).get_slice(f"{kind}/{name}")[low - first : high - first]
                target.narrow(0, low - start, high - low).copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise DamagedError(f"checkpoint {self.path}: {kind} of {name} is not covered by its fragments")


class OpenFiles:
    """Safetensors files opened once. Nothing is unpickled."""

    def __init__(self) -> None:
        self._open: dict[Path, safe_open] = {}

    def get(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedError(f"checkpoint file {path} cannot be read: {error}") from None
        return self._open[path]


def is_run(path: Path) -> bool:
    """Whether this is a run or checkpoint folder, rather than one of weights."""
    return (path / FOLDER).is_dir() or (path / MANIFEST).is_file()


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint path belongs to: RUN itself, or RUN of RUN/checkpoints/step-00001000."""
    path = Path(checkpoint).resolve()
    return path.parent.parent if path.parent.name == FOLDER else path


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """Those that have a manifest, newest first."""
    return [checkpoint for checkpoint in _all_checkpoints(run) if (checkpoint.path / MANIFEST).is_file()]


def resumable_checkpoints(run: Path) -> list[Checkpoint]:
    """What a run may go on from, newest first: those that are complete, and newer ones that have lost their manifest,
    which are to be refused, not to be passed over in silence.
    """
    complete = complete_checkpoints(run)
    newest = complete[0].step if complete else -1
    return [checkpoint for checkpoint in _all_checkpoints(run) if checkpoint.step > newest] + complete


def _all_checkpoints(run: Path) -> list[Checkpoint]:
    found = [Checkpoint(path) for path in (run / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def find_checkpoint(path: Path, choice: str = LATEST) -> Checkpoint:
    """The checkpoint that `choice` means in a run folder; a checkpoint folder means itself.

    choice: LATEST (the run's `latest`, else its newest complete one), BEST, the number of a step, or AUTO: the best
    where an evaluation has chosen one, else the latest. Raises UserError where there is none.
    """
    if (path / MANIFEST).is_file():
        if choice not in (AUTO, LATEST):
            raise UserError(f"{path} is one checkpoint; to choose {choice!r}, name its run folder")
        return Checkpoint(path)
    best = _named(path, BEST)
    if choice == BEST and best is None:
        raise UserError(
            f"{path}: no evaluation has chosen a best checkpoint; there are {_steps(path) or 'none at all'}"
        )
    if choice.isdecimal():
        found = [checkpoint for checkpoint in complete_checkpoints(path) if checkpoint.step == int(choice)]
        if not found:
            raise UserError(
                f"{path}: no complete checkpoint of step {choice}; there are {_steps(path) or 'none at all'}"
            )
        return found[0]
    if choice not in (AUTO, BEST, LATEST):
        raise UserError(f"checkpoint {choice!r}: choose {BEST}, {LATEST} or the number of a step")
    chosen = best if best is not None and choice != LATEST else _named(path, LATEST)
    if chosen is not None:
        return chosen
    if not (complete := complete_checkpoints(path)):
        raise UserError(
            f"{path}: no complete checkpoint here, nor under {path / FOLDER}; name a run or checkpoint folder"
        )
    return complete[0]


def _named(run: Path, pointer: str) -> Checkpoint | None:
    """What `latest` or `best` names; None without it, or where its folder is gone."""
    file = run / FOLDER / pointer
    if not file.is_file():
        return None
    checkpoint = Checkpoint(run / FOLDER / file.read_text().strip())
    if checkpoint.path.is_dir() and not (checkpoint.path / MANIFEST).is_file():
        raise DamagedError(f"checkpoint {checkpoint.path}: {MANIFEST} is missing; name another checkpoint folder")
    return checkpoint if checkpoint.path.is_dir() else None


def _steps(run: Path) -> str:
    return first_ten([f"step {checkpoint.step}" for checkpoint in complete_checkpoints(run)])


def load_weights(path: Path | str, which: str = "ema", choice: str = LATEST) -> tuple[dict[str, Tensor], RunConfig]:
    """`Checkpoint.load` of what `find_checkpoint` finds, and the run's configuration."""
    checkpoint = find_checkpoint(Path(path), choice)
    return checkpoint.load(which), checkpoint.config


def describe_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a checkpoint holds, after checking every digest; for people."""
    checkpoint = find_checkpoint(Path(path))
    checkpoint.verify()
    files, parameters = checkpoint.manifest["files"], checkpoint.index["parameters"]
    sizes = [torch.Size(entry["shape"]).numel() for entry in parameters.values()]
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "saved_with": {"ranks": checkpoint.state["world_size"], "zero_stage": checkpoint.state["zero_stage"]},
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "averaged": sum(entry["ema"] for entry in parameters.values()),
        "buffers": len(checkpoint.index["buffers"]),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "files": files,
    }


def mark_best(run: Path, step: int) -> None:
    """`best` names a checkpoint that an evaluation chose; it is never rotated away and never moves `latest`."""
    target = run / FOLDER / step_name(step)
    if not (target / MANIFEST).is_file():
        raise UserError(f"{target}: not a complete checkpoint, so it cannot be the best one")
    write_durably(run / FOLDER / BEST, target.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"checkpoint file {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"checkpoint file {path}: an object was expected")
    return content
