"""Two epochs of real pictures from every number of ranks and workers: the same global batches, every sample once."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_reader import assert_same, config, read

from data_pipeline.reading import DataConfig

GRID = list(product((1, 2, 3, 8), (0, 1, 3)))  # ranks, workers
BATCH = 24  # for all of them; divides none of the sets
Epochs = Callable[..., list[dict[str, Any]]]


def two_epochs(settings: DataConfig, samples: int, batch: int, **ranks: int) -> list[dict[str, Any]]:
    return read(settings, math.ceil(2 * samples / batch), batch_size=batch, **ranks)


def assert_every_sample_once_an_epoch(found: list[dict[str, Any]], samples: int) -> None:
    seen = [(sample.shard, sample.row) for batch in found for sample in batch["samples"]]
    first, second = seen[:samples], seen[samples : 2 * samples]
    assert max(Counter(first).values()) == max(Counter(second).values()) == 1
    assert len(set(first)) == samples and set(first) == set(second) and first != second


@pytest.fixture(scope="module")
def sample_of_cc12m(cc12m_folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    return cc12m_folder, two_epochs(config(cc12m_folder), 32, BATCH)


def test_cc12m_has_every_sample_once_an_epoch(sample_of_cc12m: tuple[Path, list[dict[str, Any]]]) -> None:
    assert_every_sample_once_an_epoch(sample_of_cc12m[1], 32)
    assert all(batch["has_text"].all() for batch in sample_of_cc12m[1])


@pytest.mark.parametrize(("world", "workers"), GRID)
def test_two_epochs_of_cc12m(sample_of_cc12m: tuple[Path, list[dict[str, Any]]], world: int, workers: int) -> None:
    folder, expected = sample_of_cc12m
    assert_same(two_epochs(config(folder, workers=workers), 32, BATCH, world=world), expected)


@pytest.fixture(scope="module")
def drawings(embedded_set: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Two epochs of the held-out drawings (200) and of those for training (thousands), in one process."""
    return {
        split: two_epochs(config(embedded_set[split], views=1), count(embedded_set[split]), batch)
        for split, batch in (("held-out", BATCH), ("train", 16 * BATCH))
    }


def count(folder: Path) -> int:
    from data_pipeline.format import read_manifest

    return read_manifest(folder).samples


@pytest.mark.parametrize("split", ["held-out", "train"])
def test_the_embedded_set_has_every_sample_once_an_epoch(
    embedded_set: dict[str, Path], drawings: dict[str, list[dict[str, Any]]], split: str
) -> None:
    assert_every_sample_once_an_epoch(drawings[split], count(embedded_set[split]))


@pytest.mark.parametrize(("world", "workers"), GRID)
def test_two_epochs_of_the_held_out_drawings(
    embedded_set: dict[str, Path], drawings: dict[str, list[dict[str, Any]]], world: int, workers: int
) -> None:
    settings = config(embedded_set["held-out"], views=1, workers=workers)
    assert_same(two_epochs(settings, 200, BATCH, world=world), drawings["held-out"])


@pytest.mark.parametrize(
    ("world", "workers"),
    [pytest.param(*one, marks=[] if one in ((2, 0), (3, 1)) else [pytest.mark.slow]) for one in GRID],
)
def test_two_epochs_of_the_embedded_set(
    embedded_set: dict[str, Path], drawings: dict[str, list[dict[str, Any]]], world: int, workers: int
) -> None:
    settings = config(embedded_set["train"], views=1, workers=workers)
    assert_same(two_epochs(settings, count(embedded_set["train"]), 16 * BATCH, world=world), drawings["train"])
