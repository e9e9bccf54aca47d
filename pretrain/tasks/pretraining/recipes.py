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
    target and the second image the second. pooled: momentum target of the pooled vector of the other view. pixels: the
    hidden pixels. text, category: the pooled vector's.
    """

    image: Literal["mixed", "masked", "view"] = "view"
    view: int = 0
    dense: tuple[DenseTarget, ...] = ()
    decorrelated: bool = True
    pooled: Literal["cosine", "info_nce"] | None = None
    pixels: bool = False
    text: bool = False
    category: bool = False

    @property
    def views(self) -> int:
        """Augmented views of an image that a batch must hold."""
        return 1 + max([self.view, *(d.view for d in self.dense), 1 if self.pooled else 0])

    @property
    def uses_teacher(self) -> bool:
        return bool(self.dense or self.pooled)


RECIPES: dict[str, Recipe] = {
    "m3i": Recipe(image="mixed", dense=(DenseTarget("intra", 0), DenseTarget("inter", 1)), text=True, category=True),
    "siamese": Recipe(image="masked", dense=(DenseTarget("inter", 1),)),
    "data2vec": Recipe(image="masked", dense=(DenseTarget("intra", 0, hidden_only=True),), decorrelated=False),
    "byol": Recipe(view=1, pooled="cosine"),
    "moco": Recipe(view=1, pooled="info_nce"),
    "simmim": Recipe(image="masked", pixels=True),
    "clip": Recipe(text=True),
    "clip_category": Recipe(text=True, category=True),
}
MOCO_TEMPERATURE = 0.2
