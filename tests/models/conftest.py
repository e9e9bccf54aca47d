"""The golden models: the rule that fills them, and what the public code answered."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.models import InternImage, official

GOLDEN = Path(__file__).parent.parent / "golden"

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec and _spec.loader
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


@dataclass(frozen=True)
class GoldenModel:
    """One case: arguments, official state dict by the rule, input and the expected tensors."""

    name: str
    arguments: dict[str, Any]
    num_parameters: int
    state: dict[str, torch.Tensor]
    image: torch.Tensor
    expected: dict[str, torch.Tensor]

    def build(self, **overrides: Any) -> InternImage:
        model = InternImage(**{**self.arguments, **overrides})
        official.load_state_dict(model, self.state)
        return model.eval()


def golden_model(name: str) -> GoldenModel:
    case = json.loads((GOLDEN / f"model_{name}.json").read_text())
    state = {key: torch.from_numpy(fill.parameter(key, tuple(shape))) for key, shape in case["state_dict"].items()}
    image = torch.from_numpy(fill.uniform("input", tuple(case["input_shape"])))
    expected = load_file(GOLDEN / f"model_{name}.safetensors")
    return GoldenModel(name, case["config"], case["num_parameters"], state, image, expected)


@pytest.fixture(params=["t_like", "l_like", "h_like"])
def golden(request: pytest.FixtureRequest) -> GoldenModel:
    return golden_model(request.param)


@pytest.fixture
def golden_t() -> GoldenModel:
    return golden_model("t_like")


@pytest.fixture
def golden_h() -> GoldenModel:
    return golden_model("h_like")


@pytest.fixture
def cotangent() -> Any:
    """The loss's fixed weights: uniform("cotangent", shape)."""
    return lambda shape: torch.from_numpy(fill.uniform("cotangent", tuple(shape)))


@pytest.fixture
def fill_rule() -> Any:
    """The rule itself: uniform(name, shape) and parameter(name, shape)."""
    return fill
