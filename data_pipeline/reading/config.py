"""The `data:` section of a configuration file."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class SourceConfig(Section):
    """One shard set and its share of the mixture."""

    path: str = Field(description="folder (or fsspec URL) holding the shards; or `pipe:COMMAND`, which streams")
    weight: float = Field(1.0, gt=0, description="share of the mixture, relative to the other sources")
    name: str | None = Field(None, description="name in logs and lineage; the folder's name by default")
    samples: int | None = Field(None, ge=1, description="samples of an epoch, of a `pipe:` source, which cannot tell")
    captions: bool = Field(True, description="use the captions of this source")
    labels: bool = Field(True, description="use the category labels of this source")


PerView = float | tuple[float, float]  # the same for both views, or one for each


class AugmentationConfig(Section):
    """The random view: crop of the (turned and flipped) image, resized to `data.image_size`; then colour, grey, blur,
    solarize, RandAugment, erasing. A preset of task `pretraining` brings its paper's values for keys left
    out.
    """

    scale: tuple[float, float] = Field((0.2, 1.0), description="share of the image's area that a crop covers")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="aspect ratio of a crop")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: float = Field(0.0, ge=0, description="brightness, contrast and saturation, each times 1 +- this")
    saturation: float | None = Field(None, ge=0, description="of saturation alone; null: as color_jitter")
    hue: float = Field(0.0, ge=0, le=0.5, description="turned by +- this share of the colour circle")
    jitter: float = Field(1.0, ge=0, le=1, description="probability of the four above")
    grey: PerView = Field(0.0, description="probability of a view without colour")
    blur: PerView = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="its width, pixels of the view")
    solarize: PerView = Field(0.0, description="probability of inverting what is brighter than half")
    rand_augment: str | None = Field(None, description="timm's notation, as rand-m9-mstd0.5-inc1")
    rotate: float = Field(
        0.0, ge=0, le=180, description="the picture turns by +- this before it is cropped, degrees; all views alike"
    )
    shift: float = Field(0.0, ge=0, le=0.5, description="and moves by +- this share of its sides")
    erase: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of a caption's parts (between commas) left out; one always stays"
    )

    @field_validator("grey", "blur", "solarize")
    @classmethod
    def _probabilities(cls, value: PerView) -> PerView:
        if not all(0 <= one <= 1 for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"data.augmentation: {value} is no probability between 0 and 1, nor a pair of them")
        return value


def of_view(value: PerView, number: int) -> float:
    return value[number] if isinstance(value, tuple) else value


class RectangleConfig(Section):
    """The view of dense tasks: the whole picture, resized keeping its shape; cropped where it exceeds image_size."""

    shorter: list[int] = Field([800], min_length=1, description="one of these becomes the shorter side, pixels")
    longer: int = Field(1333, ge=32, description="the longer side at most, before `scale`")
    scale: tuple[float, float] = Field((1.0, 1.0), description="a factor drawn from here enlarges both")


class CacheConfig(Section):
    """Node-local cache of remote shards."""

    folder: str | None = Field(None, description="where copies of remote shards are kept; default: a temporary folder")
    size_gb: float = Field(50.0, gt=0, description="evicted by last use beyond this size")


class DataConfig(Section):
    sources: list[SourceConfig] = Field(min_length=1)
    image_size: int = Field(
        224, ge=32, description="side of the square view, pixels; with `rectangle` the largest side of a view"
    )
    rectangle: RectangleConfig | None = Field(None, description="of detection and segmentation: views keep their shape")
    views: Literal[1, 2] = Field(2, description="augmented views of each image")
    context_length: int = Field(77, ge=4, description="caption length in tokens")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    augmentation: AugmentationConfig = AugmentationConfig()
    block_shards: int = Field(16, ge=1, description="samples are shuffled inside blocks of this many shards")
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0 decodes in the training process")
    prefetch: int = Field(4, ge=1, description="batches decoded ahead per worker")
    max_bad_rate: float = Field(0.01, ge=0, le=1, description="share of bad samples above which the run ends (3)")
    max_pixels: int = Field(100_000_000, ge=1, description="an image with more is a bad sample, whatever its file size")
    start_method: Literal["fork", "spawn"] = Field("fork", description="how workers start; spawn where fork is unsafe")
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _rectangles(self) -> Self:
        moved = [name for name in ("rand_augment", "rotate", "shift", "erase") if getattr(self.augmentation, name)]
        if self.rectangle is not None and (self.views != 1 or moved):
            raise ValueError(
                "data.rectangle makes one view, whose boxes and masks move with it: set data.views to 1, and leave "
                "rand_augment, rotate, shift and erase of data.augmentation out"
            )
        return self
