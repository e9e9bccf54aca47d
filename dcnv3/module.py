"""`DCNv3`: the operator with its projections, as InternImage's blocks use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dcnv3.fused import NormGelu, joined_linears
from dcnv3.geometry import Geometry, check_backend, integer, make_geometry
from dcnv3.operator import dcnv3, packed_dcnv3
from dcnv3.reference import activate, unpack

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # F.linear(x, weight, bias)
ALIGNED = 8  # a GPU's matrix units are slow, or not used, for another number of columns


class Places(nn.Linear):
    """Some columns of one matrix product, whose others belong to further layers of this kind.

    Each layer keeps its parameters, and is called before they are read: who moves or gathers parameters does so in the
    hooks of the layer's call.
    """

    def __init__(self, channels: int, columns: int, product: Product) -> None:
        super().__init__(channels, columns)
        self.product = product

    def forward(
        self,
        x: torch.Tensor,
        *others: Places,
        weights: tuple[torch.Tensor, ...] = (),
        biases: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """x: [..., C] -> [..., P]: columns of `weights`, this layer's, those of `others`, padding to a whole `ALIGNED`.

        The padding repeats the first columns, which costs no tensor of zeros; no gradient comes from there.
        """
        weights, biases = (*weights, self.weight), (*biases, self.bias)
        if others:
            following, *rest = others
            return following(x, *rest, weights=weights, biases=biases)
        missing = -sum(weight.shape[0] for weight in weights) % ALIGNED
        if missing:
            weights = (*weights, weights[0].detach()[:missing])
            biases = (*biases, biases[0].detach()[:missing])
        if len(weights) == 1:
            return self.product(x, self.weight, self.bias)
        return self.product(x, *joined_linears(weights, biases))


class DCNv3(nn.Module):
    """[N, H, W, C] -> [N, Ho, Wo, C].

        x  = input_proj(input)
        x1 = norm(depthwise(input))                          what the points are chosen from; with a GELU
        offset, logits = offset(x1), mask(x1)
        out = dcnv3(x, offset, logits)
        out = out * (1 - s) + x * s,  s = sigmoid(center_scale(x1))        with center_feature_scale; s is one per group
        return output_proj(out)

    offset, mask and center_scale are one matrix product, which the operator takes as it is; their parameters stay
    apart, so that an optimizer may move the offsets more slowly.

    Source: InternImage (Wang et al., CVPR 2023), section 3.1 and figure 4; the centre scale is of its H and G models.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        center_feature_scale: bool = False,
        mask_activation: str = "softmax",
        share_weights: bool = True,
        backend: str | None = None,
        product: Product = F.linear,
    ) -> None:
        """Build with InternImage's initial values (every offset 0, every point weighted alike).

        Args:
            channels: C = G*C'.
            groups: G.
            kernel_size, stride, padding, dilation, offset_scale, remove_center, mask_activation, backend: see `dcnv3`.
            dw_kernel_size: kernel of the depthwise convolution; None for `kernel_size`.
            center_feature_scale: mix the projected input back in by a learnt share a group.
            share_weights: False gives each point a projection of its own (the paper's ablation, table 5):
                `output_proj` then takes K*C features.
            product: what multiplies x [..., C] by a weight [P, C] and adds a bias [P], in place of `F.linear`.

        Raises:
            ValueError: a wrong option, or sizes that do not fit together; names the argument and what was expected.
        """
        super().__init__()
        check_backend(backend)
        integer("channels", channels, 1)
        # one number each: the depthwise convolution that goes with them is square
        for name, size, least in (
            ("kernel_size", kernel_size, 1),
            ("dw_kernel_size", kernel_size if dw_kernel_size is None else dw_kernel_size, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            integer(name, size, least)
        self.geometry: Geometry = make_geometry(
            groups=groups,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
            mask_activation=mask_activation,
        )
        if channels % groups:
            raise ValueError(f"channels: expected a positive multiple of groups={groups}, got {channels}")
        depthwise_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        # The depthwise map must have the output's size: twice the slack that the other kernel leaves.
        slack = depthwise_size - 1 - dilation * (kernel_size - 1)
        depthwise_padding = padding + slack // 2
        if slack % 2 or depthwise_padding < 0:
            raise ValueError(
                f"dw_kernel_size: {depthwise_size} cannot give the output size of kernel_size={kernel_size}, "
                f"dilation={dilation}, padding={padding}; choose one of the same parity"
            )
        if center_feature_scale and (stride != 1 or 2 * padding != dilation * (kernel_size - 1)):
            raise ValueError(
                "center_feature_scale: needs an output of the input's size (stride 1, 2 * padding = dilation * "
                f"(kernel_size - 1)), got {stride=}, {padding=}, {dilation=}, {kernel_size=}"
            )
        self.channels, self.groups, self.share_weights, self.backend = channels, groups, share_weights, backend
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.offset_scale, self.remove_center, self.mask_activation = offset_scale, remove_center, mask_activation
        points = self.geometry.points
        self.input_proj = nn.Linear(channels, channels)
        self.depthwise = nn.Conv2d(
            channels, channels, depthwise_size, stride=stride, padding=depthwise_padding, groups=channels
        )
        self.norm = NormGelu(channels)
        self.offset = Places(channels, groups * points * 2, product)
        self.mask = Places(channels, groups * points, product)
        self.center_scale = Places(channels, groups, product) if center_feature_scale else None
        self.output_proj = nn.Linear(channels if share_weights else channels * points, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """InternImage's initial values; the depthwise convolution keeps PyTorch's."""
        self.depthwise.reset_parameters()
        self.norm.reset_parameters()
        for places in (self.offset, self.mask, self.center_scale):
            if places is not None:
                nn.init.zeros_(places.weight)
                nn.init.zeros_(places.bias)
        for linear in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, inputs: torch.Tensor, again: torch.Tensor | None = None) -> torch.Tensor:
        """[N, H, W, C] -> [N, Ho, Wo, C]. ValueError for another number of channels or dimensions.

        again: the inputs once more, for the depthwise convolution to read, from one who adds up the gradients of both
        readers himself (`split_norm`).
        """
        if not isinstance(inputs, torch.Tensor):
            raise ValueError(f"inputs: expected a tensor [N, H, W, {self.channels}], got {type(inputs).__name__}")
        if inputs.dim() != 4 or inputs.shape[-1] != self.channels:
            raise ValueError(f"inputs: expected [N, H, W, {self.channels}], got shape {tuple(inputs.shape)}")
        x = self.input_proj(inputs)
        chosen_from = inputs if again is None else again
        x1 = self.norm(self.depthwise(chosen_from.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        center = self.center_scale is not None
        packed = self.offset(x1, self.mask, self.center_scale) if center else self.offset(x1, self.mask)
        if self.share_weights:
            sampled = packed_dcnv3(x, packed, self.geometry, center=center, backend=self.backend)
        else:
            sampled = self._unshared(x, packed)
        return self.output_proj(sampled)

    def _unshared(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """[N, Ho, Wo, K*C]: each point's samples apart, by K calls of a one-point kernel."""
        g = self.geometry
        offset, mask, share = unpack(packed, g, self.center_scale is not None)
        radius = (g.dilation_w * (g.kernel_w - 1)) >> 1  # the module's kernels are square
        dtype = x.dtype
        # A point's place in the kernel moves into its offset, which bfloat16 would round: float32 for this variant.
        compute = dtype if dtype == torch.float64 else torch.float32
        offset = offset.to(compute).unflatten(-1, (g.groups, g.points, 2))
        weight = activate(mask.to(compute).unflatten(-1, (g.groups, g.points)), g.activation)
        samples = []
        for k, (i, j) in enumerate(g.cells()):
            cell = offset.new_tensor([i * g.dilation_w - radius, j * g.dilation_h - radius])
            shift = radius + (cell + offset[..., k, :]) * g.offset_scale
            # padding counts towards the output's size too, so the one-point kernel gets the padding that keeps that
            # size, and the difference goes into the offset as well
            padding = g.padding_h - radius if g.padding_h >= radius else 0
            shift = shift + (padding - g.padding_h)
            samples.append((shift.flatten(-2), weight[..., k], padding))
        height, width = x.shape[1:3]
        out_h, out_w = g.output_size(height, width)
        outputs = []
        for shift, one, padding in samples:
            whole = (height + 2 * padding - 1) // g.stride_h + 1, (width + 2 * padding - 1) // g.stride_w + 1
            pad = (0, 0, 0, whole[1] - out_w, 0, whole[0] - out_h)
            outputs.append(
                dcnv3(
                    x.to(compute),
                    F.pad(shift, pad),
                    F.pad(one, pad),
                    groups=g.groups,
                    kernel_size=1,
                    stride=g.stride_h,
                    padding=padding,
                    mask_activation="none",
                    backend=self.backend,
                )[:, :out_h, :out_w]
            )
        sampled = torch.cat(outputs, dim=-1).to(dtype)
        if share is None:
            return sampled
        # one share a group, spread over its channels by broadcasting: [N, Ho, Wo, K, G, C']; a K-th of the centre to
        # each point, so that equal projections give the shared form
        split = (self.groups, self.channels // self.groups)
        centre = x.unflatten(-1, (1, *split)) / g.points
        return torch.lerp(
            sampled.unflatten(-1, (g.points, *split)), centre, share.sigmoid()[..., None, :, None]
        ).flatten(-3)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, groups={self.groups}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, offset_scale={self.offset_scale}, "
            f"remove_center={self.remove_center}, mask_activation={self.mask_activation!r}"
        )
