"""The snippets of docs/other_readers.md, as they stand there, on a set of our own writer."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from evaluation_shapes import write_set

PAGE = Path(__file__).parents[2] / "docs/other_readers.md"


def snippet(heading: str, folder: Path) -> dict:
    """What the first Python block under the heading leaves behind, with SET the folder."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block
    names: dict = {"SET": str(folder)}
    exec(compile(block[1], f"{PAGE.name}: {heading}", "exec"), names)
    return names


def test_webdataset_reads_every_sample_with_its_caption(tmp_path):
    samples = snippet("webdataset", write_set(tmp_path / "set"))["samples"]
    assert len(samples) == 12 and samples[0][2] == "red circle" and samples[0][1].size == (64, 64)
    bare = snippet("webdataset", write_set(tmp_path / "bare", captions=False))["samples"]
    assert len(bare) == 12 and {caption for _, _, caption, _ in bare} == {None}


def test_open_clips_training_loader_reads_every_captioned_sample(tmp_path):
    pytest.importorskip("pandas")  # which open_clip's loader imports
    batches = snippet("open_clip", write_set(tmp_path / "set"))["batches"]
    assert sum(len(images) for images, _ in batches) == 12 and batches[0][1].shape[1] == 77


def test_hugging_face_datasets_streams_every_sample(tmp_path):
    pytest.importorskip("datasets")
    rows = snippet("Hugging Face datasets", write_set(tmp_path / "set"))["rows"]
    assert len(rows) == 12 and rows[0][2] == "red circle"


def test_dali_reads_every_sample_on_a_cpu(tmp_path):
    pytest.importorskip("nvidia.dali")  # over a gigabyte, so that CI does without
    samples = snippet("webdataset", write_set(tmp_path / "set"))["samples"]
    pairs = snippet("DALI", tmp_path / "set")["pairs"]
    assert [caption for _, caption in pairs] == [caption for _, _, caption, _ in samples]
    for (picture, _), (_, expected, _, _) in zip(pairs, samples, strict=True):
        assert np.array_equal(picture, np.asarray(expected))
    bare = snippet("DALI", write_set(tmp_path / "bare", captions=False))["pairs"]
    assert [caption for _, caption in bare] == [""] * 12
