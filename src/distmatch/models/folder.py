"""Saves and loads models: a folder with `model.safetensors` and `config.json`. Nothing in it is executed.

`config.json` holds what is needed to rebuild the denoiser (network, schedule, prediction), what it makes (image shape,
class names), the times of a student, a free-form `card` on how the model was made, and the digest of its weights.
"""

import math
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import Schedule
from distmatch.diffusion.schedule_config import schedule_config, schedule_of
from distmatch.models.diffusers import families as diffusers
from distmatch.models.diffusers.lora import without_lora
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.info import Info
from distmatch.models.layout import build, shapes_in
from distmatch.models.mlp import MLP
from distmatch.models.unet import UNet
from distmatch.system import limits, parallel
from distmatch.system.digests import Damaged, load_file, save_file
from distmatch.system.errors import UserError
from distmatch.system.files import together, write_json
from distmatch.system.finite import check_weights
from distmatch.system.paths import located, named
from distmatch.system.plain import fitting, read_json
from distmatch.system.terminal import command
from distmatch.training.adapters import Adapted, network_of
from distmatch.training.engine import whole

FORMAT = "distmatch-model-1"
ADAPTER = "adapter.safetensors"
AGAIN = "Make the model again: the command that made it continues from its last checkpoint, or get a new copy"
NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "mlp": MLP,
    "song": SongUNet,
    "dhariwal": DhariwalUNet,
    **diffusers.NETWORKS,
}


def save_model(folder: Path, denoiser: Denoiser, info: Info, dtype: torch.dtype = torch.float32) -> None:
    """Write `denoiser` and `info` to `folder`, weights in `dtype`. An existing model is replaced at the very end.

    Of an adapted denoiser, the network that it amounts to is written, and its adapter beside it.

    All processes must call this, since the weights may be sharded; the first one writes. A network that is not one of
    `NETWORKS`, or a schedule that is not one of `SCHEDULES`, cannot be rebuilt from the folder: `load_model` needs it
    as an argument.
    """
    adapter = denoiser.adapter if isinstance(denoiser, Adapted) else None
    net: Any = network_of(denoiser)
    network: dict[str, Any] = {"type": None, "class": type(net).__name__}
    for kind, known in NETWORKS.items():
        if isinstance(net, known):  # a sharded network has its own class, derived from it
            network = {"type": kind, **dict(getattr(net, "config"))}  # noqa: B009  its constructor's arguments
    config = {
        "format": FORMAT,
        "network": network,
        "schedule": schedule_config(denoiser.schedule),
        "prediction": asdict(denoiser.prediction),
        **asdict(info),
        "source": named(info.source),
    }
    values = denoiser.merged() if isinstance(denoiser, Adapted) else net.state_dict().items()
    weights = {k: whole(v.detach()).to("cpu", dtype).contiguous() for k, v in values}
    if parallel.rank() > 0:
        return
    with together(folder, "config.json") as beside:
        written = {"weights": save_file(weights, beside / "model.safetensors")}
        if adapter is not None:
            written["adapter"] = save_file(adapter.updates(), beside / ADAPTER)
        write_json(beside / "config.json", {**config, **written})


def load_model(folder: Path, net: nn.Module | None = None, schedule: Schedule | None = None) -> tuple[Denoiser, Info]:
    """Load a model: the denoiser in evaluation mode with fp32 weights, and its `Info`.

    Args:
        net: the network to load the weights into, if the model's is not one of `NETWORKS`.
        schedule: the schedule, if the model's is not one of `SCHEDULES`.

    Raises `UserError` if the folder is not a model, is damaged, or needs a newer version, or if `schedule` is not the
    one that the model was saved with.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = _config(folder)
        fitting(
            {name: config.get(name) for name in ("network", "schedule", "prediction")},
            str(file),
            dict[str, dict[str, Any]],
            AGAIN,
        )
        network = dict(config["network"])
        kind: Any = network.pop("type")
        lora = network.pop("lora", 0)
        if kind is None and net is None:
            raise UserError(
                f"{folder} was saved with a network of its owner's, {network['class']}; pass one: "
                f"DistilledPipeline.from_pretrained(path, net={network['class']}(...))"
            )
        if kind not in (None, *NETWORKS):
            raise UserError(f"{file}: network type {kind!r} is unknown; expected one of {', '.join(NETWORKS)}")
        weights_file = folder / "model.safetensors"
        if net is None:
            net = build(f"{folder} is damaged: its network", NETWORKS[str(kind)], network, shapes_in(weights_file))
        try:
            prediction = Prediction(**config["prediction"])
            if prediction.name == "iddpm" and config["schedule"]["type"] == "edm":
                config["schedule"]["type"] = "iddpm"  # imported by a version that did not round times to its levels
            denoiser = Denoiser(net, schedule_of(config["schedule"], schedule), prediction)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        info = _info(
            {name: config[name] for name in (*(f.name for f in fields(Info)), "t") if name in config},
            file,
            denoiser.schedule,
        )
        info = replace(info, source=located(info.source))
        _check_fit(network, info, file)
        weights = load_file(weights_file, config.get("weights"))
        net.load_state_dict(without_lora(weights) if lora else weights)
    except Damaged as error:
        raise UserError(f"{error}. {AGAIN}") from error
    except (KeyError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} is damaged: {type(error).__name__}: {error}. {AGAIN}") from error
    check_weights(weights, weights_file)
    return denoiser.eval(), info


def is_student(folder: Path) -> bool:
    """Return whether the model in `folder` is a student, by its settings alone."""
    config = _config(folder)
    return bool(config.get("times") or config.get("t") is not None)  # earlier versions had one time or none


def text_in(folder: Path) -> bool:
    """Return whether the model in `folder` makes images from prompts, by its settings alone."""
    config = _config(folder)
    return bool(config.get("text", config.get("source")))  # earlier versions: with a source it always did


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config = read_json(file, dict[str, Any], AGAIN)
    if config.get("format") != FORMAT:
        raise UserError(f"{file} has format {config.get('format')!r}; this version reads {FORMAT!r}")
    return config


def load_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the adapter of the student in `folder`: `(down, up)` by layer, whose product is added to the weight.

    Raises `UserError` if there is none, or if it is damaged.
    """
    digest = _config(folder).get("adapter")
    if digest is None:
        raise UserError(
            f"{folder}: the student has no adapters: it was trained without student.adapter.rank. Use `distmatch "
            "export diffusers`"
        )
    try:
        weights = load_file(folder / ADAPTER, digest)
    except (Damaged, OSError) as error:
        raise UserError(f"{error}. {AGAIN}") from error
    return {
        name.removesuffix(".down"): (down, weights[f"{name.removesuffix('.down')}.up"])
        for name, down in weights.items()
        if name.endswith(".down")
    }


def how_to_sample(run: Path) -> str:
    """Say how to sample a run's student: by a command, or in Python if no command can know its network."""
    config = _config(run / "model")
    network = config["network"]
    if network["type"] is None:
        return f"DistilledPipeline.from_pretrained({str(run)!r}, net={network['class']}(...))(n=16) in Python"
    if len(config["shape"]) != 3:
        return f"DistilledPipeline.from_pretrained({str(run)!r}).sample(z) in Python"
    return command("sample", run, *(["-p", "PROMPT"] if text_in(run / "model") else []))


def _info(entries: dict[str, Any], file: Path, schedule: Schedule) -> Info:
    """Parse `Info` from JSON, which has lists for tuples. Models of earlier versions lack some entries."""
    entries = dict(entries)
    if entries.get("source"):  # in earlier versions, a model with a source was always text-to-image on latents
        entries = {"text": True, "latent": True, **entries}
    if "t" in entries:  # earlier versions had one time or none
        one: Any = float | None
        t = fitting(entries.pop("t"), f"{file}: t", one)
        entries["times"] = [] if t is None else [t]
    info = fitting(entries, str(file), Info)
    made = {name: info.card[name] for name in ("teach", "imported", "recipe") if name in info.card}
    fitting(made, f"{file}: card", dict[str, dict[str, Any]])
    fitting(made.get("recipe", {}).get("match", {}), f"{file}: card.recipe.match", dict[str, Any])
    if min(info.shape, default=0) < 1:
        raise UserError(f"{file}: shape is {info.shape}; expected (channels, height, width), all of them positive")
    limits.check(math.prod(info.shape), limits.SAMPLE, f"{file}: shape {info.shape}", "numbers")
    for t in info.times:
        if not 0 < t <= schedule.t_max:
            raise UserError(f"{file}: t is {t}; expected a time of its schedule, up to {schedule.t_max}")
    if any(later >= time for time, later in pairwise(info.times)):
        raise UserError(f"{file}: times are {list(info.times)}; expected falling ones")
    return info


def _check_fit(network: dict[str, Any], info: Info, file: Path) -> None:
    """Raise `UserError` if the settings of a built-in `network` do not fit the images and classes of `info`."""
    said = {
        # A network for labels may be used by a model without classes, so none at all is fine.
        "classes": (network.get("classes", network.get("label_dim")) if info.classes else None, len(info.classes)),
        "channels": (network.get("channels", network.get("in_channels")), info.shape[0]),
        "rows": (network.get("img_resolution"), info.shape[1] if len(info.shape) == 3 else None),
        "columns": (network.get("img_resolution"), info.shape[-1]),
    }
    for what, (takes, given) in said.items():
        if takes is not None and takes != given:
            raise UserError(f"{file}: its network is for {takes} {what}, and it says {given} of them. {AGAIN}")
