"""Figures of what a model looks at, each against something known: areas, supports, sampling, principal components."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import CLASSES, run_config, write_checkpoint
from torch import nn

from data_pipeline.errors import UserError
from dcnv3 import DCNv3
from dcnv3.reference import dcnv3_reference, unpack
from pretrain.analysis.figures.features import features_figure, main_colours
from pretrain.analysis.figures.receptive_field import area, erf_figure, receptive_field
from pretrain.analysis.figures.sampling import places, sampling_figure
from pretrain.report import write_report
from pretrain.report.beside import beside
from pretrain.tasks.task import module_of

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from evaluation_shapes import write_set


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run whose offsets are not 0, and a set of pictures."""
    folder = tmp_path_factory.mktemp("figures")
    config = run_config()
    torch.manual_seed(0)
    module = module_of(config, classes=len(CLASSES))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith((".offset.weight", ".mask.weight")):
                value.copy_(torch.randn_like(value) * 0.1)
    write_checkpoint(folder / "run", config, module)
    write_set(folder / "set")
    (folder / "run/metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {9 - s}}}\n' for s in range(1, 5)))
    return folder


def test_an_area_is_that_of_the_square_that_holds_the_share():
    flat = torch.full((16, 16), 1 / 256)
    assert [area(flat, share) for share in (0.25, 0.5, 1.0)] == [0.25, (12 / 16) ** 2, 1.0]
    point = torch.zeros(16, 16)
    point[8, 8] = 1
    assert area(point, 0.99) == (2 / 16) ** 2


def test_a_field_ends_where_the_kernels_end():
    one, two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    fields = receptive_field(lambda x: [one(x), two(one(x))], torch.randn(2, 3, 17, 17))
    for field, side in zip(fields, (3, 5), strict=True):
        assert int((field > 0).sum()) == side * side and field.sum().item() == pytest.approx(1)
        assert area(field, 0.99) <= ((side + 1) / 17) ** 2


@pytest.mark.parametrize(
    "options", [{}, {"offset_scale": 2.0}, {"kernel_size": 5, "padding": 2, "remove_center": True}]
)
def test_places_are_where_the_operator_samples(options):
    torch.manual_seed(1)
    layer = DCNv3(8, 2, **options)
    value, packed = torch.randn(1, 9, 7, 8), torch.randn(1, 9, 7, layer.geometry.places(False))
    offset, mask, _ = unpack(packed, layer.geometry, False)
    expected = dcnv3_reference(value, offset, mask, layer.geometry)
    locations, weights = places(packed, layer)  # [1, 9, 7, G, K, 2]
    found = []
    for group in range(2):
        grid = (2 * locations[..., group, :, :] + 1) / torch.tensor([7.0, 9.0]) - 1
        maps = value[..., 4 * group : 4 * group + 4].permute(0, 3, 1, 2)
        sampled = F.grid_sample(maps, grid.flatten(1, 2), align_corners=False)  # [1, 4, 63, K]
        found.append((sampled * weights[..., group, :].flatten(1, 2)[:, None]).sum(-1).permute(0, 2, 1))
    torch.testing.assert_close(torch.cat(found, -1).view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_colours_are_the_main_directions_of_all_patches():
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(3, 4, 4, 6, generator=draw) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1])
    colours, shares = main_colours(features)
    covariance = torch.cov(features.flatten(0, 2).T.double())
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert shares == pytest.approx((values / values.sum())[:3].tolist())
    assert colours.shape == (3, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    joint = torch.stack([colours[..., 0].flatten(), features[..., 0].flatten()])
    assert torch.corrcoef(joint)[0, 1].abs() > 0.9


def test_figures_stand_in_the_report_with_their_numbers(drawn):
    run, data = drawn / "run", drawn / "set"
    _, rows = erf_figure(run, data, count=2, beside="resnet18")
    assert [row["stage"] for row in rows] == [1, 2, 3, 4] * 3
    _, rows = sampling_figure(run, data, count=2)
    assert len(rows) == 1 + 2 + 4 + 8 and all(row["offset, px of the map"] > 0 for row in rows)
    features_figure(run, data, count=2)
    page = write_report(run).read_text()
    for title in ("Effective receptive fields", "Sampling points", "Features of patches"):
        assert title in page
    assert page.count('<img class="drawn" src="data:image/png;base64,') == 3
    assert json.loads((run / "figures/erf.json").read_text())["rows"][0]["model"] == "trained"


def test_a_file_of_weights_is_drawn_on_a_named_set(drawn, tmp_path):
    from pretrain.handoff import export

    written = export(drawn / "run", "safetensors", tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="--data"):
        features_figure(written)
    assert features_figure(written, drawn / "set", count=1, output=tmp_path)[0] == tmp_path / "features.png"


def test_two_runs_stand_side_by_side(drawn, tmp_path, run_dir):
    path, rows = beside(run_dir, drawn / "run", tmp_path)
    assert path.is_file()
    told = {row["what"]: (row["demo"], row["run"]) for row in rows}
    assert told["data.image_size"] == ("64", "-") and told["steps"] == ("400", "4")
    assert told["top1: top-1 accuracy (held-out)"] == ("0.630 [0.560, 0.700]", "-")
    assert told["loss"][0].startswith("loss falling")
