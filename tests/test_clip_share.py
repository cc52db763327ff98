"""The share of clipped steps, and when it is said that it is most of them."""

import json
import warnings

import pytest
import tiny
import torch

from distmatch.commands.distillation import distil
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM, VP
from distmatch.recipe.loading import load_recipe
from distmatch.system.terminal import Notice
from distmatch.training.clip_share import WINDOW, Clipped, Clipping, distillation


def rows(*norms: float) -> dict[str, torch.Tensor]:
    return {"match": torch.ones(len(norms)), "gradient_norm": torch.tensor(norms)}


def test_the_share_is_that_of_the_steps_just_read():
    watch = Clipping(
        Clipped("gradient_norm", 10.0, "Turn."), Clipped("fake_gradient_norm", 1.0, "Turn."), Clipped("other", 0.0, "")
    )
    assert watch(rows(9.0, 10.0, 10.5, 300.0)) == {"clipped": 0.5}  # a norm of 10 is left as it is
    fake = {"fake_gradient_norm": torch.tensor([0.5, 2.0, 2.0, 2.0])}
    assert watch({**rows(1.0, 1.0), **fake}) == {"clipped": 0.0, "fake_clipped": 0.75}


def test_it_is_said_once_when_most_of_the_last_steps_were_clipped():
    watch = Clipping(Clipped("gradient_norm", 10.0, "Lower student.optimizer.lr."))
    half = WINDOW // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(rows(*[300.0] * (WINDOW - 1)))  # a start that is rough is no finding
        watch = Clipping(Clipped("gradient_norm", 10.0, "Lower student.optimizer.lr."))
        watch(rows(*[300.0] * half, *[1.0] * half))  # half is not most
    with pytest.warns(
        Notice, match=rf"^{half + 1} of the last {WINDOW} .* gradient_norm is 300 in .* to 10\. Lower student.opt"
    ):
        watch(rows(*[300.0] * (half + 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(rows(*[300.0] * WINDOW))


@pytest.mark.parametrize(
    ("prediction", "schedule", "factor"),
    [("eps", EDM(), "80"), ("ve", EDM(sigma_max=10.0), "10"), ("edm", EDM(), None), ("v", VP(), None)],
)
def test_a_network_whose_output_is_multiplied_is_named_as_the_cause(prediction, schedule, factor):
    student = Denoiser(tiny.teacher().net, schedule, Prediction(prediction))
    with pytest.warns(Notice) as said:
        distillation(student, student.schedule.t_max, 10.0, 10.0)(rows(*[300.0] * WINDOW))
    text = str(said[0].message)
    assert (f"multiplied by {factor} (prediction {prediction})" in text) == (factor is not None)
    assert ("Raise student.optimizer.clip" in text) == (factor is None)


def test_a_runs_log_has_the_shares_of_its_own_norms(tmp_path):
    file = tiny.recipe_file(tmp_path, steps=6, log={"every": 1}, generator={"lr": 1e-3, "clip": 1.0})
    distil(load_recipe(str(file)), tmp_path / "run", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    norms = [line["gradient_norm"] for line in lines]
    assert [line["clipped"] for line in lines] == [float(norm > 1) for norm in norms]
    assert [line["fake_clipped"] for line in lines] == [float(line["fake_gradient_norm"] > 10) for line in lines]
