"""The text tower of a run, and the files that tokenizers of other tools read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.handoff.remote_code.text_internimage import TextTower
from pretrain.objectives.contrastive import MAX_LOGIT_SCALE
from pretrain.objectives.text import FULL_VOCABULARY, build_tokenizer

PLAIN = {"context_length", "vocab_size", "width", "heads", "layers"}  # of an open_clip text_cfg
PREFIX, SCALE, BIAS = "text.", "logit_scale.log", "logit_bias."  # within the state dict of a pretraining task


@dataclass(frozen=True)
class Text:
    """state: under open_clip's names. log_scale: logarithm of what cosines are multiplied by. bias: what is added then,
    of a tower that was trained with the sigmoid loss (SigLIP); None of one trained with the softmax.
    """

    state: dict[str, Tensor]
    heads: int
    log_scale: float
    bias: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """What builds the tower: TextTower(**sizes)."""
        tokens, places = self.state["token_embedding.weight"], self.state["positional_embedding"]
        blocks = {key.split(".")[2] for key in self.state if key.startswith("transformer.resblocks.")}
        return {
            "width": tokens.shape[1],
            "heads": self.heads,
            "layers": len(blocks),
            "vocab_size": tokens.shape[0],
            "context_length": places.shape[0],
            "embed_dim": self.state["text_projection"].shape[1],
        }

    def build(self) -> TextTower:
        tower = TextTower(**self.sizes)
        tower.load_state_dict(self.state)
        return tower.eval()

    def description(self) -> dict[str, Any]:
        return {**self.sizes, "log_scale": self.log_scale, "bias": self.bias}


def heads_of(settings: Mapping[str, Any]) -> int | None:
    """Attention heads of the tower that a `task.text` section describes; None where it is a bag of words, or a named
    model's tower that is built otherwise than CLIP's (another activation, width of MLP, ...), which no layout but ours
    could hold.
    """
    if settings.get("kind") == "bag":
        return None
    if settings.get("name") is None:
        return int(settings["heads"])
    import open_clip

    found = open_clip.get_model_config(settings["name"]) or {}
    shape = found.get("text_cfg", {})
    plain = set(shape) <= PLAIN and not found.get("quick_gelu")
    return int(shape["heads"]) if plain and "heads" in shape else None


def text_of(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Text | None:
    """The text tower among the weights of a task; None where it has none, or none that other tools can build.

    settings: the `task.text` section.
    """
    heads = heads_of(settings)
    if heads is None:
        return None
    state = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    state.pop("attn_mask", None)  # no weight: the tower makes its own
    if not state or SCALE not in weights:
        return None
    bias = [float(value) for name, value in weights.items() if name.startswith(BIAS)]
    return Text(state, heads, min(float(weights[SCALE]), math.log(MAX_LOGIT_SCALE)), bias[0] if bias else None)


def needed(text: Text | None, to: str) -> Text:
    """Raises UserError where there is no text tower to write."""
    if text is None:
        raise UserError(
            f"export to {to}: the checkpoint has no text tower (task.preset m3i and clip train one), or one of another "
            "build than CLIP's (task.text.kind bag, task.text.name); timm and hf take the image encoder alone"
        )
    return text


def has_own_vocabulary(text: Text) -> bool:
    """Whether the tokenizer knows fewer merges than CLIP's, which other tools must be told."""
    return text.sizes["vocab_size"] != FULL_VOCABULARY


def write_tokenizer(text: Text, folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer_config.json: transformers' CLIPTokenizer with the tower's vocabulary.

    It pads with the end of text, where ours writes 0: the tower pools at the first end and looks no further.
    """
    tokenizer: Any = build_tokenizer(text.sizes["context_length"], text.sizes["vocab_size"])
    start, end = tokenizer.decoder[tokenizer.sot_token_id], tokenizer.decoder[tokenizer.eot_token_id]
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda entry: entry[1])]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_max_length": text.sizes["context_length"],
    }
    for name, content in (("vocab", tokenizer.encoder), ("tokenizer_config", config)):
        text_of_file = json.dumps(content, indent=None if name == "vocab" else 2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text_of_file + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
