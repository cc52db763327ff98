"""Arithmetic in lower precision, by autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which networks compute in `precision`, whatever their weights are; fp32 changes nothing."""
    if precision == "fp32":
        return nullcontext()
    # The cache of cast weights is one for all threads, and a worker that is done would empty it for the others.
    return torch.autocast(device.type, PRECISIONS[precision], cache_enabled=device.type != "cpu")
