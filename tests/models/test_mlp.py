"""The MLP without gradients, which makes its hidden layer in parts and changes it in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import Mlp


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 40, 40, 48), (2, 0, 5, 48)], ids=str)
def test_parts_make_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.models.layers._PART", 1000 * 192)
    torch.manual_seed(0)
    mlp, x = Mlp(48, 192), torch.randn(shape)
    before = x.clone()
    hidden = F.gelu(F.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double()))
    want = F.linear(hidden, mlp.fc2.weight.double(), mlp.fc2.bias.double())
    with torch.no_grad():
        have = mlp(x)
    assert have.shape == x.shape and torch.equal(x, before)
    torch.testing.assert_close(have.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mlp(x), have, atol=1e-5, rtol=1e-5)


def test_a_hook_sees_the_whole_hidden_layer_unchanged() -> None:
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(output)

    mlp, x = Mlp(48, 192), torch.randn(2, 5, 5, 48)
    mlp.fc1.register_forward_hook(keep)
    with torch.no_grad():
        mlp(x)
        assert torch.equal(seen[0], mlp.fc1(x)) and seen[0].shape == (2, 5, 5, 192)
