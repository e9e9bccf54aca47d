"""The text tower (open_clip's TextTransformer: causal, pooled at the end-of-text token) and its tokenizer. Nothing is
downloaded.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.models.compilation import compiled_region

FULL_VOCABULARY = 49408  # 256 bytes, 256 bytes that end a word, 48,894 merges, start and end of text


class TowerShape(Protocol):
    """Sizes of the text tower, as the `task.text` section has them."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def build_text_tower(config: TowerShape, context_length: int, embed_dim: int) -> nn.Module:
    """tokens int64 [B, context_length] -> [B, embed_dim]."""
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer

    if config.width % config.heads:
        raise UserError(f"task.text: width {config.width} is not divisible by heads {config.heads}")
    compiled_region(ResidualAttentionBlock)
    return TextTransformer(
        context_length=context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        pool_type="argmax",  # the end-of-text token has the highest id
    )


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
