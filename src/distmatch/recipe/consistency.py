"""What must hold between the entries of a recipe, beyond the range of each; every check says how to mend it."""

from typing import TYPE_CHECKING

from distmatch.system.errors import UserError

if TYPE_CHECKING:
    from distmatch.recipe.entries import Recipe

TERMS = ("match", "guide", "regress", "gan")
"""The terms of the package."""

GUIDANCE = {"guide": "guide", "match": "match", "regress": "pairs"}
"""The group whose `guidance` is a term's. Of several terms the first here counts for the student: guide is the guidance
beside match."""


def check(recipe: "Recipe") -> None:
    """Raise `UserError` for entries that contradict one another."""
    _terms_are_known(recipe)
    _own_terms_are_used(recipe)
    _gan_fits(recipe)
    _pairs_are_of_the_first_step(recipe)
    _several_steps(recipe)
    _later_steps_start_from_data(recipe)
    _guided_once(recipe)
    _rescaled_if_guided(recipe)
    _fake_score_stays(recipe)
    _student_gets_its_turn(recipe)
    _adapters_share_the_teacher(recipe)
    _base_is_shared(recipe)
    _recordable(recipe)


def _terms_are_known(recipe: "Recipe") -> None:
    known = (*TERMS, *recipe.own_terms)
    if unknown := [term for term in recipe.terms if term not in known]:
        raise UserError(f"unknown term {unknown[0]!r} in terms; expected {', '.join(known)}, or a name in own_terms")


def _own_terms_are_used(recipe: "Recipe") -> None:
    for name in recipe.own_terms:
        if name in TERMS:
            raise UserError(f"own_terms.{name} has the name of a term of the package; choose another")
        if name not in recipe.terms:
            raise UserError(f"own_terms.{name} is not in terms, {', '.join(recipe.terms)}; add it there, or remove it")


def _gan_fits(recipe: "Recipe") -> None:
    m, g = recipe.match, recipe.gan
    if "gan" not in recipe.terms:
        if m.divergence != "reverse_kl" and "match" in recipe.terms:
            raise UserError(
                f"match.divergence {m.divergence} needs the term gan, whose head estimates density ratios; use "
                "terms=match,gan or match.divergence=reverse_kl"
            )
        return
    if "match" not in recipe.terms:
        raise UserError("the term gan goes with match, which trains the fake score; use terms=match,gan")
    end = m.bins if g.max_step is None else g.max_step
    if not g.min_step < end <= m.bins:
        raise UserError(f"expected gan.min_step < gan.max_step <= match.bins, not {g.min_step}, {end}, {m.bins}")
    if m.divergence != "reverse_kl":
        if m.sid is not None:
            raise UserError(f"match.divergence {m.divergence} is for Algorithm 2; with match.sid use reverse_kl")
        if g.min_step > m.min_step or end < m.max_step:
            raise UserError(
                f"match.divergence {m.divergence} needs the head at all levels of match, bins {m.min_step} to "
                f"{m.max_step}; gan has {g.min_step} to {end}"
            )


def _pairs_are_of_the_first_step(recipe: "Recipe") -> None:
    several, taken = recipe.student.several, recipe.pairs.taken
    if several and "regress" in recipe.terms and taken is None:
        raise UserError(
            "the regression to the teacher's images works only for one-step students. With several steps, use "
            "terms=match, or anchor the first step to a part of the teacher's trajectory: pairs.sampler=euler "
            "pairs.taken=6 pairs.steps=30 regress.weight=0.05"
        )
    if taken is not None and not several:
        raise UserError(
            f"pairs.taken {taken} makes pairs for the first of several steps; this student has one: use null, or "
            "student.nfe"
        )
    if taken is not None and (recipe.pairs.sampler not in ("heun", "euler") or taken > recipe.pairs.steps):
        raise UserError(
            f"pairs.taken {taken} of {recipe.pairs.steps} steps of {recipe.pairs.sampler}: expected at most pairs.steps"
            ", of euler or heun"
        )


def _several_steps(recipe: "Recipe") -> None:
    if recipe.student.several and recipe.match.pairs:
        raise UserError("match.pairs matches images of one step from the pairs' noise; with several, use false")
    if recipe.match.intervals and not recipe.student.several:
        raise UserError("match.intervals is for students of several steps; this one has one: use false")


def _later_steps_start_from_data(recipe: "Recipe") -> None:
    if recipe.student.inputs == "data" and not recipe.student.several:
        raise UserError(
            "student.inputs=data is for students of several steps; the only step of this one starts from noise: "
            "use rollout"
        )


def _guided_once(recipe: "Recipe") -> None:
    if "guide" not in recipe.terms:
        return
    if "match" not in recipe.terms:
        raise UserError("the term guide only goes with match, which keeps the student near the data: add it")
    if recipe.match.guidance != 1 and recipe.student.guidance is None:
        raise UserError(
            f"match.guidance {recipe.match.guidance:g} and the term guide would guide twice; use match.guidance=1 "
            f"and guide.guidance={recipe.match.guidance:g}"
        )
    if recipe.guide.guidance == 1 and recipe.student.guidance is None:
        raise UserError("guide.guidance 1 is no guidance; give a larger one, or leave the term guide out")
    if recipe.match.rescale:
        raise UserError("match.rescale is for a guided real score, which the term guide replaces; use false")
    if recipe.guide.max_step > recipe.match.bins:
        raise UserError(f"guide.max_step {recipe.guide.max_step}: expected at most match.bins, {recipe.match.bins}")


def _rescaled_if_guided(recipe: "Recipe") -> None:
    m = recipe.match
    if "match" in recipe.terms and m.rescale and m.guidance == 1 and recipe.student.guidance is None:
        raise UserError("match.rescale is for a guided real score; with match.guidance 1 it does nothing: use false")


def _fake_score_stays(recipe: "Recipe") -> None:
    if recipe.match.shared and recipe.fake.ida:
        raise UserError(
            f"fake.ida {recipe.fake.ida:g} moves the fake score between the two losses that match.shared gives one "
            "pass; expected one of the two"
        )


def _student_gets_its_turn(recipe: "Recipe") -> None:
    if only_the_fake_score(recipe, recipe.steps):
        raise UserError(
            f"fake.alone {recipe.fake.alone}: all {recipe.steps} steps would train only the fake score, and the "
            "student would stay as it began; use more steps, or fake.alone=0"
        )


def only_the_fake_score(recipe: "Recipe", steps: int) -> bool:
    """Return whether all of so many `steps` would train only the fake score."""
    return "match" in recipe.terms and recipe.fake.alone >= steps


def _adapters_share_the_teacher(recipe: "Recipe") -> None:
    if recipe.student.adapter.rank and recipe.student.init is not None:
        raise UserError("student.adapter is for the teacher's weights, student.init has others; use one of them")
    if recipe.fake.ida and recipe.fake.adapter != recipe.student.adapter:
        raise UserError("fake.ida needs a student and a fake score of one kind: give both one adapter, or none")


def _base_is_shared(recipe: "Recipe") -> None:
    held = recipe.base_weights
    if held == "fp32":
        return
    if not (recipe.student.adapter.rank and recipe.fake.adapter.rank):
        raise UserError(
            f"base_weights={held} is for frozen weights: give student and fake score adapters, "
            "student.adapter.rank and fake.adapter.rank"
        )
    if recipe.precision != "bf16":
        raise UserError(f"base_weights={held} needs precision=bf16, not {recipe.precision}")
    other = {
        "match.sid, whose gradient passes through both scores": recipe.match.sid is not None,
        "student.guidance, whose base is another network": recipe.student.guidance is not None,
        "parallel=fsdp, which shards no integers": recipe.parallel == "fsdp",
    }
    if held in ("int8", "int4") and (clash := next((name for name, used in other.items() if used), None)):
        raise UserError(f"base_weights={held} does not go with {clash}; use base_weights=bf16")


def _recordable(recipe: "Recipe") -> None:
    """A CUDA graph holds what a step computes from its draws alone, in one part of a batch, on one GPU."""
    if not recipe.cuda_graphs:
        return
    others = [term for term in recipe.terms if term not in ("match", "guide", "regress")]
    if others:
        raise UserError(
            f"cuda_graphs works with the terms match, guide and regress, not with {others[0]}; use cuda_graphs=false"
        )
    for name, is_set in (
        ("match.shared", recipe.match.shared),
        ("compile", recipe.compile),
        ("accumulate above 1", recipe.accumulate > 1),
        ("parallel=fsdp", recipe.parallel == "fsdp"),
    ):
        if is_set:
            raise UserError(f"cuda_graphs does not work with {name}; use cuda_graphs=false, or do without the other")
