"""A model on disk: a folder with `model.safetensors` and `config.json`. Nothing in it is executed.

`config.json` holds what is needed to rebuild the denoiser (network, schedule, prediction), what it makes (image shape,
class names), the student's time if it is a one-step generator, and a free `card` on how it came about.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distmatch import schedule as schedules
from distmatch.checkpoint import write_atomic, write_json
from distmatch.denoiser import Denoiser, Prediction
from distmatch.models.edm import DhariwalUNet, SongUNet
from distmatch.models.mlp import MLP
from distmatch.models.unet import UNet

FORMAT = "distmatch-model-1"
NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP, "song": SongUNet, "dhariwal": DhariwalUNet}


@dataclass(frozen=True)
class Info:
    """What goes with a denoiser.

    Args:
        shape: (C, H, W) of one image.
        classes: class names; empty for an unconditional model.
        t: the time at which a one-step student is evaluated; `None` for a teacher.
        card: how the model was made and measured, as plain JSON data.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    t: float | None = None
    card: dict[str, Any] = field(default_factory=dict)


def save_model(folder: Path, denoiser: Denoiser, info: Info, dtype: torch.dtype = torch.float32) -> None:
    """Write `denoiser` and `info` to `folder`, weights in `dtype`. The configuration goes last: it makes it a model.

    A network that is not one of `NETWORKS` is saved without its configuration; `load_model` then needs it.
    """
    net: Any = denoiser.net
    network: dict[str, Any] = {"type": None, "class": type(net).__name__}
    for kind, known in NETWORKS.items():
        if type(net) is known:
            network = {"type": kind, **dict(getattr(net, "config"))}  # noqa: B009  its constructor's arguments
    config = {
        "format": FORMAT,
        "network": network,
        "schedule": schedules.to_config(denoiser.schedule),
        "prediction": asdict(denoiser.prediction),
        "shape": list(info.shape),
        "classes": list(info.classes),
        "t": info.t,
        "card": info.card,
    }
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in net.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda p: save_file(weights, p))
    write_json(folder / "config.json", config)


def load_model(folder: Path, net: nn.Module | None = None) -> tuple[Denoiser, Info]:
    """The denoiser in evaluation mode with fp32 weights, and what goes with it.

    Args:
        net: the network to load the weights into, for a model whose network is none of `NETWORKS`.

    Raises `ValueError` where the folder is no model, is damaged, or needs a newer version.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads(file.read_text())
        if config.get("format") != FORMAT:
            raise ValueError(f"{file} has format {config.get('format')!r}; this version reads {FORMAT!r}")
        network = dict(config["network"])
        kind: Any = network.pop("type")
        if kind is None and net is None:
            raise ValueError(
                f"{folder} was saved with a network of its owner's, {network['class']}; pass one: "
                f"DistilledPipeline.from_pretrained(path, net={network['class']}(...))"
            )
        if kind not in (None, *NETWORKS):
            raise ValueError(f"{file}: network type {kind!r} is unknown; expected one of {', '.join(NETWORKS)}")
        net = NETWORKS[str(kind)](**network) if net is None else net
        denoiser = Denoiser(net, schedules.from_config(config["schedule"]), Prediction(**config["prediction"]))
        info = Info(tuple(config["shape"]), tuple(config["classes"]), config["t"], config["card"])
        net.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, RuntimeError, OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return denoiser.eval(), info
