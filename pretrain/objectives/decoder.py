"""From tokens of the fused map to predictions of a view's dense targets (the projector and predictor of SiameseIM,
section 3).

    F_S --Linear--> blocks = Projector            the teacher's targets pass through one too
    [Projector(F_S) + PE_abs(S) ; mask token + Linear(PE_rel)] --blocks--> LN, Linear --> predictions at its tokens

SiameseIM's heads have BatchNorm where these have LayerNorm: a sample's prediction does not depend on its batch, and so
not on the number of ranks.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.compilation import compiled_region
from pretrain.objectives.position import absolute_embedding, relative_embedding


class Blocks(nn.Sequential):
    """Pre-norm Transformer blocks (timm's; attention softmax is accumulated in fp32), recomputed in the backward pass
    if asked.
    """

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        if dim % heads:
            raise ValueError(f"the decoder's width {dim} is not divisible by its {heads} heads")
        super().__init__(*(Block(dim, heads, qkv_bias=True) for _ in range(layers)))
        self.checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


@compiled_region
class Projector(nn.Module):
    """[B, N, width] -> [B, N, dim]: a Linear and `layers` blocks over the tokens given, no positions added."""

    def __init__(self, width: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.blocks = Blocks(dim, layers, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embed(tokens))


@compiled_region
class Predictor(nn.Module):
    """Projected tokens and where the target lies -> predictions [B, G * G, dim] at every token of the target."""

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"the decoder's width {dim} is not divisible by 4, which the 2-D position embedding needs")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Linear(2 * dim, dim)
        self.blocks = Blocks(dim, layers, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, dim)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.position.weight)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.position.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, index: Tensor, parameters: Tensor, grid: int) -> Tensor:
        """tokens: [B, n, dim] at the token indices `index` [n] (or [B, n]) of the G x G input map. parameters: [B, 6]
        (position.py).
        """
        dtype, dim = tokens.dtype, tokens.shape[-1]
        known = tokens + absolute_embedding(grid, dim, tokens.device, parameters.dtype)[index].to(dtype)
        queries = self.mask_token + self.position(relative_embedding(parameters, grid, dim).to(dtype))
        x = self.blocks(torch.cat([known, queries], dim=1))
        return self.head(self.norm(x[:, index.shape[-1] :]))
