"""Reads the published EDM checkpoints (Karras et al. 2022) and caches them as model folders.

The source code in their pickles is never executed, see `unpickle`.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.schedule import EDM
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.family import Family
from distmatch.models.folder import load_model, save_model
from distmatch.models.info import Info
from distmatch.models.layout import build
from distmatch.system import unpickle
from distmatch.system.digests import file_sha256
from distmatch.system.download import download
from distmatch.system.errors import UserError
from distmatch.system.finite import check_weights
from distmatch.system.paths import CACHE, expand
from distmatch.system.progress import console
from distmatch.system.storage import keep, kept

_CIFAR = {"channel_mult": [2, 2, 2], "dropout": 0.13, "augment_dim": 9}
_FACES = {"img_resolution": 64, "channel_mult": [1, 2, 2, 2], "augment_dim": 9}
_VE = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
PUBLISHED: dict[str, tuple[type[SongUNet] | type[DhariwalUNet], dict[str, Any]]] = {
    "edm-cifar10-32x32-cond-vp": (SongUNet, {**_CIFAR, "label_dim": 10}),
    "edm-cifar10-32x32-uncond-vp": (SongUNet, _CIFAR),
    "edm-cifar10-32x32-cond-ve": (SongUNet, {**_CIFAR, **_VE, "label_dim": 10}),
    "edm-cifar10-32x32-uncond-ve": (SongUNet, {**_CIFAR, **_VE}),
    "edm-ffhq-64x64-uncond-vp": (SongUNet, {**_FACES, "dropout": 0.05}),
    "edm-ffhq-64x64-uncond-ve": (SongUNet, {**_FACES, **_VE, "dropout": 0.05}),
    "edm-afhqv2-64x64-uncond-vp": (SongUNet, {**_FACES, "dropout": 0.25}),
    "edm-imagenet-64x64-cond-adm": (DhariwalUNet, {"label_dim": 1000}),
}
"""The networks of the published checkpoints, by the checkpoint's name; all with EDM's preconditioning."""

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
PRECONDITIONINGS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
FIXED = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "C_1": 0.001, "C_2": 0.008}
"""Arguments of the preconditionings whose values are hard-coded here."""
UNUSED = {"use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type", "img_channels", "label_dropout", *FIXED}
"""Arguments that are not passed to the network: they are read elsewhere, or have no effect outside training."""


class Published(Family):
    """The networks of the EDM paper, from a file or a URL."""

    def load(self, source: str) -> tuple[Denoiser, Info]:
        return cached_edm(source)

    def outline(self, source: str) -> tuple[Denoiser, Info]:
        """Return the outline by the checkpoint's name; the file need not exist."""
        name = Path(source).stem
        if name not in PUBLISHED:
            raise UserError(f"teacher 'edm:{source}' is no published checkpoint; import it and name its folder")
        kind, arguments = PUBLISHED[name]
        with torch.device("meta"):
            net: Any = kind(**arguments)
        info = Info((3, *[net.config["img_resolution"]] * 2), tuple(map(str, range(net.config["label_dim"]))))
        return Denoiser(net, EDM(), Prediction("edm")), info


def import_edm(source: str, out: Path) -> tuple[Denoiser, Info]:
    """Write the checkpoint `source`, a file or a URL, as a model folder `out`; return what was written.

    Raises `UserError` if the file is missing, damaged, hostile, or not an EDM checkpoint.
    """
    denoiser, info = read_edm(_local(source))
    save_model(out, denoiser, info)
    return denoiser, info


def cached_edm(source: str) -> tuple[Denoiser, Info]:
    """Load the checkpoint `source`, a file or a URL, through a model folder in the cache; remake a damaged one."""
    file = _local(source)
    folder = CACHE / f"edm-{file_sha256(file)[:32]}"
    if (folder / "config.json").exists():
        try:
            return load_model(folder)
        except UserError as error:
            console.print(f"{error}\nIt is imported again", soft_wrap=True)
    return import_edm(str(file), folder)


def read_edm(file: Path) -> tuple[Denoiser, Info]:
    """Return the EMA network of a published `.pkl`, with its preconditioning, in evaluation mode and fp32.

    Its noise range is that of EDM's sampler, 0.002 to 80, limited to what the preconditioning allows; classes are named
    by their numbers. Raises `UserError` if the file is missing, damaged, hostile, or not an EDM checkpoint.
    """
    found = unpickle.network(file)
    top, inner = found.modules[""], found.modules.get("model")
    if top.class_name not in PRECONDITIONINGS or inner is None or inner.class_name not in NETWORKS:
        classes = top.class_name if inner is None else f"{top.class_name} around {inner.class_name}"
        raise UserError(
            f"{file} holds {classes}; expected {' or '.join(PRECONDITIONINGS)} around {' or '.join(NETWORKS)}"
        )
    other = {k: v for k, v in top.kwargs.items() if k in FIXED and v != FIXED[k]}
    if other:
        raise UserError(f"{file}: {top.class_name} has {other}; expected { ({k: FIXED[k] for k in other}) }")
    channels, side = (top.kwargs.get(name) for name in ("img_channels", "img_resolution"))
    if not isinstance(channels, int) or not isinstance(side, int):
        raise UserError(f"{file}: img_channels is {channels!r} and img_resolution {side!r}; expected whole numbers")
    iddpm = top.class_name == "iDDPMPrecond"  # its networks also predict variances
    arguments = {"in_channels": channels, "out_channels": channels * (2 if iddpm else 1)}
    arguments |= {k: v for k, v in top.kwargs.items() if k not in UNUSED}
    state = {k.removeprefix("model."): v.float() for k, v in found.state.items() if k.startswith("model.")}
    check_weights(state, file)
    net = _network(inner.class_name, arguments, state, file)

    low, high = (float(top.attributes.get(name, bound)) for name, bound in (("sigma_min", 0), ("sigma_max", 80)))
    prediction = Prediction(PRECONDITIONINGS[top.class_name], float(top.kwargs.get("sigma_data", 0.5)))
    schedule = (IDDPM if iddpm else EDM)(max(0.002, low), min(80.0, high))
    denoiser = Denoiser(net, schedule, prediction)
    dropout = float(top.kwargs.get("label_dropout", 0.0))
    facts = {"file": file.name, "sha256": file_sha256(file), "class": top.class_name, "label_dropout": dropout}
    return denoiser.eval(), Info(
        (channels, side, side), tuple(str(i) for i in range(net.label_dim)), card={"imported": facts}
    )


def _network(
    kind: str, arguments: dict[str, Any], state: dict[str, torch.Tensor], file: Path
) -> SongUNet | DhariwalUNet:
    """Build the network and load its weights."""
    shapes = {name: value.shape for name, value in state.items()}
    net = build(f"{file}: {kind}", NETWORKS[kind], arguments, shapes)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file}: {kind} does not fit its weights: {str(error)[:300]}") from error
    return net


def _local(source: str) -> Path:
    """Return the file `source`, downloaded to the cache if it is a URL."""
    if not source.startswith(("http://", "https://")):
        file = Path(expand(source))
        if not file.is_file():
            raise UserError(f"edm:{source} is no file here; give an EDM checkpoint, a .pkl file or a URL of one")
        return file
    file = CACHE / "downloads" / f"{sha256(source.encode()).hexdigest()[:16]}-{Path(source.partition('?')[0]).name}"
    if there := kept(file):
        return there
    try:
        return keep(file, lambda path: download(source, path))
    except UserError as error:
        raise UserError(f"{error}. Fetch it elsewhere and give the file") from error
