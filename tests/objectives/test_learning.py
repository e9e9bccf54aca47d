"""The whole M3I-style objective learns: eight flat colours and their names find each other."""

import torch
from objective_samples import CLASSES, make_task

from data_pipeline.reading import Batch, ImageTextTargets, normalize
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.text import build_tokenizer

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "pink": (255, 0, 255),
}


def test_colours_find_their_names_and_categories():
    task = make_task("m3i", dtype=torch.float32, temperature=0.2, overrides={"drop_path_rate": 0.0}).train()
    teacher = task.teacher()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    tokens = build_tokenizer(12, 1024)(list(COLOURS))
    views = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[:, None, None, None].expand(8, 2, 64, 64, 3)
    crops = torch.tensor([0.0, 0.0, 64.0, 64.0, 0.0, 64.0]).expand(8, 2, 6)
    labels, present = torch.arange(8) % CLASSES, torch.ones(8, dtype=torch.bool)
    generator, first = torch.Generator().manual_seed(0), {}
    for step in range(90):
        order = torch.randperm(8, generator=generator)  # else neighbours always mix with each other
        positions = torch.arange(8) + 8 * step
        targets = ImageTextTargets(tokens[order], present, labels[order], present)
        batch = Batch(step, 0, positions, views[order], crops, targets)
        keys = StepKeys(0, step)
        out = task(batch, keys, task.teacher_targets(teacher, batch, keys))
        first = first or out.parts
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
    assert all(out.parts[name] < 0.7 * first[name] for name in ("intra", "inter", "text", "category")), (
        first,
        out.parts,
    )
    task.eval()
    with torch.no_grad():
        images = normalize(views[:, 0], task.mean, task.std)
        match = (task.encode_image(images) @ task.encode_text(tokens).T).argmax(1)
        category = task.classify(images).argmax(1)
    assert (match == torch.arange(8)).sum() >= 7
    assert (category == labels).sum() >= 7
