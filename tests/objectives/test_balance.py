"""Dense losses balanced by their gradient at the fused map, left out of steps, and under a mask of each pair."""

import pytest
import torch
from objective_samples import make_batch, make_config, make_task, rows_of

from data_pipeline.errors import UserError
from pretrain.objectives.balance import balanced
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.mixing import draw_sample_cells
from pretrain.tasks.pretraining import inputs
from pretrain.tasks.task import module_of

KEYS = StepKeys(3, 4)


def run(task, batch, keys=KEYS):
    teacher = task.teacher()
    return task(batch, keys, task.teacher_targets(teacher, batch, keys))


def test_gradients_meet_in_the_stated_proportion():
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    maps = [torch.randn(4, 5, 6, dtype=torch.float64) * scale for scale in (1.0, 0.01, 300.0)]
    noted = []
    aliases = balanced(x, (0.5, 0.2), noted.append)
    sum(((alias * m).tanh().sum() for alias, m in zip(aliases, maps, strict=True)), torch.zeros(())).backward()
    alone = [torch.autograd.grad((x * m).tanh().sum(), x)[0] for m in maps]
    factors = [share * alone[0].norm() / g.norm() for share, g in zip((0.5, 0.2), alone[1:], strict=True)]
    expected = alone[0] + factors[0] * alone[1] + factors[1] * alone[2]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(noted[0], torch.stack(factors), rtol=1e-12, atol=0)


def test_a_loss_without_a_gradient_adds_nothing():
    x = torch.randn(3, 2, requires_grad=True)
    first, second = balanced(x, (1.0,), lambda factors: None)
    (first.sum() + 0 * second.sum()).backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_the_encoder_learns_as_with_weights_that_make_up_the_proportion():
    batch = make_batch(6)
    task = make_task("m3i", balance=0.25, weights={"intra": 1.0, "inter": 2.0}).train()
    out = run(task, batch)
    out.total.backward()
    norms = {name: float(out.metrics[f"grad_norm/{name}"]) for name in ("intra", "inter", "pooled")}
    factors = {name: float(out.metrics[f"balance/{name}"]) for name in ("intra", "inter")}
    for name, weight in (("intra", 1.0), ("inter", 2.0)):  # norms are noted before they are balanced
        assert factors[name] * norms[name] == pytest.approx(0.25 * weight * norms["pooled"], rel=1e-4)
    fixed = make_task("m3i", weights={"intra": factors["intra"], "inter": 2 * factors["inter"]}).train()
    run(fixed, batch).total.backward()
    own = dict(task.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in fixed.image.parameters() if p.grad is not None)
    for name, parameter in fixed.named_parameters():
        if name.startswith(("image.stem", "image.stages", "image.fuse")):
            # The factors above were noted in fp32.
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=1e-6 * largest, msg=name)


def test_balance_needs_both_kinds_of_losses():
    for preset, options in (("siamese", {}), ("m3i", {"weights": {"intra": 0, "inter": 0}})):
        with pytest.raises(UserError, match=r"set task\.balance to null"):
            module_of(make_config(preset, balance=0.2, **options), classes=3)


def test_dense_losses_every_third_step_cost_no_teacher_on_the_others():
    task = make_task("m3i", dense_every=3).train()
    every = make_task("m3i").train()
    teacher, batch = task.teacher(), make_batch(6)
    for step in range(4):
        keys = StepKeys(3, step)
        targets = task.teacher_targets(teacher, batch, keys)
        out, whole = task(batch, keys, targets), every(batch, keys, every.teacher_targets(teacher, batch, keys))
        for name in ("intra", "inter", "text", "category"):
            skipped = step != 2 and name in ("intra", "inter")
            assert float(out.parts[name]) == (0 if skipped else float(whole.parts[name]))
        assert bool(targets) == (step == 2)
        task.zero_grad()
        out.total.backward()
        heads = [p.grad for name, p in task.named_parameters() if name.startswith(("projector", "predictor"))]
        assert all(gradient is not None for gradient in heads), "ZeRO-3 would take an earlier step's"
        assert any(bool(gradient.any()) for gradient in heads) == (step == 2)


def test_masks_of_samples_hide_as_many_cells_each_and_are_fixed_by_their_keys():
    keys = torch.arange(40) * 977
    cells = draw_sample_cells(keys, 96, 16, 0.5)
    assert cells.pixels.shape == (40, 96, 96) and cells.visible.shape == cells.hidden.shape == (40, 18)
    alone = draw_sample_cells(keys[7:8], 96, 16, 0.5)
    for all_rows, row in zip(cells, alone, strict=True):
        assert torch.equal(all_rows[7:8], row)
    tokens = cells.pixels[:, ::16, ::16].flatten(1)
    for row in range(40):
        assert torch.equal(cells.hidden[row], tokens[row].nonzero()[:, 0])
        assert torch.equal(cells.visible[row], (~tokens[row]).nonzero()[:, 0])
    assert len({tuple(row.tolist()) for row in cells.hidden}) == 40
    assert (tokens.float().mean(0) - 0.5).abs().max() < 0.3


@pytest.mark.parametrize("preset", ["m3i", "siamese", "data2vec", "simmim"])
def test_a_mask_a_pair_equals_each_pair_by_itself_under_its_mask(preset, monkeypatch):
    options = {"decorrelation": 0.0, "weights": {"text": 0.0, "category": 0.0}}
    batch = make_batch(6)
    task, each = make_task(preset, mask="sample", **options).train(), make_task(preset, **options).train()
    losses = []
    if preset != "m3i":  # a mask a sample
        parts = [rows_of(batch, i, i + 1) for i in range(6)]
    else:
        parts = [rows_of(batch, i, i + 2) for i in (0, 2, 4)]
    for part in parts:
        key = inputs.sample_keys(KEYS, part.positions)[:1]
        cells = type(draw_sample_cells(key, 64, 16, 0.5))(*(x[0] for x in draw_sample_cells(key, 64, 16, 0.5)))
        monkeypatch.setattr(inputs, "draw_cells", lambda *_, cells=cells: cells)
        losses.append(run(each, part).total if each.teacher() is not None else each(part, KEYS, {}).total)
    whole = run(task, batch).total if task.teacher() is not None else task(batch, KEYS, {}).total
    torch.testing.assert_close(whole, torch.stack(losses).mean(), rtol=1e-10, atol=0)
