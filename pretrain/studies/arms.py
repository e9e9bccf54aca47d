"""What is compared: each arm as changes (`key.path=value`) of the study's one configuration."""

import re
from dataclasses import dataclass

from data_pipeline.errors import UserError

WHOLE = "m3i"
SUPERVISED = "task={name: classification, label_smoothing: 0.1}"
_PARTS = ("intra", "inter", "text", "category")
_PLAIN = ("task.balance=null", "task.dense_every=1")  # dense losses that have no other loss beside them


def _only(*names: str) -> str:
    return f"task.weights={{{', '.join(f'{part}: {1.0 if part in names else 0.0}' for part in _PARTS)}}}"


@dataclass(frozen=True)
class Arm:
    """One thing to train. stages: changes of each stage; a stage starts from the weights of the one before, and all
    have the same time. equal_steps: as many steps as the study's first whole arm has, whatever they cost. steps: these
    and no others. lr: chosen on validation, where it is another than the configuration's.
    """

    name: str
    stages: tuple[tuple[str, ...], ...] = ((),)
    equal_steps: bool = False
    steps: int | None = None
    lr: float | None = None

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name))


def _preset(name: str, lr: float | None = None) -> Arm:
    return Arm(name, ((f"task.preset={name}", *_PLAIN),), lr=lr)


def _without(part: str, *changes: str) -> tuple[Arm, Arm]:
    """m3i without one of its parts: at equal time, and at equal steps."""
    arm = Arm(f"m3i - {part}", (changes,))
    return arm, Arm(f"m3i - {part}, equal steps", (changes,), equal_steps=True)


def _weights(*names: str) -> tuple[str, ...]:
    changes = (_only(*names),)
    measured = {"intra", "inter"} & set(names) and {"text", "category"} & set(names)
    return changes if measured else (*changes, *_PLAIN)


M3I = (
    Arm("random", (("optimizer.lr=0.0", "task.balance=null"),), steps=1),
    Arm("supervised", ((SUPERVISED,),)),
    *map(_preset, ("clip", "siglip", "clip_category", "simmim", "siamese")),
    _preset("byol", lr=1.8e-3),
    Arm(WHOLE),
    *_without("dense intra", *_weights("inter", "text", "category")),
    *_without("dense inter", *_weights("intra", "text", "category")),
    *_without("mixing", "task.mix_probability=0.0"),
    *_without("text", *_weights("intra", "inter", "category")),
    *_without("category", *_weights("intra", "inter", "text")),
    *_without("momentum", "training.ema.teacher_start=0.0", "training.ema.teacher_end=0.0"),
    Arm("staged", tuple(_weights(part) for part in _PARTS)),  # the paper's rival: one loss after another
)

_OPERATOR = ("task.preset=clip_category", *_PLAIN)
OPERATOR = (
    Arm("as published", (_OPERATOR,)),
    Arm("sigmoid", ((*_OPERATOR, "model.overrides.mask_activation=sigmoid"),)),
    Arm("one group", ((*_OPERATOR, "model.overrides.groups=[1, 1, 1, 1]"),)),
    Arm("unshared weights", ((*_OPERATOR, "model.overrides.share_weights=false"),)),
)

STUDIES = {"m3i": M3I, "operator": OPERATOR}
WHOLE_ARMS = {"m3i": WHOLE, "operator": "as published"}  # what the others of a study are compared with


def arms_of(study: str, only: tuple[str, ...] = ()) -> tuple[Arm, ...]:
    """Raises UserError for a study or an arm that there is none of."""
    if study not in STUDIES:
        raise UserError(f"study {study!r}: there is {', '.join(STUDIES)}")
    names = [arm.name for arm in STUDIES[study]]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"arm {unknown[0]!r}: study {study} has {', '.join(names)}")
    return tuple(arm for arm in STUDIES[study] if not only or arm.name in only)
