"""From a configuration to a module: which parts a preset needs, and the mistakes that can be told before the first
step.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig
from pretrain.models import InternImage, create_model
from pretrain.objectives.contrastive import LogitScale
from pretrain.objectives.decoder import Predictor, Projector
from pretrain.objectives.mixing import TOKEN
from pretrain.objectives.pooled import PooledMLP
from pretrain.objectives.sigmoid import INITIAL_TEMPERATURE, LogitBias
from pretrain.objectives.text import build_text_tower
from pretrain.tasks.module import classes_for
from pretrain.tasks.pretraining.module import PretrainingModule
from pretrain.tasks.pretraining.recipes import RECIPES, Recipe
from pretrain.tasks.pretraining.teacher import TeacherRecipe

if TYPE_CHECKING:
    from pretrain.tasks.pretraining.task import Pretraining


def build_pretraining(task: "Pretraining", model: ModelConfig, data: DataConfig, *, classes: int) -> PretrainingModule:
    """classes: of the data, used where model.num_classes is 0.

    Raises UserError where preset, model and data do not fit together.
    """
    recipe, decoder, dim = RECIPES[task.preset], task.decoder, task.decoder.dim
    classes = classes_for(model, classes)
    weights, notices = _weights(task, recipe, classes)
    if data.views < recipe.views:
        raise UserError(f"task.preset {task.preset!r} compares two views of an image, but data.views is 1: set it to 2")
    if task.balance is not None and not (weights.keys() & {"intra", "inter"} and weights.keys() & {"text", "category"}):
        raise UserError(
            f"task.balance measures dense losses by those of text and category, and preset {task.preset!r} with these "
            "weights has not both: set task.balance to null"
        )
    overrides = dict(model.overrides)
    width = overrides.setdefault("head_hidden_size", task.embed_dim)
    if width != task.embed_dim:
        raise UserError(
            f"task.embed_dim is {task.embed_dim}, but model.overrides.head_hidden_size is {width}: one "
            "vector meets the text and the classifier; give one of the two, or the same number twice"
        )
    if not overrides.setdefault("use_clip_projector", True):
        raise UserError(
            f"task.preset {task.preset!r} reads the fused stride-16 map: "
            "model.overrides.use_clip_projector must not be false"
        )
    image = create_model(model.name, num_classes=classes if "category" in weights else 0, **overrides)
    projector: Callable[[], nn.Module] = partial(PooledMLP, task.embed_dim, dim)
    if not recipe.pooled:
        projector = partial(Projector, image.num_features, dim, decoder.projector_layers, decoder.heads)
    parts: dict[str, nn.Module] = {"image": image}
    dense = bool(weights.keys() & {"intra", "inter"})
    if dense:
        if dim % decoder.heads or dim % 4:
            raise UserError(f"task.decoder.dim {dim} must be divisible by 4 and by its {decoder.heads} heads")
        parts["projector"] = projector()
        parts["predictor"] = Predictor(dim, decoder.layers, decoder.heads)
    if "pooled" in weights:
        parts["pooled_projector"] = projector()
        if recipe.pooled != "nt_xent":
            parts["pooled_predictor"] = PooledMLP(dim, dim)
    if "pixels" in weights:
        parts["pixel_head"] = nn.Linear(image.num_features, 3 * TOKEN * TOKEN)
    if "text" in weights:
        parts["text"] = build_text_tower(task.text, data.context_length, task.embed_dim)
        parts["text"].requires_grad_(not task.text.frozen)
        sigmoid = recipe.text == "sigmoid"
        parts["logit_scale"] = LogitScale(task.temperature or (INITIAL_TEMPERATURE if sigmoid else 0.07))
        if sigmoid:
            parts["logit_bias"] = LogitBias()
    _freeze_unreached(image, weights)
    teacher = None
    if dense or ("pooled" in weights and recipe.pooled_teacher):
        empty_image = partial(create_model, model.name, num_classes=0, **{**overrides, "drop_path_rate": 0.0})
        teacher = TeacherRecipe(empty_image, projector, dense)
    module = PretrainingModule(task, data, weights, parts, teacher, notices)
    if model.recompute != "none":
        module.set_grad_checkpointing()
    return module


def _weights(task: "Pretraining", recipe: Recipe, classes: int) -> tuple[dict[str, float], list[str]]:
    """The losses that are on, with their weights, and what the user should know of one that is not.

    A preset of one loss takes the weight of the kind it is: same view `intra`, other view `inter`.
    """
    given, notices = task.weights, []
    own = {"intra": given.intra, "inter": given.inter}
    candidates: dict[str, float] = {target.name: own[target.name] for target in recipe.dense}
    if recipe.pooled:
        candidates["pooled"] = given.inter
    if recipe.pixels:
        candidates["pixels"] = given.intra
    if recipe.text:
        candidates["text"] = given.text
    if recipe.category:
        candidates["category"] = given.category if classes else 0.0
        if given.category > 0 and not classes:
            notices.append(
                "the category loss is off: the sets in data.sources name no classes. Give sets with labels, set "
                "model.num_classes, or set task.weights.category to 0"
            )
    weights = {name: weight for name, weight in candidates.items() if weight > 0}
    if not weights:
        raise UserError(
            f"task.weights: every loss of preset {task.preset!r} is off; "
            f"raise one of {', '.join(candidates)} (category also needs classes)"
        )
    return weights, notices


def _freeze_unreached(image: InternImage, weights: dict[str, float]) -> None:
    """Parts of the image model that no loss reaches stay in the model, for export, but out of the optimizer (and its
    decay).
    """
    if not weights.keys() & {"text", "category", "pooled"}:
        image.get_submodule("clip_projector").requires_grad_(False)
    if "category" not in weights:
        image.get_submodule("fc_norm").requires_grad_(False)
