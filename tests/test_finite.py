"""NaN is never shown as black: weights are looked at when they are read, images before they become 8 bits."""

import math

import pytest
import tiny
import torch

from distmatch.models.classifier import Classifier
from distmatch.models.folder import load_model, save_model
from distmatch.pipeline import Pipeline
from distmatch.system.finite import check_images, check_weights


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_when_a_model_is_read(bad, tmp_path):
    teacher = tiny.teacher()
    save_model(tmp_path, teacher, tiny.INFO)
    load_model(tmp_path)
    teacher.get_parameter("net.middle.0.conv0.weight").data[3, 2, 1, 0] = bad
    save_model(tmp_path, teacher, tiny.INFO)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: middle\.0\.conv0\.weight has values that are not finite"
    ):
        load_model(tmp_path)


def test_a_classifiers_weights_are_looked_at_too(tmp_path):
    net = Classifier(1, (8, 8), ("a", "b"), (4, 4, 8))
    net.save(tmp_path)
    Classifier.load(tmp_path)
    name, weight = next(iter(net.named_parameters()))
    weight.data.view(-1)[0] = math.nan
    net.save(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has values that are not finite"):
        Classifier.load(tmp_path)


def test_only_what_is_not_finite_is_refused():
    fine = {
        "huge": torch.full((1000,), 3e38),
        "half": torch.full((1000,), 65504.0, dtype=torch.half),
        "bf16": torch.full((1000,), 3e38, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.empty(0),
    }
    check_weights(fine, "x")
    with pytest.raises(ValueError, match=r"^x: pair has .* 0 more of its 6 tensors"):
        check_weights({**fine, "pair": torch.tensor([math.inf, -math.inf, 1.0])}, "x")
    with pytest.raises(ValueError, match=r"1 of 3 images of a batch, first number 1, are not finite"):
        check_images(torch.tensor([0.0, math.nan, 1e30]).reshape(3, 1, 1, 1))


def test_an_image_that_overflows_is_an_error_and_not_black():
    teacher = tiny.teacher()
    fine = Pipeline(teacher, tiny.INFO, lambda z, cond, _: z, nfe=1)
    fine(4)
    broken = Pipeline(teacher, tiny.INFO, lambda z, cond, _: torch.where(z > 2, z / 0, z), nfe=1)
    with pytest.raises(ValueError, match="are not finite"):
        broken(4)
