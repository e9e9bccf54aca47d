"""The way to the device, as far as a machine without one can show it."""

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from reading_sets import tensors, write_set
from test_reader import assert_same, config, read, tokenize

from data_pipeline.reading import ImageText, Reader
from data_pipeline.reading.workers.pinning import Prefetcher

TENSORS = 7  # positions, views, crops, tokens, has_text, labels, has_label


@pytest.fixture
def pinned_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a machine with a GPU, whose page-locked memory is a plain copy; names of the threads that made copies."""
    threads: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.append(f"device {device}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return threads


@pytest.mark.parametrize(("workers", "thread"), [(0, "MainThread"), (2, "pinning")])
def test_every_tensor_is_pinned_once_and_batches_and_events_are_the_same(
    tmp_path: Path, pinned_by: list[str], workers: int, thread: str
) -> None:
    write_set(tmp_path / "set", [7, 5])
    (tmp_path / "set/00001.tar").write_bytes(b"")
    told: list[dict] = []
    events: list[dict] = []
    chosen = config(tmp_path / "set", max_bad_rate=1.0, workers=workers, prefetch=1)
    with Reader(chosen, ImageText(tokenize, 8), batch_size=24, seed=5, events=events.append) as reader:
        held = []
        for batch in islice(reader.batches(0), 6):
            held.append(batch)
            assert {event["step"] for event in events} == set(range(batch.step + 1))  # consumed, not read ahead
    named = [name for name in pinned_by if not name.startswith("device")]
    assert set(named) == {thread} and len(named) >= 6 * TENSORS and len(named) % TENSORS == 0
    assert ("device 1" in pinned_by) == (workers > 0)
    found = [
        {name: tensor.numpy() for name, tensor in tensors(one).items()} | {"samples": list(one.samples)} for one in held
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        plain = config(tmp_path / "set", max_bad_rate=1.0)
        assert_same(found, read(plain, 6, events=told))
    assert told == events


def test_a_batch_moves_whole_and_keeps_what_is_no_tensor(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [6])
    with Reader(config(tmp_path / "set"), ImageText(tokenize, 8), batch_size=4) as reader:
        batch = next(reader.batches(0))
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    assert all(tensor.shape == tensors(batch)[name].shape for name, tensor in tensors(moved).items())
    assert (moved.samples, moved.targets.captions, moved.step, len(moved)) == (
        batch.samples,
        batch.targets.captions,
        0,
        4,
    )


def test_an_error_comes_in_its_place_and_the_thread_ends() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    ahead = Prefetcher(items(), lambda item: -item, lambda: None)
    found = iter(ahead)
    assert [next(found), next(found)] == [-1, -2]
    with pytest.raises(ValueError, match="third"):
        next(found)
    endless = Prefetcher(iter(int, 1), lambda item: item, lambda: None)
    assert next(iter(endless)) == 0
    endless.close()
    for one in (ahead, endless):
        one._thread.join(10)
        assert not one._thread.is_alive()
