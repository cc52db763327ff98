"""What a recipe distils: the teacher on its device, with the conditions and prompts of its samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from distmatch.data.computed import STORED
from distmatch.data.embeddings import Embeddings, embed, embedded, per_pass
from distmatch.data.pairs import fingerprint, prompts_digest
from distmatch.data.prompts import read_prompts
from distmatch.data.reals import Reals
from distmatch.diffusion.conditions import Classes, Conditions, Guided, Prompts, with_guidance
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.evaluation.measure import Space
from distmatch.evaluation.spaces import enough, features_folder, find_spaces, of_its_images
from distmatch.models.family import Components, Encoder
from distmatch.models.info import Info
from distmatch.models.library import components, diffusers_source, family_in, family_of, find_model
from distmatch.models.offload import Visitor, away, visiting
from distmatch.recipe.consistency import GUIDANCE
from distmatch.recipe.entries import Evaluation, Recipe
from distmatch.recipe.real_images import check_named, real_images
from distmatch.system.errors import UserError
from distmatch.system.paths import shipped
from distmatch.system.progress import progress
from distmatch.system.terminal import notice
from distmatch.training.rounded import hold


def device(name: str) -> torch.device:
    """Return the device; `auto` is CUDA if available, else the CPU. Raises `UserError` for an unavailable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()  # `meta` is also a device, but it cannot compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ["auto", "cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise UserError(f"device {name!r} is not available here; use {' or '.join(here)}") from error
    return found


@dataclass(frozen=True)
class Subject:
    """What a recipe distils: the frozen teacher on its device, its samples' shape, and what they are conditioned on."""

    denoiser: Denoiser
    info: Info
    conditions: Conditions
    fingerprint: str
    device: torch.device
    prompts: Sequence[str] = ()
    encoders: str = ""
    """Fingerprint of the text encoders; empty without prompts."""

    cut: int = 0
    """Number of prompts that are longer than the text encoder accepts."""

    real: Reals | None = None
    """Samples of what the teacher was trained on, if training needs them."""


def subject(recipe: Recipe, own: tuple[Denoiser, Info] | None = None) -> Subject:
    """Return the recipe's subject; `own` is your own teacher, used instead of the one that the recipe names."""
    # Missing files are said before the teacher is loaded, which may take minutes.
    source = None if own else diffusers_source(recipe.teacher)
    prompts = _prompts(recipe) if source is not None and family_in(source).text else []
    if recipe.needs_images:
        check_named(recipe)
    denoiser, info = own or find_model(recipe.teacher, kind="teacher")
    info = as_used(recipe, denoiser, info)
    for stage in recipe.parts:
        for scale in _scales(stage):
            info.check_guidance(scale)
    if len(info.shape) == 3:  # the last thing a run makes is a picture with the teacher's images beside the student's
        info.check_guidance(recipe.scale(recipe.pairs.guidance))
    dev = device(recipe.device)
    conditions, encoders, cut = Classes(len(info.classes)), "", 0
    if info.text:
        prompts = prompts or _prompts(recipe)
        encoder = components_of(recipe, info, dev).encode
        assert encoder is not None
        encoders, cut = encoder.fingerprint(), encoder.cut(prompts)
        conditions = Prompts(len(prompts), _encode(recipe, encoder, prompts, denoiser))
    elif recipe.prompts.path is not None:
        notice(f"prompts.path {recipe.prompts.path} is not read: the teacher {recipe.teacher} takes no prompts")
    if recipe.student.guidance is not None:
        conditions = Guided(conditions, *recipe.student.guidance)
    real = real_images(recipe, info, components_of(recipe, info, dev).encode, dev) if recipe.needs_images else None
    print_of = fingerprint(denoiser)
    if not any("regress" in stage.terms or stage.own_terms for stage in recipe.parts):  # pairs are made by all its bits
        hold(denoiser.requires_grad_(False).net, recipe.base_weights, dev.type)  # before it takes room on the device
    return Subject(frozen(denoiser, dev), info, conditions, print_of, dev, prompts, encoders, cut, real)


def _prompts(recipe: Recipe) -> list[str]:
    if recipe.prompts.path is None:
        raise UserError(
            f"teacher {recipe.teacher!r} makes images of prompts; name a file, e.g. prompts.path=prompts.txt"
        )
    return read_prompts(recipe.prompts.path, recipe.prompts.column)


def as_used(recipe: Recipe, denoiser: Denoiser, info: Info) -> Info:
    """Prepare the recipe's teacher, in place, for the recipe's image size and LoRA; return what it then is.

    Raises `UserError` if the teacher does not take them, or if it is a student already.
    """
    lora = recipe.teacher_lora
    if not recipe.distilled_teacher and (found := family_of(info).distilled(info.source, lora.path or "")):
        raise UserError(
            f"teacher {recipe.teacher!r} was distilled itself: {found}. The scores of such a model are not those of "
            "the data. Take the model that it was made from; if this one is not a student, set distilled_teacher=true"
        )
    if lora.path is not None:
        info = family_of(info).merged(denoiser, info, lora.path, lora.scale)
    if recipe.image_size is not None:
        info = family_of(info).resized(denoiser, info, recipe.image_size)
    return info


def components_of(recipe: Recipe, info: Info, device: torch.device) -> Components:
    """Return the teacher's text encoders and decoder as the recipe holds them."""
    return components(info, device, offloaded(recipe), recipe.prompts.precision)


def offloaded(recipe: Recipe) -> bool:
    """Return whether text encoders and decoder are in the host's memory: prompts that are cached need none on a GPU."""
    return recipe.offload or encoded_before(recipe)


def encoded_before(recipe: Recipe) -> bool:
    """Return whether the text encoders are done when training begins; captions of real images they encode in it."""
    return recipe.prompts.cache is not None and not recipe.needs_images


def records_graphs(recipe: Recipe, device: str) -> bool:
    """Return whether a run on this type of device, e.g. cuda, records its steps as CUDA graphs."""
    return recipe.cuda_graphs and device == "cuda"


def encode_prompts(recipe: Recipe, subject: Subject) -> None:
    """Fill `prompts.cache` before training, so that the encoders meet no network on the device; see `alone`."""
    if recipe.prompts.cache is not None and subject.prompts:
        subject.conditions.at([0])


@contextmanager
def alone(encoder: Encoder, denoiser: Denoiser) -> Iterator[None]:
    """Have encoders that wait in the host's memory on the device in place of the teacher, which waits there meanwhile.

    For very large models: one card need not hold both. Encoders that are on the device in any case stay beside it.
    """
    if not isinstance(encoder, Visitor):
        yield
        return
    with away(denoiser, encoder.device), visiting(encoder.networks, encoder.device):
        yield


def _scales(recipe: Recipe) -> list[float | None]:
    """Return the scales with which the recipe guides its teacher; `None` stands for a range."""
    if recipe.student.guidance is not None:
        return [None]
    return [getattr(recipe, GUIDANCE[term]).guidance for term in recipe.terms if term in GUIDANCE]


def _encode(
    recipe: Recipe, encoder: Encoder, prompts: Sequence[str], denoiser: Denoiser
) -> Callable[[Sequence[int]], Cond]:
    """Map prompt numbers to conditions: encoded batch by batch, or from the cache, which is filled on first use."""
    if recipe.prompts.cache is None:
        return lambda numbers: encoder([prompts[i] for i in numbers])
    folder = states_folder(recipe.prompts.cache, encoder.fingerprint(), prompts)

    @cache
    def states() -> Embeddings:
        here = nullcontext() if embedded(folder, len(prompts)) else alone(encoder, denoiser)
        with here, progress("prompts", len(prompts), unit="prompt") as advance:  # there once, not for each batch
            return embed(folder, prompts, encoder, advance, per_pass(encoder.weights()))

    return lambda numbers: states()(numbers)


def states_folder(cache: str, encoders: str, prompts: Sequence[str]) -> Path:
    """Return the folder within `cache` for the states of `prompts` by text encoders of this fingerprint."""
    return Path(cache) / f"{encoders[:16]}-{prompts_digest(prompts)[:16]}"


def states_bytes(denoiser: Denoiser, info: Info, count: int) -> int:
    """Return the bytes of the cached states of `count` prompts."""
    cond = family_of(info).example_cond(denoiser.net, info, 1)
    assert cond is not None
    assert cond.text is not None
    return STORED * count * sum(value.numel() for value in (cond.text, *cond.extra.values()))


def recipe_spaces(evaluation: Evaluation, teacher: str, info: Info, device: torch.device) -> list[Space]:
    """Return the spaces in which the student is measured during training; none if the recipe names none.

    Raises `UserError` if they belong to other images than the teacher's, or if `evaluate.images` is too small for them.
    """
    name = evaluation.features
    if not evaluation.every or not name:
        return []
    package = shipped(name)
    packaged = package is not None and features_folder(name) == package
    if package and packaged and evaluation.reference is None and not of_its_images(info, package):
        raise UserError(
            f"evaluate.features is {name}, and the teacher {teacher} is not known to be of the same images. Set "
            "evaluate.features=FOLDER (`distmatch classifier IMAGES` makes one), or evaluate.every=0"
        )
    try:
        spaces = find_spaces(name, evaluation.reference, device=device, shape=info.shape)
    except UserError as error:
        raise UserError(f"evaluate.features {name}, evaluate.reference {evaluation.reference}: {error}") from error
    for _, real in spaces:
        enough(len(real.mu), evaluation.images, "images (evaluate.images)")
    return spaces


def frozen(denoiser: Denoiser, dev: torch.device) -> Denoiser:
    """Make `denoiser` a teacher: on its device, without dropout, never trained."""
    return denoiser.to(dev).eval().requires_grad_(False)


def example(subject: Subject, guided: bool) -> tuple[Tensor, Tensor, Cond | None]:
    """Return an example input of student and fake score, a batch of one: `(x, t, cond)`; only its shapes matter.

    `guided`: they take a guidance scale.
    """
    dev, cond = subject.device, example_cond(subject.denoiser, subject.info, 1, guided)
    return torch.zeros(1, *subject.info.shape, device=dev), torch.ones(1, device=dev), cond and cond.to(dev)


def example_cond(denoiser: Denoiser, info: Info, n: int, guided: bool) -> Cond | None:
    """Return a condition of `n` samples for a student, `guided` if it takes a guidance scale; only shapes matter."""
    cond = family_of(info).example_cond(denoiser.net, info, n)
    return with_guidance(cond, torch.ones(n)) if guided else cond
