"""Entries of a recipe about the terms of the objective."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from distmatch.recipe.entry import entry
from distmatch.recipe.kinds import Factor, Natural, Place, Positive, Strict
from distmatch.recipe.network_entries import Optimiser
from distmatch.system.errors import UserError


def _unique_blocks(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise UserError(f"a block is named twice: {', '.join(map(str, blocks))}")
    return blocks


class MatchTerm(Strict):
    """Distribution matching; see `methods.terms.Match`."""

    weight: Factor = entry(1.0, "Weight of the term in the student's loss.", "Appendix B: 1")
    batch: Positive = entry(
        64,
        "Student images per step, over all processes; the fake score is trained on them too.",
        "Appendix B: 392, 336 or 2304",
        small=2,
    )
    weighting: Literal["algorithm2", "eq8", "dreamfusion", "prolificdreamer"] = entry(
        "algorithm2",
        "Factor on mu_fake - mu_real at each noise level. algorithm2: 1 / mean |x - mu_real|; eq8: that times "
        "alpha; dreamfusion: w_t = sigma / alpha; prolificdreamer: w_t = sigma^3 / alpha.",
        "Algorithm 2, Eq. 8, Table 2",
    )
    bins: Positive = entry(1000, "Number T of noise levels that the schedule is divided into.", "Appendix B.1: 1000")
    min_step: Natural = entry(
        20, "Lowest noise level drawn, as a bin below max_step; 0 is the lowest of all.", "Section 3.2: 0.02 T"
    )
    max_step: Positive = entry(
        980,
        "End of the noise levels drawn, as a bin, exclusive: the highest is the one below. At most bins.",
        "Section 3.2: 0.98 T; Table 5: 500 in late stages",
    )
    guidance: Factor = entry(
        1.0,
        "Scale w of classifier-free guidance of the real score, uncond + w (cond - uncond); the fake score is never "
        "guided. 1: no guidance.",
        "Section 3.4; Section 4.3: 3 and 8",
    )
    rescale: bool = entry(
        False, "Give the guided real score the norm of the unguided one, per image.", "Qwen-Image's pipeline"
    )
    sid: Factor | None = entry(
        None,
        "Alpha of Score identity Distillation, which then takes the place of Algorithm 2: gradients pass through both "
        "scores. weighting is that of its product; eq8 is its authors' 1 - t for flows. null: Algorithm 2.",
        "Zhou et al., arXiv 2404.04057: 1 to 1.2",
    )
    intervals: bool = entry(
        False,
        "For a student of several steps: judge the images of each step only at the noise levels between its time and "
        "the next, and train the fake score there.",
        "TDM, arXiv 2503.06674",
    )
    shared: bool = entry(
        False,
        "Give the fake score's loss the time and noise of the student's loss, so that one pass of the fake score "
        "serves both. Faster; keeps its activations meanwhile. Not with sid or fake.ida, nor in several processes.",
        "ours; Algorithm 1 draws anew",
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "softened_rkl", "hellinger", "jeffreys"] = entry(
        "reverse_kl",
        "Divergence that the matching descends; all but reverse_kl weigh each image by a ratio of densities, which the "
        "head of the term gan estimates.",
        "Section 3.2: reverse_kl; f-distill, arXiv 2502.15681, for the others",
    )
    pairs: bool = entry(
        False, "Also match the student's images from the pairs' noise, concat(x, x_ref).", "Algorithm 1, only for LAION"
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if not self.min_step < self.max_step <= self.bins:
            raise UserError(f"expected min_step < max_step <= bins, not {self.min_step}, {self.max_step}, {self.bins}")
        return self

    @model_validator(mode="after")
    def _one_pass_serves_both(self) -> Self:
        if self.shared and self.sid is not None:
            raise UserError(
                f"shared sends no gradient through the fake score, sid={self.sid:g} does; expected one of the two"
            )
        return self


class GuideTerm(Strict):
    """Guidance apart from matching; see `methods.guide.Guide`. Its bins are those of match."""

    weight: Factor = entry(1.0, "Weight of the term in the student's loss.", "Decoupled DMD, arXiv 2511.22677")
    guidance: Factor = entry(
        1.0,
        "Scale w of classifier-free guidance. match.guidance is then 1: its own part is in match, (w - 1) "
        "(cond - uncond) is here.",
        "Decoupled DMD",
    )
    weighting: Literal["algorithm2", "eq8", "dreamfusion", "prolificdreamer"] = entry(
        "algorithm2", "Factor at each noise level, as in match.weighting.", "Algorithm 2; Decoupled DMD"
    )
    min_step: Natural = entry(20, "Lowest noise level drawn, as a bin below max_step.", "as match.min_step")
    max_step: Positive = entry(
        980,
        "End of the noise levels drawn, as a bin, exclusive; of a student of several steps, only levels cleaner than "
        "its input are drawn in any case.",
        "Decoupled DMD",
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if not self.min_step < self.max_step:
            raise UserError(f"expected min_step < max_step, not {self.min_step}, {self.max_step}")
        return self


class RegressTerm(Strict):
    """Regression to the teacher's samples; see `methods.terms.Regress`, `models.perceptual.Lpips`."""

    weight: Factor = entry(
        0.25, "Weight of the term in the student's loss, lambda_reg.", "Section 3.3: 0.25; Appendix B.1; Table 5"
    )
    batch: Positive = entry(64, "Pairs per step, over all processes.", "Appendix B: 392, 336 or 1152", small=2)
    loss: Literal["mse", "huber", "lpips"] = entry(
        "mse",
        "Distance between the student's and the teacher's image: mean squared error, pseudo-Huber, or LPIPS in the "
        "features of VGG-16. Each needs its own weight.",
        "Eq. 9, Section 3.3: lpips; the others are ours",
    )
    size: Positive = entry(
        224,
        "Pixels per side at which LPIPS compares; smaller images are enlarged to it, larger ones are kept.",
        "Appendix B.1: 224",
        small=32,
    )
    weights: Place | None = entry(
        None,
        "Folder with the LPIPS files vgg16-397923af.pth and lpips_weights.pt. null: the folder in the environment "
        "variable DISTMATCH_WEIGHTS, torch.hub's cache, or a download.",
        "ours",
        unnamed=True,
    )
    decoder: Literal["none", "tiny", "full"] = entry(
        "none",
        "Decoder for latents, so that images are compared: the tiny autoencoder, or the teacher's full one. none: "
        "latents, or images that need no decoding, are compared directly.",
        "Appendix B.3: tiny; Table 5: full in late stages",
    )
    tiny: Place = entry(
        "madebyollin/taesd", "The tiny autoencoder: a folder in diffusers' format or a model id.", "Appendix B.3"
    )


class RealImages(Strict):
    """Real images, for the term gan and for `student.inputs=data`; see `recipe.real_images`."""

    images: Place | None = entry(
        None,
        "What the teacher was trained on: a folder, an archive or a URL, see docs/data.md. null: none, which suits all "
        "that needs no real images.",
        "DMD2, arXiv 2405.14867: the teacher's training data",
        unnamed=True,
    )
    split: str = entry("train", "Which of their splits: train, test, val, the name of a folder, or all.", "ours")
    classes: Literal["name", "number"] = entry(
        "name",
        "How their classes are matched to the teacher's: by name, or number k to number k, whatever they are called.",
        "ours",
    )
    cache: Place | None = entry(
        None,
        "Folder for their latents, encoded once, for a teacher of latents. null: images are encoded whenever they are "
        "drawn.",
        "ours",
        unnamed=True,
    )


class GanTerm(Strict):
    """A GAN on noised images; see `methods.adversarial`."""

    weight: Factor = entry(
        1e-3,
        "Weight of the term in the student's loss.",
        "DMD2, arXiv 2405.14867: 3e-3 for ImageNet, 1e-3 for Stable Diffusion 1.5",
        stage=True,
    )
    head_weight: Annotated[float, Field(gt=0)] = entry(
        1e-2,
        "Weight of the head's loss in that of the fake score, whose features it trains too.",
        "DMD2, arXiv 2405.14867: 1e-2",
    )
    balance: Factor | None = entry(
        None,
        "Ratio of the gradients' norms, of gan to match at the student's images, that is kept by scaling weight. null: "
        "the weight is fixed.",
        "The advice of DMD2's author, github.com/tianweiy/DMD2/issues/73: 1",
    )
    features: Literal["fake", "teacher"] = entry(
        "fake",
        "Network whose features the head reads: the fake score, or the frozen teacher.",
        "DMD2, arXiv 2405.14867: fake",
    )
    blocks: Annotated[list[Natural], Field(min_length=1), AfterValidator(_unique_blocks)] | None = entry(
        None,
        "Blocks of that network to read, by number from 0. null: the middle one of those with the coarsest features.",
        "DMD2, arXiv 2405.14867: the bottleneck",
    )
    r1: Factor = entry(
        0.0,
        "Weight of an approximate R1 penalty in the head's loss, (D(x) - D(x + r1_noise eps))^2 for real x. 0: none.",
        "FastGen, for f-distill",
    )
    r1_noise: Annotated[float, Field(gt=0)] = entry(0.1, "Standard deviation of the noise in that penalty.", "ours")
    min_step: Natural = entry(0, "Lowest noise level at which images are judged, as a bin of match.bins.", "ours")
    max_step: Positive | None = entry(
        None, "End of these noise levels, as a bin, exclusive. null: match.bins.", "DMD2, arXiv 2405.14867: all of them"
    )
    optimizer: Optimiser | None = entry(None, "AdamW for the head. null: with the settings of fake.optimizer (DMD2).")


class OwnTerm(BaseModel):
    """Your own term; see `methods.own_terms.TermContext`. All entries except `source` are arguments of its class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    source: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] = entry(
        ..., "The term's class, MODULE:CLASS or FILE.py:CLASS. It is imported and run.", "ours"
    )
