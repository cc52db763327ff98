"""Entries of a recipe about the networks that are trained: the student, the fake score, and their optimizers."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distmatch.recipe.entry import entry
from distmatch.recipe.kinds import Decay, Factor, Fraction, Natural, Place, Positive, Strict
from distmatch.system.errors import UserError

MOST_STEPS = 8
"""Of a student: with more, a fast solver on the teacher itself is the better choice."""


class Optimiser(Strict):
    """AdamW for one network; see `training.optim.Optimizer`."""

    lr: Annotated[float, Field(gt=0)] = entry(
        5e-5, "Peak learning rate.", "Appendix B: 5e-5 for CIFAR-10, 2e-6 for ImageNet, 1e-5 for LAION", stage=True
    )
    betas: tuple[Decay, Decay] = entry(
        (0.9, 0.999), "Decay per step of AdamW's averages of the gradient and of its square.", "Appendix B"
    )
    weight_decay: Factor = entry(0.01, "AdamW's decoupled weight decay, multiplied by the learning rate.", "Appendix B")
    warmup: Natural = entry(
        0, "Linear warm-up of the learning rate, in updates; 0: none.", "ours", stage=True, schedule=True
    )
    decay: Fraction = entry(
        0.0,
        "Final share of the run, or of the stage that states it, over which the learning rate falls linearly to zero; "
        "0: it stays constant.",
        "ours",
        stage=True,
        schedule=True,
    )
    clip: Factor = entry(
        10.0, "Largest L2 norm of the gradient; longer ones are scaled down to it. 0: no clipping.", "Appendix B: 10"
    )


class Adapter(Strict):
    """Low-rank adapters on a network; see `training.adapters`."""

    rank: Natural = entry(
        0,
        "Rank of the adapters; only these are trained, and all adapters share the teacher's weights. 0: no adapters, "
        "all weights are trained.",
        "LoRA, arXiv 2106.09685; DMD2, arXiv 2405.14867, and LightX2V: 64",
    )
    alpha: Annotated[float, Field(gt=0)] | None = entry(
        None, "Updates of weights are multiplied by alpha / rank. null: the rank.", "LoRA, arXiv 2106.09685"
    )
    targets: list[str] | None = entry(
        None,
        "Names of the layers that get adapters, or the ends of their names, such as to_q. null: those that the model's "
        "family names (in diffusers' format, of the transformer blocks), else all linear layers and convolutions.",
        "ours",
    )

    @model_validator(mode="after")
    def _rank_is_given(self) -> Self:
        if not self.rank and (self.alpha is not None or self.targets is not None):
            raise UserError("adapter.alpha and adapter.targets are for adapters; give adapter.rank as well")
        return self


class Fake(Strict):
    """The fake score."""

    adapter: Adapter = entry(Adapter(), "Adapters on the teacher's weights instead of weights of its own.")
    optimizer: Optimiser = entry(Optimiser(), "AdamW for the fake score (Appendix B).")
    steps: Positive = entry(
        1,
        "Updates of the fake score per update of the student.",
        "Algorithm 1: 1; DMD2, arXiv 2405.14867: 5 for ImageNet and SDXL, 10 for Stable Diffusion 1.5",
    )
    alone: Natural = entry(
        0,
        "Steps at the beginning, of the run or of the stage that states it, that train only the fake score; the "
        "student's warm-up follows them.",
        "DMD2, arXiv 2405.14867",
        stage=True,
        schedule=True,
        small=0,
    )
    ida: Decay = entry(
        0.0,
        "Share of the student's weights that the fake score takes over after each update of the student, in steps that "
        "train both. 0: none.",
        "SenseFlow, arXiv 2506.00523: 0.02 to 0.03",
    )


class Network(Strict):
    """A new network, for a teacher that has no weights (a mixture); see `models.mlp.MLP`."""

    type: Literal["mlp"] = entry("mlp", "Kind of network; an MLP is for points, not for images.", "ours")
    width: Positive = entry(64, "Units per layer.", "ours")
    depth: Positive = entry(2, "Number of residual layers.", "ours")


class Student(Strict):
    """The student: a generator of one step, or of a few."""

    times: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=MOST_STEPS)] | None = entry(
        None,
        "Times at which the student is evaluated, falling, on the schedule's own scale: sigma for EDM, 0 to 999 for "
        "Stable Diffusion. One time makes a one-step student; several make one of that many steps, trained on its own "
        "rollouts: a random step k, from the image of its first k steps. null: as student.nfe says, or the "
        "schedule's last, T - 1 in the paper. A teacher that predicts eps makes its student's errors sigma / alpha "
        "times larger there, 14.6 times for Stable Diffusion; at 399, 1.2 times. `student.t=X` is short for a single "
        "time.",
        "Section 3.1; DMD2, arXiv 2405.14867, Section 4.5 for several",
    )
    nfe: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = entry(
        None,
        "Evaluations per image, instead of the times: equal parts of the schedule's own scale (`Steps.spaced`). "
        "4 makes 999, 749, 499, 249 for Stable Diffusion. null: as student.times says.",
        "DMD2: 4 for SDXL",
    )
    inputs: Literal["rollout", "data"] = entry(
        "rollout",
        "What the later of several steps see in training: the student's own image of the steps before, noised to their "
        "time, or a real image (real.images), noised likewise. rollout needs no data, and is what happens when images "
        "are made; data saves the passes of the steps before.",
        "DMD2, arXiv 2405.14867, Section 4.5: rollout; FastGen: data",
    )
    shift: Annotated[float, Field(gt=0)] = entry(
        1.0,
        "Shift of the times of student.nfe: above 1, more of them are at high noise. 1: none.",
        "Stable Diffusion 3, arXiv 2403.03206, Eq. 23: 3 for flows",
    )
    init: Place | None = entry(
        None,
        "Student to continue from: a model folder, a run, or the name of one in the package; with student.guidance, "
        "one of a fixed scale too. null: none.",
        "ours",
    )
    network: Network | None = entry(
        None, "A new network for student and fake score. null: both start as copies of the teacher (Section 3.1)."
    )
    guidance: tuple[Factor, Factor] | None = entry(
        None,
        "Range [low, high], low < high, of a guidance scale that becomes an input of the student. Training draws one "
        "per sample and ignores match.guidance and pairs.guidance. null: the scale is fixed.",
        "Section 5 names it as future work",
        pairs=True,
    )
    adapter: Adapter = entry(Adapter(), "Adapters on the teacher's weights instead of weights of its own.")
    ema: Decay = entry(
        0.999,
        "Decay per step of the average of the student's weights, which is the result. 0: the last weights.",
        "ours",
        stage=True,
    )
    optimizer: Optimiser = entry(Optimiser(), "AdamW for the student (Appendix B).")

    @model_validator(mode="after")
    def _times_fall(self) -> Self:
        if self.times is not None and any(later >= time for time, later in pairwise(self.times)):
            raise UserError(f"expected times: [high, ..., low], falling, not {list(self.times)}")
        return self

    @model_validator(mode="after")
    def _times_or_count(self) -> Self:
        if self.times is not None and self.nfe is not None:
            raise UserError(
                f"expected times or nfe, not both: {list(self.times)} and {self.nfe}; set the other one to null"
            )
        if self.shift != 1 and (self.nfe or 1) == 1:
            raise UserError(
                f"shift {self.shift:g} is for the times that nfe makes, and leaves the first where it is; give nfe "
                "above 1, or write the times"
            )
        return self

    @property
    def several(self) -> bool:
        """Whether the student takes more than one step."""
        return max(len(self.times or ()), self.nfe or 1) > 1

    @model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.guidance is not None and not self.guidance[0] < self.guidance[1]:
            raise UserError(f"expected guidance: [low, high] with low < high, not {list(self.guidance)}")
        return self
