"""The evaluation classifier: what it takes, what it learns, what it keeps on disk."""

import json

import pytest
import torch
from torch.nn import functional as F

from distmatch.data.images import Images
from distmatch.models.classifier import Classifier, Training, _shifted, accuracy, train_classifier
from distmatch.models.library import ASSETS
from distmatch.system.files import write_json
from distmatch.system.plain import read_json


def squares(n: int, seed: int) -> Images:
    """Noise with a brighter half, left, right, above or below: four classes that a linear rule can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    pixels = torch.randint(0, 160, (n, 1, 8, 8), generator=generator)
    half = torch.zeros(4, 1, 8, 8, dtype=torch.long)
    half[0, :, :, :4] = half[1, :, :, 4:] = half[2, :, :4] = half[3, :, 4:] = 90
    return Images((pixels + half[labels]).to(torch.uint8), labels, ("left", "right", "above", "below"))


def quick(**changes) -> Classifier:
    settings = {"steps": 60, "batch": 32, "lr": 5e-3, "seed": 0, **changes}
    return train_classifier(squares(500, 1), squares(200, 2), Training(**settings))


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return quick()


def test_a_few_steps_learn_a_separable_set(trained):
    fresh = squares(300, 3)
    assert accuracy(trained, fresh) > 0.97
    assert trained.config["accuracy"] == accuracy(trained, squares(200, 2), batch=7)
    assert trained.config["training"] == {"images": 500, "steps": 60, "batch": 32, "lr": 5e-3, "flip": False, "seed": 0}


def test_training_is_a_function_of_its_arguments():
    pixels = squares(20, 4).pixels
    torch.manual_seed(1)
    first = quick(steps=5)
    torch.manual_seed(2)
    assert torch.equal(quick(steps=5)(pixels), first(pixels))
    assert not torch.equal(quick(steps=5, seed=1)(pixels), first(pixels))


def test_saving_and_loading_keeps_every_bit(trained, tmp_path):
    trained.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    pixels = squares(50, 5).pixels
    features, logits = loaded.both(pixels)
    assert torch.equal(logits, trained(pixels))
    assert torch.equal(features, trained.features(pixels))
    assert torch.equal(loaded.head(features), logits)
    assert loaded.config == trained.config
    assert not loaded.training


def test_images_do_not_see_their_batch(trained):
    pixels = squares(9, 6).pixels
    alone = torch.cat([trained(p[None]) for p in pixels])
    torch.testing.assert_close(alone, trained(pixels), rtol=1e-4, atol=1e-4)


def test_other_pixels_are_refused(trained):
    with pytest.raises(ValueError, match=r"pixels are torch.float32; expected uint8"):
        trained(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"pixels are \(2, 3, 8, 8\); this classifier takes \(B, 1, 8, 8\)"):
        trained.features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_folders_that_hold_no_classifier_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"absent is not a classifier: it has no config.json"):
        Classifier.load(tmp_path / "absent")
    trained.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    write_json(config, {**read_json(config, dict), "format": "distmatch-model-1"})
    with pytest.raises(ValueError, match="is not of format 'distmatch-classifier-1'"):
        Classifier.load(tmp_path)
    for damaged in ("{", "[]", json.dumps({"format": "distmatch-classifier-1"}), text.replace("64", "48")):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"is damaged|is not valid JSON|has the wrong form"):
            Classifier.load(tmp_path)
    config.write_text(text)
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        Classifier.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        Classifier.load(tmp_path)


def test_images_that_cannot_train_a_classifier_are_refused():
    good = squares(20, 1)
    settings = Training(steps=1, batch=2, lr=1e-3)
    with pytest.raises(ValueError, match="the test images have no labels"):
        train_classifier(good, Images(good.pixels, None, ()), settings)
    with pytest.raises(ValueError, match=r"of 4 classes, test images \(1, 8, 8\) of 2"):
        train_classifier(good, Images(good.pixels, good.labels, ("a", "b")), settings)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) of 4 classes, test images \(1, 7, 8\)"):
        train_classifier(good, Images(good.pixels[:, :, 1:], good.labels, good.classes), settings)


def test_shifts_are_crops_of_the_edge_padded_image():
    pixels = torch.randint(0, 256, (200, 2, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shifted = _shifted(pixels, 1, torch.Generator().manual_seed(1))
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    crops = [padded[:, :, y : y + 6, x : x + 5] for y in range(3) for x in range(3)]
    hits = torch.stack([(crop == shifted).flatten(1).all(1) for crop in crops])
    assert (hits.sum(0) == 1).all()
    assert hits.any(1).all()
    assert torch.equal(_shifted(pixels, 0, torch.Generator()), pixels)


def test_the_classifier_of_the_package():
    folder = ASSETS / "mnist" / "classifier"
    net = Classifier.load(folder)
    assert net.config["accuracy"] >= 0.99
    assert net.config["classes"] == list("0123456789")
    assert net.features(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).shape == (1, 64)
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
