"""Linear probe: multinomial logistic regression on frozen features, its penalty chosen on a validation split."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.classification import classification_result
from pretrain.evaluation.encoding import Encoded, HasImageModel, encode_set
from pretrain.evaluation.metrics import top_hits
from pretrain.evaluation.results import Result
from pretrain.evaluation.sets import describe_set

HELD_OUT = 5  # one in so many training samples chooses the penalty where there is no validation set
PENALTIES = tuple(10.0**e for e in range(-4, 2))


class LinearClassifier(NamedTuple):
    weight: Tensor  # float64 [classes, D]
    bias: Tensor  # float64 [classes]

    def __call__(self, features: Tensor) -> Tensor:
        return features.double() @ self.weight.T + self.bias


def linear_probe(
    model: HasImageModel,
    train_folder: Path | str,
    validation_folder: Path | str | None,
    test_folder: Path | str,
    config: RunConfig,
    *,
    penalties: Sequence[float] = PENALTIES,
    batch_size: int = 64,
) -> Result:
    """Fit on the training set, choose the penalty on the validation set, score once on the test set.

    validation_folder: None takes every fifth labelled sample of the training set, which then is not fitted on.
    Features are the backbone's last map averaged over space. Labels of the three sets are matched by name; validation
    and test may lack classes of the training set, but not have others.
    """

    about, known = describe_set(test_folder), describe_set(train_folder)
    known.class_names()
    names = known.distinct or ()
    features = mean_features(model)
    train, test = (
        encode_set(model, folder, config, features, batch_size=batch_size) for folder in (train_folder, test_folder)
    )
    mean, std = train.values.mean(0), train.values.std(0).clamp_min(1e-6)
    train_x, train_y = _labelled(train, known.rows_in(names), mean, std)
    if validation_folder is None:
        held = torch.arange(len(train_y)) % HELD_OUT == HELD_OUT - 1
        validation_x, validation_y, train_x, train_y = train_x[held], train_y[held], train_x[~held], train_y[~held]
    else:
        validation = encode_set(model, validation_folder, config, features, batch_size=batch_size)
        validation_x, validation_y = _labelled(validation, describe_set(validation_folder).rows_in(names), mean, std)
    fits: dict[float, LinearClassifier] = {}
    for penalty in sorted(penalties, reverse=True):  # each starts where the stronger one ended
        fits[penalty] = fit_logistic(train_x, train_y, len(names), penalty, start=next(reversed(fits.values()), None))
    accuracy = {penalty: top_hits(fit(validation_x), validation_y).mean().item() for penalty, fit in fits.items()}
    best = max(penalties, key=lambda penalty: (accuracy[penalty], penalty))  # of equals the strongest
    logits = fits[best]((test.values - mean) / std)
    result = classification_result(
        "linear_probe", "Linear probe", logits, about.rows_in(names)[test.labels], names, about
    )
    settings = {"penalty": best, "validation_top1": accuracy[best], "train": known.name}
    return {**result, "settings": settings, "images_per_second": test.images_per_second}


def mean_features(model: HasImageModel) -> Callable[[Tensor], Tensor]:
    """Images [B, C, S, S] -> [B, D]: the backbone's last map averaged over space."""

    def features(images: Tensor) -> Tensor:
        return model.image.forward_features(images).mean((2, 3))

    return features


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    *,
    start: LinearClassifier | None = None,
    steps: int = 300,
) -> LinearClassifier:
    """Minimiser of mean cross-entropy + penalty/2 * |W|^2, by L-BFGS in float64; the bias is not penalised.

    features: [N, D]; labels: [N] in [0, classes). Strictly convex in W, so the result does not depend on the start.
    """
    x, count = features.double(), features.shape[1]
    parameters = torch.zeros(classes, count + 1, dtype=torch.float64)
    if start is not None:
        parameters = torch.cat([start.weight, start.bias[:, None]], dim=1)
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :count], parameters[:, count]
        loss = F.cross_entropy(x @ weight.T + bias, labels) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    solution = parameters.detach()
    return LinearClassifier(solution[:, :count], solution[:, count])


def _labelled(encoded: Encoded, rows: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    keep = encoded.labels >= 0
    return (encoded.values[keep] - mean) / std, rows[encoded.labels[keep]]
