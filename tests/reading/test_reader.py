"""The global batch at a step is the same for any number of ranks and workers, and a run may stop and go on anywhere."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from reading_sets import tensors, tokenize, write_set

from data_pipeline.errors import UserError
from data_pipeline.reading import DataConfig, ImageText, Reader, normalize
from data_pipeline.reading.image_text import CachedTokenizer


def config(*paths: Path, **options) -> DataConfig:
    sources = [
        {"path": str(path), "weight": weight}
        for path, weight in zip(paths, options.pop("weights", [1] * 9), strict=False)
    ]
    return DataConfig(
        **{"sources": sources, "image_size": 32, "context_length": 8, "workers": 0, "prefetch": 2, "block_shards": 2}
        | options
    )


def read(
    settings: DataConfig,
    steps: int,
    *,
    batch_size: int = 24,
    start: int = 0,
    world: int = 1,
    accumulation: int = 1,
    seed: int = 5,
    events: list[dict] | None = None,
):
    """The global batches of `steps` steps, put together from all ranks: one dictionary of arrays a step."""
    readers = [
        Reader(
            settings,
            ImageText(tokenize, 8),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world,
            seed=seed,
            events=None if events is None else events.append,
        )
        for rank in range(world)
    ]
    streams = [reader.batches(start) for reader in readers]
    found = []
    for step in range(start, start + steps):
        parts = []
        for micro in range(accumulation):
            for stream in streams:
                batch = next(stream)
                assert (batch.step, batch.micro) == (step, micro)
                parts.append(batch)
        whole = {name: torch.cat([tensors(part)[name] for part in parts]).numpy() for name in tensors(parts[0])}
        found.append(whole | {"samples": [sample for part in parts for sample in part.samples]})
    for reader in readers:
        reader.close()
    return found


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a["samples"] == b["samples"]
        assert a.keys() == b.keys()
        for name in a.keys() - {"samples"}:
            assert np.array_equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "small"
    write_set(folder, [7, 5, 0, 9, 6], classes=["a", "b", "c"])
    return folder


@pytest.fixture(scope="module")
def expected(small):
    """Two epochs and a bit, in one process: 27 samples an epoch do not divide into batches of 24."""
    return read(config(small), 3)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_global_batches_do_not_depend_on_ranks_and_workers(small, expected, world, workers):
    assert_same(read(config(small, workers=workers), 3, world=world), expected)


def test_global_batches_do_not_depend_on_accumulation(small, expected):
    assert_same(read(config(small), 3, world=2, accumulation=3), expected)


def test_spawned_workers_read_what_forked_ones_read(small, expected):
    assert_same(read(config(small, workers=1, start_method="spawn"), 3), expected)


def test_every_sample_once_an_epoch_running_on_into_the_next(small, expected):
    samples = [(s.shard, s.row) for batch in expected for s in batch["samples"]]
    whole = sorted((f"{shard:05d}.tar", row) for shard, size in enumerate([7, 5, 0, 9, 6]) for row in range(size))
    assert sorted(samples[:27]) == whole and sorted(samples[27:54]) == whole
    assert samples[:27] != samples[27:54]


@pytest.mark.parametrize(("stop", "world", "workers"), [(1, 3, 1), (2, 8, 0), (5, 2, 3)])
def test_a_run_resumed_at_another_world_size_repeats_and_misses_nothing(small, stop, world, workers):
    unbroken = read(config(small), 7)
    before = read(config(small, workers=1), stop, world=2)
    after = read(config(small, workers=workers), 7 - stop, start=stop, world=world)
    assert_same(before + after, unbroken)


def test_mixtures_keep_their_weights_and_count_epochs_by_source(small, tmp_path):
    other = tmp_path / "bare"
    write_set(other, [4, 4], captions=False)
    settings = config(small, other, weights=[3, 1])
    found = read(settings, 32, batch_size=32)
    sources = [sample.source for batch in found for sample in batch["samples"]]
    assert sources.count("small") == 768 and sources.count("bare") == 256
    reader = Reader(settings, ImageText(tokenize, 8), batch_size=32, seed=5)
    assert reader.progress(32) == {
        "small": {"samples": 768, "epochs": 768 / 27},
        "bare": {"samples": 256, "epochs": 32.0},
    }
    counts = {key: 0 for key in {(s.shard, s.row) for b in found for s in b["samples"] if s.source == "bare"}}
    for batch in found:
        for sample in batch["samples"]:
            if sample.source == "bare":
                counts[sample.shard, sample.row] += 1
    assert set(counts.values()) == {32}


def test_captioned_labelled_and_bare_images_share_a_batch(small, tmp_path):
    write_set(tmp_path / "bare", [8], captions=False)
    write_set(tmp_path / "labelled", [8], captions=False, classes=["c", "d"])
    write_set(tmp_path / "captioned", [8])
    names = ["small", "bare", "labelled", "captioned"]
    paths = [small, *(tmp_path / name for name in names[1:])]
    settings = config(*paths)
    with Reader(settings, ImageText(tokenize, 8), batch_size=64) as reader:
        assert reader.classes == ("a", "b", "c", "d") and reader.num_classes == 4
        assert reader.epoch_samples == 27 + 24
        batch = next(reader.batches(0))
    for i, sample in enumerate(batch.samples):
        number = int(batch.targets.captions[i].split()[1]) if batch.targets.captions[i] else None
        assert bool(batch.targets.has_text[i]) == (sample.source in ("small", "captioned"))
        assert bool(batch.targets.has_label[i]) == (sample.source in ("small", "labelled"))
        if sample.source == "small":
            assert int(batch.targets.labels[i]) == number % 3
        elif sample.source == "labelled":
            assert int(batch.targets.labels[i]) == 2 + sample.row % 2
        else:
            assert int(batch.targets.labels[i]) == -1
        expected = tokenize([batch.targets.captions[i]])[0] if number is not None else torch.zeros(8, dtype=torch.int64)
        assert torch.equal(batch.targets.tokens[i], expected)


def test_a_source_may_leave_its_captions_and_labels_out(small):
    settings = config(small)
    settings.sources[0].captions = settings.sources[0].labels = False
    with Reader(settings, ImageText(tokenize, 8), batch_size=8) as reader:
        batch = next(reader.batches(0))
        assert reader.classes is None and not batch.targets.has_text.any() and not batch.targets.has_label.any()


def test_lineage_names_the_samples_of_the_global_batch(small, expected):
    with Reader(config(small), ImageText(tokenize, 8), batch_size=24, world_size=2, rank=1, seed=5) as reader:
        for step, batch in enumerate(expected):
            assert reader.lineage(step) == batch["samples"]


def test_batches_held_by_the_consumer_are_not_overwritten(small):
    settings = config(small, workers=2, prefetch=1)
    with Reader(settings, ImageText(tokenize, 8), batch_size=24, seed=5) as reader:
        held = list(islice(reader.batches(0), 12))
    assert_same(
        [
            {name: tensor.numpy() for name, tensor in tensors(batch).items()} | {"samples": list(batch.samples)}
            for batch in held
        ],
        read(config(small), 12),
    )


def test_the_seed_changes_order_and_crops(small, expected):
    other = read(config(small), 1, seed=6)[0]
    assert other["samples"] != expected[0]["samples"] and not np.array_equal(other["crops"], expected[0]["crops"])


def test_the_fingerprint_tells_whether_batches_will_be_the_same(small, tmp_path):
    def fingerprint(settings, batch_size=24, seed=0, **share):
        with Reader(settings, ImageText(tokenize, 8), batch_size=batch_size, seed=seed, **share) as reader:
            return reader.fingerprint

    same = {fingerprint(config(small)), fingerprint(config(small, workers=2), world_size=4, rank=1)}
    assert len(same) == 1
    write_set(tmp_path / "other", [7, 5, 0, 9, 5])
    others = [
        fingerprint(config(small), seed=1),
        fingerprint(config(small, block_shards=1)),
    ]
    assert len({*same, *others, fingerprint(config(tmp_path / "other"))}) == 4
    assert {fingerprint(config(small), 12)} == same, "the batch is of a run's segments"


def test_a_missing_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        Reader(config(tmp_path / "nowhere"), ImageText(tokenize, 8), batch_size=2)


def test_a_tokenizer_of_another_length_is_refused(small):
    with pytest.raises(UserError, match="8 tokens a caption"):
        Reader(config(small, context_length=16), ImageText(tokenize, 16), batch_size=2)


def test_normalising_gives_the_textbook_floats():
    views = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (views.double().permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert torch.allclose(normalize(views, mean, std, torch.float32).double(), expected, atol=1e-6)
    assert normalize(views, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_normalising_makes_its_constants_once_a_device(monkeypatch):
    views, mean, std = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    before = normalize(views, mean, std)

    def refuse(*_, **__):
        raise AssertionError("a tensor made from a list waits for the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    assert torch.equal(normalize(views, list(mean), list(std)), before)


def test_a_caption_is_tokenised_once_while_it_is_remembered(monkeypatch):
    monkeypatch.setattr("data_pipeline.reading.image_text._CAPTIONS_KEPT", 4)
    asked = []

    def counting(texts):
        asked.append(texts)
        return tokenize(texts)

    remembered = CachedTokenizer(counting)
    for captions in (["a", "b", "a"], ["b", "c"], ["c", "d", "e", "f"], ["a", "e", "a", "g", "h", "i"]):
        assert np.array_equal(remembered(captions), tokenize(captions).numpy())
    assert asked == [["a", "b"], ["c"], ["c", "d", "e", "f"], ["a", "e", "g", "h", "i"]]
    assert len(remembered._kept) == 5  # one batch may be larger than what is kept


def test_parts_of_captions_are_left_out_the_same_way_for_any_ranks_and_workers(tmp_path: Path):
    folder = tmp_path / "set"
    write_set(folder, (48,), caption=lambda number: "red, round, small thing")
    rules = {"views": 1, "augmentation": {"caption_dropout": 0.5}}

    def captions(world: int, workers: int) -> list[str]:
        readers = [
            Reader(config(folder, workers=workers, **rules), ImageText(tokenize, 8), batch_size=24, rank=rank,
                   world_size=world, seed=5) for rank in range(world)
        ]  # fmt: skip
        streams = [reader.batches(0) for reader in readers]
        said = [caption for _ in range(3) for stream in streams for caption in next(stream).targets.captions]
        for reader in readers:
            reader.close()
        return said

    said = captions(1, 0)
    assert said == captions(2, 1)
    assert len(set(said)) == 7  # every choice of three parts but none


def test_a_turned_picture_is_turned_alike_in_both_of_its_views(small):
    """Central squares, mirrored or not: the second view is the first or its mirror image, turned or not."""
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.5}
    still, turned = (
        read(config(small, views=2, augmentation={**whole, "rotate": angle, "shift": angle / 300}), 1)[0]
        for angle in (0.0, 30.0)
    )
    for one in (still, turned):
        first, second = one["views"][:, 0], one["views"][:, 1]
        mirrored = one["crops"][:, 0, 4] != one["crops"][:, 1, 4]
        assert 0 < mirrored.sum() < len(first)
        second = np.where(mirrored[:, None, None, None], second[:, :, ::-1], second)
        assert np.abs(first.astype(int) - second).max() <= 1
    assert (still["views"][:, 0] != turned["views"][:, 0]).any(axis=(1, 2, 3)).all()
    assert np.array_equal(still["crops"], turned["crops"])
