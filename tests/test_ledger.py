"""Tensors without data against PyTorch's own fake tensors: the same bytes and the same FLOPs, operation by operation.

In a process of their own, see `test_plan`.
"""

import copy
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from weakref import WeakSet, finalize

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.edm.networks import SongUNet
from distmatch.planning import ledger
from distmatch.planning.ledger import Ledger
from distmatch.planning.rehearsal import _emptied, _light_copies


@pytest.fixture(scope="module")
def alone():
    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield lambda task, *arguments: pool.submit(task, *arguments).result()


class Followed(TorchDispatchMode):
    """Bytes alive, FLOPs and kernels, by the storages of PyTorch's fake tensors."""

    def __init__(self):
        super().__init__()
        self.alive, self.flops, self.known, self.kernels = 0, Counter(), WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops["all"] += formula(*args, **(kwargs or {}), out_val=out)
        before = self.alive
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                finalize(storage, self.gone, storage.nbytes()).atexit = False
        writes = func._schema.is_mutable or (self.alive > before and "empty" not in func.name())
        self.kernels += writes and func.namespace != "profiler"
        return out

    def gone(self, nbytes):
        self.alive -= nbytes


class Mixed(nn.Module):
    """Convolutions in both layouts, attention, normalisations, views, and a part that is computed again."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.down, self.out = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Conv2d(32, 3, 1)
        self.qkv, self.layer = nn.Linear(16, 48), nn.LayerNorm(16)
        self.enter.weight = nn.Parameter(self.enter.weight.detach().contiguous(memory_format=torch.channels_last))

    def attend(self, x):
        q, k, v = self.qkv(self.layer(x.flatten(2).mT)).unflatten(2, (6, 8)).transpose(1, 2).chunk(3, 1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:])

    def forward(self, x):
        x = F.silu(self.norm(self.enter(x)))
        low = checkpoint(self.attend, self.down(x), use_reentrant=False)
        return self.out(torch.cat((x, F.interpolate(low, scale_factor=2)), 1))


def passed(account, low: bool) -> list[int]:
    """The bytes alive after each part of two steps, and the FLOPs."""
    net, found = Mixed(), []
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = net(torch.randn(4, 3, 8, 8)).square().mean()
        found.append(account.alive)
        loss.backward()
        found.append(account.alive)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del loss
        found.append(account.alive)
    return [*found, account.flops.total(), account.kernels]


def both(low: bool) -> tuple[list[int], list[int]]:
    with FakeTensorMode(), Followed() as theirs:
        expected = passed(theirs, low)
    with Ledger() as ours:
        return passed(ours, low), expected


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_bytes_flops_and_kernels_are_those_of_fake_tensors(alone, low):
    found, expected = alone(both, low)
    assert found == expected
    assert len(set(expected)) > 3
    assert expected[-2] > 1e5
    assert expected[-1] > 100


def asked_twice() -> tuple[int, list[str]]:
    """How many answers of the meta device there are in a step of an EDM network, and which of fake tensors differ."""
    ask, count, differ = ledger._by_meta, 0, []

    def check(func, args, kwargs):
        nonlocal count
        count += 1
        answer, other = ask(func, args, kwargs), ledger._by_fakes(func, args, kwargs)
        if answer != other:
            differ.append(f"{func}: {answer} is {other}")
        return answer

    ledger._by_meta = check
    ledger._answers.clear()
    for low in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
        with Ledger(), low:
            net = SongUNet(16, 3, 3, model_channels=16, num_blocks=1, channel_mult=[1, 2], attn_resolutions=[8])
            denoiser = Denoiser(net, EDM(), Prediction("edm"))
            denoiser(torch.randn(2, 3, 16, 16), torch.ones(2), None).mean().backward()
            passed(Ledger(), False)
            x, weight = (torch.randn(4, 8, 9, 9, requires_grad=True) for _ in range(2))
            for layout in (torch.contiguous_format, torch.channels_last):
                y = F.conv2d(x.contiguous(memory_format=layout), weight[:, :2, :3, :3], stride=2, groups=4)
                F.conv_transpose2d(y, weight.contiguous(memory_format=layout)[:, :, :2, :2], stride=2).mean().backward()
            assert F.conv1d(x[0, :, 0].detach()[None], weight[:, :, 0, :3].detach()).shape == (1, 4, 7)
    return count, differ


def test_the_meta_device_answers_like_fake_tensors(alone):
    count, differ = alone(asked_twice)
    assert not differ
    assert count > 100


def test_tensors_of_a_network_that_are_no_weights_are_shared_by_its_copies():
    """Qwen-Image has such tables of positions; copied inside a ledger they would lose their data."""
    net = nn.Linear(2, 2)
    net.table = torch.arange(3)
    with _light_copies(), Ledger():
        copied = copy.deepcopy(_emptied(net))
    assert copied.table is net.table
    assert copied.weight.shape == net.weight.shape
    assert copied.weight is not net.weight
