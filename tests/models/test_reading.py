"""Weights are found in whatever stands around them, by a name, never by luck; and nothing else is made of a file."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.models import InternImage, official
from pretrain.models.reading import open_weights, read_weights

SMALL = {"channels": 8, "depths": (1, 1, 1, 1), "groups": (1, 1, 2, 2), "num_classes": 3}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return official.state_dict(InternImage(**SMALL))


def save(content: object, path: Path) -> Path:
    torch.save(content, path, pickle_module=pickle)
    return path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in state.items()}


def test_averaged_weights_are_taken_where_they_are_asked_for_and_there(state, tmp_path):
    path = save({"model": state, "model_ema": other(state), "epoch": 3}, tmp_path / "both.pth")
    averaged, trained = open_weights(path), open_weights(path, "model")
    assert same(averaged.state, other(state)) and averaged.chosen == "model_ema"
    assert same(trained.state, state) and trained.chosen == "model"
    alone = open_weights(save({"state_dict": state}, tmp_path / "alone.pth"))
    assert same(alone.state, state) and alone.chosen == "state_dict (no averaged weights beside it)"
    with pytest.raises(UserError, match=r"under model, state_dict.*it holds 'model_ema'"):
        open_weights(save({"model_ema": state}, tmp_path / "averaged.pth"), "model")


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        (lambda s: s, ""),
        (lambda s: {"module": s, "ds_version": "0.18"}, "module (no averaged weights beside it)"),
        (lambda s: {"state_dict": {"model": s}, "meta": {}}, "state_dict.model (no averaged weights beside it)"),
        (lambda s: {"ema": {"decay": 0.9, "state_dict": s}, "model": other(s)}, "ema.state_dict"),
        (lambda s: {"step": torch.tensor(3), "model": s}, "model (no averaged weights beside it)"),
    ],
    ids=["bare", "deepspeed", "nested", "ema with its decay", "a tensor beside"],
)
def test_weights_are_found_under_the_names_of_the_field(content, chosen, state, tmp_path):
    found = open_weights(save(content(state), tmp_path / "weights.pth"))
    assert same(found.state, state) and found.chosen == chosen


def test_settings_and_counters_beside_the_weights_do_no_harm(state, tmp_path, monkeypatch):
    """Of a library that is not installed here too: nothing of it is imported."""
    made = []

    class CfgNode(dict):
        def __setstate__(self, values: object) -> None:
            made.append(values)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    settings = CfgNode(lr=1e-3)
    settings.frozen = True
    content = {
        "model": state,
        "config": settings,
        "args": argparse.Namespace(lr=1, output=Path("x")),
        "max_accuracy": np.float64(81.5),
        "history": np.arange(3),
        "best": OrderedDict(at=np.int64(3)),
    }
    path = save(content, tmp_path / "full.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    assert same(read_weights(path), state) and not made


def test_what_is_not_known_to_be_harmless_is_refused_by_name(state, tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with pytest.raises(UserError, match=r"an object of (io|_io|builtins)\.open, and nothing is made") as error:
        open_weights(save({"model": state, "x": Boom()}, tmp_path / "evil.pth"))
    assert "torch.save" in str(error.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.backbone.", "image.", "a.b.c."])
def test_prefixes_of_wrappers_are_stripped(prefix, state):
    around = {"neck.weight": torch.ones(2)} if prefix == "module.backbone." else {}
    wrapped = {f"{prefix}{key}": value for key, value in state.items()}
    assert official.wrapper_of(wrapped | around) == prefix
    assert same(official.normalize_layout(wrapped | around), state)


def test_of_two_image_models_none_is_chosen(state):
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(UserError, match=r"2 image models, under student\., teacher\."):
        official.normalize_layout(both)


def test_what_zero_3_left_with_the_ranks_is_refused(state, tmp_path):
    empty = {key: torch.empty(0) for key in state}
    with pytest.raises(UserError, match="zero_to_fp32"):
        open_weights(save({"module": empty}, tmp_path / "mp_rank_00_model_states.pt"))


def test_shards_of_pickled_weights_are_joined(state, tmp_path):
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2])):
        save({key: state[key] for key in part}, tmp_path / f"pytorch_model-{number}.bin")
    listing = {key: f"pytorch_model-{number % 2}.bin" for number, key in enumerate(keys)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(str({"weight_map": listing}).replace("'", '"'))
    assert same(read_weights(tmp_path), state)


def test_misfits_are_listed_ten_a_kind_and_counted(state):
    wider = InternImage(**{**SMALL, "depths": (1, 1, 2, 1)})
    strange = {f"extra.{n}": torch.ones(1) for n in range(12)}
    with pytest.raises(UserError) as error:
        official.load_state_dict(wider, {**state, **strange})
    lines = str(error.value).splitlines()
    missing = [line for line in lines if line.startswith("missing: levels.2.blocks.1.")]
    unexpected = [line for line in lines if line.startswith("unexpected: extra.")]
    assert len(missing) == len(unexpected) == 10 and lines.count("... and 2 more") == 1
    absent = len(official.state_dict(wider)) - len(state)
    assert f"... and {absent - 10} more" in lines
