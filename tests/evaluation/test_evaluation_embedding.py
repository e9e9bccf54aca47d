"""Vectors of a set: in its order, of any number of ranks, going on after a stop."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import CLASSES, run_config, write_checkpoint
from evaluation_shapes import write_set

from data_pipeline.errors import UserError
from data_pipeline.reading import ImageText, evaluation_batches, normalize
from pretrain.evaluation import embed
from pretrain.tasks.task import module_of


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A run with a text tower, a set of twelve, and the vectors that its module gives by itself."""
    folder = tmp_path_factory.mktemp("embedding")
    config = run_config()
    torch.manual_seed(0)
    module = module_of(config, classes=len(CLASSES)).eval()
    write_checkpoint(folder / "run", config, module)
    write_set(folder / "set")
    (batch,) = evaluation_batches(folder / "set", 64, 99, ImageText())
    with torch.no_grad():
        vectors = module.encode_image(normalize(batch.views[:, 0], config.data.mean, config.data.std))
    return folder, vectors, [sample.key for sample in batch.samples]


def test_vectors_stand_in_the_order_of_the_set_with_their_keys(given, tmp_path):
    folder, vectors, keys = given
    table = pq.read_table(embed(folder / "run", folder / "set", tmp_path / "v.parquet", batch_size=5))
    assert table.column("key").to_pylist() == keys and str(table.schema.field("vector").type.value_type) == "halffloat"
    found = np.stack(table.column("vector").to_numpy())
    np.testing.assert_allclose(found.astype(np.float32), vectors.numpy(), atol=2e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["v.parquet"]
    array = np.load(embed(folder / "run", folder / "set", tmp_path / "v.npy", part_samples=5))
    assert array.dtype == np.float16 and np.array_equal(array, found)
    lines = (tmp_path / "v.keys.txt").read_text().splitlines()
    assert [line.rpartition("/")[2] for line in lines] == keys


def test_what_is_done_is_not_done_again(given, tmp_path, monkeypatch):
    folder, vectors, _ = given
    seen: list[str] = []

    def stop_after_two(line: str) -> None:
        seen.append(line)
        if line.startswith("part 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(folder / "run", folder / "set", tmp_path / "v.npy", part_samples=4, say=stop_after_two)
    with pytest.raises(UserError, match="parts of another embedding"):
        embed(folder / "run", folder / "set", tmp_path / "v.npy", part_samples=4, features="mean")
    seen.clear()
    written = embed(folder / "run", folder / "set", tmp_path / "v.npy", part_samples=4, say=seen.append)
    assert [line.split(":")[0] for line in seen[1:]] == ["part 3 of 3"]
    np.testing.assert_allclose(np.load(written).astype(np.float32), vectors.numpy(), atol=2e-3)
    assert not (tmp_path / "v.npy.parts").exists()


def test_mistakes_are_named(given, tmp_path):
    folder, _, _ = given
    with pytest.raises(UserError, match=r"ending in \.parquet or \.npy"):
        embed(folder / "run", folder / "set", tmp_path / "v.csv")


def test_the_command_prints_the_file(given, tmp_path, capsys):
    from launch.cli import run as command_line

    folder, vectors, _ = given
    target = tmp_path / "v.parquet"
    words = ["embed", str(folder / "run"), "--data", str(folder / "set"), "--to", str(target), "--features", "mean"]
    assert command_line(words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target) and pq.read_metadata(target).num_rows == len(vectors)
    assert "mean features of step 1000" in said.err
