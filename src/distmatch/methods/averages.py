"""Averages over training steps that do not depend on how a batch is shared between parts and processes."""

import torch
from torch import Tensor, nn

from distmatch.system import parallel


class Averages(nn.Module):
    """Means of numbers, one mean per bin, in which each step counts `decay` times as much as the step after it.

    The parts of a batch `note` what they see, in any order and from any thread; `settle` then lets the means follow.
    Saved with the module that it belongs to.
    """

    def __init__(self, bins: int, decay: float):
        super().__init__()
        self.bins, self.decay = bins, decay
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(2, bins))  # of the numbers, and how many
        self._noted: list[Tensor] = []

    def means(self, unseen: float = 1.0) -> Tensor:
        """Return the mean f[bins] of each bin, `unseen` for those without any number."""
        total, count = self.sums
        return torch.where(count > 0, total / count, unseen)

    def note(self, values: Tensor, bins: Tensor) -> None:
        """Note the `values f[N]`, each in the bin `i64[N]`; those in bin -1 not at all."""
        member = (bins[:, None] == torch.arange(self.bins, device=bins.device)).float()  # summed in a fixed order
        self._noted.append(torch.stack([(values.detach().float()[:, None] * member).sum(0), member.sum(0)]))

    def settle(self) -> None:
        """Let the means follow what was noted, by all processes, since the last call. All processes must call it."""
        if self._noted:
            sums = torch.stack(self._noted).sort(0).values.sum(0)  # sorted, so that the order of the parts is forgotten
            self.sums.copy_(self.decay * self.sums + parallel.mean(sums))
            self._noted.clear()
