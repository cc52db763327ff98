"""`Info`, the description of a model: what it makes, from which conditions, and how it was made."""

from dataclasses import dataclass, field
from typing import Any, Literal

from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Lora:
    """A LoRA that was merged into a model.

    Args:
        file: its path.
        scale: what its update was multiplied by.
        sha256: the digest of the file.
        text: it also changes the text encoders.
    """

    file: str
    scale: float
    sha256: str
    text: bool


@dataclass(frozen=True)
class Info:
    """The description of a model.

    Args:
        shape: (C, H, W) of one image.
        classes: class names; empty for an unconditional model.
        times: the times at which a student is evaluated, falling, see `sampler.Steps`; empty for a teacher.
        source: the model in diffusers' format whose text encoders and autoencoder are used, if any.
        guidance: the range of scales (low, high) that a student takes as an input; `None` for a fixed scale.
        scheduler: the settings of the model's own diffusers scheduler, if it came with one.
        card: how the model was made and measured, as plain JSON data.
        text: it makes images from prompts.
        latent: it makes latents, and `shape` is theirs; an autoencoder turns them into images.
        lora: a LoRA that was merged into the model `source`, if any.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    source: str = ""
    guidance: tuple[float, float] | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    text: bool = False
    latent: bool = False
    lora: Lora | None = None

    @property
    def condition(self) -> Literal["none", "classes", "text"]:
        """What its samples are conditioned on."""
        return "text" if self.text else "classes" if self.classes else "none"

    def check_guidance(self, scale: float | None) -> None:
        """Raise `UserError` if the guidance `scale` would need an `uncond` that the teacher never learnt.

        `None` means that each sample has its own scale; 1 needs no `uncond`.
        """
        if scale == 1:
            return
        said = "guidance" if scale is None else f"guidance {scale:g}"
        if self.condition == "none":
            raise UserError(f"{said}: this model has neither classes nor prompts to be guided by; use guidance 1")
        for made, what in (("teach", "label"), ("imported", "label"), ("teach-text", "text")):
            if made in self.card and not self.card[made].get(f"{what}_dropout"):
                remedy = "" if made == "imported" else f"teach it with --{what}-dropout 0.1, or "
                raise UserError(
                    f"{said}: this teacher was trained with {what} dropout 0, so its output without a {what} was never "
                    f"trained; {remedy}use guidance 1"
                )
