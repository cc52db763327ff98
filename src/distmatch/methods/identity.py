"""Score identity Distillation, which takes the place of Algorithm 2 (Zhou et al. 2024, arXiv 2404.04057)."""

from typing import Any

from torch import Tensor, nn

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import expand
from distmatch.methods.terms import Levels, Match, Samples


class Identity(Match):
    """As `Match`, but gradients pass through both scores; the fake score is trained in the same way.

    Args:
        alpha: see `identity_loss`.
        settings: those of `Match`.
    """

    def __init__(self, teacher: Denoiser, fake: nn.Module, alpha: float, **settings: Any):
        super().__init__(teacher, fake, **settings)
        self.alpha = alpha

    def student_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        t, x, cond = drawn.t, samples.x, samples.cond
        x_t = self.schedule.add_noise(x, drawn.eps, t)
        # The fake score's weights get a gradient too; `Distiller.update_student` clears it.
        return identity_loss(x, self.fake(x_t, t, cond), self.real(x_t, t, cond), self.alpha)


def identity_loss(x: Tensor, x0_fake: Tensor, x0_real: Tensor, alpha: float) -> Tensor:
    """Return `(mu_real - mu_fake) . ((mu_real - x) - alpha (mu_real - mu_fake))` over the mean of `|mu_real - x|`, f[].

    All three f[B,*D] carry the student's graph. With an exact fake score and `alpha` 0, the expectation of the product
    is the Fisher divergence. The paper takes 1 to 1.2: the fake score's weights are constants in the gradient.
    """
    apart = x0_real - x0_fake
    distance = (x0_real - x).abs().flatten(1).mean(1).detach()
    return (apart * (x0_real - x - alpha * apart) / expand(distance, x)).mean()
