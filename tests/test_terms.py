"""Terms of one's own and students of several steps, apart from the paper's two terms and one step."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_parallel import together

from distmatch import DistilledPipeline
from distmatch.commands.distillation import distil
from distmatch.diffusion.conditions import WHOLE, Classes
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.methods.terms import Samples
from distmatch.models.folder import save_model
from distmatch.pipeline import side_by_side
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import parallel
from distmatch.training.engine import blocks, features

OWN = Path(__file__).parent / "own_terms.py"
JUDGE = (f"own_terms={{judge: {{source: '{OWN}:Judge', weight: 0.5}}}}", "terms=[match, regress, judge]")


def recipe(folder, *changes, **entries):
    return load_recipe(str(tiny.recipe_file(folder, **entries)), [f"pairs.path={folder / 'pairs'}", *changes])


def distiller(folder, *changes):
    return built(recipe(folder, *changes), folder)


def built(found, folder):
    subject = subjects.subject(found)
    pairs = build.pair_store(found, subject, folder) if objectives.reads_pairs(found) else None
    return build.distiller(found, subject, pairs)


def test_a_term_of_ones_own_trains_the_student_the_fake_score_and_its_head(tmp_path):
    """One step written out: the weighted sum for the student, the plain sum for fake score and head."""
    d = distiller(tmp_path, *JUDGE, "student.optimizer.clip=0", "fake.optimizer.clip=0")
    judge = d.terms[2]
    part = d.draw(0, WHOLE)
    samples = {name: d.generate(start) for name, start in part.starts.items()}
    both = d.generate_all(part.starts)
    student, fake, head = list(d.student.parameters()), list(d.fake.parameters()), list(judge.head.parameters())

    def seen(term):
        x = torch.cat([both[name].x for name in term.reads])
        return Samples(x, Cond.cat(*(both[name].cond for name in term.reads)))

    total = sum(term.weight * term.student_loss(part.drawn[term.name], seen(term)) for term in d.terms)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(total, student, retain_graph=True)]).norm()
    apart = [(term, seen(term).detach()) for term in (d.terms[0], judge)]
    d.optimizer.lr = 0.0  # so that the fake score's losses are those of the same student
    losses = d.step(0)
    assert losses["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    fresh = distiller(tmp_path, *JUDGE, "student.optimizer.clip=0", "fake.optimizer.clip=0")
    terms = {term.name: term for term in fresh.terms}
    fakes = [terms[term.name].fake_loss(part.drawn[term.name], one) for term, one in apart]
    for name, loss in zip(("match", "judge"), fakes, strict=True):
        assert losses[f"{name}/fake"].item() == pytest.approx(loss.item(), rel=1e-4), name
    gradients = torch.autograd.grad(sum(fakes), list(fresh.fake.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert losses["fake_gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    assert not torch.equal(terms["judge"].head.weight, judge.head.weight)
    assert len(samples) == 2
    assert len(student) > 0
    assert len(fake) == len(list(fresh.fake.parameters()))
    assert len(head) == 2


def test_its_head_is_saved_and_goes_on_bit_for_bit(tmp_path):
    one = recipe(tmp_path, *JUDGE, steps=6, checkpoint={"every": 3})
    distil(one, tmp_path / "whole", tmp_path)
    with tiny.stopped_before(4):
        distil(one, tmp_path / "parts", tmp_path)
    distil(one, tmp_path / "parts", tmp_path)
    folders = [tmp_path / run / "checkpoints" / "step-00000006" for run in ("whole", "parts")]
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    tensors = [{k: v for f in run for k, v in load_file(f).items()} for run in files]
    assert any("judge.head" in name and "weight" in name for name in tensors[0])
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def _two(found, folder, out):
    torch.set_num_threads(1)
    with parallel.process_group():
        d = built(found, folder)
        losses = [{k: parallel.mean(v.clone()).item() for k, v in d.step(i).items()} for i in range(2)]
        if parallel.rank() == 0:
            torch.save((losses, d.terms[2].head.state_dict()), out)


def test_two_processes_train_its_head_as_one_does(tmp_path):
    found = recipe(tmp_path, *JUDGE)
    d = built(found, tmp_path)  # makes the pairs
    alone = [{k: v.item() for k, v in d.step(i).items()} for i in range(2)]
    together(2, _two, found, tmp_path, tmp_path / "two.pt")
    losses, head = torch.load(tmp_path / "two.pt")
    for one, two in zip(alone, losses, strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert torch.allclose(head["weight"], d.terms[2].head.weight, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["own_terms={a: {source: nowhere:A}}", "terms=[match, a]"], r"'nowhere:A' cannot be imported"),
        ([f"own_terms={{a: {{source: '{OWN}:Nobody'}}}}", "terms=[match, a]"], r"Nobody' cannot be imported"),
        ([f"own_terms={{a: {{source: '{OWN}:Judge', colour: 3}}}}", "terms=[match, a]"], r"own_terms.a: .*'colour'"),
        ([f"own_terms={{a: {{source: '{OWN}:Reader'}}}}", "terms=[match, a]"], r"a reads 'rollouts'; expected noise"),
        (["terms=[match, b]"], r"unknown term 'b' in terms; expected match, guide, regress"),
        (["own_terms={a: {weight: 1}}"], r"'own_terms.a.source' is missing"),
        ([f"own_terms={{match: {{source: '{OWN}:Judge'}}}}", "terms=match"], r"own_terms.match has the name of a term"),
        ([f"own_terms={{a: {{source: '{OWN}:Judge'}}}}", "terms=match"], r"own_terms.a is not in terms"),
        ([f"own_terms={{a: {{source: '{OWN}:Odd'}}}}", "terms=[match, a]"], r"raised ValueError: by the test, in .*ow"),
    ],
)  # fmt: skip
def test_one_that_cannot_be_is_named_before_anything_is_made(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        distil(recipe(tmp_path, *changes), tmp_path / "run", tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_features_are_what_blocks_returned():
    network = tiny.teacher()
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    calls = []
    handle = blocks(network)[1].register_forward_hook(lambda _, inputs, output: calls.append(output))
    with features(network, [1]) as found:
        network(x, t)
        handle.remove()
    assert torch.equal(found[1], calls[0])
    network(x, t)
    assert torch.equal(found[1], calls[0])  # outside, nothing is kept


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=lambda s: type(s).__name__)
def test_steps_noise_each_image_to_the_next_time(schedule):
    """Three steps written out, with a denoiser that is not linear."""
    high, middle, low = (schedule.t_max * part for part in (1.0, 0.4, 0.1))

    def model(x, t, cond):
        return torch.tanh(x / (1 + t[:, None]))

    z, first, second = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).unbind()
    steps = Steps((high, middle, low))
    at = [torch.full((5,), t) for t in (high, middle, low)]
    x = model(schedule.prior_std * z, at[0], None)
    x = model(schedule.alpha(at[1])[:, None] * x + schedule.sigma(at[1])[:, None] * first, at[1], None)
    start = schedule.alpha(at[2])[:, None] * x + schedule.sigma(at[2])[:, None] * second
    assert torch.allclose(steps.start(model, schedule, z, None, [first, second], 2), start)
    assert torch.allclose(steps.sample(model, schedule, z, None, [first, second]), model(start, at[2], None))
    assert len(steps) == 3
    for times in ((), (1.0, 1.0), (1.0, 2.0)):
        with pytest.raises(ValueError, match="expected one or more, falling"):
            Steps(times)


def test_training_takes_each_step_in_turn_and_makes_the_earlier_ones_without_gradient(tmp_path):
    d = distiller(tmp_path, "terms=match", "student.times=[80, 5, 0.5]")
    noise = d.objective.streams["noise"]
    starts = [d.start(noise, index, 0, WHOLE) for index in range(30)]
    assert {len(start.noise) for start in starts} == {0, 1, 2}
    last = next(start for start in starts if len(start.noise) == 2)
    halves = [d.start(noise, starts.index(last), 0, (part, 2)) for part in (0, 1)]
    for k in range(2):  # a row's noise does not depend on how the batch is shared
        assert torch.equal(torch.cat([half.noise[k] for half in halves]), last.noise[k])
    expected = d.steps.sample(d.student, d.student.schedule, last.z, last.cond, last.noise)
    samples = d.generate_all({"noise": last})["noise"]
    assert torch.allclose(samples.x, expected, atol=1e-5)
    x = d.steps.start(d.student, d.student.schedule, last.z, last.cond, last.noise, 2).detach()
    (gradient,) = torch.autograd.grad(d.steps.step(d.student, x, last.cond, 2).sum(), d.student.net.head.weight)
    (found,) = torch.autograd.grad(samples.x.sum(), d.student.net.head.weight)
    assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-4)
    assert not torch.equal(d.step(0)["match/fake"], torch.zeros(()))


def test_images_of_several_steps_are_the_same_in_every_batch(tmp_path):
    info = replace(tiny.INFO, times=(80.0, 5.0))
    save_model(tmp_path / "few", tiny.teacher(), info)
    pipe = DistilledPipeline.from_pretrained(tmp_path / "few")
    assert pipe.nfe == 2
    whole = pipe(7, seed=3).pixels
    assert torch.equal(pipe(7, seed=3, batch=2).pixels, whole)
    assert not torch.equal(pipe(7, seed=4).pixels, whole)
    sheets = [side_by_side(pipe, pipe, Classes(3), columns, 6 // columns)[0] for columns in (2, 3)]
    assert {row.tobytes() for row in sheets[0].reshape(-1, 3)} == {row.tobytes() for row in sheets[1].reshape(-1, 3)}


def test_the_file_of_a_term_runs_once(tmp_path):
    """Or its side effects are repeated, and `isinstance` of its own class fails between two questions."""
    file, ran = tmp_path / "mine.py", tmp_path / "ran.txt"
    file.write_text(f"open({str(ran)!r}, 'a').write('x')\n{OWN.read_text()}")
    distil(recipe(tmp_path, JUDGE[0].replace(str(OWN), str(file)), JUDGE[1], steps=1), tmp_path / "run", tmp_path)
    assert ran.read_text() == "x"
