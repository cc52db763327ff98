"""From a recipe to objects: the only factory, the only place that knows both."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distmatch import rng
from distmatch.config import Optimiser, Recipe
from distmatch.denoiser import Denoiser
from distmatch.distill import Distiller, Match, Regress, Term
from distmatch.losses import REGRESSIONS, WEIGHTINGS
from distmatch.models.folder import NETWORKS, Info
from distmatch.models.library import find_model
from distmatch.optim import Optimizer
from distmatch.pairs import PairSpec, PairStore, build, fingerprint
from distmatch.progress import progress


def device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises `ValueError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return found


def teacher(recipe: Recipe) -> tuple[Denoiser, Info]:
    """The recipe's teacher, frozen, on its device."""
    denoiser, info = find_model(recipe.teacher, kind="teacher")
    return frozen(denoiser, device(recipe.device)), info


def frozen(denoiser: Denoiser, dev: torch.device) -> Denoiser:
    """`denoiser` as a teacher: on its device, without dropout, never trained."""
    return denoiser.to(dev).eval().requires_grad_(False)


def pair_spec(recipe: Recipe, denoiser: Denoiser, info: Info) -> PairSpec:
    """What the recipe's pair store holds."""
    p = recipe.pairs
    return PairSpec(
        teacher=recipe.teacher,
        fingerprint=fingerprint(denoiser),
        sampler=p.sampler,
        steps=p.steps,
        guidance=p.guidance,
        seed=p.seed,
        count=p.count,
        shard_size=p.shard,
        shape=info.shape,
        classes=len(info.classes),
        dtype=p.dtype,
    )


def pairs_folder(recipe: Recipe, denoiser: Denoiser, info: Info, runs: Path) -> Path:
    """`pairs.path`, or a folder beside the runs, named by what sets one store apart from another."""
    p = recipe.pairs
    if p.path is not None:
        return Path(p.path)
    teacher_name = Path(recipe.teacher).name.replace(":", "-")
    return runs / "pairs" / f"{teacher_name}-{p.sampler}{p.steps}-{pair_spec(recipe, denoiser, info).digest()[:8]}"


def pair_store(recipe: Recipe, denoiser: Denoiser, info: Info, runs: Path) -> PairStore:
    """The recipe's pairs, built (or finished, where a build was interrupted) if they are not there."""
    folder, spec = pairs_folder(recipe, denoiser, info, runs), pair_spec(recipe, denoiser, info)
    with progress("pairs", spec.count, unit="pair") as advance:
        build(folder, spec, denoiser, batch=recipe.pairs.batch, device=device(recipe.device), progress=advance)
    return PairStore.open(folder, spec.fingerprint, spec.count)


def distiller(recipe: Recipe, denoiser: Denoiser, info: Info, pairs: PairStore | None) -> Distiller:
    """The recipe's distillation. Student and fake score start as copies of one network, see `start`."""
    dev = device(recipe.device)
    first = start(recipe, denoiser, info)
    student = _trained_copy(first if recipe.student.init is None else _earlier(recipe, first, dev))
    fake = _trained_copy(first) if "match" in recipe.terms else None
    critic_steps = recipe.critic.steps
    return Distiller(
        student,
        fake,
        [_term(name, recipe, denoiser, fake, info, pairs, dev) for name in recipe.terms],
        _optimizer(recipe.generator, student, recipe.steps),
        None if fake is None else _optimizer(recipe.critic, fake, recipe.steps * critic_steps),
        info=student_info(recipe, denoiser, info),
        t=recipe.student.t,
        ema=recipe.student.ema,
        seed=recipe.seed,
        critic_steps=critic_steps,
        accumulate=recipe.accumulate,
        precision=recipe.precision,
    )


def start(recipe: Recipe, denoiser: Denoiser, info: Info) -> Denoiser:
    """What student and fake score start from: the teacher (Algorithm 1, line 2), or the recipe's own new network.

    A new network takes the teacher's schedule and prediction. Raises `ValueError` where neither is possible.
    """
    network = recipe.student.network
    if network is None:
        if next(denoiser.parameters(), None) is None:
            raise ValueError(
                f"teacher {recipe.teacher!r} has no weights that the student could start from; "
                "give the student a network of its own, e.g. student.network={type: mlp}"
            )
        return denoiser
    if len(info.shape) != 1:
        raise ValueError(f"student.network {network.type!r} is for points; this teacher makes samples of {info.shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(recipe.seed, "network"))
        net = NETWORKS[network.type](dim=info.shape[0], width=network.width, depth=network.depth)
    return Denoiser(net, denoiser.schedule, denoiser.prediction).to(device(recipe.device))


def student_info(recipe: Recipe, denoiser: Denoiser, info: Info) -> Info:
    """What the student's model folder says of it."""
    t = denoiser.schedule.t_max if recipe.student.t is None else recipe.student.t
    return Info(info.shape, info.classes, t, {"recipe": recipe.model_dump(mode="json")})


def _earlier(recipe: Recipe, denoiser: Denoiser, dev: torch.device) -> Denoiser:
    """The student `student.init`. Raises `ValueError` where its network is not that of the `denoiser` beside it."""
    assert recipe.student.init is not None
    student, _ = find_model(recipe.student.init, kind="student")
    here, there = ({k: v.shape for k, v in m.state_dict().items()} for m in (denoiser, student))
    if here != there:
        raise ValueError(
            f"student.init {recipe.student.init!r} has another network than the teacher {recipe.teacher!r}"
        )
    return student.to(dev)


def _trained_copy(denoiser: Denoiser) -> Denoiser:
    """A copy to train, in evaluation mode all the same: dropout stays off in distillation."""
    return copy.deepcopy(denoiser).eval().requires_grad_(True)


def _optimizer(settings: Optimiser, network: Denoiser, steps: int) -> Optimizer:
    return Optimizer(
        network.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        steps=steps,
        decay=settings.decay,
        clip=settings.clip,
    )


def _term(
    name: str,
    recipe: Recipe,
    denoiser: Denoiser,
    fake: Denoiser | None,
    info: Info,
    pairs: PairStore | None,
    dev: torch.device,
) -> Term:
    match name:
        case "match":
            m = recipe.match
            assert fake is not None
            return Match(
                denoiser,
                fake,
                shape=info.shape,
                classes=len(info.classes),
                weighting=WEIGHTINGS[m.weighting],
                weight=m.weight,
                batch=m.batch,
                bins=m.bins,
                min_step=m.min_step,
                max_step=m.max_step,
                guidance=m.guidance,
                device=dev,
            )
        case _:
            r = recipe.regress
            assert pairs is not None
            return Regress(pairs, loss=_regression(recipe), weight=r.weight, batch=r.batch, device=dev)


def _regression(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance of Eq. 9."""
    if recipe.regress.loss != "lpips":
        return REGRESSIONS[recipe.regress.loss]
    from distmatch.perceptual import Lpips  # the `metrics` extra

    return Lpips(recipe.regress.weights, size=recipe.regress.size)
