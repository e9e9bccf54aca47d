"""A whole set, or a list of texts, through a function of the model, without gradients; results on the CPU."""

import base64
import io
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.reading import Batch, ImageText, ImageTextTargets, SampleRef, evaluation_batches, normalize
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.pictures import is_picture_folder, list_pictures
from pretrain.models import InternImage
from pretrain.training.sharing import sharing

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
    pictures: dict[int, str]  # data URIs of the samples that were asked for, by their place here
    images_per_second: float = 0.0  # of reading and computing together, all ranks

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
    """`function` of each sample's centre crop, normalised as in `config.data`; ranks that share the work
    (`sharing.shared_by`) read a part each and all return the whole.

    set_folder: a shard set or a folder of pictures. function: [B, 3, S, S] on the device of `model` -> [B, ...].
    pictures: numbers in the set of the samples whose crops to keep.
    """
    device, ranks = device_of(model), sharing()
    began, positions = time.perf_counter(), list[int]()
    values: list[Tensor] = []
    labels: list[Tensor] = []
    captions: list[str | None] = []
    samples: list[SampleRef] = []
    kept: dict[int, str] = {}
    with inference(model):
        for batch in set_batches(set_folder, config.data.image_size, batch_size, ranks.rank, ranks.world_size):
            numbers = batch.positions.tolist()
            kept |= {i: data_uri(batch.views[row, 0]) for row, i in enumerate(numbers) if i in pictures}
            positions += numbers
            images = normalize(batch.views[:, 0].to(device), config.data.mean, config.data.std)
            values.append(function(images).float().cpu())
            labels.append(batch.targets.labels)
            captions += batch.targets.captions
            samples += batch.samples
    seconds = time.perf_counter() - began
    mine = (values, labels, captions, samples, positions, kept, seconds)
    parts = ranks.gather(mine)  # in the order of the set, since ranks take contiguous shares
    place = {number: i for i, number in enumerate(number for part in parts for number in part[4])}
    return Encoded(
        torch.cat([value for part in parts for value in part[0]]),
        torch.cat([value for part in parts for value in part[1]]),
        tuple(caption for part in parts for caption in part[2]),
        tuple(sample for part in parts for sample in part[3]),
        {place[number]: uri for part in parts for number, uri in sorted(part[5].items())},
        len(place) / max(part[6] for part in parts),
    )


def set_batches(
    set_folder: Path | str, image_size: int, batch_size: int, part: int, parts: int
) -> Iterator[Batch[ImageTextTargets]]:
    """Centre crops of one of `parts` contiguous parts of a shard set or a folder of pictures."""
    if is_picture_folder(set_folder):
        return list_pictures(set_folder).batches(image_size, batch_size, rank=part, world_size=parts)
    return evaluation_batches(set_folder, image_size, batch_size, ImageText(), rank=part, world_size=parts)


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
