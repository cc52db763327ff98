"""The recipes of the package: the paper's numbers, and every one runs."""

import json

import pytest
import torch

from distmatch.commands.train import train
from distmatch.data.images import load_images
from distmatch.models.folder import load_adapter, load_model
from distmatch.models.library import find_model
from distmatch.recipe.loading import load_recipe, recipes
from distmatch.recipe.smoke import make_networks
from distmatch.recipe.steps import student_steps

# Appendix B: teacher, pairs, sampler steps, learning rate, batch, lambda, iterations.
PAPER = {
    "cifar10-cond": ("edm-cifar10-32x32-cond-vp", 100_000, 18, 5e-5, 392, 0.25, 300_000),
    "cifar10-uncond": ("edm-cifar10-32x32-uncond-vp", 500_000, 18, 5e-5, 392, 0.5, 300_000),
    "imagenet64-cond": ("edm-imagenet-64x64-cond-adm", 25_000, 256, 2e-6, 336, 0.25, 350_000),
}
ABLATIONS = {"": (["match", "regress"], None), "-nodm": (["regress"], None), "-noreg": (["match"], 1e-5)}


@pytest.mark.parametrize("name", [n for n in recipes() if n.startswith(tuple(PAPER))])
def test_the_papers_numbers(name):
    base = next(p for p in PAPER if name.startswith(p))
    teacher, count, steps, lr, batch, weight, iterations = PAPER[base]
    terms, other_lr = ABLATIONS[name.removeprefix(base)]
    recipe = load_recipe(name)
    assert recipe.teacher.endswith(f"/{teacher}.pkl")
    assert recipe.terms == terms
    assert (recipe.steps, recipe.match.batch, recipe.regress.batch) == (iterations, batch, batch)
    assert (recipe.pairs.count, recipe.pairs.sampler, recipe.pairs.steps) == (count, "heun", steps)
    assert (recipe.regress.loss, recipe.regress.size, recipe.regress.weight) == ("lpips", 224, weight)
    assert (recipe.match.weighting, recipe.match.weight, recipe.fake.steps) == ("algorithm2", 1.0, 1)
    assert (recipe.match.bins, recipe.match.min_step, recipe.match.max_step) == (1000, 20, 980)
    for optimiser in (recipe.student.optimizer, recipe.fake.optimizer):
        assert optimiser.lr == (other_lr or lr)
        assert (optimiser.betas, optimiser.weight_decay, optimiser.clip) == ((0.9, 0.999), 0.01, 10.0)
    assert recipe.expected


def test_the_papers_numbers_of_laion():
    """Appendix B.3 and B.4."""
    for name, guidance, iterations, match, regress, count in (
        ("sd15-laion-6.25", 3.0, 20_000, 2304, 1152, 500_000),
        ("sd15-laion-6plus", 8.0, 165_000, 2560, 1280, 12_000_000),
    ):
        recipe = load_recipe(name)
        assert (recipe.match.guidance, recipe.pairs.guidance, recipe.steps) == (guidance, guidance, iterations)
        assert (recipe.match.batch, recipe.regress.batch, recipe.pairs.count) == (match, regress, count)
        assert (recipe.pairs.sampler, recipe.pairs.steps, recipe.pairs.dtype) == ("pndm", 50, "float16")
        assert (recipe.regress.loss, recipe.regress.decoder, recipe.regress.weight) == ("lpips", "tiny", 0.25)
        assert (recipe.match.pairs, recipe.match.weighting, recipe.match.bins) == (True, "algorithm2", 1000)
        assert (recipe.match.min_step, recipe.match.max_step) == (20, 980)
        assert (recipe.gradient_checkpointing, recipe.precision, recipe.student.times) == (True, "bf16", None)
        for optimiser in (recipe.student.optimizer, recipe.fake.optimizer):
            assert (optimiser.lr, optimiser.betas, optimiser.weight_decay) == (1e-5, (0.9, 0.999), 0.01)
            assert optimiser.clip > 0
        assert recipe.expected


def test_the_published_numbers_of_dmd2():
    """DMD2's scripts of its GAN, experiments/imagenet and experiments/sdv1.5."""
    recipe = load_recipe("imagenet64-dmd2")
    assert (recipe.terms, recipe.fake.steps, recipe.match.batch, recipe.steps) == (
        ["match", "gan"],
        5,
        280,
        193_500 / 5,
    )
    assert (recipe.gan.weight, recipe.gan.head_weight, recipe.gan.features) == (3e-3, 1e-2, "fake")
    assert recipe.student.optimizer.lr == recipe.fake.optimizer.lr == 2e-6
    recipe = load_recipe("sd15-dmd2")
    assert (recipe.terms, recipe.fake.steps, recipe.match.batch) == (["match", "gan"], 10, 32 * 64)
    assert (recipe.match.guidance, recipe.gan.head_weight) == (1.75, 1e-2)
    stages = [(one.gan.weight, one.student.optimizer.lr, one.fake.optimizer.lr) for one in recipe.parts]
    assert stages == [(0, 1e-5, 1e-5), (1e-3, 5e-7, 5e-7)]
    assert [stage.until for stage in recipe.stages] == [39_000 / 10, 41_000 / 10]


def test_the_stages_are_table_5():
    """Pairs in millions, weight, highest bin, decoder, batches per GPU of 80, cumulative iterations."""
    rows = """
        2.5 .1 980 tiny 32 16 5400
        2.5 .5 980 tiny 32 16 8600
        2.5 1 980 tiny 32 16 21100
        4 1 980 tiny 32 16 56300
        6 1 980 tiny 32 16 60100
        9 1 980 tiny 32 16 68000
        12 1 980 tiny 32 16 74000
        12 1 500 tiny 32 16 80000
        12 1 500 full 16 4 127000
        12 .75 500 full 16 4 149500
        12 .5 500 full 16 4 162500
        12 .25 500 full 16 4 165000
    """
    recipe = load_recipe("sd15-laion-6plus")
    assert len(recipe.stages) == 12
    for number, row in enumerate(rows.strip().splitlines()):
        million, weight, highest, decoder, match, regress, until = row.split()
        stage = recipe.stage(number)
        assert recipe.stages[number].until == int(until)
        assert stage.pairs.count == float(million) * 1e6
        assert (stage.regress.weight, stage.match.max_step) == (float(weight), int(highest))
        assert stage.regress.decoder == decoder
        assert (stage.match.batch, stage.regress.batch) == (80 * int(match), 80 * int(regress))
        assert stage.match.guidance == 8


def test_real_images_at_smoke_scale_are_as_large_as_the_teachers(tmp_path):
    make_networks(load_recipe("sana-1step", ["terms=match,gan"]), tmp_path)
    assert load_images(tmp_path / "images").pixels.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_runs_at_smoke_scale(name, tmp_path):
    """Every term of the recipe has its loss, the fake score is trained where there is one, and the student moves."""
    train(name, runs=tmp_path, scale="cpu-smoke")
    folder = tmp_path / "cpu-smoke" / name
    recipe = load_recipe(str(folder / name / "recipe.yaml"))
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "gradient_norm" in line]
    assert [line["step"] for line in losses] == list(range(1, recipe.steps + 1))
    for line in losses:
        ends = [stage.until for stage in recipe.stages] or [recipe.steps]
        terms = recipe.parts[sum(end < line["step"] for end in ends)].terms
        expected = {
            *(f"{term}/student" for term in terms),
            *(["match/fake", "fake_gradient_norm"] if "match" in terms else []),
        }
        assert expected <= line.keys()
        assert not {"match/student", "regress/student", "match/fake"} - expected & line.keys()
        for key in expected:  # both scores start as one network, and the matching loss at zero
            # With guidance the real score is another from the start.
            zero = (
                key == "match/student"
                and line == next(one for one in losses if key in one)
                and not recipe.student.network
                and recipe.match.guidance == 1
            )
            assert (line[key] == 0) == zero, key
    shown = {*range(0, recipe.steps + 1, 2), *(stage.until for stage in recipe.stages)}
    previews = {f"step-{step:08d}.png" for step in shown}
    assert {p.name for p in (folder / name / "previews").iterdir()} == previews
    student, info = load_model(folder / name / "model")
    assert info.times == student_steps(recipe, student.schedule).times
    if recipe.student.network is None:
        teacher, _ = find_model(recipe.teacher, "teacher")
        pairs = zip(teacher.named_parameters(), student.parameters(), strict=True)
        moved = {name for (name, a), b in pairs if not torch.equal(a, b)}
        trained = {name for name, _ in student.named_parameters()}
        if recipe.student.adapter.rank:
            trained = {f"net.{layer}.weight" for layer in load_adapter(folder / name / "model")}
        assert moved <= trained
        assert len(moved) > len(trained) / 2


def test_a_base_is_merged_group_by_group(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar10-cond-noreg\ndescription: mine\nfake: {steps: 5}\n")
    mine, base = load_recipe(str(tmp_path / "mine.yaml"), ["fake.optimizer.lr=3e-6"]), load_recipe("cifar10-cond-noreg")
    optimizer = base.fake.optimizer.model_copy(update={"lr": 3e-6})
    fake = base.fake.model_copy(update={"steps": 5, "optimizer": optimizer})
    said = {"name": "mine", "description": "mine", "expected": ""}  # what is said of a base is not said of its heirs
    assert base.expected
    assert mine == base.model_copy(update={**said, "fake": fake})
    (tmp_path / "lost.yaml").write_text("base: cifar10-con\n")
    with pytest.raises(ValueError, match=r"lost.yaml: its base 'cifar10-con' is unknown; did you mean 'cifar10-cond'"):
        load_recipe(str(tmp_path / "lost.yaml"))
    (tmp_path / "loop.yaml").write_text(f"base: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(ValueError, match="has itself as base"):
        load_recipe(str(tmp_path / "loop.yaml"))
