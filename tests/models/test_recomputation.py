"""Within a budget: gradients to the last bit, memory under it, and less computed again the larger it is."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import UserError
from dcnv3.fused import built
from pretrain.models import InternImage
from pretrain.models.activations import DEAR, blocks_of, image_activations, joined_weights, kept_within
from pretrain.models.compilation import compile_regions
from pretrain.models.randomness import drawing_from
from pretrain.models.recomputation import values_within

SIZE, ROWS = 64, 2
PLAIN: dict[str, Any] = {
    "channels": 32,
    "depths": (2, 2, 4, 2),
    "groups": (2, 4, 8, 16),
    "num_classes": 0,
    "drop_path_rate": 0.3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": PLAIN,
    "post": {**PLAIN, "post_norm": True, "layer_scale": 0.1, "offset_scale": 2.0},
    "both": {
        **PLAIN,
        "dw_kernel_size": 5,
        "res_post_norm": True,
        "center_feature_scale": True,
        "level2_post_norm": True,
        "level2_post_norm_block_ids": (1, 3),
        "use_clip_projector": True,
        "clip_embed_dim": 64,
        "head_hidden_size": 48,
        "clip_heads": 4,
    },
}
SHARES = (0.0, 0.1, 0.25, 0.5, 0.8, 1.0)


@pytest.fixture(params=VARIANTS)
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


def budgets(arguments: dict[str, Any]) -> list[float]:
    """From the least to what recomputes nothing."""
    least = image_activations(arguments, SIZE, checkpointing=True).peak
    most = image_activations(arguments, SIZE).peak
    return [least + share * (most - least) for share in SHARES]


def model_of(arguments: dict[str, Any]) -> InternImage:
    torch.manual_seed(0)
    model = InternImage(**arguments).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset" in name or "center" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(rows: int = ROWS) -> torch.Tensor:
    return torch.rand(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def forward(model: InternImage, rows: int = ROWS) -> torch.Tensor:
    with drawing_from(torch.arange(rows)):
        return model(images(rows)).square().sum()


def gradients(model: InternImage) -> list[torch.Tensor]:
    forward(model).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


class Alive(TorchDispatchMode):
    """Every storage that an operation makes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return outputs

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def values_alive(model: InternImage, rows: int) -> float:
    """After a forward pass, its parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with Alive() as alive:
        loss = forward(model, rows)
    alive.made = {key: made for key, made in alive.made.items() if key not in own}
    assert loss.requires_grad
    return alive.bytes() / 4


def test_the_gradient_is_the_same_to_the_last_bit(arguments: dict[str, Any]) -> None:
    model = model_of(arguments)
    expected = gradients(model)
    for budget in budgets(arguments):
        model.recompute_within(budget, SIZE)
        found = gradients(model)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), budget


@pytest.mark.skipif(not built("norm_forward", "cpu"), reason="the CPU kernels, which keep less, are not built here")
def test_memory_stays_under_the_budget_and_uses_it(arguments: dict[str, Any]) -> None:
    model, kept = model_of(arguments), []
    for budget in budgets(arguments):
        model.recompute_within(budget, SIZE)
        few, more = values_alive(model, ROWS), values_alive(model, 2 * ROWS)
        kept.append((more - few) / ROWS)
        assert 2 * few - more <= joined_weights(arguments) * 1.1
        planned = image_activations(arguments, SIZE, budget=budget)
        assert planned.peak <= budget * (1 + 1e-9)
        assert kept[-1] == pytest.approx(planned.kept, rel=0.08)
    assert kept == sorted(kept) and kept[-1] > 2 * kept[0]


def flops(model: InternImage) -> int:
    with FlopCounterMode(display=False) as counter:
        gradients(model)
    return counter.get_total_flops()


@pytest.fixture
def _counted_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that the counter of every version knows, instead of an x86 CPU's own."""
    monkeypatch.setattr("pretrain.models.linear._CHOSEN", False)


@pytest.mark.usefixtures("_counted_products")
def test_less_is_computed_again_the_larger_the_budget(arguments: dict[str, Any]) -> None:
    model = model_of(arguments)
    least = flops(model)
    model.set_grad_checkpointing()
    counts = [flops(model)]
    for budget in budgets(arguments):
        model.recompute_within(budget, SIZE)
        counts.append(flops(model))
    assert counts == sorted(counts, reverse=True) and counts[0] == counts[1]
    assert counts[-1] == least
    assert counts[-2] < 1.01 * least, "what is dear is kept before what is not"
    assert counts[1] > counts[3] > counts[-1]


@pytest.mark.usefixtures("_counted_products")
@pytest.mark.parametrize("kind", sorted(set(DEAR) - {"sampling"}))
def test_every_dear_operation_is_known_when_it_is_met(kind: str) -> None:
    model = model_of(VARIANTS["both"])
    model.set_grad_checkpointing()
    before = flops(model)
    for stage in model.stages:
        for block in stage.blocks:
            block.kept = (kind,)
    saved = sum(
        block.outputs[kind][0] * 2 * per_value(kind, stage) * depth * ROWS
        for stage, (depth, block) in enumerate(blocks_of(VARIANTS["both"], SIZE))
    )
    assert before - flops(model) == pytest.approx(saved)


def test_the_sampled_map_is_kept_when_asked_for() -> None:
    block, inputs = model_of(VARIANTS["both"]).stages[0].blocks[0], torch.rand(1, 8, 8, 32, requires_grad=True)
    found = []
    for kinds in ((), ("sampling",)):
        block.kept = kinds
        with Alive() as alive:
            output = block(inputs)
        found.append(alive.bytes())
        del output
    assert found[1] - found[0] == inputs.nbytes


def per_value(kind: str, stage: int) -> int:
    """Multiply-adds of one value that an operation of the third variant gives."""
    width = PLAIN["channels"] * 2**stage
    return {"fc2": 4 * width, "depthwise": 25}.get(kind, width)


@pytest.mark.parametrize(
    "variant", ["pre", pytest.param("post", marks=pytest.mark.slow), pytest.param("both", marks=pytest.mark.slow)]
)
def test_compiled_blocks_keep_what_eager_ones_keep(variant: str) -> None:
    arguments = VARIANTS[variant]
    model = model_of(arguments).double()
    run = images().double()

    def learned() -> list[torch.Tensor]:
        with drawing_from(torch.arange(ROWS)):
            model(run).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    expected = learned()
    model.recompute_within(budgets(arguments)[2], SIZE)
    torch.compiler.reset()
    compile_regions(model, "aot_eager")
    for found, value in zip(learned(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


def test_a_budget_is_spent_on_what_is_dearest_for_its_size() -> None:
    arguments = {"channels": 320, "depths": (6, 6, 32, 6), "groups": (10, 20, 40, 80), "res_post_norm": True}
    least, most = (image_activations(arguments, 224, checkpointing=on).peak for on in (True, False))
    stages = blocks_of(arguments, 224)
    for share in (0.02, 0.1, 0.3):
        kept = kept_within(least + share * (most - least), arguments, 224)
        chosen = [
            seconds / values
            for (_, block), stage in zip(stages, kept, strict=True)
            for kind, (values, seconds) in block.outputs.items()
            if all(kinds is None or kind in kinds for kinds in stage)
        ]
        left = [
            seconds / values
            for (_, block), stage in zip(stages, kept, strict=True)
            for kind, (values, seconds) in block.outputs.items()
            if all(kinds is not None and kind not in kinds for kinds in stage)
        ]
        assert chosen and min(chosen) >= max(left)


def test_a_budget_too_small_or_for_other_blocks_is_refused() -> None:
    least = image_activations(PLAIN, SIZE, checkpointing=True).peak
    with pytest.raises(ValueError, match="with every block recomputed"):
        kept_within(0.99 * least, PLAIN, SIZE)
    with pytest.raises(ValueError, match="share_weights"):
        kept_within(2 * least, {**PLAIN, "share_weights": False}, SIZE)
    with pytest.raises(UserError, match=r"model.recompute.budget_gb 0.001: 8 images at once take at least"):
        values_within(0.001, PLAIN, SIZE, rows=8, width=4)
    assert values_within(1.0, PLAIN, SIZE, rows=8, width=4) == (1e9 / 4 - joined_weights(PLAIN)) / 8
