"""Which settings make a recipe fit into a GPU's memory: a ladder of them, from those that cost least."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from distmatch.data.embeddings import LARGE
from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.info import Info
from distmatch.models.library import family_of, outline
from distmatch.planning.cost import Cost, cost, encoder_weights
from distmatch.recipe.entries import Recipe, parse_recipe
from distmatch.recipe.entry import flat, set_entry
from distmatch.recipe.objectives import trains_fake
from distmatch.recipe.subjects import as_used, encoded_before, offloaded
from distmatch.system.errors import UserError
from distmatch.system.screen import size
from distmatch.training.engine import blocks

SPARE = 0.1
"""Share of a GPU's memory reserved for fragmentation, libraries and the driver."""

RANK = 64
"""Of adapters, in DMD2 (arXiv 2405.14867) and LightX2V."""

ADAPTED = {"student.adapter.rank": RANK, "fake.adapter.rank": RANK}

SMALLER, SMALLEST = 32, 16
"""Ranks for where nothing else helps."""

CACHE, STATES = "prompts.cache", "runs/prompts"
"""The entry for cached prompts, and the folder that is proposed for it: beside the pairs' default."""

CHOSEN = ("accumulate", "gradient_checkpointing", "offload", "parallel", "precision", "base_weights", "cuda_graphs")
"""The entries that `memory` chooses."""

RETRAINED = ("student.adapter.rank", "fake.adapter.rank", "regress.decoder")
"""The entries of a ladder that change what is trained, whatever their value."""

MOVED = ("int8", "int4")
"""Values of `base_weights` that move the weights which adapters share with the teacher; `bf16` computes the same."""


@dataclass(frozen=True)
class Fit:
    """Changes of a recipe's entries, by dotted name, with which it fits; what a step of its costliest stage costs."""

    changes: dict[str, Any]
    cost: Cost

    def __str__(self) -> str:
        return _words(self.changes)

    @property
    def retrains(self) -> list[str]:
        """The entries that make another student; the others change only how it is computed."""
        moved = self.changes.get("base_weights") in MOVED
        return [name for name in self.changes if name in RETRAINED or (name == "base_weights" and moved)]


@dataclass
class Ladder:
    """A recipe on `gpus` GPUs, and what its steps cost with more and more settings that save memory.

    Args:
        retrain: change what is trained, too: adapters instead of whole networks, another decoder in the loss. And use
            the disk, for the prompts' states.
        known: costs by the changes made, `()` for none.
    """

    recipe: Recipe
    denoiser: Denoiser
    info: Info
    gpus: int = 1
    retrain: bool = True
    known: dict[tuple[tuple[str, Any], ...], Cost] = field(default_factory=dict)

    def cost(self, changes: dict[str, Any]) -> Cost:
        """Return the cost of the stage that takes the most memory, with the arithmetic of one update per network."""
        key = tuple(sorted(changes.items()))
        if key not in self.known:
            stages = {kind(stage): stage for stage in changed(self.recipe, changes).parts}.values()
            costs = (cost(stage, self.denoiser, self.info, self.gpus, once=True) for stage in stages)
            self.known[key] = max(costs, key=lambda made: made.peak)
        return self.known[key]

    def fitting(self, memory: float) -> Fit | None:
        """Return the first changes with which a step leaves `SPARE` of `memory` bytes free; None if nothing does.

        At each rung `accumulate` is raised as far as it must, because it costs next to nothing.
        """
        room, changes = (1 - SPARE) * memory, {}
        if () in self.known and self.known[()].peak < room:
            return Fit({}, self.known[()])
        for rung in ({}, *self.rungs):
            changes |= rung
            made, divisors = self.cost(_new(changes, self.recipe)), self._divisors()
            part, fixed = 1.0, _fixed(made)
            for n in divisors:
                smaller = divisors[0] / n
                if fixed + (made.peak - fixed) * smaller / part >= room:  # it takes no less than that
                    continue
                all_changes = _new({"accumulate": n} | changes, self.recipe)
                found = self.cost(all_changes)
                if found.peak < room:
                    return Fit(all_changes, found)
                if smaller < part:  # memory is convex in the size of a part, so the line through both bounds the rest
                    line = (part * found.peak - smaller * made.peak) / (part - smaller)
                    part, made, fixed = smaller, found, max(line, _fixed(found))
        return None

    def least(self, others: Mapping[str, Any] = MappingProxyType({})) -> float:
        """Return the bytes that a step takes at the top of the ladder, with `others` changed as well."""
        changes: dict[str, Any] = {"accumulate": self._divisors()[-1], **others}
        for rung in self.rungs:
            changes |= rung
        return self.cost(_new(changes, self.recipe)).peak

    def adapters_save(self, least: float) -> bool:
        """Whether a step of whole networks, `least` bytes, would take less with adapters; not if these are as large."""
        adapted = self.recipe.student.adapter.rank and self.recipe.fake.adapter.rank
        return not adapted and self._adaptable() and self.least(ADAPTED) < least

    @cached_property
    def rungs(self) -> list[dict[str, Any]]:
        """What each rung changes, besides those below it."""
        return list(self._rungs())

    def _rungs(self) -> Iterator[dict[str, Any]]:
        recipe = self.recipe
        if blocks(self.denoiser) and recipe.student.network is None and not recipe.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        # The cache takes the encoders' visits, too; with real images, they are needed in every step.
        if self.retrain and self._cacheable() and not encoded_before(recipe):
            yield {CACHE: STATES}
        elif family_of(self.info).component_weights(self.info.source) and not offloaded(recipe):
            yield {"offload": True}
        adapted = bool(recipe.student.adapter.rank and recipe.fake.adapter.rank)
        if self.gpus > 1 and recipe.parallel == "ddp":
            yield {"parallel": "fsdp"}
        if self.retrain and "regress" in recipe.terms and recipe.regress.decoder == "full":
            yield {"regress.decoder": "tiny"}
        if not adapted and (not self.retrain or not self._adaptable()):
            return
        if not adapted:
            roles = {"student": recipe.student, "fake": recipe.fake}
            yield {f"{name}.adapter.rank": RANK for name, role in roles.items() if not role.adapter.rank}
        if recipe.precision == "fp32" and not self.retrain:
            return
        if recipe.base_weights == "fp32":
            yield {"precision": "bf16", "base_weights": "bf16"}
        if self.retrain and self._large_encoders() and recipe.prompts.precision == "fp32":
            yield {"prompts.precision": "bf16"}
        plain = recipe.match.sid is None and recipe.student.guidance is None and self.gpus == 1
        if recipe.base_weights in ("fp32", "bf16") and plain:
            yield {"parallel": "ddp", "precision": "bf16", "base_weights": "int8"}
        # Fewer ranks leave the teacher as it is, while 4 bits move its estimates; see docs/adapters.md.
        yield from self._ranks(SMALLER)
        if recipe.base_weights != "int4" and plain:
            yield {"parallel": "ddp", "precision": "bf16", "base_weights": "int4"}
        yield from self._ranks(SMALLEST)

    def _ranks(self, rank: int) -> Iterator[dict[str, Any]]:
        """Yield a rung that gives adapters of higher ranks this one, if what is trained may change."""
        roles = {"student": self.recipe.student.adapter, "fake": self.recipe.fake.adapter}
        # `alpha` is relative to the rank: with a given one, updates would become larger.
        higher = [name for name, how in roles.items() if (how.rank or RANK) > rank and how.alpha is None]
        if self.retrain and higher:
            yield {f"{name}.adapter.rank": rank for name in higher}

    def _large_encoders(self) -> bool:
        """Whether the text encoders are so large that their precision matters."""
        return self.info.text and encoder_weights(self.info.source) > LARGE

    def _cacheable(self) -> bool:
        """Whether the states of prompts in a cache take the place of the text encoders."""
        return self.info.text and not any(stage.needs_images for stage in (self.recipe, *self.recipe.parts))

    def _adaptable(self) -> bool:
        """Whether adapters may take the place of whole networks."""
        recipe, student = self.recipe, self.recipe.student
        if student.init is not None or student.network is not None or recipe.compile or not trains_fake(recipe):
            return False
        return bool(blocks(self.denoiser)) and not recipe.fake.ida

    def _divisors(self) -> list[int]:
        """Return the possible values of `accumulate`, from the recipe's own upwards."""
        batches = {batch for stage in self.recipe.parts for batch in stage.batches.values()}
        own = self.recipe.accumulate
        return [n for n in range(own, min(batches) + 1) if not any(batch % (n * self.gpus) for batch in batches)]


def kind(recipe: Recipe) -> str:
    """Return a key that is equal for stages of equal cost."""
    m, r = recipe.match, recipe.regress
    matching = (m.batch, m.guidance == 1, m.pairs, m.sid is None, m.divergence == "reverse_kl")
    return str((recipe.terms, *matching, r.batch, r.loss, r.size, r.decoder, r.tiny))


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return the recipe with other entries, by dotted name."""
    tree = recipe.model_dump()
    for name, value in changes.items():
        set_entry(tree, name, value)
    return parse_recipe(tree, recipe.name)


def fitted(
    recipe: Recipe,
    began: Recipe | None,
    memory: float,
    gpus: int = 1,
    own: tuple[Denoiser, Info] | None = None,
    on_cpu: bool = False,
) -> tuple[Recipe, str]:
    """Replace what `recipe.memory` leaves to the machine; return also what was chosen, in a line.

    Args:
        began: the recipe with which the run began, whose choice is kept.
        memory: bytes of the device; a number in the recipe counts instead.
        own: your own teacher.
        on_cpu: `memory` is that of the machine, not of a GPU.

    Raises `UserError` if nothing fits.
    """
    if began is not None and began.memory is not None:
        before = flat(began.model_dump())
        kept = {name: before[name] for name in CHOSEN}
        return changed(recipe, kept), f"memory as when the run began: {_words(_new(kept, recipe))}"
    if not isinstance(recipe.memory, str):
        memory = 1e9 * (recipe.memory or 0)
    denoiser, info = (copy.deepcopy(own[0]).to("meta"), own[1]) if own else outline(recipe.teacher)
    info = as_used(recipe, denoiser, info)
    ladder = Ladder(recipe, denoiser, info, gpus, retrain=False)
    found = ladder.fitting(memory)
    if found is None:
        least = ladder.least()
        hint = f"train adapters, {_words(ADAPTED)}, or " if ladder.adapters_save(least) else ""
        more = "take a machine with more memory" if on_cpu else "take a larger GPU"
        if not isinstance(recipe.memory, str):  # rounded up
            more = f"give more, memory={1.01 * least / (1 - SPARE) / 1e9:.3g}"
        raise UserError(
            f"memory {recipe.memory}: a step takes {size(least)} or more, and may take {1 - SPARE:.0%} of "
            f"{size(memory)}; {hint}{more}. `distmatch plan RECIPE --ladder` lists what fits where"
        )
    return changed(recipe, found.changes), f"{size(found.cost.peak)} of {size(memory)} planned: {found}"


def _fixed(made: Cost) -> float:
    """Return the bytes of a step, at least, that do not shrink with the parts of a batch."""
    if made.memory.get("previews, prompts"):  # which take the place of what shrinks
        return made.peak
    return made.peak - made.memory["activations"]


def _words(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in changes.items()) or "as it is"


def _new(changes: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return those of `changes` that are not the recipe's own entries already, without CUDA graphs if none can be."""
    own = flat(recipe.model_dump())
    then = own | changes
    if then["accumulate"] > 1 or then["parallel"] == "fsdp":
        changes = changes | {"cuda_graphs": False}
    return {name: value for name, value in changes.items() if own[name] != value}
