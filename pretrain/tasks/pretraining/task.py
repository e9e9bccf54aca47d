"""The `task:` section of image-text pretraining, and what a run asks of it. Imports no torch until a run needs it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.reading.config import DataConfig, Section
from pretrain.configuration.schema import ModelConfig, RunConfig
from pretrain.tasks.pretraining.augmentations import AUGMENTATIONS
from pretrain.tasks.pretraining.recipes import RECIPES
from pretrain.tasks.task import MainScore, Task

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.reading import Targets, TargetSpec
    from pretrain.tasks.module import TaskModule
    from pretrain.tasks.pretraining.module import PretrainingModule


class TextConfig(Section):
    """The text tower: open_clip's TextTransformer, or a bag of words, which no other tool can build."""

    kind: Literal["transformer", "bag"] = Field(
        "transformer", description="bag: the mean of the tokens' vectors, task.embed_dim wide; vocab_size alone counts"
    )
    name: str | None = Field(None, description="open_clip model whose text tower it is, as ViT-H-14; null: sizes below")
    weights: str | None = Field(None, description="file to start the tower from: an open_clip model's, or its tower's")
    frozen: bool = Field(False, description="the tower is not trained; it needs weights")
    width: int = Field(512, ge=16)
    layers: int = Field(12, ge=1)
    heads: int = Field(8, ge=1)
    vocab_size: int = Field(49408, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _older_key(cls, values: object) -> object:
        """`token_dropout` emptied captions and made false negatives: configurations of finished runs have it, as 0."""
        if isinstance(values, dict) and values.get("token_dropout"):
            raise ValueError(
                "task.text.token_dropout is no more: data.augmentation.caption_dropout leaves parts of captions out"
            )
        return {k: v for k, v in values.items() if k != "token_dropout"} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _bag_without_name(self) -> Self:
        if self.kind == "bag" and self.name is not None:
            raise ValueError(f"task.text.kind bag is no tower of {self.name}: leave task.text.name out, or the kind")
        return self

    @model_validator(mode="after")
    def _frozen_from_somewhere(self) -> Self:
        if self.frozen and self.weights is None:
            raise ValueError("task.text.frozen: a tower that is not trained needs task.text.weights")
        return self


class DecoderConfig(Section):
    """Projector and predictor of the dense targets."""

    dim: int = Field(768, ge=8, description="width of targets and predictions")
    projector_layers: int = Field(2, ge=0, description="Transformer blocks of the projector; 0: its Linear alone")
    layers: int = Field(4, ge=1, description="Transformer blocks of the predictor")
    heads: int = Field(12, ge=1)


class LossWeights(Section):
    intra: float = Field(1.0, ge=0, description="first image, its same view")
    inter: float = Field(1.0, ge=0, description="second image, its other view")
    text: float = Field(1.0, ge=0)
    category: float = Field(1.0, ge=0)


class Pretraining(Task):
    evaluations: ClassVar[tuple[str, ...]] = ("retrieval", "zero-shot", "top1")
    main_score: ClassVar[MainScore | None] = MainScore("retrieval", "image_to_text_recall@1", "image to text, recall@1")

    name: str = "pretraining"
    preset: str = Field("m3i", description="one of pretrain/tasks/pretraining/recipes.py")
    weights: LossWeights = LossWeights()
    text: TextConfig = TextConfig()
    decoder: DecoderConfig = DecoderConfig()
    embed_dim: int = Field(768, ge=8, description="width of the pooled image vector that meets the text")
    mask_cell: int | None = Field(None, description="side of a mixing cell in pixels; 32, below 128 px images 16")
    mask_ratio: float = Field(0.5, gt=0, lt=1)
    mask: Literal["batch", "sample"] = Field("batch", description="one mask a global batch, or one a sample (a pair)")
    mix_probability: float = Field(1.0, ge=0, le=1, description="preset m3i: share of the pairs that are mixed")
    balance: float | None = Field(
        None, gt=0, description="share of the text and category gradient that each dense loss gets at the fused map, "
        "times its weight; null: the weights alone count"
    )  # fmt: skip
    dense_every: int = Field(1, ge=1, description="steps from one with dense losses to the next")
    encode_rows: int | None = Field(
        None, ge=1, description="rows encoded at once, the others recomputed (GradCache); null: a rank's micro-batch"
    )
    decorrelation: float = Field(0.02, ge=0, description="lambda of the dense loss")
    temperature: float | None = Field(
        None, gt=0, description="initial temperature of the contrastive loss; null: .07, of siglip .1"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    templates: tuple[str, ...] = Field(("{}",), description="prompts of zero-shot scores, {} for a class's name")

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str) -> str:
        if preset == "supervised":
            raise ValueError("task.preset 'supervised' is a task of its own: set task to {name: classification}")
        if preset not in RECIPES:
            raise ValueError(f"task.preset {preset!r}: choose one of {', '.join(RECIPES)}")
        return preset

    @classmethod
    def augmentation(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return AUGMENTATIONS.get(str(settings.get("preset", cls.model_fields["preset"].default)), {})

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "PretrainingModule":
        from pretrain.tasks.pretraining.build import build_pretraining

        return build_pretraining(self, model, data, classes=classes)

    @property
    def begins(self) -> bool:
        return self.text.weights is not None

    def target_spec(self, data: DataConfig) -> "TargetSpec[Targets]":
        from data_pipeline.reading import ImageText

        return ImageText(self.tokenizer(data), data.context_length)

    def with_templates(self, templates: Sequence[str]) -> "Pretraining":
        """The same task whose zero-shot classification asks with these prompts."""
        return self.model_copy(update={"templates": tuple(templates)})

    def tokenizer(self, data: DataConfig) -> "Callable[[list[str]], Tensor]":
        """list of n captions -> int64 [n, data.context_length]."""
        from pretrain.objectives.text import build_tokenizer

        return build_tokenizer(data.context_length, self.text.vocab_size)

    def refusal(
        self, name: str, module: "TaskModule", data: Path | str, *, classes: Sequence[str] | None
    ) -> str | None:
        from pretrain.evaluation.classification import top1_refusal
        from pretrain.evaluation.sets import captions_refusal, describe_set

        parts = _own(module)
        if name == "top1":
            return top1_refusal(parts.image.num_classes, data, classes)
        if not parts.has_text:
            return f"preset {self.preset} trains no text tower"
        if name == "zero-shot" and not describe_set(data).classes:
            return f"{data} names no classes"
        return captions_refusal(data) if name == "retrieval" else None

    def evaluate(
        self,
        name: str,
        module: "TaskModule",
        data: Path | str,
        run: RunConfig,
        *,
        classes: Sequence[str] | None,
        batch_size: int,
    ) -> dict[str, Any]:
        from pretrain.evaluation.classification import top1, zero_shot
        from pretrain.evaluation.retrieval import retrieval

        own = _own(module)
        if name == "top1":
            return top1(own, data, run, classes=classes, batch_size=batch_size)
        if name == "zero-shot":
            tokenizer = self.tokenizer(run.data)
            return zero_shot(own, data, run, tokenizer=tokenizer, templates=self.templates, batch_size=batch_size)
        return retrieval(own, data, run, tokenizer=self.tokenizer(run.data), batch_size=batch_size)


def _own(module: "TaskModule") -> "PretrainingModule":
    from pretrain.tasks.pretraining.module import PretrainingModule

    assert isinstance(module, PretrainingModule), "a task is given the modules that it built"
    return module
