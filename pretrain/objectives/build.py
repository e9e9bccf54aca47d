"""From a configuration to a Task: which modules a preset needs, and the mistakes that can be told before the first
step.
"""

from torch import nn

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.models import create_model
from pretrain.objectives.contrastive import LogitScale
from pretrain.objectives.decoder import PooledMLP, Predictor, Projector
from pretrain.objectives.mixing import TOKEN, cell_size
from pretrain.objectives.recipes import RECIPES, Recipe
from pretrain.objectives.task import Task
from pretrain.objectives.text import build_text_tower


def build_task(config: RunConfig, *, classes: int) -> Task:
    """The task of `config.objective` over `config.model`. classes: of the data, used where model.num_classes is 0.

    Raises UserError where preset, model and data do not fit together.
    """
    objective, model, data = config.objective, config.model, config.data
    recipe = RECIPES[objective.preset]
    if 0 < model.num_classes < classes:
        raise UserError(
            f"model.num_classes is {model.num_classes}, but the data name {classes} classes: raise it, or set 0 to "
            "take theirs"
        )
    classes = model.num_classes or classes
    weights = _weights(config, recipe, classes)
    if data.views < recipe.views:
        raise UserError(
            f"objective.preset {objective.preset!r} compares two views of an image, but data.views is 1: set it to 2"
        )
    overrides = dict(model.overrides)
    if not recipe.whole_model:
        width = overrides.setdefault("head_hidden_size", objective.embed_dim)
        if width != objective.embed_dim:
            raise UserError(
                f"objective.embed_dim is {objective.embed_dim}, but model.overrides.head_hidden_size is {width}: one "
                "vector meets the text and the classifier; give one of the two, or the same number twice"
            )
        if not overrides.setdefault("use_clip_projector", True):
            raise UserError(
                f"objective.preset {objective.preset!r} reads the fused stride-16 map: "
                "model.overrides.use_clip_projector must not be false"
            )
    rows = classes if "category" in weights else 0
    image = create_model(model.name, num_classes=rows, **overrides)
    decoder, width, dim = objective.decoder, image.num_features, objective.decoder.dim

    def make_image() -> nn.Module:
        return create_model(model.name, num_classes=0, **{**overrides, "drop_path_rate": 0.0})

    def make_projector() -> nn.Module:
        if recipe.pooled:
            return PooledMLP(objective.embed_dim, dim)
        return Projector(width, dim, decoder.projector_layers, decoder.heads)

    modules: dict[str, nn.Module] = {"image": image}
    if weights.keys() & {"intra", "inter"}:
        if dim % decoder.heads or dim % 4:
            raise UserError(f"objective.decoder.dim {dim} must be divisible by 4 and by its {decoder.heads} heads")
        modules["projector"] = make_projector()
        modules["predictor"] = Predictor(dim, decoder.layers, decoder.heads)
    if "pooled" in weights:
        modules["pooled_projector"] = make_projector()
        modules["pooled_predictor"] = PooledMLP(dim, dim)
    if "pixels" in weights:
        modules["pixel_head"] = nn.Linear(width, 3 * TOKEN * TOKEN)
    if "text" in weights:
        modules["text"] = build_text_tower(objective.text, data.context_length, objective.embed_dim)
        modules["logit_scale"] = LogitScale(objective.temperature)
    _freeze_unreached(image, recipe, weights)
    cell = 0 if recipe.image == "view" else cell_size(data.image_size, objective.mask_cell)
    task = Task(
        recipe,
        weights,
        modules,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        cell=cell,
        mask_ratio=objective.mask_ratio,
        mix_probability=objective.mix_probability,
        decorrelation=objective.decorrelation,
        smoothing=objective.label_smoothing,
        mixup=objective.mixup,
        cutmix=objective.cutmix,
        dim=dim,
        token_dropout=objective.text.token_dropout,
        make_image=make_image,
        make_projector=make_projector,
    )
    if model.recompute != "none":
        task.set_grad_checkpointing()
    return task


def _weights(config: RunConfig, recipe: Recipe, classes: int) -> dict[str, float]:
    """The losses that are on, with their weights. A preset of one loss takes the weight of the kind it is: same view
    `intra`, other view `inter`.
    """
    given = config.objective.weights
    candidates: dict[str, float] = {target.name: getattr(given, target.name) for target in recipe.dense}
    if recipe.pooled:
        candidates["pooled"] = given.inter
    if recipe.pixels:
        candidates["pixels"] = given.intra
    if recipe.text:
        candidates["text"] = given.text
    if recipe.category:
        if not classes and recipe.whole_model:
            raise UserError("objective.preset 'supervised' needs classes: set model.num_classes, or use labelled data")
        candidates["category"] = given.category if classes else 0.0
    weights = {name: weight for name, weight in candidates.items() if weight > 0}
    if not weights:
        raise UserError(
            f"objective.weights: every loss of preset {config.objective.preset!r} is off; "
            f"raise one of {', '.join(candidates)} (category also needs classes)"
        )
    return weights


def _freeze_unreached(image: nn.Module, recipe: Recipe, weights: dict[str, float]) -> None:
    """Parts of the image model that no loss reaches stay in the model, for export, but out of the optimizer (and its
    decay).
    """
    if recipe.whole_model:
        return
    if not weights.keys() & {"text", "category", "pooled"}:
        image.get_submodule("clip_projector").requires_grad_(False)
    if "category" not in weights:
        image.get_submodule("fc_norm").requires_grad_(False)
