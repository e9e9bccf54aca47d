"""`create_model` by name; timm's registration is in timm_registration."""

import difflib
from typing import Any

from data_pipeline.errors import UserError
from pretrain.models.internimage import InternImage
from pretrain.models.variants import VARIANTS


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> InternImage:
    """A published variant with some arguments changed, or `custom`: InternImage(**overrides).

    Raises UserError for an unknown name or argument, or arguments that do not fit together.
    """
    if name != "custom" and name not in VARIANTS:
        names = [*VARIANTS, "custom"]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"model {name!r}: known are {', '.join(names)}.{hint}")
    arguments = {} if name == "custom" else dict(VARIANTS[name].arguments)
    try:
        return InternImage(num_classes=num_classes, **{**arguments, **overrides})
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name!r}: {error}") from None
