"""Weight files: .pth (nothing beyond tensors is made of them), .safetensors, either in shards by their index.

A training checkpoint holds more than weights. `open_weights` looks for them under the names that the field uses, the
averaged ones first where these are asked for, and says which it took.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UserError, first_ten

METADATA_KEY = "internimage"  # of a file's own header or entry: what an export of ours says of itself
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
AVERAGED = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model", "module_ema")
TRAINED = ("model", "state_dict", "module", "model_state_dict")  # `module` is DeepSpeed's
DEPTH = 3  # dictionaries within each other, as {"state_dict": {"model": ...}}

# What stands beside the weights in files of the tools around: settings, counters, records. None of it is imported or
# called; the reader puts something empty in the place of each.
HARMLESS = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "typing.Any"),
    *("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.set"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *("numpy.dtype", "numpy.ndarray", "numpy.float64", "numpy.float32", "numpy.int64", "numpy.bool_"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *("mmcv.utils.config.Config", "mmengine.config.config.Config", "mmengine.logging.history_buffer.HistoryBuffer"),
    *("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    *("deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum"),
)
HARMLESS_MAPPINGS = (
    *("collections.defaultdict", "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"),
    *("mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict", "ml_collections.config_dict.ConfigDict"),
)


class _Inert:
    """In the place of an object that is no weight: takes whatever it is made of, and keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __new__(cls, *_: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _InertMapping:
    """In the place of a mapping: torch fills no other class than its own three with entries."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Inert, name) for name in HARMLESS),
    *((_InertMapping, name) for name in HARMLESS_MAPPINGS),
]


@dataclass(frozen=True)
class WeightFile:
    """state: name -> tensor. chosen: which part of the file this is, "" where it holds nothing else. described: what an
    export of ours says of itself.
    """

    state: dict[str, Tensor]
    chosen: str = ""
    described: dict[str, Any] | None = None


def read_weights(path: str | Path, which: str = "ema") -> dict[str, Tensor]:
    """The entries of a weight file alone; see `open_weights`."""
    return open_weights(path, which).state


def open_weights(path: str | Path, which: str = "ema") -> WeightFile:
    """The weights in a file, on the CPU.

    path: a .safetensors, a .pth/.pt/.bin, the index of shards of either, or a folder that holds one of these.
    which: "ema" takes averaged weights where there are some, else the trained ones; "model" the trained ones alone.
    Raises UserError naming the file where it is missing, damaged, has no weights or more than `HARMLESS` beside them.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    if path.name.endswith(INDEX_SUFFIXES):
        return WeightFile(_sharded(path))
    content = _content(path)
    if path.suffix == ".safetensors":
        return WeightFile(content, described=_header(path))
    state, chosen = _chosen(content, which, path)
    if empty := [key for key, value in state.items() if value.numel() == 0]:
        raise UserError(
            f"{path}: {len(empty)} entries are empty ({first_ten(empty)}): ZeRO-3 left their values with the ranks; "
            "join these with the zero_to_fp32.py beside the checkpoint"
        )
    described = content.get(METADATA_KEY)
    return WeightFile(state, chosen, described if type(described) is dict else None)


def _content(path: Path) -> Any:
    """What is in the file. Raises UserError where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; each means that this file is not one
        if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise UserError(
                f"{path}: not a readable file of weights: it holds an object of {foreign[1]}, and nothing is made of "
                'what is not known to be harmless; save its weights alone, torch.save({"model": state_dict}, PATH)'
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable file of weights (tensors only are read): {reason}") from None


def _chosen(content: Any, which: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in `content`, and in words which of its entries that is."""
    names = (*AVERAGED, *TRAINED) if which == "ema" else TRAINED
    taken: list[str] = []
    for _ in range(DEPTH):
        if not isinstance(content, Mapping):
            break
        inner = next((name for name in names if isinstance(content.get(name), Mapping) and content[name]), None)
        if inner is None:
            if not (state := {key: value for key, value in content.items() if isinstance(value, Tensor)}):
                break
            missed = which == "ema" and taken and not set(taken) & set(AVERAGED)
            return state, ".".join(taken) + (" (no averaged weights beside it)" if missed else "")
        taken.append(inner)
        content = content[inner]
    held = first_ten([repr(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(
        f"{path}: a mapping of names to tensors was expected, at the top or under {', '.join(names)}; it holds {held}"
    )


def _header(path: Path) -> dict[str, Any] | None:
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    return json.loads(text) if text else None


def _sharded(index: Path) -> dict[str, Tensor]:
    listing = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    state: dict[str, Tensor] = {}
    for name in sorted(set(listing.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{index}: its shard {name!r} is missing")
        state.update(_content(shard))
    if absent := sorted(set(listing) - set(state)):
        raise UserError(f"{index}: {len(absent)} entries are in none of its shards: {first_ten(absent)}")
    return state


def _in_folder(folder: Path) -> Path:
    for pattern in (*(f"*{suffix}" for suffix in INDEX_SUFFIXES), "*.safetensors", "*.pth", "pytorch_model.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: several weight files ({first_ten([f.name for f in found])}); name one")
    raise UserError(f"{folder}: holds no .safetensors, .pth or pytorch_model.bin, and is no run")
