"""Every preset compiled: all that training calls becomes whole graphs, and the numbers stay."""

import pytest
import torch
from objective_samples import make_batch, make_task

from pretrain.models.compilation import compile_regions
from pretrain.objectives.keys import StepKeys
from pretrain.tasks.module import TaskModule

KEYS = StepKeys(seed=11, step=5)
ALWAYS = {"Stem", "Block", "Downsample"}
REGIONS = {  # beside those of the stages: of the student, of its teacher
    "m3i": ({"FuseStages", "AttentionPool", "Projector", "Predictor", "ResidualAttentionBlock"}, {"Projector"}),
    "siamese": ({"FuseStages", "AttentionPool", "Projector", "Predictor"}, {"Projector"}),
    "data2vec": ({"FuseStages", "AttentionPool", "Projector", "Predictor"}, {"Projector"}),
    "byol": ({"FuseStages", "AttentionPool"}, {"AttentionPool"}),
    "moco": ({"FuseStages", "AttentionPool"}, {"AttentionPool"}),
    "simclr": ({"FuseStages", "AttentionPool"}, set()),
    "simsiam": ({"FuseStages", "AttentionPool"}, set()),
    "simmim": ({"FuseStages", "AttentionPool"}, set()),
    "clip": ({"FuseStages", "AttentionPool", "ResidualAttentionBlock"}, set()),
    "siglip": ({"FuseStages", "AttentionPool", "ResidualAttentionBlock"}, set()),
    "clip_category": ({"FuseStages", "AttentionPool", "ResidualAttentionBlock"}, set()),
    "supervised": ({"ConvHead"}, set()),
}


def learned(task: TaskModule, teacher: torch.nn.Module | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = make_batch(6)
    targets = task.teacher_targets(teacher, batch, KEYS) if teacher is not None else None
    loss = task(batch, KEYS, targets).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def assert_compiled_alike(preset: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    overrides = {} if preset != "supervised" else {"use_clip_projector": False}
    eager = make_task(preset, dtype=dtype, overrides=overrides).train()
    loss, gradients = learned(eager, eager.teacher())
    task = make_task(preset, dtype=dtype, overrides=overrides).train()
    names, teacher = list(task.state_dict()), task.teacher()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    found = {type(region).__name__ for region in compile_regions(task, backend)}
    in_teacher = {type(region).__name__ for region in compile_regions(teacher, backend)} if teacher else set()
    expected, expected_in_teacher = REGIONS[preset]
    assert found == ALWAYS | expected
    assert in_teacher == (ALWAYS | {"FuseStages"} | expected_in_teacher if teacher else set())
    compiled_loss, compiled = learned(task, teacher)
    assert list(task.state_dict()) == names
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= len(found | in_teacher)
    torch.testing.assert_close(compiled_loss, loss, rtol=tolerance, atol=0)
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert compiled.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((compiled[name] - gradient).abs().max()) <= 10 * tolerance * largest, name


# m3i, byol and supervised have every kind of region between them.
FAST = ("m3i", "byol", "supervised")
PRESETS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in sorted(REGIONS)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_compiled_preset_is_whole_graphs_and_learns_alike(preset):
    assert_compiled_alike(preset, "eager", torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(REGIONS))
def test_gradients_traced_ahead_are_those_of_eager_mode(preset):
    assert_compiled_alike(preset, "aot_eager", torch.float64, 1e-12)


@pytest.mark.slow
def test_generated_code_learns_alike():
    assert_compiled_alike("supervised", "inductor", torch.float32, 1e-5)
