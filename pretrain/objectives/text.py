"""The text tower (open_clip's TextTransformer, of a size given or of a model named, or a bag of words) and its
tokenizer. Nothing is downloaded.
"""

import difflib
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError, first_ten
from pretrain.models.compilation import compiled_region
from pretrain.models.reading import read_weights

FULL_VOCABULARY = 49408  # 256 bytes, 256 bytes that end a word, 48,894 merges, start and end of text


class TowerShape(Protocol):
    """Kind and sizes of the text tower, as the `task.text` section has them. name: of an open_clip model, whose sizes
    count.
    """

    @property
    def kind(self) -> Literal["transformer", "bag"]: ...
    @property
    def name(self) -> str | None: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def build_text_tower(config: TowerShape, context_length: int, embed_dim: int) -> nn.Module:
    """tokens int64 [B, context_length] -> [B, embed_dim], with fresh values.

    Raises UserError where open_clip has no such model, or one whose text tower is not its own.
    """
    if config.kind == "bag":
        return BagOfWords(config.vocab_size, embed_dim)
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer

    compiled_region(ResidualAttentionBlock)
    if config.name is not None:
        return _named_tower(config.name, config.vocab_size, context_length, embed_dim)
    if config.width % config.heads:
        raise UserError(f"task.text: width {config.width} is not divisible by heads {config.heads}")
    return TextTransformer(
        context_length=context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        pool_type="argmax",  # the end-of-text token has the highest id
    )


class BagOfWords(nn.Module):
    """Mean of the vectors of a caption's tokens, whatever their order: [B, L] -> [B, embed_dim].

    A token that no training caption has keeps its small initial vector and says little beside those that were learned;
    a Transformer normalises every token first, so that unknown words speak as loud as known ones.
    """

    def __init__(self, vocab_size: int, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # as CLIP's

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: between the start, the first, and the end of text, the highest; zeros for an empty caption."""
        end = tokens.argmax(1, keepdim=True)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        inside = ((place > 0) & (place < end)).to(self.token_embedding.weight.dtype)
        vectors = self.token_embedding(tokens) * inside[:, :, None]
        return vectors.sum(1) / inside.sum(1, keepdim=True).clamp(min=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing here is worth computing twice."""


def _named_tower(name: str, vocab_size: int, context_length: int, embed_dim: int) -> nn.Module:
    import open_clip
    from open_clip.model import _build_text_tower

    found = open_clip.get_model_config(name)
    if found is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise UserError(f"task.text.name {name!r}: open_clip has no such model; near are {', '.join(near) or 'none'}")
    shape = found["text_cfg"]
    if "hf_model_name" in shape:
        raise UserError(
            f"task.text.name {name!r}: its text tower is {shape['hf_model_name']}, of Hugging Face, which would have "
            "to be downloaded; choose a model with a tower of open_clip's own"
        )
    shape = {**shape, "vocab_size": vocab_size, "context_length": context_length}
    tower: nn.Module = _build_text_tower(embed_dim, shape, quick_gelu=bool(found.get("quick_gelu")))
    return tower


def load_text_tower(tower: nn.Module, path: str) -> None:
    """Load the text tower of an open_clip model's weight file, or of a tower by itself, into `tower`.

    Raises UserError where the file is missing or does not fit: another width, vocabulary or context length.
    """
    held, wanted = read_weights(path), tower.state_dict()
    own = {key.removeprefix("text."): value for key, value in held.items() if not key.startswith("visual.")}
    if missing := [key for key in wanted if key not in own]:
        raise UserError(f"task.text.weights {path}: no text tower of this shape; it lacks {first_ten(missing)}")
    for key, value in wanted.items():
        if own[key].shape != value.shape:
            raise UserError(
                f"task.text.weights {path}: {key} is {list(own[key].shape)} there and {list(value.shape)} here; "
                "task.text.name, task.embed_dim, task.text.vocab_size and data.context_length must be the file's"
            )
    tower.load_state_dict({key: own[key] for key in wanted})


def build_tokenizer(context_length: int, vocab_size: int = FULL_VOCABULARY) -> Callable[[list[str]], Tensor]:
    """CLIP's byte-pair tokenizer: list of n strings -> int64 [n, context_length], cut to length, padded with 0.

    A smaller `vocab_size` keeps the first (most frequent) merges: any text can still be written, in more tokens, and a
    small model does not carry, average and update an embedding of 49,408 rows. Raises UserError outside [514, 49408].
    """
    from open_clip.tokenizer import SimpleTokenizer

    if not 514 <= vocab_size <= FULL_VOCABULARY:
        raise UserError(
            f"task.text.vocab_size {vocab_size}: between 514 (single bytes only) and {FULL_VOCABULARY} is needed"
        )
    tokenizer: Any = SimpleTokenizer(context_length=context_length)
    if vocab_size < FULL_VOCABULARY:
        ordered = [tokenizer.decoder[i] for i in range(vocab_size - 2)]
        ordered += [tokenizer.decoder[tokenizer.sot_token_id], tokenizer.decoder[tokenizer.eot_token_id]]
        tokenizer.encoder = {piece: i for i, piece in enumerate(ordered)}
        tokenizer.decoder = dict(enumerate(ordered))
        tokenizer.bpe_ranks = {m: r for m, r in tokenizer.bpe_ranks.items() if r < vocab_size - 514}
        tokenizer.vocab_size = vocab_size
        tokenizer.all_special_ids = [vocab_size - 2, vocab_size - 1]
        tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    return tokenizer
