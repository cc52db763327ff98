"""What goes with a denoiser: what it makes, of what, and how it came about."""

from dataclasses import dataclass, field
from typing import Any, Literal

from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Info:
    """What goes with a denoiser.

    Args:
        shape: (C, H, W) of one image.
        classes: class names; empty for an unconditional model.
        times: at which a student is evaluated, falling, see `sampler.Steps`; none for a teacher.
        source: the model in diffusers' format whose text encoders and autoencoder go with this one, if there is one.
        guidance: the scales (low, high) that a student takes as an input; `None` for a student of one scale.
        scheduler: the settings of the model's own diffusers scheduler, if it came with one.
        card: how the model was made and measured, as plain JSON data.
        text: it makes images of prompts.
        latent: it makes latents, and `shape` is theirs; an autoencoder turns them into images.
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

    @property
    def condition(self) -> Literal["none", "classes", "text"]:
        """What its samples are conditioned on."""
        return "text" if self.text else "classes" if self.classes else "none"

    def check_guidance(self, scale: float | None) -> None:
        """Raise `UserError` where the guidance `scale` would guide by an `uncond` that the teacher never learnt.

        `None` is a scale that each sample brings; 1 needs no `uncond`.
        """
        if scale == 1:
            return
        said = "guidance" if scale is None else f"guidance {scale:g}"
        if self.condition == "none":
            raise UserError(f"{said}: this model has neither classes nor prompts to be guided by; use guidance 1")
        for made, remedy in (("teach", "teach it with --label-dropout 0.1, or "), ("imported", "")):
            if made in self.card and not self.card[made].get("label_dropout"):
                raise UserError(
                    f"{said}: this teacher was trained with label dropout 0, so that what it makes of no label is left "
                    f"from its random start; {remedy}use guidance 1"
                )
