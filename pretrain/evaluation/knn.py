"""k nearest neighbours on frozen features: what the features tell without anything being fitted."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.classification import classification_result
from pretrain.evaluation.encoding import HasImageModel, encode_set
from pretrain.evaluation.probe import mean_features
from pretrain.evaluation.results import Result
from pretrain.evaluation.sets import describe_set

NEIGHBOURS, TEMPERATURE = 20, 0.07


def knn(
    model: HasImageModel,
    train_folder: Path | str,
    test_folder: Path | str,
    config: RunConfig,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    batch_size: int = 64,
) -> Result:
    """Each of the k training samples with the nearest direction votes for its class with exp(cosine / temperature)
    (Wu et al. 2018, section 3.4; DINO's settings). Labels are matched by name; the test may lack classes.
    """
    known, about = describe_set(train_folder), describe_set(test_folder)
    known.class_names()
    names = known.distinct or ()
    rows = known.rows_in(names), about.rows_in(names)
    train, test = (
        encode_set(model, folder, config, mean_features(model), batch_size=batch_size)
        for folder in (train_folder, test_folder)
    )
    kept = train.labels >= 0
    scores = votes(
        F.normalize(test.values, dim=1),
        F.normalize(train.values[kept], dim=1),
        rows[0][train.labels[kept]],
        len(names),
        k,
        temperature,
    )
    result = classification_result("knn", "Nearest neighbours", scores, rows[1][test.labels], names, about)
    settings = {"k": k, "temperature": temperature, "train": known.name, "train_samples": int(kept.sum())}
    return {**result, "settings": settings, "images_per_second": test.images_per_second}


def votes(
    queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int, temperature: float, *, block: int = 1024
) -> Tensor:
    """float32 [Q, classes]: the weights of the k nearest, summed by class. queries [Q, D], gallery [G, D]: unit."""
    found = []
    for part in queries.split(block):
        near = (part @ gallery.T).topk(min(k, len(gallery)))
        weights = (near.values / temperature).exp()
        found.append(torch.zeros(len(part), classes).scatter_add_(1, labels[near.indices], weights))
    return torch.cat(found)
