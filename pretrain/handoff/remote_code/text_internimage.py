"""CLIP's text tower in plain PyTorch, under the names of open_clip's TextTransformer.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class TextBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input: [B, L, W] -> [B, L, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask: [L, L], -inf where a token may not look."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TextBlocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([TextBlock(width, heads) for _ in range(layers)])


class TextTower(nn.Module):
    """Tokens int64 [B, L], the end of text the largest id -> [B, embed_dim], not normalised. L: up to context_length.

    Causal, and pooled at the end of text.
    """

    def __init__(
        self, width: int, heads: int, layers: int, vocab_size: int, context_length: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.transformer = TextBlocks(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = mask.to(x.dtype)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        end = tokens.argmax(1)  # of several the first: what pads behind it is not looked at
        pooled = self.ln_final(x).gather(1, end[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
        return pooled @ self.text_projection
