"""Score identity Distillation, which takes the place of Algorithm 2 (Zhou et al. 2024, arXiv 2404.04057)."""

from typing import Any

from torch import Tensor, nn

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import expand
from distmatch.methods.terms import Levels, Match, Samples
from distmatch.system.errors import UserError


class Identity(Match):
    """As `Match`, but gradients pass through both scores; the fake score is trained in the same way.

    Args:
        alpha: see `identity_loss`.
        settings: those of `Match`.
    """

    def __init__(self, teacher: Denoiser, fake: nn.Module, alpha: float, **settings: Any):
        super().__init__(teacher, fake, **settings)
        self.alpha = alpha
        _check_differentiable(teacher, "teacher")
        _check_differentiable(fake, "fake score")
        weights = list(fake.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            raise UserError(
                "Score identity Distillation (match.sid) needs a fake score that is trained; this one is frozen. Use "
                "Algorithm 2, match.sid=null, or let its weights require gradients"
            )

    def student_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        t, x, cond, schedule = drawn.t, samples.x, samples.cond, self.schedule
        x_t = schedule.add_noise(x, drawn.eps, t)
        # The fake score's weights get a gradient too; `Distiller.update_student` clears it.
        x0_fake, x0_real = self.fake(x_t, t, cond), self.real(x_t, t, cond)
        w = self.weighting(x.detach(), x0_real.detach(), schedule.alpha(t), schedule.sigma(t))
        return identity_loss(x, x0_fake, x0_real, self.alpha, w)


def _check_differentiable(network: nn.Module, name: str) -> None:
    """Raise `UserError` if `network` is quantised: no gradient passes through it."""
    for weight, value in network.named_parameters():
        if not value.is_floating_point() or value.element_size() < 2:
            raise UserError(
                f"Score identity Distillation (match.sid) sends gradients through the {name}, whose weight {weight} is "
                f"{str(value.dtype).removeprefix('torch.')}: quantised. Use Algorithm 2, match.sid=null, or load it in "
                "bf16 or fp32"
            )


def identity_loss(x: Tensor, x0_fake: Tensor, x0_real: Tensor, alpha: float, w: Tensor) -> Tensor:
    """Return the mean f[] of `w (mu_real - mu_fake) . ((mu_real - x) - alpha (mu_real - mu_fake))`.

    The three f[B,*D] carry the student's graph; `w f[B]` is constant, in the paper `1 / mean |mu_real - x|`. With an
    exact fake score and `alpha` 0, the expectation of the product is the Fisher divergence. The paper takes 1 to 1.2:
    the fake score's weights are constants in the gradient.
    """
    apart = x0_real - x0_fake
    return (expand(w, x) * apart * (x0_real - x - alpha * apart)).mean()
