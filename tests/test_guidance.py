"""A guidance scale as an input of the student: the network, the fake score, and the distribution that comes out."""

import pytest
import tiny
import torch

from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, PairStore, fingerprint
from distmatch.diffusion.conditions import Classes, Guided, with_guidance
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.losses import REGRESSIONS, WEIGHTINGS
from distmatch.diffusion.sampler import heun
from distmatch.diffusion.schedule import EDM
from distmatch.methods.distill import Distiller, Networks
from distmatch.methods.terms import Match, NoiseStream, Objective, PairStream, Regress
from distmatch.models.edm.networks import SongUNet
from distmatch.models.folder import Info, save_model
from distmatch.models.guidance import embed_guidance
from distmatch.models.guidance import with_guidance as taking_guidance
from distmatch.models.mixture import mixture
from distmatch.models.mlp import MLP
from distmatch.pipeline import TeacherPipeline
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.subjects import subject
from distmatch.training.ema import EMA
from distmatch.training.optim import Optimizer

SCHEDULE = EDM(sigma_min=0.02, sigma_max=40.0)


class Shifted(Denoiser):
    """Two modes along the first axis; the second is normal, and the class moves its mean from 0 to 0.5.

    Guided scores `uncond + w (cond - uncond)` are then those of a mixture as well, at every noise level: the second
    mean becomes `0.5 w` and nothing else changes.
    """

    def __init__(self):
        super().__init__(torch.nn.Identity(), SCHEDULE, Prediction("edm", sigma_data=1.5))
        self.uncond, self.cond = self.exact(0.0), self.exact(1.0)

    def forward(self, x, t, cond=None):
        return (self.uncond if cond is None or cond.label is None else self.cond)(x, t)

    @staticmethod
    def exact(w):
        return mixture(SCHEDULE, [[-1.5, 0.5 * w], [1.5, 0.5 * w]], [0.5, 0.5], [0.7, 0.3])


def test_guidance_of_each_sample_is_exact():
    """`guided(teacher, None)` takes each sample's own scale, and is the exact denoiser of the mixture of that scale."""
    teacher, generator = Shifted(), torch.Generator().manual_seed(0)
    x, t = torch.randn(64, 2, generator=generator, dtype=torch.float64), torch.rand(64, generator=generator) * 5 + 0.1
    w = torch.arange(64) % 4 + 1.0
    out = guided(teacher, None)(x, t.double(), Cond(label=torch.zeros(64).long(), extra={"guidance": w}))
    for scale in range(1, 5):
        rows = w == scale
        assert torch.allclose(out[rows], Shifted.exact(scale)(x[rows], t[rows].double()), atol=1e-9)


def test_the_students_distribution_follows_the_guided_one(tmp_path):
    """Distilled with scales drawn from 1 to 6, at scales 1, 3 and 6: both means, both spreads, the share of a mode."""
    teacher = Shifted()
    conditions = Guided(Classes(1), 1.0, 6.0)
    torch.manual_seed(0)
    start = taking_guidance(MLP(2, width=96, depth=3))
    student, fake = (Denoiser(net, SCHEDULE, teacher.prediction) for net in (start, taking_guidance(start)))
    spec = PairSpec(
        teacher="shifted", fingerprint=fingerprint(teacher), sampler="heun", steps=20, guidance=None, seed=0,
        count=4000, shard_size=4000, shape=(2,), classes=1, dtype="float32", guidances=(1.0, 6.0),
    )  # fmt: skip
    build(tmp_path, spec, teacher, conditions, batch=4000)
    steps = 1000
    d = Distiller(
        Networks(student, fake, average=EMA(student, 0.99)),
        Objective(
            {
                "noise": NoiseStream((2,), conditions, batch=192),
                "pairs": PairStream(PairStore.open(tmp_path), conditions, batch=48),
            },
            [
                Match(teacher, fake, weighting=WEIGHTINGS["algorithm2"], steps=(20, 800), real=guided(teacher, None)),
                Regress(REGRESSIONS["mse"], weight=1.0),
            ],
        ),
        Optimizer(student.parameters(), lr=2e-3, steps=steps, decay=0.5),
        Optimizer(fake.parameters(), lr=2e-3, steps=steps, decay=0.5),
        info=Info((2,), ("one",), times=(40.0,), guidance=(1.0, 6.0)),
    )  # fmt: skip
    for index in range(steps):
        d.step(index)

    z = torch.randn(8000, 2, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 3.0, 6.0):
        cond = with_guidance(Cond(label=torch.zeros(8000).long()), torch.full((8000,), scale))
        with torch.no_grad():
            x = d.steps.sample(d.ema.network, SCHEDULE, z, cond)
            exact = heun(guided(teacher, scale), SCHEDULE, z, cond, 20)
        real = Shifted.exact(scale).sample(8000, torch.Generator().manual_seed(2))
        assert exact.mean(0)[1].item() == pytest.approx(0.5 * scale, abs=0.05)  # the closed form itself
        assert x.mean(0)[1].item() == pytest.approx(0.5 * scale, abs=0.12), scale
        assert x.std(0)[1].item() == pytest.approx(0.5, abs=0.1), scale
        assert x.mean(0)[0].item() == pytest.approx(real.mean(0)[0].item(), abs=0.15), scale
        assert x.std(0)[0].item() == pytest.approx(real.std(0)[0].item(), abs=0.15), scale
        assert (x[:, 0] < 0).double().mean().item() == pytest.approx(0.7, abs=0.05), scale


def test_a_network_with_the_input_computes_what_it_did(tmp_path):
    denoiser = tiny.teacher()
    given = taking_guidance(denoiser.net)
    x, noise, cond = torch.randn(3, 1, 8, 8), torch.rand(3), Cond(label=torch.arange(3))
    w = with_guidance(cond, torch.tensor([1.0, 4.0, 8.0]))
    assert torch.equal(given(x, noise, w), denoiser.net(x, noise, cond))
    torch.nn.init.normal_(given.guidance.weight, std=0.1)
    assert not torch.allclose(given(x, noise, w), denoiser.net(x, noise, cond), atol=1e-3)
    with pytest.raises(ValueError, match="this network takes a guidance scale"):
        given(x, noise, cond)
    with pytest.raises(ValueError, match="the network SongUNet takes no guidance scale"):
        taking_guidance(SongUNet(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, num_blocks=1))


def test_the_embedding_tells_scales_apart():
    embedded = embed_guidance(torch.tensor([1.0, 1.01, 4.0, 8.0]), 256)
    assert torch.equal(embedded[0], torch.cat([torch.zeros(128), torch.ones(128)]))
    assert torch.cdist(embedded, embedded).fill_diagonal_(9).min() > 1


def test_a_recipe_trains_a_student_whose_guidance_is_chosen(tmp_path):
    from distmatch import DistilledPipeline
    from distmatch.commands.distillation import distil

    changes = ["student.guidance=[1, 4]", "steps=4", f"pairs.path={tmp_path / 'pairs'}"]
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), changes)
    distil(recipe, tmp_path / "run", tmp_path)
    pipe = DistilledPipeline.from_pretrained(tmp_path / "run")
    assert pipe.info.guidance == (1.0, 4.0)
    low, middle, high = (pipe(3, labels=1, guidance_scale=w).pixels.int() for w in (1, 2.5, 4))
    assert not torch.equal(low, high)
    assert torch.equal(middle, pipe(3, labels=1).pixels)
    with pytest.raises(ValueError, match=r"guidance_scale 4.5 is out of range; this student learnt 1 to 4"):
        pipe(1, guidance_scale=4.5)


TAUGHT, IMPORTED = {"teach": {"label_dropout": 0.0}}, {"imported": {"file": "x.pkl"}}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            Info((1, 8, 8), ("a", "b", "c"), card=TAUGHT),
            "label dropout 0, .*; teach it with --label-dropout 0.1, or use",
        ),
        (
            Info((1, 8, 8), ("a", "b", "c"), card={"imported": {"file": "x.pkl"}}),
            "label dropout 0, .* never trained; use guidance",
        ),
        (
            Info((1, 8, 8), ("a", "b", "c"), card={"teach-text": {"text_dropout": 0.0}}),
            "text dropout 0, .* without a text .*; teach it with --text-dropout 0.1, or use",
        ),
        (Info((1, 8, 8)), "neither classes nor prompts to be guided by"),
    ],
)
def test_a_teacher_that_never_went_without_labels_is_not_guided(info, message, tmp_path):
    """By no command: `sample`, `eval` and `serve` make a `TeacherPipeline`, `train` and `pairs build` a subject."""
    denoiser = tiny.teacher()
    with pytest.raises(ValueError, match=f"guidance 3: .*{message}"):
        TeacherPipeline(denoiser, info, guidance=3.0)
    TeacherPipeline(denoiser, info, guidance=1.0)
    save_model(tmp_path / "taught", denoiser, info)
    changes = ["match.guidance=3", "pairs.guidance=3", "student.guidance=[1,4]"]
    changes.append("stages=[{until: 4, change: {}}, {until: 12, change: {match.guidance: 3}}]")
    changes.append("terms=match pairs.guidance=3")  # of the teacher's images in the run's picture
    for change in changes:
        given = [f"teacher={tmp_path / 'taught'}", *([change] if "stages" in change else change.split())]
        recipe = load_recipe(str(tiny.recipe_file(tmp_path)), given)
        with pytest.raises(ValueError, match=message):
            subject(recipe)
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), [f"teacher={tmp_path / 'taught'}", "match.guidance=3"])
    subject(recipe.model_copy(update={"terms": ["regress"]}))  # which guides nothing


def test_a_teacher_taught_with_label_dropout_is_guided():
    TeacherPipeline(tiny.teacher(), Info((1, 8, 8), ("a",), card={"teach": {"label_dropout": 0.1}}), guidance=3.0)
