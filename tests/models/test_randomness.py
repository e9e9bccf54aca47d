"""What a layer draws belongs to the sample: not to the batch it is in, the rank, or the number of times it is
computed.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.models import InternImage, create_model
from pretrain.models.layers import DropPath, drop_path_factors
from pretrain.models.randomness import drawing_from, hashed_uniform


def splitmix(z: int) -> int:
    """Steele et al., "Fast Splittable Pseudorandom Number Generators", the finalizer, in Python's own integers."""
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_splitmix_for_every_sign_of_key():
    keys = [0, 1, -1, 2**62, -(2**63), 123456789]
    drawn = hashed_uniform(torch.tensor(keys), salt=5)
    mask = (1 << 64) - 1
    for key, value in zip(keys, drawn.tolist(), strict=True):
        inner = splitmix((key + 0x9E3779B97F4A7C15) & mask)
        assert value == (splitmix((inner + 6 * 0xD1B54A32D192ED03) & mask) >> 40) / 2**24


def test_draws_are_uniform_and_differ_between_layers():
    keys = torch.arange(20000)
    a, b = hashed_uniform(keys, 0).numpy(), hashed_uniform(keys, 1).numpy()
    assert a.min() >= 0 and a.max() < 1
    histogram = np.histogram(a, bins=20, range=(0, 1))[0]
    assert ((histogram - 1000) ** 2 / 1000).sum() < 45  # chi-squared, 19 degrees: p = 0.0007
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03


def test_a_samples_drop_path_does_not_depend_on_its_batch():
    layer = DropPath(0.5, salt=3).train()
    keys = torch.arange(64)
    with drawing_from(keys):
        whole = layer(torch.ones(64, 1, 1, 1)).flatten()
    with drawing_from(keys[40:48]):
        part = layer(torch.ones(8, 1, 1, 1)).flatten()
    assert torch.equal(whole[40:48], part)
    assert set(whole.tolist()) == {0.0, 2.0}


def test_keys_must_be_one_a_sample():
    layer = DropPath(0.5, salt=0).train()
    with drawing_from(torch.arange(3)), pytest.raises(ValueError, match="3 keys, but the model was given a batch of 4"):
        layer(torch.ones(4, 1, 1, 1))
    with pytest.raises(ValueError, match="int64"), drawing_from(torch.zeros(3)):
        pass


def test_a_recomputed_block_drops_what_it_dropped_before_even_after_the_context_is_left():
    torch.manual_seed(0)
    arguments = {
        "channels": 16,
        "depths": (1, 1, 2, 1),
        "groups": (1, 2, 4, 8),
        "num_classes": 4,
        "drop_path_rate": 0.5,
    }
    model = InternImage(**arguments).train()
    images = torch.randn(8, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with drawing_from(torch.arange(8)):
            loss = model(images).square().sum()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_grows_linearly_and_every_branch_has_its_own_draws():
    model = InternImage(16, (1, 1, 2, 1), (1, 2, 4, 8), drop_path_rate=0.4)
    layers = [module for module in model.modules() if isinstance(module, DropPath)]
    assert len({layer.salt for layer in layers}) == len(layers) == 10
    assert [layer.rate for layer in layers[::2]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def one_layers_factors(layer: DropPath, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By the definition, one layer at a time: keep where hash(key, salt) >= rate, and divide by the share kept."""
    kept = hashed_uniform(keys, layer.salt) >= layer.rate
    return (kept.to(dtype) / (1 - layer.rate)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_draw_for_all_layers_gives_each_its_own_bits(dtype):
    layers = [DropPath(rate, salt).train() for salt, rate in enumerate([0.0, 0.1, 1 / 3, 0.2 * 7 / 49, 0.5, 0.9])]
    layers[4].eval()
    keys = torch.randint(-(2**63), 2**63 - 1, (257,), generator=torch.Generator().manual_seed(0))
    with drawing_from(keys):
        factors = drop_path_factors(layers, torch.empty(257, 1, 1, 1, dtype=dtype))
    assert factors[0] is None and factors[4] is None
    for index in (1, 2, 3, 5):
        assert torch.equal(factors[index], one_layers_factors(layers[index], keys, dtype)), index


def test_without_keys_all_layers_draw_from_the_generator_in_order():
    layers = [DropPath(rate, salt).train() for salt, rate in enumerate([0.0, 0.3, 0.6])]
    torch.manual_seed(5)
    _, *factors = drop_path_factors(layers, torch.empty(8, 1, 1, 1))
    torch.manual_seed(5)
    for layer, drawn in zip(layers[1:], factors, strict=True):
        kept = torch.rand(8) >= layer.rate
        assert torch.equal(drawn.flatten() > 0, kept)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_whole_models_drop_path_takes_few_operations():
    """H has 100 branches, of which 98 drop: one layer at a time they took 3,038 kernels, of 31 each."""
    counts = []
    for rate in (0.0, 0.2):
        with torch.device("meta"):
            model = create_model("internimage_h", num_classes=0, drop_path_rate=rate).train()
            keys, images = torch.empty(2, dtype=torch.int64), torch.empty(2, 3, 64, 64)
        with Operations() as operations, drawing_from(keys):
            model(images)
        counts.append(operations.count)
    assert counts[1] - counts[0] < 60
