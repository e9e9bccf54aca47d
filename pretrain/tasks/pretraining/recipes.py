"""Each method as (what the encoder sees) x (targets) x (distance): the rows of the table in docs/objectives.md."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DenseTarget:
    """The teacher's normalised token map of one view, predicted at every token of that view."""

    name: Literal["intra", "inter"]
    view: int
    hidden_only: bool = False  # average over the tokens hidden from the encoder (data2vec), not over all (SiameseIM)


@dataclass(frozen=True)
class Recipe:
    """What a preset switches on.

    image: "mixed" (two images, cell by cell), "masked" (one image, cells hidden) or "view" (one whole view). view:
    which augmented view the encoder sees. dense: momentum targets; of a mixed input the first image predicts the first
    target and the second image the second. pooled: what the pooled vector must find of the other view, in the momentum
    teacher ("cosine", "info_nce") or in the encoder itself, which then sees both views ("nt_xent", "symmetric_cosine").
    pixels: the hidden pixels. text: distance of the pooled vector and the text. category: the pooled vector's.
    """

    image: Literal["mixed", "masked", "view"] = "view"
    view: int = 0
    dense: tuple[DenseTarget, ...] = ()
    decorrelated: bool = True
    pooled: Literal["cosine", "info_nce", "nt_xent", "symmetric_cosine"] | None = None
    pixels: bool = False
    text: Literal["info_nce", "sigmoid"] | None = None
    category: bool = False

    @property
    def views(self) -> int:
        """Augmented views of an image that a batch must hold."""
        return 1 + max([self.view, *(d.view for d in self.dense), 1 if self.pooled else 0])

    @property
    def both_views(self) -> bool:
        """Whether the encoder sees both views of every image, each whole."""
        return self.pooled in ("nt_xent", "symmetric_cosine")

    @property
    def uses_teacher(self) -> bool:
        return bool(self.dense or self.pooled_teacher)

    @property
    def pooled_teacher(self) -> bool:
        return self.pooled in ("cosine", "info_nce")


RECIPES: dict[str, Recipe] = {
    "m3i": Recipe(
        image="mixed", dense=(DenseTarget("intra", 0), DenseTarget("inter", 1)), text="info_nce", category=True
    ),
    "siamese": Recipe(image="masked", dense=(DenseTarget("inter", 1),)),
    "data2vec": Recipe(image="masked", dense=(DenseTarget("intra", 0, hidden_only=True),), decorrelated=False),
    "byol": Recipe(view=1, pooled="cosine"),
    "moco": Recipe(view=1, pooled="info_nce"),
    "simclr": Recipe(pooled="nt_xent"),
    "simsiam": Recipe(pooled="symmetric_cosine"),
    "simmim": Recipe(image="masked", pixels=True),
    "clip": Recipe(text="info_nce"),
    "siglip": Recipe(text="sigmoid"),
    "clip_category": Recipe(text="info_nce", category=True),
}
MOCO_TEMPERATURE = 0.2
SIMCLR_TEMPERATURE = 0.1  # SimCLR, table 5
