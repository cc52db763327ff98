"""AdamW with a learning-rate schedule and gradient clipping, for one network."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distmatch.training.engine import local


class Optimizer:
    """AdamW with warm-up, optional linear decay to zero at the end, and clipping by the global L2 norm.

    Args:
        lr: peak learning rate.
        warmup: steps of linear warm-up from `lr / warmup`.
        steps: length of the schedule; needed for the decay.
        decay: fraction of these steps, at their end, over which the rate falls linearly to zero.
        clip: largest L2 norm of the gradient; 0 turns clipping off.
    """

    first = 0
    """Step at which the schedule begins."""

    wait = 0
    """Steps at its beginning without an update; the moments follow the gradients meanwhile."""

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
        """Return the learning rate of step `step` of the run, counted from 0."""
        step -= self.first
        if step < self.wait:
            return 0.0
        up = min(1.0, (step - self.wait + 1) / self.warmup) if self.warmup else 1.0
        tail = self.decay * self.steps
        down = min(1.0, max(0.0, (self.steps - step) / tail)) if tail else 1.0
        return self.lr * min(up, down)

    def step(self, index: int) -> Tensor:
        """Clip, apply and clear the gradients at the rate of step `index`; return their norm f[] before clipping."""
        most = self.clip or float("inf")
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(index)
        if any(hasattr(p, "to_local") for p in self.parameters):
            norm = self._step_of_parts(most)
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, most)
            self.adamw.step()
        self.clear()
        return norm

    @torch.no_grad()
    def _step_of_parts(self, most: float) -> Tensor:
        """Clip to `most` and apply with the parts of sharded weights that this process holds; see `engine.local`."""
        weights = [p for p in self.parameters if p.grad is not None]
        gradients = [local(p.grad) for p in weights if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()  # pyright: ignore[reportPrivateImportUsage]
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1))  # pyright: ignore[reportPrivateImportUsage]
        states, group = [self.adamw.state[p] for p in weights], self.adamw.param_groups[0]
        adamw(
            list(map(local, weights)),
            gradients,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        return norm

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
