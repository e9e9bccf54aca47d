"""Image-text retrieval: which caption belongs to a picture, which picture to a caption."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.encoding import ImageTextModel, encode_set, encode_texts
from pretrain.evaluation.metrics import recall
from pretrain.evaluation.results import Result, score
from pretrain.evaluation.sets import describe_set

SHOWN = 5  # captions listed for an example


def retrieval(
    model: ImageTextModel,
    set_folder: Path | str,
    config: RunConfig,
    *,
    tokenizer: Callable[[list[str]], Tensor],
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    examples: int = 12,
) -> Result:
    """Recall@k both ways over every captioned sample of the set.

    A caption that several pictures share is one candidate and one query, and any of its pictures is right: equal
    captions are not each other's negatives, and chance stays exact. Beside each score stand those of `baselines`.
    `examples` samples, evenly spaced through the set rather than chosen, are kept with their picture and nearest
    captions.

    Returns the result (see `results`): scores image_to_text_recall@k and text_to_image_recall@k.
    Raises UserError where no sample has a caption.
    """
    about = describe_set(set_folder)
    shown = _evenly(about.samples, examples)
    encoded = encode_set(model, set_folder, config, model.encode_image, batch_size=batch_size, pictures=shown)
    captioned = [i for i, caption in enumerate(encoded.captions) if caption]
    if not captioned:
        raise UserError(f"{about.folder}: no sample has a caption, so there is nothing to retrieve")
    texts = list(dict.fromkeys(str(encoded.captions[i]) for i in captioned))
    place = {text: i for i, text in enumerate(texts)}
    owner = torch.tensor([place[str(encoded.captions[i])] for i in captioned])
    pictures, words = encoded.values[captioned], encode_texts(model, texts, tokenizer, model.encode_text)
    names = torch.arange(len(texts))
    ways = (
        ("image_to_text", "image to text", len(pictures), recall(pictures, words, owner, names, ks)),
        ("text_to_image", "text to image", len(texts), recall(words, pictures, names, owner, ks)),
    )
    dumb = baselines(owner, encoded.labels[captioned], len(texts), ks)
    scores = [
        score(f"{name}_recall@{k}", f"{title}, recall@{k}", value, chance=chance, count=count, beside=dumb[name, k])
        for name, title, count, found in ways
        for k, (value, chance) in found.items()
    ]
    row = {sample: i for i, sample in enumerate(captioned)}
    return {
        "task": "retrieval",
        "title": "Image-text retrieval",
        "set": about.name,
        "samples": len(captioned),
        "captions": len(texts),
        "images_per_second": encoded.images_per_second,
        "scores": scores,
        "examples": [
            {
                "key": encoded.samples[i].key,
                "caption": encoded.captions[i],
                "image": encoded.pictures[i],
                "place": _place(pictures[row[i]] @ words.T, place[str(encoded.captions[i])]),
                "candidates": len(texts),
                "retrieved": _nearest(pictures[row[i]] @ words.T, texts, str(encoded.captions[i])),
            }
            for i in sorted(encoded.pictures)
            if i in row
        ],
        **about.credit,
    }


def baselines(owner: Tensor, labels: Tensor, texts: int, ks: Sequence[int]) -> dict[tuple[str, int], dict[str, float]]:
    """What answers score that do not look: (way, k) -> {what: recall@k}.

    constant answer   the k commonest captions for every picture; the same k pictures, of different captions, for every
                      caption
    category oracle   knows each picture's category and nothing else: its category's captions, the commonest first; of a
                      caption the pictures of its categories. Only where every sample has a label

    owner: int64 [N], each picture's caption in [0, texts). labels: int64 [N], -1 where missing.
    """
    pictures, names, often = torch.arange(len(owner)), torch.arange(texts), torch.bincount(owner, minlength=texts)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for k in ks:
        found["image_to_text", k] = {"constant answer": often.topk(min(k, texts)).values.sum().item() / len(pictures)}
        found["text_to_image", k] = {"constant answer": min(k, texts) / texts}
    if len(labels) and int(labels.min()) >= 0:
        known = torch.zeros(len(owner), int(labels.max()) + 1, dtype=torch.float64)
        known[pictures, labels] = 1
        said = torch.zeros(texts, known.shape[1], dtype=torch.float64).index_add_(0, owner, known)
        for k, (value, _) in recall(known, said, owner, names, ks).items():
            found["image_to_text", k]["category oracle"] = value
        for k, (value, _) in recall(said, known, names, owner, ks).items():
            found["text_to_image", k]["category oracle"] = value
    return found


def _nearest(similarity: Tensor, texts: Sequence[str], right: str) -> list[Result]:
    found = similarity.topk(min(SHOWN, len(texts)))
    return [
        {"caption": texts[i], "score": value, "correct": texts[i] == right}
        for value, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def _place(similarity: Tensor, right: int) -> int:
    """Where the right caption stands, from 1; among equals last."""
    return int((similarity >= similarity[right]).sum())


def _evenly(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
