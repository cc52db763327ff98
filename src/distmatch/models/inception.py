"""The Inception-v3 network in whose features FID is measured, with weights from a file.

It is the network of 2015-12-05 with 1008 outputs (Heusel et al. 2017, arXiv 1706.08500), not the later one of the same
name that classifies ImageNet. Its structure comes from torch-fidelity's port (the extra `metrics`) or from a
TorchScript archive. Images are resized to 299 x 299 in one of two ways, whose figures cannot be compared:

- `legacy`: bilinear as in TensorFlow 1, which defines FID and which EDM and DMD report (Karras et al. 2022,
  arXiv 2206.00364; Yin et al. 2024, arXiv 2311.18828, Appendix D).
- `clean`: bicubic with antialiasing (Parmar et al. 2022, arXiv 2104.11222).
"""

import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from distmatch.models.published_space import PublishedSpace
from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.finite import check_weights

SIDE = 299
FEATURES = 2048
RESIZES = ("legacy", "clean")
NORM = {
    "weight": {"weight", "gamma", "scale"},
    "bias": {"bias", "beta"},
    "running_mean": {"running_mean", "moving_mean", "mean"},
    "running_var": {"running_var", "moving_variance", "var"},
}
"""Vectors of batch normalisation: the port's names -> names in other files."""


class Inception(PublishedSpace):
    """A feature space (see `features.FeatureSpace`): 2048 features of 8-bit images, in float32, and no classes.

    Args:
        network: holds the weights.
        whole: `pixels u8[B,3,H,W] -> f32[B,2048]`; resizes by itself, as `legacy`.
        layers: `f32[B,3,299,299] in about [-1, 1] -> f32[B,2048]`, the same network after the resizing.
        resize: `legacy` or `clean`.
        identity: see `features.FeatureSpace`.
    """

    name = "inception"
    distance = "fid"

    def __init__(
        self,
        network: nn.Module,
        whole: Callable[[Tensor], Tensor],
        layers: Callable[[Tensor], Tensor],
        resize: str,
        identity: dict[str, Any],
    ):
        super().__init__(network)
        self.whole, self.layers, self.resize, self.identity = whole, layers, resize, identity

    @torch.no_grad()
    def both(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return `(features f32[B,2048], None)` of `pixels u8[B,C,H,W]`; a grey image (C = 1) becomes three equal
        channels.

        Raises `UserError` for other pixels, and for a network with another number of features.
        """
        self.check(pixels)
        precise = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        # An optimised archive may round differently after its first batches.
        with precise, torch.jit.optimized_execution(False):  # type: ignore[reportPrivateImportUsage]
            if self.resize == "clean":
                enlarged = clean_resize(pixels).to(self.device).expand(-1, 3, -1, -1)
                features = self.layers((enlarged - 128) / 128)
            else:
                features = self.whole(pixels.to(self.device).expand(-1, 3, -1, -1))
        features = features.flatten(1).float()
        if features.shape[1] != FEATURES:
            raise UserError(f"this network has {features.shape[1]} features; FID's Inception-v3 has {FEATURES}")
        return features, None


def load_inception(file: Path, resize: str = "legacy") -> Inception:
    """Load the Inception-v3 whose weights are in `file`.

    Args:
        file: one of
            a TorchScript archive (`inception-2015-12-05.pt`), called as `archive(pixels, return_features=True)`: a
            program in TorchScript's language that is executed, so only use one you trust;
            a state dict of the PyTorch port (.pth, .safetensors), as in torch-fidelity or pytorch-fid;
            NVIDIA's pickle (.pkl), from which tensors are read and nothing is executed. Its names differ: there, and in
            a .pth with foreign names, convolutions are matched by their order (.safetensors keeps no order).
        resize: `legacy` or `clean`, see above.

    Raises `UserError` if the file is missing, damaged or another network, or if the extra `metrics` is not installed.
    """
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r} is unknown; expected one of {', '.join(RESIZES)}")
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; expected the weights of FID's Inception-v3: a TorchScript archive "
            "(inception-2015-12-05.pt), a state dict (.pth, .safetensors) or NVIDIA's .pkl"
        )
    if _is_torchscript(file):
        archive = _archive(file)
        identity = {"inception": resize, "archive": file_sha256(file)}
        return Inception(archive, partial(archive, return_features=True), archive.layers, resize, identity)
    port = _port(_state(file), file)
    layers = nn.Sequential(*list(port.children())[:-1], nn.Flatten())  # in order of registration, without the logits
    return Inception(port, lambda pixels: port(pixels)[0], layers, resize, {"inception": resize})


def clean_resize(pixels: Tensor) -> Tensor:
    """Return `pixels u8[B,C,H,W]` as f32[B,C,299,299] in 0..255, on the CPU, as in clean-fid.

    Uses Pillow's bicubic filter, which antialiases when shrinking; each channel in float32, clipped and not rounded.
    """
    planes = pixels.cpu().flatten(0, 1).numpy().astype(np.float32)
    images = [Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).clamp(0, 255).unflatten(0, pixels.shape[:2])
    )


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as content:
        return any(name.endswith("/constants.pkl") for name in content.namelist())


def _archive(file: Path) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates this kind of archive
            archive = torch.jit.load(file, map_location="cpu")
        arguments = {argument.name for argument in archive.forward.schema.arguments}  # type: ignore[union-attr]
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as a TorchScript archive: {str(error).splitlines()[0]}") from error
    if "return_features" not in arguments or not hasattr(archive, "layers"):
        raise UserError(
            f"{file} is an archive of another network: expected forward(pixels, return_features) and `layers`, "
            f"as inception-2015-12-05.pt has them; its forward takes {', '.join(sorted(arguments))}"
        )
    return archive


def _state(file: Path) -> dict[str, Tensor]:
    """Return the tensors in `file` by name, in the file's order."""
    if file.suffix == ".pkl":
        from distmatch.system.unpickle import read_state

        return read_state(file)
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything here
        raise UserError(
            f"{file} is no state dict, or is damaged ({type(error).__name__}); "
            "pickles of anything but tensors are not read"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds something other than tensors by name; expected a state dict")
    check_weights(state, file)
    return dict(state)


def _port(state: dict[str, Tensor], file: Path) -> nn.Module:
    """Return torch-fidelity's network with the weights `state`, read from `file`."""
    need("torch_fidelity", by=f"FID with {file.name}")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Port(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return super().load_state_dict(_fitted(state_dict, self.state_dict(), file))

    # Its constructor unpickles a file or downloads one. We give it a buffer with our tensors instead.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return Port("inception", [str(FEATURES)], buffer)


def _fitted(state: Mapping[str, Tensor], network: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Rename `state` for the port, whose own state is `network`: by name if it has the port's names, else by order.

    Raises `UserError` naming what does not fit.
    """
    found = state if any(name in network for name in state) else _by_order(state, network, file)
    # The counter of training steps and the logits may be missing: FID does not use them.
    optional = {name for name in network if name.endswith("num_batches_tracked") or name.startswith("fc.")}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wrong = [f"{name} is missing" for name in network if name not in found and name not in optional]
    wrong += [f"{name} is unknown" for name in found if name not in network]
    wrong += [
        f"{name} is {shapes[name]} instead of {tuple(network[name].shape)}"
        for name in network
        if name in found and shapes[name] != tuple(network[name].shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{file} does not fit FID's Inception-v3: {'; '.join(wrong[:5])}{more}")
    return {**network, **found}


def _by_order(state: Mapping[str, Tensor], network: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Rename `state` to the names of `network`: convolution by convolution, each with the vectors that belong to it.

    Shapes must be equal in equal order. This is not a guess: a different order of a block's branches would show in the
    shapes, since the first and the last branch differ in some blocks of each kind.
    """
    ours, theirs = ([name for name, v in weights.items() if v.ndim == 4] for weights in (network, state))
    if len(ours) != len(theirs):
        raise UserError(f"{file} has {len(theirs)} convolutions; FID's Inception-v3 has {len(ours)}")
    found: dict[str, Tensor] = {}
    for our, their in zip(ours, theirs, strict=True):
        if state[their].shape != network[our].shape:
            raise UserError(
                f"{file} does not fit FID's Inception-v3: {their} is {tuple(state[their].shape)} where {our} is "
                f"{tuple(network[our].shape)}"
            )
        found[our] = state[their]
        vectors = _vectors(state, their)
        for name, known in NORM.items():
            target = our.replace(".conv.weight", f".bn.{name}")
            values = [value for key, value in vectors if key in known]
            if name == "weight" and not values:  # normalisation without a gain, as in the original graph
                values = [torch.ones_like(network[target])]
            if len(values) != 1:
                raise UserError(
                    f"{file} does not fit FID's Inception-v3: for the {name} of the normalisation that follows {their} "
                    f"there are {len(values)} of {', '.join(key for key, _ in vectors) or 'no vectors'}"
                )
            found[target] = values[0]
    return found


def _vectors(state: Mapping[str, Tensor], convolution: str) -> list[tuple[str, Tensor]]:
    """Return the vectors of the module that holds `convolution`, by the last part of their names; else its parent's."""
    own = convolution.rpartition(".")[0]
    for prefix in (own, own.rpartition(".")[0]):
        inside = {k: v for k, v in state.items() if prefix and k.startswith(f"{prefix}.") and v.ndim == 1}
        if inside:
            return [(key.rpartition(".")[2], value) for key, value in inside.items()]
    return []
