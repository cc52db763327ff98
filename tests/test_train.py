"""The loop: what it writes, when it stops, what it refuses."""

from io import StringIO
from itertools import count
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from PIL import Image
from torch import nn

from distmatch.commands.distillation import distil
from distmatch.recipe.loading import load_recipe
from distmatch.system import progress
from distmatch.system.errors import Diverged
from distmatch.system.plain import read_json
from distmatch.system.screen import Screen
from distmatch.training import log
from distmatch.training.clock import Clock
from distmatch.training.ema import EMA
from distmatch.training.optim import Optimizer
from distmatch.training.train import Plan, train


class Quadratic:
    """A task whose loss is `w^2`; at `bad_step` it is not a number."""

    images_per_step = 4

    def __init__(self, bad_step: int = -1):
        self.net, self.bad_step = nn.Linear(1, 1, bias=False), bad_step
        nn.init.ones_(self.net.weight)
        self.optimizer = Optimizer(self.net.parameters(), lr=0.1)
        self.clock = Clock([self.net], torch.device("cpu"))
        self.parts = {"net": self.net, "optimizer": self.optimizer}

    def step(self, index):
        loss = self.net(torch.ones(1, 1)).square().mean() * (float("nan") if index == self.bad_step else 1.0)
        with self.clock.counted():
            loss.backward()
        self.optimizer.step(index)
        return {"fine": torch.zeros(()), "loss": loss.detach()}

    def preview(self):
        return torch.zeros(4, 1, 3, 3, dtype=torch.uint8)

    def export(self, folder):
        folder.mkdir()
        (folder / "weight").write_text(str(self.net.weight.item()))


def test_the_plan_is_kept(tmp_path):
    figures = iter([3.0, 1.0, 2.0])
    plan = Plan(12, log_every=3, save_every=5, preview_every=6, evaluate_every=4, keep=1)
    train(Quadratic(), tmp_path, plan, evaluate=lambda: {"frechet": next(figures)})
    lines = log.read(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 5, 6, 8, 9, 10, 12]  # saving flushes, too
    assert [(line["step"], line["frechet"]) for line in lines if "frechet" in line] == [(4, 3.0), (8, 1.0), (12, 2.0)]
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == [f"step-{step:08d}.png" for step in (0, 6, 12)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.json", "step-00000008", "step-00000012",
    ]  # fmt: skip
    assert read_json(tmp_path / "checkpoints" / "best.json", dict[str, float]) == {"step": 8, "score": 1.0}
    assert all(0 <= line["outside"] <= 1 and line["images_per_second"] > 0 for line in lines if "loss" in line)
    assert Image.open(tmp_path / "previews" / "step-00000000.png").size == (2 * (2 * 5 + 2), 2 * (2 * 5 + 2))


def test_a_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(tmp_path):
    with pytest.raises(Diverged, match=r"loss is nan at step 9; the last good checkpoint is .*step-00000008"):
        train(Quadratic(bad_step=8), tmp_path, Plan(20, log_every=3, save_every=4))
    with pytest.raises(Diverged, match="loss is nan at step 1; no checkpoint was saved yet"):
        train(Quadratic(bad_step=0), tmp_path / "other", Plan(20, log_every=1))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(Quadratic(), tmp_path, Plan(6, save_every=3))
    before = (tmp_path / "checkpoints" / "step-00000006" / "state.json").stat().st_mtime_ns
    (tmp_path / "model" / "weight").unlink()
    (tmp_path / "model").rmdir()
    task = Quadratic()
    train(task, tmp_path, Plan(6, save_every=3))
    assert (tmp_path / "checkpoints" / "step-00000006" / "state.json").stat().st_mtime_ns == before
    assert float((tmp_path / "model" / "weight").read_text()) == task.net.weight.item() != 1.0


def test_ema_against_the_formula():
    network = nn.Linear(1, 1, bias=False)
    ema = EMA(network, 0.9)
    expected = network.weight.item()
    for n in range(1, 30):
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[float(n)]]))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.network.weight.item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_schedule_and_clipping():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Optimizer([weight], lr=2.0, warmup=4, steps=100, decay=0.5, clip=1.0)
    assert [optimizer.rate(i) for i in (0, 1, 3, 49, 75, 100)] == [0.5, 1.0, 2.0, 2.0, 1.0, 0.0]
    weight.grad = torch.tensor([3.0, 4.0])
    seen = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    assert optimizer.step(0).item() == pytest.approx(5.0)
    assert torch.allclose(seen[0], torch.tensor([0.6, 0.8]), atol=1e-5)


def test_a_run_of_another_recipe_is_refused_with_the_differences(tmp_path):
    file = str(tiny.recipe_file(tmp_path, steps=2))
    distil(load_recipe(file), tmp_path / "run", tmp_path / "runs")
    with pytest.raises(
        ValueError, match=r"run with other settings:\n  match.weighting: algorithm2 there, eq8 here\nChoose"
    ) as refused:
        distil(load_recipe(file, ["match.weighting=eq8", "log.every=1"]), tmp_path / "run", tmp_path / "runs")
    own = tmp_path / "run" / "recipe.yaml"
    assert yaml.safe_load(own.read_text())["match"]["weighting"] == "algorithm2"
    assert str(refused.value).endswith(f"as it began: distmatch train {own} --out {tmp_path / 'run'}")
    distil(load_recipe(str(own)), tmp_path / "run", tmp_path / "runs")


def test_tensorboard_gets_the_same_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(Quadratic(), tmp_path, Plan(4, log_every=2), trackers=["tensorboard"], config={"lr": 0.1})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log.read(tmp_path / "log.jsonl")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.track needs wandb .*: pip install 'distmatch\[wandb\]'"):
        train(Quadratic(), tmp_path, Plan(1), trackers=["wandb"])


def test_a_log_file_gets_rate_and_time_left_after_seconds_and_at_each_tenth(monkeypatch):
    file, now = StringIO(), count(step=2.0)
    monkeypatch.setattr(progress, "console", Screen(file=file, width=200))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress.progress("teach-text", 40, unit="step") as advance:
        for _ in range(5):
            advance(1)
    assert file.getvalue().splitlines() == [
        "teach-text: 2 of 40 steps, 2.0 s/step, 0:01:16 left",
        "teach-text: 4 of 40 steps, 2.0 s/step, 0:01:12 left",
    ]


def test_passes_within_what_is_counted_count_once(monkeypatch):
    ticks = count()
    monkeypatch.setattr("distmatch.training.clock.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    layer = torch.nn.Linear(1, 1)
    clock = Clock([layer], torch.device("cpu"))  # at 0
    with clock.counted():  # from 1 to 2
        layer(torch.ones(1))
    with pytest.raises(ZeroDivisionError), clock.counted():  # at 3
        raise ZeroDivisionError
    layer(torch.ones(1))  # from 4 to 5
    assert clock.read() == (2, 6)
