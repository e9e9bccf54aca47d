"""What turns stages into one vector an image: the pooled head of T-XL and the CLIP projector head of H and G."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.compilation import compiled_region
from pretrain.models.layers import GlobalBatchNorm, initial_std


@compiled_region
class ConvHead(nn.Module):
    """1x1 convolution (a Linear, as channels are last), BatchNorm, GELU: [B, H, W, C] -> [B, H, W, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width, bias=False)
        self.norm = GlobalBatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


@compiled_region
class FuseStages(nn.Module):
    """Stages 3 and 4 -> one stride-16 map: proj3(x3) + pixel_shuffle(proj4(x4)).

    x3: [B, H, W, C3], x4: [B, ceil(H/2), ceil(W/2), C4] -> [B, H, W, width]. With an odd H or W the shuffled map, one
    wider, is cropped.
    """

    def __init__(self, channels3: int, channels4: int, width: int) -> None:
        super().__init__()
        self.proj3 = nn.Linear(channels3, width)
        self.proj4 = nn.Linear(channels4, width * 4)

    def forward(self, x3: Tensor, x4: Tensor) -> Tensor:
        batch, height, width, _ = x4.shape
        fine = self.proj4(x4).view(batch, height, width, -1, 2, 2).permute(0, 1, 4, 2, 5, 3)
        fine = fine.reshape(batch, 2 * height, 2 * width, -1)[:, : x3.shape[1], : x3.shape[2]]
        return self.proj3(x3) + fine


@compiled_region
class AttentionPool(nn.Module):
    """Tokens [B, N, D] -> [B, width]: multi-head attention with one query, the mean of the tokens.

    Queries, keys and values each have their own LayerNorm, projection and bias. With a single query neither keys nor
    values have to be made: the query is carried through the key projection to the tokens, and the tokens are averaged
    before the value projection, which is D/heads times less work and no [B, N, D] tensor but the normalised tokens. It
    is the same function.

    Parameters lie in this module itself, not in sub-modules that are never called: ZeRO-3 gathers what a called module
    owns.
    """

    def __init__(self, dim: int, width: int, heads: int, eps: float = 1e-6, init_std: float | None = 0.02) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"the CLIP projector's width {dim} is not divisible by its {heads} heads")
        self.heads, self.eps = heads, eps
        self.norm_q_weight, self.norm_q_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_k_weight, self.norm_k_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_v_weight, self.norm_v_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.q_weight, self.q_bias = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.zeros(dim))
        self.k_weight, self.k_bias = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.zeros(dim))
        self.v_weight, self.v_bias = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.zeros(dim))
        for weight in (self.q_weight, self.k_weight, self.v_weight):
            nn.init.trunc_normal_(weight, std=initial_std(init_std, dim))
        self.proj = nn.Linear(dim, width)

    def forward(self, tokens: Tensor) -> Tensor:
        heads, dim = self.heads, tokens.shape[-1]
        query = F.layer_norm(tokens.mean(1), (dim,), self.norm_q_weight, self.norm_q_bias, self.eps)
        query = F.linear(query, self.q_weight, self.q_bias).unflatten(-1, (heads, -1)) * (dim // heads) ** -0.5
        normal = F.layer_norm(tokens, (dim,), eps=self.eps)
        # q . (K (g x + b) + c)  =  (g K^T q) . x  +  q . (K b + c); the second term is one number a head.
        reached = torch.einsum("bhe,hed->bhd", query, self.k_weight.unflatten(0, (heads, -1)))
        shift = reached @ self.norm_k_bias + (query * self.k_bias.unflatten(0, (heads, -1))).sum(-1)
        scores = (reached * self.norm_k_weight) @ normal.transpose(1, 2) + shift[..., None]
        weights = scores.float().softmax(-1).to(normal.dtype)
        mean = weights @ normal * self.norm_v_weight + self.norm_v_bias
        value = torch.einsum("bhd,hed->bhe", mean, self.v_weight.unflatten(0, (heads, -1)))
        return self.proj(value.flatten(1) + self.v_bias)
