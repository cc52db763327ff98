"""`distmatch teach-text`: trains a small Stable Diffusion on captioned images."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from distmatch.commands.shared import TeachingOptions, find_precision, read_images, starting
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.options import WHOLE, Count, File, Name, Out, Range, Rate, Scale, Share, Whole

if TYPE_CHECKING:
    from distmatch.data.images import Images
    from distmatch.models.diffusers.small import Sizes

PREVIEWED = 36
"""Captions drawn for the previews, if no prompts are given."""

Widths = Annotated[tuple[int, ...], WHOLE, Parameter(consume_multiple=True, validator=Range(1))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options(TeachingOptions):
    """How to train a small Stable Diffusion."""

    steps: Count = 20_000
    """Training steps of the diffusion model; the learning rate falls to zero over the last 30 %."""

    lr: Rate = 6e-4
    """Peak learning rate of Adam."""

    autoencoder: File | None = None
    """A trained autoencoder, a folder in diffusers' format; without it, one is trained first."""

    autoencoder_steps: Count = 2_000
    """Training steps of the autoencoder."""

    autoencoder_batch: Count = 64
    """Images per step of the autoencoder."""

    autoencoder_lr: Rate = 1e-3
    """Peak learning rate of the autoencoder."""

    perceptual: Scale = 1.0
    """Weight of LPIPS in the autoencoder's loss, beside the absolute difference of pixels; 0 needs no weights."""

    weights: File | None = None
    """Folder with the weights of LPIPS, which `distmatch fetch lpips` gets; without it, they are downloaded."""

    autoencoder_widths: Widths = (32, 64, 64)
    """Channels of the autoencoder per level; each level after the first halves the side."""

    widths: Widths = (64, 128, 144)
    """Channels of the U-Net per level."""

    text_width: Count = 192
    """Width of the text encoder, which has two layers and is trained with the U-Net."""

    tokens: Count = 32
    """Length of a text in tokens; what is longer is cut."""

    vocabulary: Annotated[int, WHOLE, Parameter(validator=Range(514))] = 2048
    """Pieces of words that the tokenizer learns from the captions."""

    text_dropout: Share = 0.1
    """Share of the images shown without their caption, which prepares the teacher for guidance."""

    prompts: File | None = None
    """A file of prompts for the sample pictures, one per line; without it, captions of the images."""

    preview_every: Whole = 1000
    """Steps between sample pictures; 0: none."""


def teach_text(images: Name, /, *, out: Out = None, options: Options = Options()) -> None:
    """Train a small Stable Diffusion on captioned images of your own. Run again to continue.

    It consists of an autoencoder, a text encoder and a U-Net. The folder that it writes is one that
    `DiffusionPipeline.from_pretrained` opens, and a teacher for `distmatch train`.

    Parameters
    ----------
    images
        A folder or an archive of square images of one size with captions, in metadata.jsonl, NAME.txt beside each
        NAME.png, or Parquet. For details see docs/data.md.
    out
        The run's folder; default: runs/teach-text-NAME. The model is saved in its model/ folder.
    """
    starting(f"Loading PyTorch, then reading {images}")
    from distmatch.system.storage import name_of

    train_text_teacher(images, out or Path("runs") / f"teach-text-{name_of(images).split('.')[0]}", options)


def train_text_teacher(images: "str | Path | Images", out: Path, options: Options = Options()) -> None:
    """Train a small Stable Diffusion on `images`, into `out`. If called again, continue the run.

    Args:
        images: a place to read from (see `images.load_images`), or loaded images with captions.

    Raises `UserError` if the images cannot be read, have no captions or do not fit the networks, or if `out` is a run
    with other settings or images.
    """
    from distmatch.system.ownership import owned

    with owned(out):
        _train(images, out, options)


def _train(images: "str | Path | Images", out: Path, options: Options) -> None:
    import torch

    from distmatch.commands.binding import begun_settings, same_settings
    from distmatch.data.images import Images
    from distmatch.data.pairs import prompts_digest
    from distmatch.data.prompts import read_prompts
    from distmatch.evaluation.features import image_fingerprint
    from distmatch.methods import teach_text
    from distmatch.models.diffusers.small import TextDenoiser, check_sizes, make_tokenizer
    from distmatch.recipe import subjects
    from distmatch.system import rng
    from distmatch.system.screen import console
    from distmatch.system.storage import name_of
    from distmatch.system.terminal import command
    from distmatch.training import teaching
    from distmatch.training.train import Plan, train

    given = isinstance(images, Images)
    name, real = ("given in Python", images) if given else (name_of(images), read_images(images, options.split, out))
    captions = real.captions
    if captions is None:
        raise UserError(
            f"{name} has no captions; expected a column `text` in metadata.jsonl, or NAME.txt beside each NAME.png. "
            "For images with classes or nothing, see distmatch teach"
        )
    console.print(str(real))
    sizes = _sizes(options)
    check_sizes(sizes, (real.pixels.shape[2], real.pixels.shape[3]))
    first = [texts[0] for texts in captions]
    drawn = [first[i] for i in rng.shuffled(options.seed, len(first), 0, PREVIEWED)]
    prompts = read_prompts(options.prompts)[:PREVIEWED] if options.prompts else drawn
    device = subjects.device(options.device)
    precision = find_precision(options.precision, begun_settings(out / "settings.json").get("precision"), device)
    how = teach_text.Settings(
        batch=options.batch,
        seed=options.seed,
        ema=options.ema,
        text_dropout=options.text_dropout,
        precision=precision,
    )
    left_out = ("batch", "device", "save_every", "preview_every", "prompts", "weights", "precision")
    plain = json.loads(json.dumps(asdict(options), default=str))  # as it is read back
    settings = {k: v for k, v in plain.items() if k not in left_out} | vars(how)
    content = {"pixels": image_fingerprint(real.pixels), "captions": prompts_digest([str(c) for c in captions])}
    same_settings({"images": name, "count": len(real), **settings, **content}, out / "settings.json")
    autoencoder, latents = _autoencoder(real, sizes, out / "autoencoder", options, precision, device)
    tokenizer = make_tokenizer((caption for texts in captions for caption in texts), sizes)
    torch.manual_seed(options.seed)  # for the initial weights
    network = TextDenoiser(sizes, latents[0].shape[-1], tokenizer).to(device).train()
    optimizer = teaching.optimizer(network, options.lr, warmup=200, steps=options.steps)
    task = teach_text.TextTeaching(network, autoencoder, tokenizer, latents, captions, prompts, optimizer, how)
    plan = Plan(options.steps, log_every=50, save_every=options.save_every, preview_every=options.preview_every)
    train(task, out, plan, config=settings, title="teach-text")
    shown = command("sample", out, "--teacher", "--guidance", 4, "--prompt", first[0])
    console.print(f"The teacher is in {out / 'model'}. Next: {shown}")


def _sizes(options: Options) -> "Sizes":
    from distmatch.models.diffusers.small import Sizes

    return Sizes(
        autoencoder=options.autoencoder_widths,
        unet=options.widths,
        text=options.text_width,
        tokens=options.tokens,
        vocabulary=options.vocabulary,
    )


def _autoencoder(
    images: "Images", sizes: "Sizes", out: Path, options: Options, precision: str, device: Any
) -> tuple[Any, Any]:
    """Return the autoencoder, trained first if none is given, with latents of mean 0 and deviation 1; and mean and
    standard deviation of each image's latents."""
    need("diffusers", by="an autoencoder")
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from distmatch.methods import autoencode
    from distmatch.models.diffusers import hub
    from distmatch.models.diffusers.small import make_autoencoder, standardise
    from distmatch.models.perceptual import Lpips
    from distmatch.training import teaching
    from distmatch.training.train import Plan, train

    folder = options.autoencoder or out / "model"
    if not (folder / "config.json").exists():
        torch.manual_seed(options.seed)  # for the initial weights
        network = make_autoencoder(sizes, images.pixels.shape[-1]).to(device).train()
        steps = options.autoencoder_steps
        optimizer = teaching.optimizer(network, options.autoencoder_lr, warmup=100, steps=steps)
        how = autoencode.Settings(
            batch=options.autoencoder_batch,
            perceptual=options.perceptual,
            seed=options.seed,
            ema=options.ema,
            precision=precision,
        )
        weights = None if options.weights is None else str(options.weights)
        lpips = Lpips(weights, size=images.pixels.shape[-1]) if options.perceptual else None
        task = autoencode.Autoencoding(network, images, optimizer, lpips, how)
        plan = Plan(steps, log_every=50, save_every=options.save_every, preview_every=options.preview_every)
        train(task, out, plan, title="autoencoder")
    autoencoder: Any = hub.network(str(folder), "", AutoencoderKL).to(device).eval().requires_grad_(False)
    means, stds = autoencode.encoded(autoencoder, images.pixels, precision)
    mean = means.mean((0, 2, 3))
    std = (means.var((0, 2, 3)) + (stds**2).mean((0, 2, 3))).sqrt()
    standardise(autoencoder, mean, std)
    mean, std = mean[:, None, None], std[:, None, None]
    return autoencoder, ((means - mean) / std, stds / std)
