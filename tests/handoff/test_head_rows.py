"""Which rows of a classifier of many classes start one of few: by name, by number, by a table."""

import pytest
import torch
from checkpoints import CLASSES

from data_pipeline.errors import UserError
from pretrain.finetuning.weights import load_into, read_rows
from pretrain.handoff import export, read_backbone
from pretrain.models import create_model

THEIRS = ("ant", "bee", "cat", "dog", "eel")


def test_rows_are_found_by_name_and_by_a_table(tmp_path):
    assert read_rows("names", 2, ("eel", "bee"), THEIRS).tolist() == [4, 1]
    (tmp_path / "table").write_text("n02\tbee\nn01\tant\nn09\t4\nunused\tdog\n")
    assert read_rows(tmp_path / "table", 3, ("n09", "n01", "n02"), THEIRS).tolist() == [4, 0, 1]
    (tmp_path / "numbers").write_text("3\n0\n")
    assert read_rows(tmp_path / "numbers", 2).tolist() == [3, 0]


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(UserError, match="not among those of the source: wasp"):
        read_rows("names", 2, ("ant", "wasp"), THEIRS)
    with pytest.raises(UserError, match="the source's classifier has no class names"):
        read_rows("names", 1, ("ant",), None)
    (tmp_path / "table").write_text("a\tant\nb\tbees\n")
    with pytest.raises(UserError, match=r"1 of 3 classes of the data are not in it: c"):
        read_rows(tmp_path / "table", 3, ("a", "b", "c"), THEIRS)
    with pytest.raises(UserError, match="no classes of the source and no row numbers: bees"):
        read_rows(tmp_path / "table", 2, ("a", "b"), THEIRS)


def test_a_classifier_starts_from_the_rows_of_its_names(fake_run, tmp_path):
    run, weights = fake_run()
    written = export(run, "safetensors", tmp_path / "m.safetensors")
    assert read_backbone(written).classes == CLASSES == THEIRS
    model = create_model("custom", **{**read_backbone(written).arguments, "num_classes": 2})
    assert load_into(model, written, head_rows="names", classes=("dog", "ant")) == []
    assert torch.equal(model.head.weight, weights["image.head.weight"][[3, 0]])
