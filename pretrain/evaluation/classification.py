"""Classification of a labelled set: by the model's own classifier, or zero-shot by the names of the classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.reading.batch import normalize
from data_pipeline.reading.decode.centre import render_centre
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.encoding import Classifier, ImageTextModel, device_of, encode_set, encode_texts
from pretrain.evaluation.metrics import (
    answer_counts,
    expected_calibration_error,
    largest_share,
    mean_per_class,
    per_class,
    top_hits,
)
from pretrain.evaluation.results import Result, score
from pretrain.evaluation.sets import AboutSet, classes_refusal, describe_set
from pretrain.tasks.class_names import row_names

# The class by its bare name, as tags name it; CLIP's "a photo of a {}" suits captions of photographs.
TEMPLATES = ("{}",)
SHOWN_CLASSES = 30  # of a table of answers that a page bears
SHOWN_MISTAKES = 20


def top1(
    model: Classifier,
    set_folder: Path | str,
    config: RunConfig,
    *,
    classes: Sequence[str] | None,
    batch_size: int = 64,
    title: str = "Classification",
) -> Result:
    """Accuracy of the model's classifier on the labelled samples of the set.

    classes: names of the classifier's first rows, as the checkpoint has them. The set's labels are looked up among them
    by name: it may have fewer classes, in any order. Raises UserError where it has others, or a side has no names.
    """
    about = describe_set(set_folder)
    about.rows_in(classes or ())  # refused before any image is read
    encoded = encode_set(model, set_folder, config, model.classify, batch_size=batch_size)
    names = row_names(classes, encoded.values.shape[1]) or ()
    labels = about.rows_in(names)[encoded.labels]
    result = classification_result("top1", title, encoded.values, labels, names, about)
    known = labels >= 0
    ece = expected_calibration_error(encoded.values[known], labels[known])
    return {**result, "calibration_error": ece, "images_per_second": encoded.images_per_second}


def classify_picture(model: Classifier, image: bytes, config: RunConfig) -> Tensor:
    """Probabilities float32 [classes], on the CPU, of an image file's centre crop. Call within `inference`. Raises
    BadSample where it cannot be read.
    """
    view, _ = render_centre(image, config.data.max_pixels, config.data.image_size, 1.0)
    pixels = torch.from_numpy(view.copy())[None].to(device_of(model))
    return model.classify(normalize(pixels, config.data.mean, config.data.std))[0].float().softmax(0).cpu()


def top1_refusal(rows: int, set_folder: Path | str, classes: Sequence[str] | None) -> str | None:
    """Why a classifier of `rows` rows named `classes` cannot be scored on the set; None where it can."""
    if not rows:
        return "the model has no classifier"
    return classes_refusal(set_folder, classes)


def zero_shot(
    model: ImageTextModel,
    set_folder: Path | str,
    config: RunConfig,
    *,
    tokenizer: Callable[[list[str]], Tensor],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
) -> Result:
    """Accuracy of the class whose name, put into the templates and averaged, is nearest (CLIP, section 3.1.4)."""
    about = describe_set(set_folder)
    names = about.class_names()
    vectors = class_vectors(model, names, tokenizer=tokenizer, templates=templates)
    encoded = encode_set(model, set_folder, config, model.encode_image, batch_size=batch_size)
    result = classification_result(
        "zero_shot",
        "Zero-shot classification",
        encoded.values @ vectors.T,
        encoded.labels,
        about.distinct or names,
        about,
    )
    settings = {"templates": list(templates)}
    return {**result, "settings": settings, "images_per_second": encoded.images_per_second}


def class_vectors(
    model: ImageTextModel,
    names: Sequence[str],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """float32 [classes, D], unit length: for each class the mean direction of its prompts."""
    prompts = prompts_of(names, templates)
    vectors = F.normalize(encode_texts(model, prompts, tokenizer, model.encode_text), dim=1)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=1)


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template, a name's prompts together. Raises UserError for a template without its {}."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise UserError(f"templates {list(templates)}: each needs exactly one {{}}, where the name of the class goes")
    return [template.replace("{}", name) for name in names for template in templates]


def classification_result(
    task: str, title: str, logits: Tensor, labels: Tensor, names: Sequence[str], about: AboutSet
) -> Result:
    """The result of scores [N, classes] for labels [N], -1 where a sample has none; such samples do not count."""
    labelled = labels >= 0
    logits, labels = logits[labelled], labels[labelled]
    if not len(labels):
        raise UserError(f"{about.folder}: no sample has a label of these classes, so there is nothing to classify")
    hits, count, classes = top_hits(logits, labels), len(labels), len(names)
    beside = {"largest category": largest_share(labels)}
    found = len(labels.unique())
    scores = [
        score("top1", "top-1 accuracy", hits.mean().item(), chance=1 / classes, count=count, beside=beside),
        score(
            "mean_per_class",
            "top-1 accuracy, mean of classes",
            mean_per_class(hits, labels),
            chance=1 / classes,
            count=count,
            beside={"largest category": 1 / found},
        ),
    ]
    if classes > 20:
        hits5 = top_hits(logits, labels, 5).mean().item()
        largest5 = torch.bincount(labels).topk(min(5, found)).values.sum().item() / count
        scores.insert(
            1,
            score(
                "top5", "top-5 accuracy", hits5, chance=5 / classes, count=count, beside={"largest category": largest5}
            ),
        )
    return {
        "task": task,
        "title": title,
        "set": about.name,
        "samples": count,
        "classes": classes,
        "scores": scores,
        "per_class": per_class(hits, labels, names),
        **answers(logits, labels, names),
        **about.credit,
    }


def answers(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What is taken for what: the commonest mistakes, and of few classes the whole table.

    logits: [N, classes]; labels: [N]. Classes that neither occur nor are answered are left out of the table.
    """
    counts = answer_counts(logits, labels)
    wrong = counts - counts.diag().diag()
    found = wrong.flatten().topk(min(SHOWN_MISTAKES, wrong.numel()))
    mistakes = [
        {"class": names[i], "answer": names[j], "count": count, "of": int(counts[i].sum())}
        for count, place in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        if count
        for i, j in [divmod(place, len(names))]
    ]
    seen = ((counts.sum(0) + counts.sum(1)) > 0).nonzero().flatten()
    if len(seen) > SHOWN_CLASSES:
        return {"mistakes": mistakes}
    table = {"classes": [names[i] for i in seen.tolist()], "counts": counts[seen][:, seen].tolist()}
    return {"mistakes": mistakes, "confusion": table}
