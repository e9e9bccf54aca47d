"""Exports, foreign files, folders of pictures, several ranks: the same scores as a run on a shard set, or a refusal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import CLASSES, run_config, write_checkpoint
from evaluation_shapes import COLOURS, SIZES, colour_tokens, drawing, write_set
from PIL import Image

from data_pipeline.errors import UserError
from pretrain.evaluation import embed, evaluate, linear_probe, retrieval, top1, value_of, zero_shot
from pretrain.evaluation.knn import knn, votes
from pretrain.evaluation.pictures import list_pictures
from pretrain.evaluation.words import class_names, templates
from pretrain.handoff import export
from pretrain.tasks.task import module_of


def paint(folder: Path) -> Path:
    """The pictures of `write_set`, a sub-folder a colour."""
    for size in SIZES:
        for colour, value in COLOURS.items():
            file = folder / colour / f"{size}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(drawing(value, size))
    return folder


def test_a_folder_of_pictures_scores_as_a_shard_set_of_them(painter, shapes, tmp_path, config):
    painter.classify = lambda images: painter.encode_image(images) * torch.tensor([1.0, 1.0, -1.0])  # never blue
    folder = paint(tmp_path / "folder")
    one, other = (top1(painter, data, config, classes=tuple(COLOURS)) for data in (shapes, folder))
    assert one["scores"] == other["scores"] and one["per_class"] == other["per_class"]
    assert one["calibration_error"] == pytest.approx(other["calibration_error"], abs=1e-12)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_a_picture_folder_give_captions_and_labels(kind, painter, shapes, tmp_path, config):
    folder = paint(tmp_path / "folder")
    files = [f"{colour}/{size}.png" for size in SIZES for colour in COLOURS]
    rows = [{"file_name": f, "text": f"{f.split('/')[0]} circle", "label": f.split("/")[0]} for f in files]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["file_name,text,label", *(",".join(row.values()) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    one, other = (retrieval(painter, data, config, tokenizer=colour_tokens) for data in (shapes, folder))
    assert one["scores"] == other["scores"]
    assert [e["caption"] for e in one["examples"]] == [e["caption"] for e in other["examples"]]
    assert zero_shot(painter, folder, config, tokenizer=colour_tokens)["scores"][0]["value"] == 1
    assert list_pictures(folder).classes == ("blue", "green", "red")
    (folder / "red/10.png").unlink()
    with pytest.raises(UserError, match=r"names 'red/10\.png', which is not in"):
        list_pictures(folder)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="neither a shard set"):
        list_pictures(tmp_path)


def test_neighbours_vote_as_counted_one_by_one(painter, shapes, tmp_path, config):
    draw = torch.Generator().manual_seed(0)
    gallery, queries = (F.normalize(torch.randn(n, 5, generator=draw), dim=1) for n in (40, 9))
    labels = torch.randint(4, (40,), generator=draw)
    found = votes(queries, gallery, labels, 4, 7, 0.1)
    for query, row in zip(queries, found, strict=True):
        cosines = sorted(((float(query @ g), int(label)) for g, label in zip(gallery, labels, strict=True)))[-7:]
        expected = [sum(torch.tensor(c / 0.1).exp().item() for c, label in cosines if label == k) for k in range(4)]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    result = knn(painter, shapes, write_set(tmp_path / "test", classes=("blue", "green", "red")), config, k=3)
    assert value_of(result, "top1") == 1 and result["settings"]["train"] == "held-out"


def test_a_probe_without_a_validation_set_keeps_a_fifth_of_the_training_set(painter, shapes, config):
    result = linear_probe(painter, shapes, None, shapes, config, penalties=(1e-3, 1e3))
    assert value_of(result, "top1") == 1 and result["settings"]["penalty"] == 1e-3


def test_words_come_from_a_file_or_by_a_known_name(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\n\n")
    assert class_names(str(tmp_path / "names.txt")) == ("ant", "bee")
    wnids = class_names("imagenet-1k")
    assert len(wnids) == 1000 and wnids[0] == "n01440764" and list(wnids) == sorted(wnids)
    assert len(templates("openai")) == 80 and all(t.count("{}") == 1 for t in templates("openai"))
    with pytest.raises(UserError, match="openai or simple"):
        templates("sonnet")


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A run with a classifier of five animals, and 13 pictures of four of them."""
    folder = tmp_path_factory.mktemp("animals")
    config = run_config("supervised")
    torch.manual_seed(0)
    module = module_of(config, classes=len(CLASSES))
    with torch.no_grad():
        module.image.head.weight.mul_(30)
    write_checkpoint(folder / "run", config, module)
    draw = torch.Generator().manual_seed(5)
    for i in range(13):
        file = folder / "pictures" / CLASSES[i % 4] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        rough = torch.randint(256, (4, 4, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(rough).resize((70 + i, 66), Image.Resampling.BICUBIC).save(file)
    return folder


def scores(result) -> list[tuple[str, float]]:
    return [(entry["name"], entry["value"]) for entry in result["scores"]]


@pytest.mark.parametrize("layout", ["safetensors", "official", "timm", "hf"])
def test_an_export_scores_as_its_run_from_another_folder(layout, animals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = evaluate(animals / "run", animals / "pictures", untrained=False)["top1"]
    path = export(animals / "run", layout, tmp_path / ("e" if layout in ("timm", "hf") else f"e.{layout}"))
    told: list[str] = []
    other = evaluate(path, animals / "pictures", untrained=False, say=told.append)["top1"]
    assert scores(run) == scores(other) and run["per_class"] == other["per_class"]
    assert run["images_per_second"] > 0
    assert (path / "evaluation/top1.json").is_file() if path.is_dir() else any("--output" in line for line in told)


@pytest.mark.parametrize("change", ["permuted", "missing"])
def test_other_orders_and_fewer_classes_are_matched_by_name(change, animals, tmp_path):
    expected = evaluate(animals / "run", animals / "pictures", untrained=False)["top1"]
    folder = tmp_path / "pictures"
    shutil.copytree(animals / "pictures", folder)
    if change == "missing":
        shutil.rmtree(folder / CLASSES[0])
        result = evaluate(animals / "run", folder, untrained=False)["top1"]
        left = {name: row for name, row in expected["per_class"].items() if name != CLASSES[0]}
        assert result["per_class"] == left and CLASSES[0] not in result["per_class"]
        return
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    rows = [{"file_name": name, "label": name.split("/")[0]} for name in reversed(names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(animals / "run", folder, untrained=False)["top1"]
    assert scores(result) == scores(expected) and result["per_class"] == expected["per_class"]


def test_a_renamed_class_is_refused_with_both_lists(animals, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(animals / "pictures", folder)
    (folder / "bee").rename(folder / "wasp")
    with pytest.raises(UserError, match=r"not among those of the model: wasp") as refused:
        evaluate(animals / "run", folder, untrained=False)
    assert "ant, wasp, cat, dog" in str(refused.value).replace("ant, cat, dog, wasp", "ant, wasp, cat, dog")
    assert "ant, bee, cat, dog, eel" in str(refused.value)


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_without_captions_the_other_scores_are_made(kind, tmp_path):
    config = run_config("m3i")
    write_checkpoint(tmp_path / "run", config, module_of(config, classes=len(CLASSES)))
    names = CLASSES[:3]
    if kind == "shards":
        data = write_set(tmp_path / "set", captions=False, classes=names, labels=names)
    else:
        data = paint(tmp_path / "set")
        for colour, name in zip(COLOURS, names, strict=True):
            (data / colour).rename(data / name)
    told: list[str] = []
    assert sorted(evaluate(tmp_path / "run", data, untrained=False, say=told.append)) == ["top1", "zero-shot"]
    assert f"left out: retrieval: no sample of {data} has a caption" in told
    with pytest.raises(UserError, match="retrieval: no sample of"):
        evaluate(tmp_path / "run", data, tasks=["retrieval"])


def test_fitted_scores_need_a_training_set_and_no_classifier(animals, tmp_path):
    with pytest.raises(UserError, match="--train SET"):
        evaluate(animals / "run", animals / "pictures", tasks=["knn"])
    found = evaluate(
        animals / "run",
        animals / "pictures",
        tasks=["knn", "linear-probe"],
        train=animals / "pictures",
        output=tmp_path,
    )
    assert value_of(found["knn"], "top1") == 1, "each picture is its own nearest neighbour"
    assert "untrained" in found["linear-probe"]["scores"][0]["beside"]


def test_ranks_share_the_work_and_answer_as_one(animals, tmp_path):
    run, data = animals / "run", animals / "pictures"
    alone = evaluate(run, data, untrained=False, batch_size=2)["top1"]
    vectors = np.load(embed(run, data, tmp_path / "alone.npy"))
    script = Path(__file__).with_name("sharing_ranks.py")
    command = [sys.executable, str(script), "3", str(run), str(data), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # which a copy of a process cannot share
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert done.returncode == 0, (done.stderr[-3000:], logs)
    shared = json.loads((tmp_path / "evaluation/top1.json").read_text())
    assert scores(shared) == scores(alone) and shared["per_class"] == alone["per_class"] and shared["samples"] == 13
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), vectors, atol=1e-3)
    for rank, log in enumerate(logs):
        assert f"part {rank + 1} of 3" in log, "parts are taken in turn"


@pytest.mark.parametrize(
    "command", [["evaluate", "RUN", "--data", "SET"], ["embed", "RUN", "--data", "S", "--to", "F"]]
)
def test_the_commands_start_ranks_of_themselves(command, monkeypatch):
    from launch.cli import run as command_line

    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr("launch.local.spawn", lambda argv, count: started.append((list(argv), count)) or 7)
    monkeypatch.setattr(sys, "argv", ["internimage", *command, "--processes", "3"])
    assert command_line([*command, "--processes", "3"]) == 7
    ((words, count),) = started
    assert count == 3 and words[-len(command) - 2 :] == [*command, "--processes", "3"]
