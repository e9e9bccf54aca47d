"""The gradient of every preset equals that of a plain implementation of the method's loss."""

import copy

import pytest
import torch
import yaml
from objective_samples import CLASSES, SIZE, make_batch, make_config, make_task
from plain_objectives import Plain, images_of

from data_pipeline.errors import UserError
from pretrain.configuration import dump_config, parse_config
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.mixing import draw_cells, partners
from pretrain.objectives.mixup import mix_pairs
from pretrain.tasks.pretraining.augmentations import AUGMENTATIONS
from pretrain.tasks.pretraining.recipes import RECIPES
from pretrain.tasks.task import module_of

KEYS = StepKeys(seed=11, step=5, micro=0)
WEIGHTS = {"intra": 0.7, "inter": 1.3, "text": 0.9, "category": 1.1}


def a_teacher(task):
    """Not the student: the average of earlier weights."""
    teacher = task.teacher()
    if teacher is not None:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in teacher.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.02 * noise)
    return teacher


def outputs(task, teacher, batch):
    targets = task.teacher_targets(teacher, batch, KEYS) if teacher is not None else None
    return task(batch, KEYS, targets)


def gradients(task, loss):
    named = {name: p for name, p in task.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True)}


def assert_same_gradients(task, ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0)
    mine, theirs = gradients(task, ours), gradients(task, plain)
    scale = max(g.abs().max() for g in theirs.values() if g is not None)
    for name in mine:
        assert mine[name] is not None and theirs[name] is not None, name
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-9 * float(scale), msg=name)


@pytest.mark.parametrize("preset", sorted([*RECIPES, "supervised"]))
def test_the_gradient_equals_the_plain_implementation(preset):
    task = make_task(preset, **({"weights": WEIGHTS} if preset == "m3i" else {})).train()
    batch = make_batch(6)
    if preset == "supervised":
        torch.nn.init.normal_(task.image.head.weight, std=0.5)
    teacher = a_teacher(task)
    cells = draw_cells(KEYS, SIZE, 16, 0.5, torch.device("cpu"))
    plain = Plain(task, teacher, batch, cells, sample_keys(KEYS, batch.positions))
    assert_same_gradients(task, outputs(task, teacher, batch).total, getattr(plain, preset)())


def test_pairs_left_whole_equal_the_plain_implementation():
    task = make_task("m3i", weights=WEIGHTS, mix_probability=0.5).train()
    batch = make_batch(12)
    pair = partners(batch.positions, KEYS, 0.5).tolist()
    assert 0 < sum(i == j for i, j in enumerate(pair)) < 12, "both kinds are there"
    teacher = a_teacher(task)
    plain = Plain(
        task, teacher, batch, draw_cells(KEYS, SIZE, 16, 0.5, torch.device("cpu")), sample_keys(KEYS, batch.positions)
    )
    plain.pair = pair
    assert_same_gradients(task, outputs(task, teacher, batch).total, plain.m3i())


def test_supervised_extras_equal_the_plain_implementation():
    task = make_task("supervised", label_smoothing=0.1, mixup=0.8, cutmix=1.0).train()
    batch = make_batch(6)
    keys = sample_keys(KEYS, batch.positions)
    images, shares = mix_pairs(images_of(task, batch.views[:, 0]), keys, 0.8, 1.0)
    plain = Plain(task, None, batch, draw_cells(KEYS, SIZE, 16, 0.5, torch.device("cpu")), keys)
    assert_same_gradients(task, outputs(task, None, batch).total, plain.supervised(shares, images, 0.1))
    task.eval()
    plain_evaluation = plain.supervised(smoothing=0.1)
    torch.testing.assert_close(outputs(task, None, batch).total, plain_evaluation, rtol=1e-10, atol=0)


def test_supervised_reads_the_logits_of_either_head():
    for overrides in ({"use_clip_projector": False}, {"use_clip_projector": True}):
        task = make_task("supervised", overrides=overrides).eval()
        batch = make_batch(4)
        images = images_of(task, batch.views[:, 0])
        assert task.classify(images).shape == (4, CLASSES)
        assert outputs(task, None, batch).total.isfinite()


def test_the_encoder_is_not_shown_what_the_mask_hides():
    task = make_task("m3i")
    teacher = a_teacher(task)
    hidden = draw_cells(KEYS, SIZE, 16, 0.5, torch.device("cpu")).pixels
    other = make_batch(4)
    other.views[0, 0][hidden] = 255 - other.views[0, 0][hidden]
    other.views[:, 1] = 255 - other.views[:, 1]
    seen: list[torch.Tensor] = []
    task.image.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in (make_batch(4), other):
        outputs(task, teacher, batch)
    assert torch.equal(seen[0][0], seen[1][0]), "row 0 shows its own image where that is visible"
    assert not torch.equal(seen[0][1], seen[1][1]), "row 1, its pair, shows the rest of it"
    assert torch.equal(seen[0][2:], seen[1][2:])


def test_the_teacher_mirrors_part_of_the_task_and_draws_nothing():
    assert make_task("supervised").teacher() is None and make_task("supervised").teacher_names() == []
    for preset, recipe in RECIPES.items():
        task = make_task(preset)
        state = torch.random.get_rng_state()
        teacher = task.teacher()
        assert torch.equal(state, torch.random.get_rng_state())
        if not recipe.uses_teacher:
            assert teacher is None and task.teacher_names() == []
            continue
        own = task.state_dict()
        assert [name for name, _ in teacher.named_parameters()] == task.teacher_names()
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, own[name])
        assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
        trainable = {name for name, p in task.named_parameters() if p.requires_grad}
        assert set(task.teacher_names()) <= trainable, "what is averaged is what is trained"


def test_every_trainable_parameter_gets_a_gradient_whatever_is_switched_off():
    batch = make_batch(6)
    cases = [("m3i", {}, 0), ("m3i", {"weights": {"text": 0}}, CLASSES), ("m3i", {"weights": {"inter": 0}}, CLASSES)]
    cases += [("m3i", {"weights": {"intra": 0, "inter": 0}}, CLASSES), ("siamese", {}, CLASSES)]
    for preset, objective, classes in cases:
        torch.manual_seed(0)
        task = module_of(make_config(preset, **objective), classes=classes)
        outputs(task, task.teacher(), batch).total.backward()
        missing = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, (preset, objective, missing)


def test_a_batch_without_a_caption_or_label_gives_zero_not_nan():
    task = make_task("m3i")
    batch = make_batch(6)
    batch.targets.has_text[:], batch.targets.has_label[:], batch.targets.labels[:] = False, False, -1
    out = outputs(task, task.teacher(), batch)
    assert out.parts["text"] == 0 and out.parts["category"] == 0
    out.total.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert not task.text.token_embedding.weight.grad.any()


def test_measuring_changes_no_bit_of_the_gradient():
    task = make_task("m3i", dtype=torch.float32)
    teacher, batch = task.teacher(), make_batch(6)
    found = []
    for measure in (True, False):
        out = task(batch, KEYS, task.teacher_targets(teacher, batch, KEYS), measure)
        out.total.backward()
        assert bool(out.metrics) is measure
        found.append([p.grad.clone() for p in task.parameters() if p.grad is not None])
        task.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputing_blocks_changes_no_bit_of_the_gradient():
    task = make_task("m3i", dtype=torch.float32).train()
    again = copy.deepcopy(task)
    again.set_grad_checkpointing()
    batch, teacher = make_batch(6), task.teacher()
    for each in (task, again):
        outputs(each, teacher, batch).total.backward()
    for (name, a), (_, b) in zip(task.named_parameters(), again.named_parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_bfloat16_weights_give_finite_gradients_and_fp32_losses():
    task = make_task("m3i", dtype=torch.bfloat16)
    teacher, batch = task.teacher(), make_batch(6)
    reference = make_task("m3i", dtype=torch.float32)
    out = outputs(task, teacher, batch)
    assert out.total.dtype == torch.float32
    out.total.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)
    exact = outputs(reference, reference.teacher(), batch)
    for name, value in exact.parts.items():
        assert float(out.parts[name]) == pytest.approx(float(value), rel=0.1), name


@pytest.mark.parametrize(
    ("change", "classes", "message"),
    [
        ({"preset": "supervised"}, 0, "needs classes"),
        ({"weights": {"intra": 0, "inter": 0, "text": 0, "category": 0}}, 3, "every loss of preset 'm3i' is off"),
        ({"weights": {"intra": 0, "inter": 0, "text": 0}}, 0, "is off"),
        ({"embed_dim": 32}, 3, "embed_dim is 32.*head_hidden_size is 24"),
        ({"overrides": {"use_clip_projector": False}}, 3, "use_clip_projector"),
        ({"decoder": {"dim": 18, "heads": 2}}, 3, "divisible by 4"),
        ({"decoder": {"dim": 16, "heads": 3}}, 3, "its 3 heads"),
        ({"text": {"width": 16, "heads": 3}}, 3, "width 16 is not divisible by heads 3"),
        ({"size": 80, "mask_cell": 32}, 3, "task.mask_cell 32"),
        ({"views": 1}, 3, "data.views is 1"),
        ({"rows": 2}, 3, "model.num_classes is 2, but the data name 3"),
    ],
)
def test_what_does_not_fit_together_is_told_before_the_first_step(change, classes, message):
    change = dict(change)
    views, rows = change.pop("views", 2), change.pop("rows", 0)
    config = make_config(change.pop("preset", "m3i"), **change)
    config.data.views = views
    config.model.num_classes = rows
    with pytest.raises(UserError, match=message):
        module_of(config, classes=classes)


def test_encoding_for_evaluation():
    task = make_task("m3i").eval()
    batch = make_batch(4)
    images = images_of(task, batch.views[:, 0])
    for vectors in (task.encode_image(images), task.encode_text(batch.targets.tokens)):
        assert vectors.shape == (4, 24)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    with pytest.raises(UserError, match="no text tower"):
        make_task("siamese").encode_text(batch.targets.tokens)
    assert not hasattr(make_task("supervised"), "encode_image"), "another task, whose models meet no text"


def test_a_preset_brings_its_papers_augmentation_for_what_is_left_out():
    siamese, clip = make_config("siamese").data.augmentation, make_config("clip").data.augmentation
    assert (siamese.scale, siamese.blur, siamese.solarize, siamese.hue) == ((0.2, 1.0), (1.0, 0.1), (0.0, 0.2), 0.1)
    assert (clip.flip, clip.blur, clip.color_jitter) == (0.0, 0.0, 0.0)
    raw = yaml.safe_load(dump_config(make_config("byol")))
    raw["data"]["augmentation"] = {"grey": 0.5}
    given = parse_config(raw).data.augmentation
    assert (given.grey, given.saturation, given.scale) == (0.5, 0.2, (0.08, 1.0))
    assert AUGMENTATIONS.keys() >= RECIPES.keys()
