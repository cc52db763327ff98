"""What the first step of a few-step student is anchored to: a part of the teacher's trajectory (arXiv 2602.03139)."""

from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.sampler import Callback, Model, Sampler
from distmatch.diffusion.schedule import Schedule, expand


class _Reached(Exception):
    """Carries the state `x` out of a sampler."""

    def __init__(self, x: Tensor):
        self.x = x


def first_steps(sampler: Sampler, taken: int) -> Sampler:
    """Return a sampler that takes only `taken` of its steps: the image to which one straight step leads there.

    That is the `x0` of which a single DDIM step from the noise lands on the state that `sampler` reaches; of a flow,
    it is the end of the straight line through that state. With all steps taken it is the sampler's own image.

    Args:
        sampler: euler or heun, whose state after step `i` is at `schedule.grid(steps)[i]`.
    """

    def sample(
        model: Model, schedule: Schedule, z: Tensor, cond: Cond | None, steps: int, callback: Callback | None = None
    ) -> Tensor:
        def stop(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                callback(step, x, x0)
            if step + 1 == taken:
                raise _Reached(x)

        if taken == steps:
            return sampler(model, schedule, z, cond, steps, callback=callback)
        try:
            sampler(model, schedule, z, cond, steps, callback=stop)
        except _Reached as found:
            state = found.x
        else:
            raise ValueError(f"{taken} steps of {steps} cannot be taken")
        start, end = (schedule.grid(steps)[i].to(z).expand(len(z)) for i in (0, taken))
        kept = schedule.sigma(end) / schedule.sigma(start)  # share of the noise that is still there
        gained = schedule.alpha(end) - kept * schedule.alpha(start)
        return (state - expand(kept, z) * schedule.prior_std * z) / expand(gained, z)

    return sample
