"""Hugging Face and ONNX exports answer as the PyTorch model does, with the golden weights (at initialisation every
offset is zero).
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.handoff import export, read_backbone
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.huggingface import remote_code, write_huggingface
from pretrain.handoff.onnx import save_graph, write_onnx
from pretrain.models import InternImage, official

GOLDEN = Path(__file__).parent.parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


def golden(name: str) -> tuple[Backbone, InternImage, torch.Tensor]:
    case = json.loads((GOLDEN / f"model_{name}.json").read_text())
    state = {key: torch.from_numpy(fill.parameter(key, tuple(shape))) for key, shape in case["state_dict"].items()}
    model = InternImage(**case["config"])
    official.load_state_dict(model, state)
    images = torch.from_numpy(fill.uniform("input", (3, 3, 64, 64)))
    backbone = Backbone(state, model.arguments, image_size=64, classes=tuple("abcdefghij"), mean=(0.5, 0.4, 0.3))
    return backbone, model.eval(), images


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """transformers, its cache of remote code in a temporary folder."""
    transformers = pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    modules = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield transformers


def test_the_code_of_the_folder_imports_nothing_that_it_does_not_carry():
    files = remote_code()
    for name, text in files.items():
        for module in re.findall(r"^\s*from (\S+) import", text, re.MULTILINE):
            assert not module.startswith(("pretrain", "data_pipeline")), f"{name} imports {module}"
            assert not module.startswith(".") or f"{module[1:]}.py" in files, f"{name} imports {module}"


@pytest.mark.parametrize("name", ["t_like", "l_like", "h_like"])
def test_hugging_face_loads_the_folder_and_agrees(name, hugging_face, tmp_path):
    backbone, model, images = golden(name)
    folder = write_huggingface(backbone, tmp_path / f"folder_{name}")
    loaded = hugging_face.AutoModelForImageClassification.from_pretrained(str(folder), trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(images)
        answer = loaded(images, labels=torch.tensor([0, 1, 2]))
    assert (answer.logits - expected).abs().max() <= 1e-4
    torch.testing.assert_close(answer.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2])))
    assert loaded.config.id2label[3] == "d"
    processor = hugging_face.AutoImageProcessor.from_pretrained(str(folder))
    pixels = processor(np.full((80, 100, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    torch.testing.assert_close(pixels[0, :, 0, 0], (1 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(backbone.std))
    again = read_backbone(folder)
    assert all(torch.equal(again.state[key], value) for key, value in backbone.state.items())


def test_the_hugging_face_folder_works_without_this_project(tmp_path):
    pytest.importorskip("transformers")
    backbone, model, images = golden("h_like")
    folder = write_huggingface(backbone, tmp_path / "folder")
    torch.save(images, tmp_path / "images.pt")
    script = f"""
import sys
for name in ("dcnv3", "pretrain", "data_pipeline"):
    sys.modules[name] = None          # an import of it is an ImportError
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load({str(tmp_path / "images.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert (torch.load(tmp_path / "logits.pt") - model(images)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["t_like", "l_like", "h_like"])
def test_onnxruntime_runs_the_classifier_and_agrees_for_any_batch(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    backbone, model, images = golden(name)
    path = write_onnx(backbone, tmp_path / "model.onnx")
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}, "standard operators only"
    assert json.loads({p.key: p.value for p in graph.metadata_props}["internimage"])["mean"] == [0.5, 0.4, 0.3]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(None, {"images": images[:batch].numpy()})
        with torch.no_grad():
            assert np.abs(logits - model(images[:batch]).numpy()).max() <= 1e-4


def test_weights_too_large_for_one_onnx_file_lie_beside_it_also_when_written_again(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr("pretrain.handoff.onnx.LARGEST_FILE", 1 << 12)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    matrix = np.random.default_rng(0).random((64, 32), np.float32)
    for _ in range(2):
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", kind, [None, 64])],
            [helper.make_tensor_value_info("y", kind, [None, 32])],
            [onnx.numpy_helper.from_array(matrix, "w")],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        path = save_graph(proto, tmp_path / "model.onnx")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        assert (tmp_path / "model.onnx.data").stat().st_size == matrix.nbytes
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.ones((3, 64), np.float32)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, x @ matrix, rtol=1e-5)
    monkeypatch.setattr("pretrain.handoff.onnx.LARGEST_FILE", 1 << 20)
    save_graph(helper.make_model(helper.make_graph([], "nothing", [], [])), tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx.data").exists()


def test_a_run_is_exported_to_a_hugging_face_folder_in_one_call(fake_run, tmp_path):
    run, weights = fake_run()
    folder = export(run, "hf", tmp_path / "folder")
    assert read_backbone(folder).image_size == 64
    assert not any("text" in path.name or "decoder" in path.name for path in folder.iterdir())
    state = read_backbone(folder).state
    assert torch.equal(state["patch_embed.conv1.weight"], weights["image.stem.conv1.weight"])
