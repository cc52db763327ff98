"""Checks that weights and images are finite, on input and on output, so that NaNs are never shown as black."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distmatch.system.errors import UserError


def check_weights(weights: Mapping[str, Tensor], source: object) -> None:
    """Raise `UserError` naming the first of `weights` with a NaN or an infinity. Reads each weight once."""
    # Sums of finite weights stay finite in float64 and, unlike a mask, use no memory.
    bad = [k for k, v in weights.items() if v.is_floating_point() and not v.sum(dtype=torch.float64).isfinite()]
    if bad:
        raise UserError(
            f"{source}: {bad[0]} has values that are not finite (NaN or infinite), as have {len(bad) - 1} more of its "
            f"{len(weights)} tensors; get it again, or make it again"
        )


def check_images(images: Tensor) -> None:
    """Raise `UserError` if one of `images f[B,*D]`, which are about to become 8 bits, is not finite."""
    check_rows(finite_rows(images))


def finite_rows(images: Tensor) -> Tensor:
    """Return which of `images f[B,*D]` are finite, bool[B], without waiting for the device."""
    return images.isfinite().flatten(1).all(1)


def check_rows(finite: Tensor) -> None:
    """Raise `UserError` unless all images of a batch are `finite bool[B]`."""
    if finite.all():
        return
    bad = (~finite).nonzero().flatten().tolist()
    raise UserError(
        f"{len(bad)} of {len(finite)} images of a batch, first number {bad[0]}, are not finite (NaN or infinite), "
        "though all weights are: the network or its decoder overflows. Compute in fp32, or with less guidance"
    )
