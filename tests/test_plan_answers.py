"""What a plan is asked and how it answers: cards, precision, units, prices."""

import gc
import inspect
import warnings
from pathlib import Path
from typing import get_args
from weakref import ref

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from test_plan import said

from distmatch.commands.plan import plan
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.diffusers.tiny_patched import write_tiny_flux
from distmatch.models.folder import save_model
from distmatch.models.info import Info
from distmatch.models.library import family_of, find_model, outline
from distmatch.planning import plan as planning
from distmatch.planning.cost import Cost, Traffic, numel
from distmatch.planning.gpus import GPUS, Gpu
from distmatch.planning.plan import LAUNCHED, REPLAYED, Cluster, _memory, bill, missing_bf16, pace, settled
from distmatch.planning.weightless import regression
from distmatch.recipe.loading import load_recipe
from distmatch.system.digests import load_file
from distmatch.system.errors import UserError
from distmatch.system.garbage import no_collection
from distmatch.system.screen import console, duration
from distmatch.system.screen import size as shown


def test_gpus_are_those_of_the_command():
    gpus, _ = get_args(inspect.signature(plan).parameters["gpu"].annotation)
    assert sorted(GPUS) == sorted(get_args(gpus))
    t4, a100 = GPUS["t4"], GPUS["a100"]
    assert [t4.rate(precision) for precision in ("fp32", "bf16", "fp16")] == [8.1e12, 8.1e12, 65e12]  # no bf16
    assert [a100.rate(precision) for precision in ("fp32", "bf16", "fp16")] == [156e12, 312e12, 312e12]
    for gpu in GPUS.values():  # 2:4 sparsity would be four times fp32, at least
        assert gpu.bf16 / gpu.fp32 == pytest.approx(2, rel=0.05) or gpu in (t4, GPUS["mi300x"])


def test_auto_is_the_precision_in_which_a_gpu_is_faster():
    recipe = load_recipe("cifar10-cond", ["precision=auto", "pairs.precision=auto"])
    for gpu, faster in (("a100", "bf16"), ("t4", "fp32")):
        found = settled(recipe, GPUS[gpu])
        assert (found.precision, found.pairs.precision) == (faster, faster)
    asked = load_recipe("cifar10-cond", ["precision=bf16", "pairs.precision=fp16"])
    assert settled(asked, GPUS["t4"]) == asked


def test_a_card_without_bf16_says_so_where_a_recipe_counts_on_it(planner, tmp_path):
    def lack(gpu, *changes):
        return missing_bf16(load_recipe("cifar10-cond", [*changes]), gpu, GPUS[gpu])

    auto, bf16 = ("precision=auto", "pairs.precision=auto"), ("precision=bf16", "pairs.precision=fp16")
    assert lack("t4", *auto) == "the t4 has no bf16: precision auto is fp32, pairs.precision auto is fp32"
    assert lack("t4", *bf16) == "the t4 has no bf16: precision bf16 is emulated, no faster than fp32"
    assert lack("t4", *auto, "terms=match") == "the t4 has no bf16: precision auto is fp32"  # without pairs
    assert lack("t4", "precision=fp32", "pairs.precision=fp32") == lack("a100", *auto) == lack("a100", *bf16) == ""
    file = str(tiny.recipe_file(tmp_path, precision="auto"))
    text = planner(said, "plan", file, "--gpu", "t4")
    assert text.count("the t4 has no bf16: precision auto is fp32") == 1
    assert "no bf16" not in planner(said, "plan", file)


def test_a_small_step_takes_as_long_as_its_kernels_do(planner, tmp_path):
    made = Cost(1, {"student": 1e6}, {}, Traffic(1), 0, kernels=1000)
    one = Cluster(1, GPUS["h100"], 1e9, 0.4)
    for changes, seconds in ((), 1000 * LAUNCHED), (("cuda_graphs=true",), 1000 * REPLAYED), (("compile=true",), 0):
        assert pace(made, load_recipe("mnist", [*changes]), one).kernels == seconds
    file = str(tiny.recipe_file(tmp_path))
    text = planner(said, "plan", file, "steps=1000", "--gpu", "h100")
    kernels, what, _ = text.partition("a step has ")[2].partition(" kernels, each of which takes about 30 µs from Py")
    assert what
    together = duration(1000 * int(kernels.replace(",", "")) * LAUNCHED)
    assert f"training: {together}\n  Arithmetic is " in text
    assert "accumulate" not in text
    text = planner(said, "plan", file, "steps=1000", "accumulate=2", "--gpu", "h100")
    assert f"a step has {2 * int(kernels.replace(',', '')):,} kernels" in text
    assert "from Python; fewer with accumulate=1, in more memory" in text
    assert "Arithmetic is " not in planner(said, "plan", file, "--utilisation", "1e-9")
    text = planner(said, "plan", file, "steps=1000", "compile=true", "--gpu", "h100")
    assert f"  In practice longer: without compile, launching its kernels would take {together}" in text
    assert "In practice" not in planner(said, "plan", file, "compile=true", "--utilisation", "1e-9")


def test_what_a_plan_made_is_not_looked_through_for_garbage_at_its_end():
    """It would take half a second, when all that is left to do is to exit."""

    class Loop:
        def __init__(self):
            self.itself = self

    with no_collection():
        kept = [[] for _ in range(10_000)]
        lost = ref(Loop())
    assert gc.isenabled()
    assert gc.get_count()[0] < len(kept)
    assert lost() is not None
    gc.collect()
    assert lost() is None


def test_amounts_have_units_that_fit():
    assert [shown(n) for n in (0, 999, 1e3, 1.26e6, 24.06e9, 3.93e14)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "1.3 MB", "24.1 GB", "393.0 TB")
    ]
    assert [duration(s) for s in (2e-5, 0.0452, 3.42, 59.96, 90, 4572, 3600 * 36, 3600 * 1368.4, 1e8)] == [
        *("20.0 µs", "45.2 ms", "3.42 s", "60.0 s", "1.50 minutes", "1.27 hours", "36.0 hours", "57.0 days"),
        "3.17 years",
    ]
    assert duration(3600 * 1368.4, of="GPU-") == "1,368 GPU-hours"
    assert duration(90, 5400) == "1.50 to 90.0 minutes"
    assert duration(3600.0, 3600.1, of="GPU-") == "1.00 GPU-hours"


def test_a_table_of_memory_explains_its_dashes():
    def table(*gradients):
        kept, recomputed = (Cost(1, {}, {"student": 4, "gradients": n}, Traffic(1), 0) for n in gradients)
        with console.capture() as screen:
            console.print(_memory(kept, recomputed, False, "one a100, 80 GB"))
        return screen.get()

    explained = "-: adds nothing when a step takes the most"
    for text, dashes in ((table(8, 8), 0), (table(0, 8), 1), (table(0, 0), 0)):
        rows = [line.split() for line in text.splitlines()]
        assert (sum(row.count("-") for row in rows), text.count(explained)) == (dashes, dashes)


def test_a_price_is_that_of_all_gpus():
    told = bill(2.5, 4, 1800, (3600, 7200))
    assert "$5.00 for the pairs and $10.00 to $20.00 for training, $15.00 to $25.00 in all" in told
    assert bill(2, 72, 0, (68400, 68400)).startswith("price: $2,736 for training, at $2.00")


def test_the_students_folder_and_the_hosts_memory_are_those_of_the_models(planner, tmp_path):
    """Networks are read in fp32, of the autoencoder the decoder; the student's folder has its network."""
    source = str(write_tiny_sd(tmp_path / "sd"))
    changes = (f"teacher=diffusers:{source}", "terms=match", "match.batch=2")
    text = planner(said, "plan", "sd15-laion-6.25", *changes, "--gpus", "2").replace("\n", " ")
    denoiser, info = find_model(f"diffusers:{source}", "teacher")
    save_model(tmp_path / "student", denoiser, info)
    weights = sum(tensor.nbytes for tensor in load_file(tmp_path / "student" / "model.safetensors").values())
    vae = DiffusionPipeline.from_pretrained(source).vae
    networks = (*family_of(info).encoders(source), denoiser, vae.decoder, vae.post_quant_conv)
    assert f"the student's folder: {shown(weights)} " in text
    assert f"host memory per process: {shown(4 * sum(map(numel, networks)))} while the models are read, " in text


def test_a_decoder_of_other_latents_is_refused_as_in_training(tmp_path):
    other = ["teacher=diffusers:black-forest-labs/FLUX.1-dev", "regress.decoder=tiny"]  # of 16 channels
    for changes, mistake in (
        (other, "taesd decodes latents of 4 channels; those of 'diffusers:black-forest-labs/FLUX.1-dev' are"),
        (["regress.decoder=tiny"], "regress.decoder 'tiny' is for latents; .* makes images: use none"),
    ):
        recipe = load_recipe(str(tiny.recipe_file(tmp_path)), changes)
        with pytest.raises(UserError, match=mistake):
            regression(recipe, outline(recipe.teacher)[1])


def test_a_network_with_rms_norms_is_planned_without_warnings(planner, tmp_path):
    """PyTorch warns of them if they meet inputs in bf16, as they do under the autocast of a CPU."""
    changes = [f"teacher=diffusers:{write_tiny_flux(tmp_path / 'flux')}", "terms=match", "base_weights=bf16"]
    changes += ["student.adapter.rank=2", "fake.adapter.rank=2", "precision=bf16"]
    assert "it fits" in planner(_said_without_warnings, "plan", str(tiny.recipe_file(tmp_path)), *changes)


def _said_without_warnings(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)  # not only once in a process
        try:
            return said(*arguments)
        finally:
            torch.set_warn_always(False)


def test_pairs_that_only_a_term_of_your_own_reads_are_planned(planner, tmp_path):
    source = f"{Path(__file__).parent / 'own_terms.py'}:Judge"
    own = (f"own_terms={{judge: {{source: '{source}'}}}}", "terms=match,judge")
    file = str(tiny.recipe_file(tmp_path))
    assert "pairs: 6.1 kB, " in planner(said, "plan", file, *own)
    assert "pairs: " not in planner(said, "plan", file, "terms=match")


def test_a_plan_of_stages_is_that_of_the_one_that_takes_the_most(planner, tmp_path):
    light = {"terms": ["regress"]}
    for heaviest, changes in ((2, [light, {}]), (1, [{}, light])):
        stages = [{"until": until, "change": change} for until, change in enumerate(changes, 1)]
        text = planner(said, "plan", str(tiny.recipe_file(tmp_path, steps=2, stages=stages, device="cpu")))
        assert f"those of stage {heaviest}, which takes the most" in text
        assert " fake score " in text  # in its table


SLOW = Cluster(2, Gpu(80e9, bf16=1e15, fp32=5e14, link=1e11), 1e9, 0.5)


def test_pairs_take_as_long_as_their_evaluations_or_their_kernels(monkeypatch):
    """10 batches of 9 evaluations on two GPUs, in the pairs' own precision."""
    changes = ("pairs.count=1000", "pairs.batch=100", "pairs.sampler=heun", "pairs.steps=5", "precision=fp32")
    info = Info((3, 32, 32))

    def seconds(flops, *more):
        monkeypatch.setattr(planning, "evaluated", lambda *_: (flops, 1000))
        return planning._tell_pairs([load_recipe("cifar10-cond", [*changes, *more])], None, info, SLOW)

    assert seconds(1e12, "pairs.precision=fp32") == pytest.approx(18)
    assert seconds(1e12, "pairs.precision=bf16") == pytest.approx(9)
    assert seconds(1e9, "pairs.precision=fp32") == pytest.approx(5 * 9 * 1000 * LAUNCHED)


def test_training_takes_the_steps_of_each_stage_and_none_is_faster_than_its_kernels():
    """A stage of 10 steps, with traffic beside arithmetic, and one of 20 that wait for Python."""
    costs = [
        Cost(1, {"student": flops}, {}, Traffic(2, reduced=1e11), 0, kernels)
        for flops, kernels in ((1e15, 0), (2.5e14, 100_000))
    ]
    recipe = load_recipe("mnist", ["precision=fp32"])
    fast, slow = planning._tell_training(recipe, costs, [10, 30], SLOW)
    launched = 20 * 100_000 * LAUNCHED
    assert (fast, slow) == pytest.approx((10 * 2 + launched, 10 * 3 + launched))


def test_the_disk_has_room_for_the_best_checkpoint_and_the_next(capsys):
    made = Cost(1, {}, {}, Traffic(1), 1e9)
    for every, kept in (0, 2), (100, 3):
        planning._tell_disk(load_recipe("mnist", ["checkpoint.keep=2", f"evaluate.every={every}"]), made)
        told = capsys.readouterr().out
        assert f"{kept} kept" in told
        assert shown((kept + 1) * 1e9) in told
