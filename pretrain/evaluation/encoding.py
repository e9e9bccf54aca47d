"""A whole set, or a list of texts, through a function of the model, without gradients; results on the CPU."""

import base64
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.reading import ImageText, SampleRef, evaluation_batches, normalize
from pretrain.configuration.schema import RunConfig
from pretrain.models import InternImage

THUMBNAIL = 112  # pixels; what a report shows


class Evaluated(Protocol):
    """A torch module, as far as an evaluation needs one."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> object: ...


class Classifier(Evaluated, Protocol):
    def classify(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes]."""


class ImageTextModel(Evaluated, Protocol):
    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, D]."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, L] -> unit vectors [B, D]."""


class HasImageModel(Evaluated, Protocol):
    @property
    def image(self) -> InternImage: ...


@dataclass(frozen=True)
class Encoded:
    """What a function of the model gave for every sample of a set, in the set's order."""

    values: Tensor  # float32 [N, ...]
    labels: Tensor  # int64 [N], -1 where missing
    captions: tuple[str | None, ...]
    samples: tuple[SampleRef, ...]
    pictures: dict[int, str]  # data URIs of the samples that were asked for

    def __len__(self) -> int:
        return len(self.labels)


def encode_set(
    model: Evaluated,
    set_folder: Path | str,
    config: RunConfig,
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    pictures: Collection[int] = (),
) -> Encoded:
    """`function` of each sample's centre crop, normalised as in `config.data`.

    function: [B, 3, S, S] on the device of `model` -> [B, ...]. pictures: indices of the samples whose crops to keep.
    """
    device = device_of(model)
    values: list[Tensor] = []
    labels: list[Tensor] = []
    captions: list[str | None] = []
    samples: list[SampleRef] = []
    kept: dict[int, str] = {}
    with inference(model):
        for batch in evaluation_batches(set_folder, config.data.image_size, batch_size, ImageText()):
            first = len(samples)
            kept |= {i: data_uri(batch.views[i - first, 0]) for i in pictures if first <= i < first + len(batch)}
            images = normalize(batch.views[:, 0].to(device), config.data.mean, config.data.std)
            values.append(function(images).float().cpu())
            labels.append(batch.targets.labels)
            captions += batch.targets.captions
            samples += batch.samples
    return Encoded(torch.cat(values), torch.cat(labels), tuple(captions), tuple(samples), kept)


def encode_texts(
    model: Evaluated,
    texts: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 256,
) -> Tensor:
    """float32 [len(texts), D] on the CPU."""
    device = device_of(model)
    with inference(model):
        parts = [
            encode_text(tokenizer(list(texts[i : i + batch_size])).to(device)).float().cpu()
            for i in range(0, len(texts), batch_size)
        ]
    return torch.cat(parts)


@contextmanager
def inference(model: Evaluated) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: Evaluated) -> torch.device:
    return next(model.parameters()).device


def data_uri(view: Tensor) -> str:
    """uint8 [S, S, 3] -> a PNG of at most THUMBNAIL pixels a side, as a data URI."""
    image = Image.fromarray(view.contiguous().numpy())
    if image.width > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
