"""CLIP score: the same as by OpenCLIP's own functions, from every kind of file; refusals."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from distmatch.evaluation.clip import ClipScore

MODEL = "distmatch-test-tiny"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = ["a red bus", "two cats on a mat, close-up", ""]
PIXELS = torch.randint(0, 256, (3, 3, 50, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def open_clip():
    import open_clip  # seconds, which only the process of these tests need spend

    return open_clip


@pytest.fixture(scope="module")
def model(open_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / f"{MODEL}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return open_clip.create_model(MODEL).eval()


@pytest.fixture(scope="module")
def expected(open_clip, model):
    """Cosines by OpenCLIP's own API, picture by picture."""
    _, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    tokens = open_clip.get_tokenizer(MODEL)([f"A photo depicts {prompt}" for prompt in PROMPTS])
    cosines = []
    with torch.no_grad():
        for pixels, token in zip(PIXELS, tokens, strict=True):
            image = preprocess(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
            cosines.append(F.cosine_similarity(model.encode_image(image[None]), model.encode_text(token[None])))
    return torch.cat(cosines)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt", "folder/open_clip_model.safetensors"])
def test_the_cosines_are_openclips_from_every_kind_of_file(model, expected, tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    state = model.state_dict()
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if name == "w.pt" else state, file)
    score = ClipScore(file.parent if file.parent != tmp_path else str(file), MODEL)
    torch.testing.assert_close(score(PIXELS, PROMPTS), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01  # prompts and pictures matter
    swapped = score(PIXELS, PROMPTS[::-1])
    assert (swapped - expected)[[0, 2]].abs().min() > 1e-3
    assert swapped[1] == pytest.approx(float(expected[1]), abs=1e-6)


def test_refusals_say_what_to_fetch(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"fetch open_clip_model.safetensors or .* of laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    ):
        ClipScore(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=f"open_clip_pytorch_model.bin not found; expected the weights of .*{MODEL}"):
        ClipScore(tmp_path, MODEL)
    with pytest.raises(ValueError, match="CLIP model 'ViT-none' is unknown to OpenCLIP; the paper's is ViT-g-14"):
        ClipScore(tmp_path, "ViT-none")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=rf"other.safetensors holds no weights of {MODEL}: RuntimeError: (?s:.*)Missing key"
    ):
        ClipScore(tmp_path / "other.safetensors", MODEL)
    (tmp_path / "damaged.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=rf"damaged.bin holds no weights of {MODEL}"):
        ClipScore(tmp_path / "damaged.bin", MODEL)


class Harm:
    def __reduce__(self):
        raise_in = "raise SystemExit('executed')"
        return exec, (raise_in,)


def test_a_pickle_is_not_executed(model, tmp_path):
    torch.save({"state_dict": Harm()}, tmp_path / "harm.bin")
    with pytest.raises(ValueError, match=r"harm.bin holds no weights"):
        ClipScore(tmp_path / "harm.bin", MODEL)


@pytest.mark.parametrize(
    ("pixels", "prompts"), [(PIXELS.float(), PROMPTS), (PIXELS[:, :1], PROMPTS), (PIXELS, PROMPTS[:2])]
)
def test_pixels_of_another_kind_are_refused(model, tmp_path, pixels, prompts):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"CLIP score takes uint8 \(B, 3, H, W\) in 0..255 and a prompt for each"):
        ClipScore(tmp_path / "w.safetensors", MODEL)(pixels, prompts)
