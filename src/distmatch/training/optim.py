"""AdamW with a learning-rate schedule and gradient clipping, for one network."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distmatch.training.engine import whole


class Optimizer:
    """AdamW with warm-up, optional linear decay to zero at the end, and clipping by the global L2 norm.

    Args:
        lr: peak learning rate.
        warmup: steps of linear warm-up from `lr / warmup`.
        steps: length of the whole run; needed for the decay.
        decay: fraction of the run, at its end, over which the rate falls linearly to zero.
        clip: largest L2 norm of the gradient; 0 turns clipping off.
    """

    wait = 0
    """Steps at the beginning without an update; the moments follow the gradients meanwhile."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup: int = 0,
        steps: int = 0,
        decay: float = 0.0,
        clip: float = 0.0,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.lr, self.warmup, self.steps, self.decay, self.clip = lr, warmup, steps, decay, clip
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        for p in self.parameters:  # as the first step would create them, so that a checkpoint can be loaded into them
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adamw.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        if step < self.wait:
            return 0.0
        up = min(1.0, (step - self.wait + 1) / self.warmup) if self.warmup else 1.0
        tail = self.decay * self.steps
        down = min(1.0, max(0.0, (self.steps - step) / tail)) if tail else 1.0
        return self.lr * min(up, down)

    def step(self, index: int) -> Tensor:
        """Clip, apply and clear the gradients at the rate of step `index`; return their norm f[] before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf"))
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(index)
        self.adamw.step()
        self.clear()
        return whole(norm)

    def clear(self) -> None:
        """Clear the gradients."""
        self.adamw.zero_grad()

    def state_dict(self) -> dict:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state)
        # The fused update walks raw memory: moments must have their weights' layout (channels-last), not the saved one.
        for parameter, moments in self.adamw.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
