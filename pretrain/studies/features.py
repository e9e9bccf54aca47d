"""Scores of one trained encoder, picture by picture, so that arms can be compared on the same pictures.

Frozen features are the last map averaged over space. Nearest neighbours: the most similar of 5 training drawings votes,
by cosine. Linear probe: logistic regression, its penalty chosen on training concepts held aside. Categories and kinds
(a hundred finer classes, of which those that training knows count). Retrieval: recall@5 among the set, both ways.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.format import packed_rows, read_manifest, read_sidecar
from pretrain.evaluation.encoding import encode_set, encode_texts
from pretrain.evaluation.loading import load_module
from pretrain.evaluation.metrics import hits_at_k, top_hits
from pretrain.evaluation.probe import PENALTIES, fit_logistic
from pretrain.tasks.module import image_of
from pretrain.tasks.pretraining.module import PretrainingModule
from pretrain.tasks.pretraining.task import Pretraining
from pretrain.tasks.task import task_of

NEIGHBOURS, WITHIN = 5, 5
Hits = dict[str, list[float]]  # score -> one number in [0, 1] a picture, in the set's order


@dataclass(frozen=True)
class Labels:
    """What is known of the pictures of a set, in its order."""

    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    kinds: tuple[str, ...]  # "" where there is none

    def of(self, what: str) -> tuple[str, ...]:
        return self.kinds if what == "kind" else self.categories


def labels_of(folder: Path) -> Labels:
    """Read from the JSON members of a set that `shards openmoji` wrote."""
    manifest = read_manifest(folder)
    found = []
    for entry in manifest.shards:
        data = manifest.shard_path(entry).read_bytes()
        for row in packed_rows(read_sidecar(manifest.sidecar_path(entry))).to_pylist():
            found.append(json.loads(data[row["json_offset"] :][: row["json_size"]]))
    concepts, categories, kinds = (
        tuple(str(one.get(key) or "") for one in found) for key in ("concept", "label_name", "kind")
    )
    return Labels(concepts, categories, kinds)


def frozen_scores(run: Path, train: Path, tests: Mapping[str, Path]) -> dict[str, Hits]:
    """{set: hits} of the encoder of a run (its averaged weights) and, where it has one, its text tower."""
    module, config, _ = load_module(run)
    image = image_of(module)

    def features(pixels: Tensor) -> Tensor:
        return image.forward_features(pixels).mean((2, 3))

    known = labels_of(train)
    x = encode_set(module, train, config, features).values
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    probes = {what: _probe(x, known.of(what), known.concepts) for what in ("category", "kind")}
    results: dict[str, Hits] = {}
    for name, folder in tests.items():
        encoded, own = encode_set(module, folder, config, features), labels_of(folder)
        values = (encoded.values - mean) / std
        hits: Hits = {}
        for what, probe in probes.items():
            hits[f"{what}, linear"] = probe(values, own.of(what))
            hits[f"{what}, nearest {NEIGHBOURS}"] = _neighbours(x, known.of(what), values, own.of(what))
        task = task_of(config)
        if isinstance(task, Pretraining) and isinstance(module, PretrainingModule) and module.has_text:
            pictures = encode_set(module, folder, config, module.encode_image).values
            captions = [str(caption) for caption in encoded.captions]
            words = encode_texts(module, captions, task.tokenizer(config.data), module.encode_text)
            hits |= _retrieval(pictures, words, captions)
        results[name] = hits
    return results


def classified(run: Path, tests: Mapping[str, Path]) -> dict[str, Hits]:
    """{set: hits} of a fine-tuned classifier."""
    module, config, checkpoint = load_module(run)
    names = checkpoint.trained_on.classes or ()
    results: dict[str, Hits] = {}
    for name, folder in tests.items():
        logits = encode_set(module, folder, config, image_of(module)).values
        rows = torch.tensor([names.index(label) for label in labels_of(folder).categories])
        results[name] = {"category, fine-tuned": top_hits(logits, rows).tolist()}
    return results


def _probe(x: Tensor, labels: Sequence[str], concepts: Sequence[str]) -> Callable[[Tensor, Sequence[str]], list[float]]:
    """Fits on the labelled pictures; scores others, those of classes never seen as misses."""
    names = sorted({label for label in labels if label})
    place = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([i for i, label in enumerate(labels) if label])
    y = torch.tensor([place[labels[i]] for i in rows.tolist()])
    aside = torch.tensor([hashlib.sha256(concepts[i].encode()).digest()[0] < 51 for i in rows.tolist()])  # a fifth
    best, start = 0.0, None
    if aside.any() and not aside.all():
        accuracy = {}
        for penalty in sorted(PENALTIES, reverse=True):
            start = fit_logistic(x[rows[~aside]], y[~aside], len(names), penalty, start=start, steps=100)
            accuracy[penalty] = top_hits(start(x[rows[aside]]), y[aside]).mean().item()
        best = max(PENALTIES, key=lambda penalty: (accuracy[penalty], penalty))
    fit = fit_logistic(x[rows], y, len(names), best or PENALTIES[-1])

    def score(values: Tensor, labels: Sequence[str]) -> list[float]:
        said = fit(values).argmax(1).tolist()
        return [float(names[i] == label) for i, label in zip(said, labels, strict=True)]

    return score


def _neighbours(x: Tensor, known: Sequence[str], values: Tensor, labels: Sequence[str]) -> list[float]:
    rows = torch.tensor([i for i, label in enumerate(known) if label])
    similarity = F.normalize(values) @ F.normalize(x[rows]).T
    near = similarity.topk(min(NEIGHBOURS, len(rows)))
    hits = []
    for weights, indices, label in zip(near.values.tolist(), near.indices.tolist(), labels, strict=True):
        votes: dict[str, float] = {}
        for weight, i in zip(weights, indices, strict=True):
            name = known[int(rows[i])]
            votes[name] = votes.get(name, 0.0) + max(weight, 0.0) + 1e-9
        hits.append(float(max(votes, key=lambda name: votes[name]) == label))
    return hits


def _retrieval(pictures: Tensor, words: Tensor, captions: Sequence[str]) -> Hits:
    same = torch.tensor([[one == other for other in captions] for one in captions])
    return {
        f"retrieval, picture to caption, within {WITHIN}": hits_at_k(pictures @ words.T, same, WITHIN).tolist(),
        f"retrieval, caption to picture, within {WITHIN}": hits_at_k(words @ pictures.T, same, WITHIN).tolist(),
    }
