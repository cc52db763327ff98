"""Data sets passed from Python: tensors, and data sets of PyTorch or Hugging Face."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.data.captions import captions_of, several
from distmatch.data.decode import Decoder
from distmatch.data.prompts import KEYS
from distmatch.data.sidecars import COLUMNS, IMAGES
from distmatch.system.errors import UserError


def as_pixels(data: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Return a tensor [N,C,H,W] or [N,H,W], C of 1 or 3, as `u8[N,C,H,W]`: uint8, or floats in `value_range`.

    Raises `UserError` for anything else, and for values outside the range.
    """
    if data.ndim == 3:
        data = data[:, None]
    if data.ndim != 4 or data.shape[1] not in (1, 3) or 0 in data.shape:
        channels_last = data.ndim == 4 and data.shape[-1] in (1, 3)
        hint = "; move the channels with .permute(0, 3, 1, 2)" if channels_last else ""
        raise UserError(f"images are {tuple(data.shape)}; expected (N, C, H, W) with C of 1 or 3, or (N, H, W){hint}")
    data = data.detach().cpu()
    if data.dtype == torch.uint8:
        return data.contiguous().clone()
    if not data.is_floating_point():
        raise UserError(f"images are {data.dtype}; expected uint8 in 0..255, or floats with their value_range")
    low, high = data.min().item(), data.max().item()
    if value_range is None:
        raise UserError(f"images are floats in {low:.4g}..{high:.4g}; give black and white, e.g. value_range=(-1, 1)")
    black, white = value_range
    if not -math.inf < black < white < math.inf:
        raise UserError(f"value_range=({black}, {white}) is no range; expected black below white, e.g. (-1, 1)")
    slack = 1e-3 * (white - black)  # for errors of resizing and rounding
    if not black - slack <= low <= high <= white + slack:  # also false for NaN
        raise UserError(f"images are in {low:.4g}..{high:.4g}, outside of value_range=({black}, {white})")
    return torch.cat([_to_bytes((part.double() - black) / (white - black)) for part in data.split(256)])


def _to_bytes(unit: Tensor) -> Tensor:
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def plain(label: Any) -> Any:
    """Return a label as a plain Python value, without NumPy's or PyTorch's type."""
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label


def collected(
    data: Any, classes: tuple[str, ...], value_range: tuple[float, float] | None
) -> tuple[Tensor, list[Any] | None, tuple[str, ...], tuple[tuple[str, ...], ...] | None, list[str]]:
    """Return pixels, labels, classes, captions and notes of a data set read image by image; see `Images.of`."""
    if isinstance(data, Mapping):
        raise UserError(f"the data set has the splits {', '.join(map(str, data))}; give one of them")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(
            f"{type(data).__name__} is no data set of known length; expected a tensor, a Dataset, or a list of images"
        )
    image, known = _columns(data)
    label, text, decoder = None, None, None
    tensors, labels, texts = [], [], []
    for row, item in enumerate(data[i] for i in range(len(data))):
        if isinstance(item, Mapping) and image in item:
            label = label or next((name for name in known if name in item), None)
            text = text or next((name for name in KEYS if name in item), None)
            picture, said = item[image], item.get(label)
            texts.append(several(item.get(text)))
        else:
            picture, said = _pair(item)
        labels.append(plain(said))
        if isinstance(picture, Image.Image):
            decoder = decoder or Decoder("the data set", len(data))
            decoder.add(row, f"number {row}", picture)
        elif isinstance(picture, Tensor | np.ndarray):
            tensor = torch.as_tensor(picture)
            tensors.append(as_pixels(tensor[None] if tensor.ndim == 3 else tensor[None, None], value_range)[0])
        else:
            raise UserError(
                f"number {row} is a {type(picture).__name__}; expected a Pillow image, a tensor or an array"
            )
    if (decoder is not None and tensors) or not labels:
        raise UserError("the data set is empty, or has Pillow images beside tensors; expected one kind")
    if any(said is None for said in labels) and any(said is not None for said in labels):
        raise UserError("some images have a label and some have none; give all of them one")
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise UserError(f"images have the shapes {', '.join(map(str, sorted(shapes)[:5]))}; bring them to one")
    pixels, notes = (torch.stack(tensors), []) if decoder is None else decoder.finish()
    given = None if labels[0] is None else labels
    named = known.get(label) or () if image else getattr(data, "classes", None) or ()
    captions = captions_of(texts, f"{text} of the data set") if text else None
    return torch.as_tensor(pixels), given, classes or tuple(named), captions, notes


def _columns(data: Any) -> tuple[str, dict[str | None, Sequence[str] | None]]:
    """For items that are dictionaries: the image's key, and possible keys of a label, with their classes if known."""
    first = data[0] if len(data) else None
    if not isinstance(first, Mapping):
        return "", {}
    pictures = [name for name, value in first.items() if isinstance(value, Image.Image)]
    image = next((name for name in IMAGES if name in first), pictures[0] if len(pictures) == 1 else None)
    if image is None:
        raise UserError(f"items have {', '.join(map(str, first))}; expected one called {' or '.join(IMAGES)}")
    features = getattr(data, "features", None) or {}
    named = [name for name in features if getattr(features[name], "names", None)]
    return image, {name: getattr(features.get(name), "names", None) for name in (*COLUMNS, *named)}


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list):
        return item, None
    if len(item) not in (1, 2):
        raise UserError(f"an item has {len(item)} parts; expected an image, or (image, label)")
    return item[0], item[1] if len(item) == 2 else None
