"""Balance of a GAN and distribution matching by the norms of their gradients at the student's images."""

import torch
from torch import Tensor

from distmatch.methods.averages import Averages

DECAY = 0.99
"""Of the averages of the squared norms, per step."""


class Balance(Averages):
    """Scales the gradient of `gan` so that its norm is `ratio` times that of `match`, both at the batch's images.

    The advice of DMD2's author is a ratio of 1 (github.com/tianweiy/DMD2, issue 73). The scale follows the averages of
    the squared norms up to the step before, so no part of a batch waits for the others.
    """

    TERMS = ("match", "gan")

    def __init__(self, ratio: float):
        super().__init__(bins=2, decay=DECAY)
        self.ratio = ratio

    def scale(self) -> Tensor:
        """Return the factor f[] on the gradient of `gan`; 1 before both were seen."""
        match, gan = self.means(0.0)
        return torch.where((match > 0) & (gan > 0), self.ratio * (match / gan).sqrt(), 1.0)

    def seen(self, term: str, x: Tensor) -> Tensor:
        """Return `x f[B,*D]` as `term` is to see it: the gradient there is measured, and that of `gan` scaled."""
        if term not in self.TERMS:
            return x
        number = torch.tensor([self.TERMS.index(term)], device=x.device)
        scale = self.scale() if term == "gan" else None

        def measure(gradient: Tensor) -> Tensor | None:
            squared = gradient.float().square().sum()[None]
            # Zero is of a term that a stage turns off. As a small norm it would count when the term is on again.
            self.note(squared, torch.where(squared > 0, number, -1))
            return None if scale is None else gradient * scale.to(gradient.dtype)

        own = x.view_as(x)
        own.register_hook(measure)
        return own
