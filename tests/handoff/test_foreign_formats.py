"""Hugging Face and ONNX exports answer as the PyTorch model does, with the golden weights (at initialisation every
offset is zero).
"""

import ast
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.handoff import export, read_backbone
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.huggingface import remote_code, write_huggingface
from pretrain.handoff.onnx import save_graph, write_onnx
from pretrain.models import InternImage, official

NEWEST_OPSET = 23  # that torch's exporter writes
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
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if not node.level:
                assert not str(node.module).startswith(("pretrain", "data_pipeline")), f"{name} imports {node.module}"
                continue
            carried = files[f"{node.module}.py"]
            for alias in node.names:
                defined = rf"^\s*(def|class) {alias.name}\b|^{alias.name}\b.*=|import .*\b{alias.name}\b"
                assert re.search(defined, carried, re.MULTILINE), f"{name} imports {alias.name} of {node.module}"


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


@pytest.fixture
def folder(tmp_path):
    """h_like as a Hugging Face folder with names for its ten classes."""
    return write_huggingface(golden("h_like")[0], tmp_path / "folder_again")


def test_a_new_number_of_labels_gets_a_new_classifier(hugging_face, folder, tmp_path):
    _, model, images = golden("h_like")
    auto = hugging_face.AutoModelForImageClassification
    loaded = auto.from_pretrained(
        str(folder), trust_remote_code=True, num_labels=5, ignore_mismatched_sizes=True
    ).eval()
    with torch.no_grad():
        logits = loaded(images).logits
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits, pooled @ loaded.model.head.weight.T + loaded.model.head.bias)
    assert 0 < loaded.model.head.weight.std() < 0.05 and not loaded.model.head.bias.any()
    loaded.save_pretrained(tmp_path / "again_5")
    again = read_backbone(tmp_path / "again_5")
    assert again.classes is None and again.mean == (0.5, 0.4, 0.3) and again.image_size == 64
    with torch.no_grad():
        torch.testing.assert_close(again.build()(images), logits, rtol=0, atol=1e-6)


def test_a_folder_saved_again_by_transformers_is_read_by_its_own_words(hugging_face, folder, tmp_path):
    loaded = hugging_face.AutoModelForImageClassification.from_pretrained(str(folder), trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="300KB")
    assert not (tmp_path / "again/model.safetensors").exists(), "in several files"
    backbone, again = golden("h_like")[0], read_backbone(tmp_path / "again")
    assert again.classes == tuple("abcdefghij") and again.mean == (0.5, 0.4, 0.3)
    assert all(torch.equal(again.state[key], value) for key, value in backbone.state.items())


def test_an_encoder_without_classifier_takes_a_new_one(hugging_face, tmp_path):
    backbone, model, images = golden("h_like")
    state = {key: value for key, value in backbone.state.items() if not key.startswith("head.")}
    bare = Backbone(state, {**backbone.arguments, "num_classes": 0}, image_size=64)
    folder = str(write_huggingface(bare, tmp_path / "folder_bare"))
    auto = hugging_face.AutoModelForImageClassification
    assert auto.from_pretrained(folder, trust_remote_code=True, num_labels=4)(images).logits.shape == (3, 4)
    with pytest.raises(ValueError, match="no classifier"):
        auto.from_pretrained(folder, trust_remote_code=True)
    encoder = hugging_face.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images).pooler_output, model.forward_head(model.forward_features(images), pre_logits=True)
        )


def test_hidden_states_are_the_stages_and_blocks_can_be_recomputed(hugging_face, folder):
    _, model, images = golden("h_like")
    loaded = hugging_face.AutoModelForImageClassification.from_pretrained(str(folder), trust_remote_code=True)
    with torch.no_grad():
        expected = [stage.permute(0, 3, 1, 2) for stage in model.forward_stages(images)]
        answer = loaded.eval()(images, output_hidden_states=True)
    assert loaded(images).hidden_states is None and len(answer.hidden_states) == 4
    for got, stage in zip(answer.hidden_states, expected, strict=True):
        torch.testing.assert_close(got, stage, rtol=0, atol=1e-4)
    assert (answer.logits - model(images)).abs().max() <= 1e-4
    loaded.gradient_checkpointing_enable()
    loaded.train()(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    kept = {name: p.grad.clone() for name, p in loaded.named_parameters()}
    assert all(block.kept == () for stage in loaded.model.stages for block in stage.blocks)
    loaded.gradient_checkpointing_disable()
    loaded.zero_grad()
    loaded(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("preset", ["m3i", "supervised"])
@pytest.mark.parametrize("target", ["folder", "model.onnx"])
def test_an_onnx_graph_gives_what_the_model_knows(target, preset, classes, fake_run, tmp_path, monkeypatch):
    """Which graphs are written, with which outputs; what these are, eagerly. The exporter itself is not run."""
    pytest.importorskip("onnxscript")
    graphs = {}

    def graph(model, example, shapes, given, outputs, described, opset):
        with torch.no_grad():
            found = model(example)
        return given, dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))

    monkeypatch.setattr("pretrain.handoff.onnx._graph", graph)
    monkeypatch.setattr("pretrain.handoff.onnx.save_graph", lambda made, out: graphs.setdefault(out.name, made))
    backbone = read_backbone(fake_run(preset)[0])
    if not classes:
        state = {key: value for key, value in backbone.state.items() if not key.startswith("head.")}
        backbone = replace(backbone, state=state, arguments={**backbone.arguments, "num_classes": 0}, classes=None)
    write_onnx(backbone, tmp_path / target)
    first, text = "logits" if classes else "features", preset == "m3i"
    assert set(graphs) == {"model.onnx", "text.onnx"} if text and target == "folder" else {"model.onnx"}
    given, outputs = graphs["model.onnx"]
    assert given == "images" and list(outputs) == ([first, "vectors"] if text else [first])
    with torch.no_grad():
        torch.testing.assert_close(outputs[first], backbone.build()(torch.zeros(2, 3, 64, 64)), rtol=0, atol=1e-5)
    if "text.onnx" in graphs:
        assert graphs["text.onnx"][0] == "tokens" and list(graphs["text.onnx"][1]) == ["vectors"]
        assert (tmp_path / "folder/vocab.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t_like", "l_like", "h_like"])
def test_onnxruntime_agrees_for_any_batch_in_old_and_new_opsets(name, tmp_path):
    """The golden models at opset 20; the smallest at the newest opset that both libraries know, too."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    backbone, model, images = golden(name)
    for opset in (20, NEWEST_OPSET) if name == "t_like" else (20,):
        path = write_onnx(backbone, tmp_path / "model.onnx", opset=opset)
        graph = onnx.load(path)
        assert {node.domain for node in graph.graph.node} == {""}, "standard operators only"
        assert [entry.version for entry in graph.opset_import if not entry.domain] == [opset]
        described = json.loads({p.key: p.value for p in graph.metadata_props}["internimage"])
        assert described["mean"] == [0.5, 0.4, 0.3] and described["classes"] == list("abcdefghij")
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
    assert not any("decoder" in path.name for path in folder.iterdir())
    state = read_backbone(folder).state
    assert torch.equal(state["patch_embed.conv1.weight"], weights["image.stem.conv1.weight"])
