"""Captions as tokens, and category labels: the targets of pretraining and of classification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.targets import TargetSource
from data_pipeline.reading.workers.memory import Arrays, Layout

Tokenizer = Callable[[list[str]], Any]  # captions -> integers [n, L], as an array or a tensor
_CAPTIONS_KEPT = 8192


@dataclass(frozen=True)
class ImageTextTargets:
    """Captions and categories of B samples."""

    tokens: Tensor  # int64 [B, L], zeros where there is no caption
    has_text: Tensor  # bool [B]
    labels: Tensor  # int64 [B], -1 where missing
    has_label: Tensor  # bool [B]
    captions: tuple[str | None, ...] = ()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            tokens=change(self.tokens),
            has_text=change(self.has_text),
            labels=change(self.labels),
            has_label=change(self.has_label),
        )


class ImageText:
    """Makes `ImageTextTargets`. tokenizer: captions -> int64 [n, length]; None gives captions without tokens, L is 0.

    Raises UserError where the tokenizer makes another number of tokens.
    """

    members: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer | None = None, length: int = 0) -> None:
        self._length = length
        self._tokenizer = None if tokenizer is None else CachedTokenizer(tokenizer)
        if tokenizer is not None and (shape := tuple(tokenizer(["a"]).shape)) != (1, length):
            raise UserError(
                f"the tokenizer makes {shape[-1]} tokens a caption, data.context_length is {length}; build it with that"
            )

    def layout(self, rows: int) -> Layout:
        flags: Layout = {name: ((rows,), np.bool_) for name in ("has_text", "has_label")}
        return flags | {"tokens": ((rows, self._length), np.int64), "labels": ((rows,), np.int64)}

    def write(self, row: int, sample: RawSample, source: TargetSource, crops: np.ndarray, arrays: Arrays) -> str | None:
        caption = sample.caption if source.captions else None
        arrays["has_text"][row] = caption is not None
        label = source.category(sample.label)
        arrays["labels"][row], arrays["has_label"][row] = label, label >= 0
        return caption

    def incomplete(self, sample: RawSample, source: TargetSource) -> str:
        return sample.note if source.captions or "text" not in sample.note else ""

    def finish(self, extras: Sequence[object], arrays: Arrays) -> None:
        arrays["tokens"][:] = 0
        have = [(row, caption) for row, caption in enumerate(extras) if isinstance(caption, str)]
        if have and self._tokenizer is not None:
            arrays["tokens"][[row for row, _ in have]] = self._tokenizer([caption for _, caption in have])

    def collate(self, arrays: Arrays, extras: Sequence[object]) -> ImageTextTargets:
        tensors = {name: torch.from_numpy(arrays[name]) for name in ("tokens", "has_text", "labels", "has_label")}
        captions = tuple(caption if isinstance(caption, str) else None for caption in extras)
        return ImageTextTargets(**tensors, captions=captions)


class CachedTokenizer:
    """Keeps the tokens of the last few thousand captions: a small set has the same captions in every epoch."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, captions: list[str]) -> np.ndarray:
        """Returns int64 [len(captions), L]."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._kept))
        if len(self._kept) + len(new) > _CAPTIONS_KEPT:
            self._kept.clear()
            new = list(dict.fromkeys(captions))
        if new:
            self._kept.update(zip(new, np.asarray(self._tokenizer(new)), strict=True))
        return np.stack([self._kept[caption] for caption in captions])
