"""The term gan in two processes: DDP and FSDP2, whole networks and adapters."""

import pytest
import torch
from test_gan import HOW, distiller, recipe
from test_parallel import together

from distmatch.recipe import build, subjects
from distmatch.system import parallel
from distmatch.training.engine import whole


def _two(found, out):
    torch.set_num_threads(1)
    with parallel.process_group():
        d = build.distiller(found, subjects.subject(found), None)
        losses = [{k: parallel.mean(v.clone()).item() for k, v in d.step(i).items()} for i in range(3)]
        state = d.terms[1].head.state_dict()
        if parallel.rank() == 0:
            torch.save((losses, state), out)


@pytest.mark.parametrize(
    ("how", "changes"), [("fsdp", HOW), ("ddp", ("gan.features=teacher", "match.sid=1.2", "accumulate=2"))]
)
def test_two_processes_follow_one(tmp_path, how, changes):
    d = distiller(tmp_path, *changes)
    alone = [{k: v.item() for k, v in d.step(i).items()} for i in range(3)]
    together(2, _two, recipe(tmp_path, *changes, f"parallel={how}"), tmp_path / "two.pt")
    losses, head = torch.load(tmp_path / "two.pt")
    for one, two in zip(alone, losses, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    for name, value in d.terms[1].head.named_parameters():
        torch.testing.assert_close(head[name], value.data, rtol=1e-3, atol=1e-5)


BOTH = ("student.adapter.rank=2", "fake.adapter.rank=2")


def _gradients(found, count=2):
    """The gradients with which each of the optimizers was called in the first steps."""
    d = build.distiller(found, subjects.subject(found), None)
    seen = {}

    def watch(name, own):
        step = own.step

        def watched(index):
            gradients = [p.grad for p in own.parameters if p.grad is not None]
            seen[name, index] = torch.cat([whole(g.detach()).flatten() for g in gradients]).clone()
            return step(index)

        own.step = watched

    watch("student", d.optimizer)
    watch("fake", d.fake_optimizer)
    watch("head", d.terms[1].trained["head"].optimizer)
    for index in range(count):
        d.step(index)
    return seen


def _save_gradients(found, out):
    torch.set_num_threads(1)
    with parallel.process_group():
        seen = _gradients(found)
        if parallel.rank() == 0:
            torch.save(seen, out)


@pytest.mark.parametrize(
    "changes",
    [
        (*BOTH, *HOW),
        (*BOTH, "gan.features=teacher", "accumulate=2"),
        (*BOTH, "match.sid=1.2", "gradient_checkpointing=true"),
        ("student.adapter.rank=2", "fake.steps=2"),
        ("fake.adapter.rank=2",),
    ],
    ids=" ".join,
)
def test_adapters_on_a_sharded_base_get_the_gradients_of_one_process(tmp_path, changes):
    """To a hundred-thousandth of the largest: of head, student and fake score; adapters do more after a first step."""
    found = recipe(tmp_path, *changes)
    alone = _gradients(found)
    together(2, _save_gradients, recipe(tmp_path, *changes, "parallel=fsdp"), tmp_path / "two.pt")
    two = torch.load(tmp_path / "two.pt")
    assert two.keys() == alone.keys()
    for name, gradient in alone.items():
        assert gradient.abs().max() > 0
        tolerance = (1e-5 if name[1] == 0 else 1e-3) * gradient.abs().max().item()
        torch.testing.assert_close(two[name], gradient, rtol=0, atol=tolerance, msg=lambda said, n=name: f"{n}: {said}")
