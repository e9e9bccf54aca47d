"""A small labelled, captioned set of drawn shapes, and a task that sees colour and reads words without training."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data_pipeline.format import write_manifest
from data_pipeline.preparation.packing.samples import Sample, pack_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}
SIZES = (10, 14, 18, 22)


def drawing(colour: tuple[int, int, int], radius: int) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((32 - radius, 32 - radius, 32 + radius, 32 + radius), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_set(
    folder: Path,
    *,
    name: str = "held-out",
    captions: bool = True,
    classes: tuple[str, ...] | None = None,
    labels: tuple[str, str, str] = tuple(COLOURS),
) -> Path:
    """12 circles in 3 colours and 4 sizes; label and caption are the colour, so each caption has four pictures.

    classes: of the manifest, in its order. labels: what red, green and blue are called there.
    """
    folder.mkdir(parents=True)
    classes, called = classes if classes is not None else tuple(COLOURS), dict(zip(COLOURS, labels, strict=True))
    pairs = [(colour, size) for size in SIZES for colour in COLOURS]
    samples = [
        Sample(
            row=i,
            image=drawing(COLOURS[colour], size),
            extension="png",
            format="png",
            width=64,
            height=64,
            caption=f"{colour} circle" if captions else None,
            label=classes.index(called[colour]),
        )
        for i, (colour, size) in enumerate(pairs)
    ]
    entry = pack_shard(folder, 0, 0, samples, classes=classes)
    write_manifest(folder, name=name, shards=[entry], classes=classes, about={"attribution": "drawn by this test"})
    return folder


class Pixels(nn.Module):
    def forward_features(self, images: Tensor) -> Tensor:
        return images


class Painter(nn.Module):
    """Embeds a picture as its mean colour below white, a text as the colours that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.image = Pixels()

    def encode_image(self, images: Tensor) -> Tensor:
        colours = torch.tensor(list(COLOURS.values())) / 255 - 1
        absent = images.mean((2, 3)) - images.amax((2, 3))
        return F.normalize(F.normalize(absent) @ F.normalize(colours).T - 0.8) * self.scale

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens.float() + 1e-6) * self.scale

    def classify(self, images: Tensor) -> Tensor:
        return self.encode_image(images)


def colour_tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[int(colour in text) for colour in COLOURS] for text in texts])
