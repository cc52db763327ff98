"""The U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364), named like the published checkpoints.

`SongUNet` is DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456): CIFAR-10, FFHQ, AFHQv2. `DhariwalUNet` is ADM
(Dhariwal and Nichol 2021, arXiv 2105.05233): ImageNet-64. Written from the papers. The constructors take the arguments
of the checkpoints, under their names. Dropout only acts in training mode, which distillation never uses. The
augmentation labels of EDM's training are accepted (`cond.extra["augment"]`); without them there is no augmentation.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond
from distmatch.models.attention import attention
from distmatch.system.errors import UserError

HALF = math.sqrt(0.5)
"""Keeps the variance of a sum of two."""


def resample(x: Tensor, kernel: Tensor, direction: str) -> Tensor:
    """Return `x` at twice ("up") or half ("down") the resolution, smoothed by `kernel f[1,1,n,n]` of sum one."""
    n = kernel.shape[-1]
    if n == 2:  # the box filter: means or copies of 2x2 pixels
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    depthwise = kernel.to(x.dtype).expand(x.shape[1], 1, n, n)
    if direction == "down":
        return F.conv2d(x, depthwise, stride=2, padding=(n - 1) // 2, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * depthwise, stride=2, padding=(n - 1) // 2, groups=x.shape[1])


def _kernel(taps: Sequence[float]) -> Tensor:
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum() ** 2)[None, None]


class Resample(nn.Module):
    """A resolution change without learned weights."""

    def __init__(self, direction: str, taps: Sequence[float]):
        super().__init__()
        self.direction = direction
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.resample_filter, self.direction)


class ResampledConv(nn.Conv2d):
    """A convolution after a resolution change."""

    def __init__(self, inputs: int, outputs: int, kernel: int, direction: str, taps: Sequence[float]):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.direction = direction
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resample(x, self.resample_filter, self.direction))


class BlurredConv(nn.Conv2d):
    """A 3x3 convolution followed by halving the resolution: NCSN++'s residual path from the input image.

    The convolution also applies the filter's padding, so that it sees zeros beyond the border, instead of the filter
    blurring into them.
    """

    def __init__(self, inputs: int, outputs: int, taps: Sequence[float]):
        super().__init__(inputs, outputs, 3, padding=1 + (len(taps) - 1) // 2)
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        depthwise = self.resample_filter.to(y.dtype).expand(y.shape[1], -1, -1, -1)
        return F.conv2d(y, depthwise, stride=2, groups=y.shape[1])


class Block(nn.Module):
    """The residual block of all these networks, with attention if it has heads.

    Args:
        direction: "up" or "down" if the block changes the resolution.
        heads: number of attention heads; 0 for no attention.
        adaptive: the embedding scales and shifts the normalised features (ADM); otherwise it is added before (DDPM++).
        scale: factor on the sum of branch and skip connection.
        project: with a resolution change, the skip connection has a 1x1 convolution even between equal widths.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        direction: str | None = None,
        heads: int = 0,
        dropout: float = 0.0,
        adaptive: bool = True,
        scale: float = 1.0,
        eps: float = 1e-5,
        taps: Sequence[float] = (1, 1),
        project: bool = False,
    ):
        super().__init__()
        self.inputs, self.outputs, self.heads = inputs, outputs, heads
        self.adaptive, self.scale, self.dropout = adaptive, scale, dropout
        self.norm0 = _norm(inputs, eps)
        self.conv0 = _conv(inputs, outputs, 3, direction, taps)
        self.affine = nn.Linear(embedding, outputs * (2 if adaptive else 1))
        self.norm1 = _norm(outputs, eps)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or (direction is not None and project):
            self.skip = _conv(inputs, outputs, 1, direction, taps)
        elif direction is not None:
            self.skip = Resample(direction, taps)
        if heads:
            self.norm2 = _norm(outputs, eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + shift)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = self._sum(self.skip(x), h)
        return self._sum(x, self._attention(x)) if self.heads else x

    def _sum(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch if self.scale == 1 else (x + branch) * self.scale

    def _attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # The published layout of the 3c channels: head, then channel, then query/key/value.
        qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        y = attention(q, k, v)
        return self.proj(y.transpose(-1, -2).reshape(b, c, h, w))


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def _conv(inputs: int, outputs: int, kernel: int, direction: str | None, taps: Sequence[float]) -> nn.Conv2d:
    if direction is None:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return ResampledConv(inputs, outputs, kernel, direction, taps)


class Fourier(nn.Module):
    """Random Fourier features of the noise level, `noise f[B] -> f[B,channels]`, at fixed frequencies `N(0, 16^2)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Positional(nn.Module):
    """Sinusoids of the noise level at frequencies from 1 down to 1e-4 (`endpoint`: inclusive), `f[B] -> f[B,channels]`.

    DDPM++ puts the sines first, ADM the cosines.
    """

    def __init__(self, channels: int, endpoint: bool, sines_first: bool):
        super().__init__()
        half = channels // 2
        self.sines_first = sines_first
        self.freqs: Tensor
        exponent = torch.arange(half, dtype=torch.float32) / (half - endpoint)
        self.register_buffer("freqs", 1e-4**exponent, persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise[:, None] * self.freqs
        parts = [angles.sin(), angles.cos()] if self.sines_first else [angles.cos(), angles.sin()]
        return torch.cat(parts, dim=1)


def _one_hot(cond: Cond | None, like: Tensor, classes: int) -> Tensor:
    """Return f[B,classes] for the batch of `like f[B,*]`; zeros without a label, or for label number `classes`."""
    if cond is None or cond.label is None:
        return like.new_zeros(len(like), classes)
    return (cond.label[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)


class _UNet(nn.Module):
    """The encoder and decoder of both networks, with modules named by resolution."""

    bf16_throughout: ClassVar[bool] = True

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        first: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        attend_once: bool,
        residual: Sequence[float] | None,
        block: Callable[..., Block],
    ):
        """
        Args:
            first: channels of the first convolution.
            widths: channels per resolution.
            attend_once: the decoder attends in the last block of a resolution only.
            residual: taps of the path that carries the image down the encoder, or `None` for no such path.
            block: `(inputs, outputs, direction, attention) -> Block`.
        """
        super().__init__()
        sides = [img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = []
        width, image = first, in_channels
        for side, outputs in zip(sides, widths, strict=True):
            if side == img_resolution:
                self.enc[f"{side}x{side}_conv"] = nn.Conv2d(in_channels, width, 3, padding=1)
            else:
                self.enc[f"{side}x{side}_down"] = block(width, width, direction="down")
                if residual is not None:
                    self.enc[f"{side}x{side}_aux_residual"] = BlurredConv(image, width, residual)
                    image = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(width, outputs, attention=side in attn_resolutions)
                width = outputs
                skips.append(width)
        for side, outputs in zip(reversed(sides), reversed(widths), strict=True):
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = block(width, width, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, direction="up")
            for i in range(num_blocks + 1):
                attention = side in attn_resolutions and (i == num_blocks or not attend_once)
                self.dec[f"{side}x{side}_block{i}"] = block(width + skips.pop(), outputs, attention=attention)
                width = outputs

    def trunk(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`(x f[B,C,H,H], embedding f[B,E]) -> f[B,width,H,H]`: down, then up again with the skip connections."""
        x = image = x.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):
                x = image = skips[-1] = (skips[-1] + module(image)) * HALF
            else:
                x = module(x, embedding) if isinstance(module, Block) else module(x)
                skips.append(x)
        for module in self.dec.values():
            if isinstance(module, Block):  # otherwise an output layer of SongUNet, applied in its forward
                x = module(torch.cat([x, skips.pop()], dim=1) if module.inputs != x.shape[1] else x, embedding)
        return x


class SongUNet(_UNet):
    """DDPM++ and NCSN++: `(x f[B,C,H,H], noise f[B], cond) -> f[B,C,H,H]`.

    Args:
        img_resolution, in_channels, out_channels: H and C.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: width of the augmentation labels; 0 for none.
        model_channels, channel_mult: base width and its multiples, one per resolution.
        channel_mult_emb, channel_mult_noise: width of the embedding and of the noise features, in base widths.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with attention.
        dropout: in training mode.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard" (DDPM++) or "residual" (NCSN++).
        resample_filter: taps of the resolution changes, `[1, 1]` (DDPM++) or `[1, 3, 3, 1]` (NCSN++).

    Raises `UserError` for other types.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _known("embedding_type", embedding_type, "positional", "fourier")
        _known("encoder_type", encoder_type, "standard", "residual")
        _known("decoder_type", decoder_type, "standard")
        embedding, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise

        def block(inputs: int, outputs: int, direction: str | None = None, attention: bool = False) -> Block:
            return Block(
                inputs,
                outputs,
                embedding,
                direction=direction,
                heads=int(attention),
                dropout=dropout,
                adaptive=False,
                scale=HALF,
                eps=1e-6,
                taps=resample_filter,
                project=True,
            )

        super().__init__(
            img_resolution,
            in_channels,
            model_channels,
            [model_channels * m for m in channel_mult],
            num_blocks,
            attn_resolutions,
            attend_once=True,
            residual=resample_filter if encoder_type == "residual" else None,
            block=block,
        )
        self.config = config
        self.label_dim = label_dim
        positional = embedding_type == "positional"
        self.map_noise = Positional(noise, endpoint=True, sines_first=True) if positional else Fourier(noise)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.out, width = f"{img_resolution}x{img_resolution}_aux", model_channels * channel_mult[0]
        self.dec[f"{self.out}_norm"] = _norm(width, eps=1e-6)
        self.dec[f"{self.out}_conv"] = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None = None) -> Tensor:
        embedding = self.map_noise(noise).to(x.dtype)
        if self.map_label is not None:
            label = _one_hot(cond, embedding, self.label_dim)
            embedding = embedding + self.map_label(label * math.sqrt(self.label_dim))
        if self.map_augment is not None and cond is not None and "augment" in cond.extra:
            embedding = embedding + self.map_augment(cond.extra["augment"].to(x.dtype))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        x = self.trunk(x, embedding)
        return self.dec[f"{self.out}_conv"](F.silu(self.dec[f"{self.out}_norm"](x)))

    def _initialise(self) -> None:
        """Glorot-uniform weights, zero biases; last layers of branches near zero (Karras et al. 2022, Appendix F.2)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                last = name.endswith(("conv1", "proj", "aux_conv"))
                nn.init.xavier_uniform_(module.weight, 1e-5 if last else math.sqrt(0.2) if name.endswith("qkv") else 1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class DhariwalUNet(_UNet):
    """ADM: `(x f[B,C,H,H], noise f[B], cond) -> f[B,C,H,H]`, 64 channels per attention head; see `SongUNet`."""

    def __init__(
        self,
        img_resolution: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        embedding = model_channels * channel_mult_emb
        widths = [model_channels * m for m in channel_mult]

        def block(inputs: int, outputs: int, direction: str | None = None, attention: bool = False) -> Block:
            heads = outputs // 64 if attention else 0  # a block with fewer channels has no attention
            return Block(inputs, outputs, embedding, direction=direction, heads=heads, dropout=dropout)

        super().__init__(
            img_resolution,
            in_channels,
            widths[0],
            widths,
            num_blocks,
            attn_resolutions,
            attend_once=False,
            residual=None,
            block=block,
        )
        self.config = config
        self.label_dim = label_dim
        self.map_noise = Positional(model_channels, endpoint=False, sines_first=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None
        self.out_norm = _norm(widths[0], eps=1e-5)
        self.out_conv = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None = None) -> Tensor:
        embedding = self.map_noise(noise).to(x.dtype)
        if self.map_augment is not None and cond is not None and "augment" in cond.extra:
            embedding = embedding + self.map_augment(cond.extra["augment"].to(x.dtype))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(_one_hot(cond, embedding, self.label_dim))
        embedding = F.silu(embedding)
        return self.out_conv(F.silu(self.out_norm(self.trunk(x, embedding))))

    def _initialise(self) -> None:
        """PyTorch's initialisation, as in ADM, except labels of unit variance and zeros at the end of every branch."""
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name.endswith(("conv1", "proj", "out_conv")):
                nn.init.zeros_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


def _known(name: str, value: str, *expected: str) -> None:
    if value not in expected:
        raise UserError(f"{name} {value!r} is unknown; expected one of {', '.join(expected)}")
