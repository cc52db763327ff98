"""What `distmatch plan` says of a step's time against what steps take; and settings to plan with offline.

    uv run python benchmarks/plan.py                                       the embedded MNIST teacher
    uv run python benchmarks/plan.py imagenet64-cond --rounds 20           on a GPU
    uv run python benchmarks/plan.py --settings sd15 --folder FOLDER       or sdxl: writes FOLDER and stops
    distmatch plan sd15-laion-6.25 teacher=diffusers:FOLDER regress.tiny=FOLDER/taesd --gpus 72

The rate of the machine is that of the bare network passes of one setting, the recipe's own (see `step.py`). At this
rate the planner predicts the step of other settings, which are timed in turn, all of them beside each other.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cyclopts
from rich.console import Console
from rich.table import Table
from step import bare, timed
from step import step as stepping
from torch.utils.flop_counter import FlopCounterMode

from distmatch.evaluation.measure import hardware
from distmatch.models.folder import save_model
from distmatch.planning.cost import cost
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.smoke import make_networks, random_edm
from distmatch.system.files import write_json

OTHERS = (
    ("match.batch=16", "regress.batch=16"),
    ("match.batch=128", "regress.batch=128"),
    ("terms=match",),
    ("terms=regress",),
    ("fake.steps=3",),
    ("match.pairs=true",),
    ("match.guidance=2",),
    ("accumulate=4",),
    ("gradient_checkpointing=true",),
)

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
OPENCLIP_G = {
    **CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {
            **UNET,
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        "vae": {**VAE, "scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
    },
    "sdxl": {
        "unet": {
            **UNET,
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": OPENCLIP_G,
    },
}
"""As Stable Diffusion 1.5 and SDXL base 1.0 are published: 859.5 and 2,567.5 million weights in their U-Nets."""


def main(
    recipe: str = "mnist",
    /,
    *overrides: str,
    rounds: int = 7,
    settings: Literal["sd15", "sdxl"] | None = None,
    folder: Path = Path("settings"),
) -> None:
    """Compare predicted and measured times, or write the `settings` of a published model to `folder`."""
    if settings is not None:
        write_settings(SETTINGS[settings], folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(recipe, list(overrides), Path(temporary), rounds)


def write_settings(parts: dict[str, dict[str, Any]], folder: Path) -> None:
    """A folder in diffusers' format with the settings of its networks, TAESD's among them."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    for name, config in parts.items():
        write_json(folder / name / "config.json", config)
        library = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, config.get("_class_name") or config["architectures"][0]]
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "taesd" / "config.json", {"_class_name": "AutoencoderTiny"})  # its default settings
    write_json(folder / "model_index.json", index)


def compare(name: str, overrides: list[str], folder: Path, rounds: int) -> None:
    own = ["pairs.count=256", "pairs.steps=1", "pairs.shard=256", *overrides]  # the pairs' content does not matter here
    recipe = load_recipe(name, own)
    if recipe.teacher.startswith("edm:"):
        save_model(folder / "teacher", *random_edm(Path(recipe.teacher).stem, small=False))
        own.append(f"teacher={folder / 'teacher'}")
    if recipe.regress.loss == "lpips":
        own.append(f"regress.weights={folder / 'weights'}")
    make_networks(recipe, folder, teacher=False)
    recipe = load_recipe(name, own)
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, folder)
    first = build.distiller(recipe, subject, pairs)
    passes = bare(first, subject.denoiser, subject.info, recipe)
    with FlopCounterMode(display=False) as counter:
        passes()
    work: dict[str, Callable[[], None]] = {"bare passes": passes}
    flops = {"bare passes": float(counter.get_total_flops())}
    for changes in ((), *OTHERS):
        changed = load_recipe(name, [*own, *changes])
        title = " ".join(changes) or "the recipe's own"
        work[title] = stepping(build.distiller(changed, subject, pairs))
        flops[title] = cost(changed, subject.denoiser, subject.info).step_flops
    # The fastest round, since others who use the machine can only slow it down.
    seconds = {title: min(each) for title, each in timed(work, first.device, rounds).items()}
    rate = flops["bare passes"] / seconds["bare passes"]
    table = Table("setting", "TFLOP", "predicted, ms", "measured, ms", "predicted / measured", box=None)
    for title, count in flops.items():
        row = count / rate, seconds[title]
        table.add_row(title, f"{count / 1e12:.3f}", *(f"{1000 * s:,.0f}" for s in row), f"{row[0] / row[1]:.2f}")
    console = Console()
    console.print({**hardware(first.device), "recipe": recipe.name, "rounds": rounds})
    console.print(f"{rate / 1e9:,.1f} GFLOP/s in bare passes")
    console.print(table)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
