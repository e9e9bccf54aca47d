"""A run goes into every layout, is loaded by that layout's own tool in a process without this project, and answers the
same: logits, names, normalisation, top-1 on the same pictures. What comes back into ours is the same weights.
"""

import hashlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import CLASSES, run_config, write_checkpoint
from foreign_loaders import CAPTIONS
from PIL import Image
from safetensors import safe_open

from data_pipeline.errors import UserError
from data_pipeline.reading.decode.centre import render_centre
from pretrain.handoff import FORMATS, export, read_backbone
from pretrain.handoff.text import heads_of, write_tokenizer
from pretrain.models import official
from pretrain.objectives.text import build_tokenizer
from pretrain.tasks.task import module_of

SIZES = [(64, 64), (90, 64), (64, 131), (200, 150), (65, 67), (33, 47)]
PLACES = {"safetensors": "model.safetensors", "official": "model.pth", "pt2": "model.pt2"}
TOOLS = {  # what each layout is read with
    "safetensors": "safetensors",
    "official": "torch",
    "timm": "timm",
    "hf": "transformers",
    "open_clip": "open_clip",
    "onnx": "onnxruntime",
    "pt2": "torch",
}
LIKE_H = {
    "depths": [1, 1, 1, 1],
    "dw_kernel_size": 5,
    "level2_post_norm": True,
    "level2_post_norm_block_ids": [0],
    "res_post_norm": True,
    "center_feature_scale": True,
}


class Given:
    """A run, its exports and the pictures in one folder, and what this project itself answers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        config = run_config(**LIKE_H)
        torch.manual_seed(0)
        self.module = module_of(config, classes=len(CLASSES)).eval()
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                if name.endswith(("offset.weight", "mask.weight", "center_scale.weight")):
                    value.copy_(torch.randn_like(value) * 0.1)
                if name == "image.head.weight":
                    value.mul_(20)  # classes that are told apart
        write_checkpoint(self.run, config, self.module)
        draw = torch.Generator().manual_seed(7)
        for i, (width, height) in enumerate(SIZES):
            rough = torch.randint(256, (5, 5, 3), generator=draw, dtype=torch.uint8)
            image = Image.fromarray(rough.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            image.save(folder / f"picture-{i}.png")
        views = [
            torch.from_numpy(render_centre(p.read_bytes(), 10**6, 64, 1.0)[0].copy())
            for p in sorted(folder.glob("picture-*.png"))
        ]
        mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
        self.pixels = ((torch.stack(views).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        self.tokens = build_tokenizer(config.data.context_length)(CAPTIONS)
        torch.save(self.pixels, folder / "pixels.pt")
        torch.save(self.tokens, folder / "tokens.pt")
        with torch.no_grad():
            self.logits = self.module.classify(self.pixels)
            self.stages = [stage.permute(0, 3, 1, 2) for stage in self.module.image.forward_stages(self.pixels)]
            self.images, self.texts = self.module.encode_image(self.pixels), self.module.encode_text(self.tokens)
            self.scale = self.module.logit_scale.log.exp()
        self.std = std[None, :, None, None]

    def export(self, layout: str) -> Path:
        return export(self.run, layout, self.folder / PLACES.get(layout, layout))

    def ask(self, layouts: list[str]) -> None:
        """Each layout's own tool, in a process of its own, from another working directory."""
        for layout in layouts:
            self.export(layout)
        empty = self.folder / "empty"
        empty.mkdir()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("foreign_loaders.py")), str(self.folder), *layouts]
        done = subprocess.run(
            command, env=environment, cwd=empty, timeout=900, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("round-trip"))


@pytest.fixture(scope="module")
def asked(given: Given, request: pytest.FixtureRequest) -> Given:
    """All tools that are installed have answered, at the cost of one import of torch."""
    own = [item for item in request.session.items if item.path == request.path and "asked" in item.fixturenames]
    wanted = [item.callspec.params["layout"] for item in own]
    given.ask([layout for layout in wanted if importlib.util.find_spec(TOOLS[layout])])
    return given


@pytest.mark.timeout(1800)  # the first asks all tools
@pytest.mark.parametrize("layout", TOOLS)
def test_a_tool_without_this_project_answers_the_same(layout: str, asked: Given) -> None:
    pytest.importorskip(TOOLS[layout])
    given, error = asked, asked.folder / f"{layout}-error.txt"
    assert not error.exists(), error.read_text()
    said, most = torch.load(given.folder / f"{layout}-answers.pt"), 1e-4 if layout == "onnx" else 1e-5
    if "names" in said:
        assert list(said["names"]) == list(CLASSES)
    if "state" in said:  # under the authors' keys, whose model answers as ours does: tests/models/test_golden_models.py
        expected = official.state_dict(given.module.image)
        assert said["state"].keys() == expected.keys()
        assert all(torch.equal(said["state"][name], value) for name, value in expected.items())
    if "logits" in said:
        torch.testing.assert_close(said["logits"], given.logits, rtol=0, atol=most)
        assert torch.equal(said["own_logits"].argmax(1), given.logits.argmax(1)), "top-1 of its own reading"
        assert given.logits.argmax(1).unique().numel() > 1, "a test that can fail"
    levels = ((said["own"] - given.pixels) * given.std * 255).abs()
    if layout == "hf":  # resizes with another library, and cuts half a pixel from the centre where a margin is odd
        levels = levels[:2]
    assert levels.max() <= (2.1 if layout == "hf" else 0.01)
    if "images" in said:
        torch.testing.assert_close(said["images"], given.images, rtol=0, atol=most)
        torch.testing.assert_close(said["texts"], given.texts, rtol=0, atol=most)
        expected = given.scale * given.images @ given.texts.T
        torch.testing.assert_close(said["similarity"], expected, rtol=0, atol=20 * most)
    if "zero_shot" in said:
        tokens = build_tokenizer(77)(["a ant", "one ant.", "a bee", "one bee."])
        with torch.no_grad():
            classes = F.normalize(given.module.encode_text(tokens).view(2, 2, -1).mean(1), dim=1)
        torch.testing.assert_close(said["zero_shot"], given.images @ classes.T, rtol=0, atol=most)
    if "stages" in said:
        chosen = [given.stages[1], given.stages[3]]
        for got, expected in ((said["stages"], given.stages), (said["hidden"], given.stages), (said["chosen"], chosen)):
            torch.testing.assert_close(list(got), expected, rtol=0, atol=most)
        assert said["channels"] == ([32, 128], [128])
    if layout == "onnx":
        assert (said["domains"], said["opset"]) == ({""}, 20), "standard operators alone"


@pytest.mark.parametrize("layout", ["safetensors", "official", "timm", "hf", "open_clip"])
def test_what_comes_back_is_the_same_model(layout: str, given: Given) -> None:
    written = given.export(layout)
    back, first = read_backbone(written), read_backbone(given.run)
    assert back.image_size == 64 and back.mean == first.mean and back.std == first.std
    if layout == "open_clip":
        assert back.classes is None and not back.arguments["num_classes"], "its labels are words"
        wanted = {key: value for key, value in first.state.items() if not key.startswith("head.")}
    else:
        assert back.classes == CLASSES
        wanted = first.state
        with torch.no_grad():
            torch.testing.assert_close(back.build()(given.pixels), given.logits, rtol=0, atol=1e-6)
    assert set(back.state) == set(wanted)
    assert all(torch.equal(back.state[key], value) for key, value in wanted.items())
    assert back.origin["sources"][0]["name"] == "animals" and "path" not in back.origin["sources"][0]
    if layout in ("hf", "open_clip"):
        with torch.no_grad():
            torch.testing.assert_close(F.normalize(back.text.build()(given.tokens), dim=1), given.texts)


@pytest.mark.parametrize("layout", ["safetensors", "official", "timm", "hf", "open_clip"])
def test_exporting_again_gives_the_same_bytes(layout: str, given: Given, tmp_path: Path) -> None:
    """Often enough to see two entries in a random order; whoever saved the weights: test_same_bytes.py."""
    backbone, found = read_backbone(given.run), set()
    for number in range(8):
        target = tmp_path / str(number) / PLACES.get(layout, layout)
        target.parent.mkdir()
        FORMATS[layout](backbone, target)
        files = sorted(path for path in target.parent.rglob("*") if path.is_file())
        found.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))
    assert len(found) == 1 and found != {()}


@pytest.mark.parametrize("layout", ["onnx", "pt2"])
def test_layouts_for_running_alone_are_refused_with_what_to_read(layout: str, tmp_path: Path) -> None:
    (tmp_path / f"model.{layout}").write_bytes(b"graph")
    with pytest.raises(UserError, match=r"made for running.*safetensors"):
        read_backbone(tmp_path / f"model.{layout}")


def test_every_export_has_a_card_and_ordinary_permissions(given: Given, tmp_path: Path) -> None:
    result = {
        "task": "top1",
        "title": "Classification",
        "set": "held-out",
        "samples": 6,
        "checkpoint": "step 1000",
        "weights": "trained weights (the run keeps no EMA)",
        "scores": [
            {
                "name": "top1",
                "title": "top-1 accuracy",
                "value": 0.5,
                "interval": [0.2, 0.8],
                "chance": 0.2,
                "beside": {"largest category": 0.3},
            }
        ],
    }
    (given.run / "evaluation").mkdir()
    (given.run / "evaluation/top1.json").write_text(json.dumps(result))
    (given.run / "evaluation/older.json").write_text(json.dumps({**result, "checkpoint": "step 7", "set": "stale"}))
    mask = os.umask(0o027)
    try:
        for layout in ("safetensors", "official", "timm", "hf", "open_clip"):
            written = export(given.run, layout, tmp_path / layout / PLACES.get(layout, "folder"))
            files = [path for path in written.parent.rglob("*") if path.is_file()]
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}, layout
            card = (written / "README.md" if written.is_dir() else Path(f"{written}.md")).read_text()
            for told in (
                "`m3i`",
                "1,000 steps",
                "animals: 160 samples",
                "CC-BY-4.0",
                "0.500",
                "largest category 0.300",
            ):
                assert told in card, (layout, told)
            assert "stale" not in card and str(given.folder) not in card
            for line in ("ant, bee, cat, dog, eel", "0.5, 0.4, 0.3", "wang2023internimage"):
                assert line in card, (layout, line)
    finally:
        os.umask(mask)
    digests = {
        line.split("`")[1]
        for path in tmp_path.rglob("*.md")
        for line in path.read_text().splitlines()
        if line.startswith("SHA-256 of the weights")
    }
    assert len(digests) == 1, "one model, one digest, whatever the layout"


@pytest.mark.parametrize("layout", ["open_clip"])
def test_towers_are_refused_where_there_is_no_text(layout: str, fake_run, tmp_path: Path) -> None:
    run, _ = fake_run("simmim")
    with pytest.raises(UserError, match="no text tower"):
        export(run, layout, tmp_path / "out")


def test_a_smaller_vocabulary_is_written_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pretrain.handoff.text import Text

    tower = {
        "token_embedding.weight": torch.zeros(2000, 8),
        "positional_embedding": torch.zeros(24, 8),
        "text_projection": torch.zeros(8, 8),
    }
    write_tokenizer(Text(tower, 2, 1.0), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = build_tokenizer(24, 2000)
    texts = ["A red ant", "  the cat's 3 eels -- at noon!  ", "naïve café 猫", " ".join(["long"] * 40), ""]
    encoded = theirs(texts, padding="max_length", max_length=24, truncation=True)["input_ids"]
    for row, tokens in zip(encoded, ours(texts).tolist(), strict=True):
        end = tokens.index(1999)
        assert row[: end + 1] == tokens[: end + 1] and set(row[end:]) == {1999}


def test_all_layouts_are_in_the_matrix() -> None:
    own = {"mmdet"}  # tests/handoff/test_export.py
    assert set(FORMATS) - own == {"safetensors", "official", "timm", "hf", "open_clip", "onnx", "pt2"}


def test_the_header_says_how_the_text_tower_is_built(given: Given) -> None:
    with safe_open(given.export("open_clip") / "open_clip_model.safetensors", "pt") as file:
        described = json.loads(file.metadata()["internimage"])
    assert described["text"]["heads"] == 2 and described["text"]["layers"] == 1


def test_a_run_with_the_sigmoid_loss_keeps_its_bias(fake_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import timm

    run, weights = fake_run("siglip", lambda module: module.logit_bias.value.data.fill_(-7.5))
    assert float(weights["logit_bias.value"]) == -7.5
    folder = export(run, "open_clip", tmp_path / "folder")
    assert read_backbone(folder).text.bias == -7.5 and read_backbone(run).text.bias == -7.5
    monkeypatch.syspath_prepend(str(folder))
    listed = timm.list_models("internimage*")
    import internimage_open_clip

    assert timm.is_model(internimage_open_clip.TOWER["name"]) and timm.list_models("internimage*") == listed
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert model.logit_bias.item() == -7.5
    config = json.loads((export(run, "hf", tmp_path / "hf") / "config.json").read_text())
    assert config["sigmoid"] is True
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert file.get_tensor("logit_bias").item() == -7.5


def test_a_tower_that_is_not_clips_is_not_written_as_if_it_were() -> None:
    assert heads_of({"kind": "bag", "name": None, "heads": 8}) is None
    assert heads_of({"name": None, "heads": 3}) == 3 and heads_of({"name": "ViT-B-32"}) == 8
    assert heads_of({"name": "ViT-B-32-quickgelu"}) is None, "another activation"
    assert heads_of({"name": "ViT-B-16-SigLIP"}) is None, "another pooling"
