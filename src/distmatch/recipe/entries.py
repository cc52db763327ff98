"""A recipe: all its entries, those of networks and terms included.

Each entry has a type, a range, a default, a description and its source, and facts for the program.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from distmatch.recipe import consistency
from distmatch.recipe.earlier import present_name, renamed
from distmatch.recipe.entry import entry, marked, set_entry, walk
from distmatch.recipe.kinds import Factor, Natural, Place, Positive, Strict
from distmatch.recipe.mistakes import explain
from distmatch.recipe.network_entries import Fake, Student
from distmatch.recipe.term_entries import GanTerm, GuideTerm, MatchTerm, OwnTerm, RealImages, RegressTerm
from distmatch.system.errors import UserError


class Pairs(Strict):
    """The noise-image pairs; see `data.pairs.PairSpec`."""

    path: Place | None = entry(
        None,
        "Folder or URL of the store. null: a folder next to the runs, shared by all runs with this teacher and these "
        "settings.",
        "ours",
        unnamed=True,
    )
    count: Positive = entry(
        100_000, "Number of pairs; raising it adds pairs.", "Appendix B: 25,000 to 12,000,000", pairs=True, small=4
    )
    sampler: Literal["heun", "euler", "ddim", "dpm", "pndm", "flow"] = entry(
        "heun",
        "Deterministic sampler for the teacher; ddim, dpm (DPM-Solver++), pndm and flow, by diffusers, are for models "
        "in its format, whose scheduler's settings they follow; flow is for flow models such as Stable Diffusion 3.",
        "Section 3.3: heun, pndm for LAION",
        pairs=True,
    )
    steps: Positive = entry(
        18,
        "Steps of the sampler; heun evaluates the teacher 2 steps - 1 times.",
        "Appendix B: 18 for CIFAR-10, 256 for ImageNet, 50 for LAION",
        pairs=True,
        small=3,
    )
    taken: Positive | None = entry(
        None,
        "Steps of the sampler (euler or heun) that are taken, the first of them; the pair's image is then the one to "
        "which a straight step from the noise would lead there. For students of several steps, whose first step "
        "regress anchors to it. null: all.",
        "DP-DMD, arXiv 2602.03139: 5 to 10 of 30",
        pairs=True,
    )
    guidance: Factor = entry(
        1.0,
        "Scale of classifier-free guidance during sampling, as in match.guidance. 1: no guidance.",
        "Section 3.4; Appendix B: 3 and 8 for LAION",
        pairs=True,
    )
    seed: int = entry(0, "Seed of the pairs' noise.", "ours", pairs=True)
    dtype: Literal["float32", "float16"] = entry("float32", "Data type in which images are stored.", "ours", pairs=True)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = entry(
        "fp32",
        "Arithmetic of the teacher during sampling; bf16 and fp16 by autocast. auto: as for the recipe's precision.",
        "ours",
        pairs=True,
        small="fp32",  # a trial runs on CPUs, many of which have no fast bf16: there it takes up to 40 times as long
    )
    shard: Positive = entry(1024, "Pairs per file.", "ours", pairs=True, small=4)
    batch: Positive = entry(256, "Pairs sampled at once; affects only memory and speed.", "ours", small=2)


class Prompts(Strict):
    """Prompts for a text-to-image teacher; see `data.prompts.read_prompts`."""

    path: Place | None = entry(
        None,
        "File of prompts: .txt with one per line, .jsonl, .parquet, .csv, .tsv, or MS-COCO captions in .json; or a "
        "folder of a data set, whose tables or texts beside pictures are read. null: none, for teachers without "
        "prompts.",
        "Appendix B.3: LAION-Aesthetics 6.25+",
        unnamed=True,
        pairs=True,
    )
    column: str | None = entry(
        None,
        "Column of the table, or key of each JSON line, that contains the prompt. null: the first of prompt, caption, "
        "text.",
        "ours",
        unnamed=True,
        pairs=True,
    )
    cache: Place | None = entry(
        None,
        "Folder for the prompts' text embeddings, computed once, before training, while the teacher leaves the device "
        "to the text encoders; `train --check` says how large they are. null: they are computed for each batch.",
        "ours",
        unnamed=True,
    )
    precision: Literal["fp32", "bf16"] = entry(
        "fp32",
        "In what the text encoders are held and compute, on every device. bf16 takes half the memory, and moves "
        "embeddings by 1 to 2 % (rms, of random encoders of 24 and 28 layers). Cached embeddings and pairs made in one "
        "are not used in the other. A finished student's prompts are encoded in fp32.",
        "ours",
        pairs=True,
        small="fp32",
    )


class TeacherLora(Strict):
    """A LoRA for a teacher of prompts; see `models.diffusers.teacher_lora`."""

    path: Place | None = entry(
        None,
        "The LoRA: a .safetensors file of diffusers', kohya's or ComfyUI's form, or a folder with "
        "pytorch_lora_weights.safetensors. null: none.",
        "ours",
        pairs=True,
    )
    scale: float = entry(1.0, "What the LoRA is multiplied by.", "ours", pairs=True)


class Stage(Strict):
    """A part of a run."""

    until: Positive = entry(
        ..., "Last step of the stage. Must rise from stage to stage; the last one equals steps.", "Table 5"
    )
    change: dict[str, float | int | str | bool | list[str]] = entry(
        {},
        "Entries that differ from the recipe in this stage, by dotted name. Changes of earlier stages do not carry "
        "over. The rates of an optimizer whose warmup or decay is among them (of the student's, also fake.alone) are "
        "those of a run of this stage alone: counted from its first step, over its length. Otherwise they are counted "
        "over the whole run. AdamW's averages carry over in any case.",
        "Table 5",
    )


class Logging(Strict):
    """What is logged during training."""

    every: Positive = entry(20, "Steps between two lines of the log.", "ours", small=1)
    preview: Natural = entry(0, "Steps between two preview pictures; 0: none.", "ours", small=2)
    track: list[Literal["tensorboard", "wandb"]] = entry(
        [], "Where to log figures in addition to log.jsonl; each needs its package.", "ours"
    )


class Checkpointing(Strict):
    """Checkpoints, from which a run continues."""

    every: Positive = entry(500, "Steps between two checkpoints.", "ours", small=2)
    keep: Positive = entry(2, "How many of the latest are kept, plus the best if the run is evaluated.", "ours")


class Evaluation(Strict):
    """Frechet distances of the averaged student during training; see `recipe.subjects.recipe_spaces`."""

    every: Natural = entry(0, "Steps between two evaluations; 0: none.", "ours", small=0)
    images: Positive = entry(2000, "Images per evaluation; with few images, distances are too high.", "ours")
    features: Place | None = entry(
        None,
        "Feature spaces: a folder made by `distmatch classifier`, one in the package, pixels, efficientnet, or "
        "inception:FILE. null: no evaluation.",
        "ours; Appendix D: Inception",
    )
    reference: Place | None = entry(
        None,
        "Real images to compare with, or their statistics for Inception. null: those in the folder of the features.",
        "ours; Appendix D",
    )


def _unique(terms: list[str]) -> list[str]:
    if len(set(terms)) < len(terms):
        raise UserError(f"a term is named twice: {', '.join(terms)}")
    return terms


class Recipe(Strict):
    """One distillation experiment. `name` is the file's; every other entry can be overridden on the command line.

    A file may name another recipe as its `base`, whose entries apply wherever the file has none.
    """

    name: str = entry(..., "Name of the recipe; default: the file's name.", "ours", unnamed=True)
    description: str = entry("", "What the recipe is, in one line.", "ours", free=True)
    expected: str = entry("", "What to expect from it: quality, cost, memory.", "ours", free=True)
    teacher: Place = entry(
        ...,
        "Diffusion model to distil: a model folder, one in the package, edm:FILE (a published checkpoint), "
        "diffusers:FOLDER_OR_ID, or mixture:NAME.",
        "Appendix B",
        pairs=True,
    )
    teacher_lora: TeacherLora = entry(TeacherLora(), "A LoRA that is merged into the teacher before distillation.")
    image_size: tuple[Positive, Positive] | None = entry(
        None,
        "[height, width] of the images, for a teacher in diffusers' format that makes other sizes than its own. null: "
        "the teacher's own.",
        "ours",
        pairs=True,
    )
    distilled_teacher: bool = entry(
        False,
        "Distil a teacher in diffusers' format even if its own files say that it is a student already, as SD-Turbo, "
        "Lightning or latent consistency models are.",
        "ours",
        unnamed=True,
    )
    seed: int = entry(
        0, "Seed for everything that training draws: noise, conditions, noise levels, the order of pairs.", "ours"
    )
    steps: Positive = entry(..., "Updates of the student.", "Appendix B: 20,000 to 350,000", small=2)
    terms: Annotated[list[str], Field(min_length=1), AfterValidator(_unique)] = entry(
        ["match", "regress"],
        "Terms of the objective, each at most once: match, guide, regress, gan, or names in own_terms. On the command "
        "line, terms=match,regress also works.",
        "Section 3.3; Table 2 omits one",
        stage=True,
    )
    own_terms: dict[str, OwnTerm] = entry(
        {},
        "Terms of your own by name: {NAME: {source: FILE.py:CLASS, ARGUMENT: VALUE, ...}}; see examples/own_term.py.",
        "ours",
    )
    prompts: Prompts = entry(Prompts(), "Prompts for a text-to-image teacher.")
    student: Student = entry(Student(), "The student: a generator of one step, or of a few.")
    match: MatchTerm = entry(MatchTerm(), "Distribution matching (Section 3.2, Algorithms 2 and 3).", stage=True)
    guide: GuideTerm = entry(
        GuideTerm(), "Guidance as a term of its own, beside match (decoupled distribution matching).", stage=True
    )
    regress: RegressTerm = entry(
        RegressTerm(), "Regression to the teacher's images from the same noise (Section 3.3, Eq. 9).", stage=True
    )
    gan: GanTerm = entry(GanTerm(), "A GAN on noised images, with real ones (DMD2, arXiv 2405.14867, Section 4.3).")
    real: RealImages = entry(RealImages(), "Real images, for the term gan or student.inputs=data.")
    pairs: Pairs = entry(Pairs(), "Noise-image pairs made by the teacher (Section 3.3).", stage=True)
    fake: Fake = entry(Fake(), "The fake score, a denoiser of the student's images (Section 3.2, Algorithm 3).")
    stages: list[Stage] = entry(
        [],
        "Parts of the run with different terms, pairs and learning rates; empty: the run has only one.",
        "Table 5",
        unnamed=True,
    )
    accumulate: Positive = entry(
        1, "Number of parts a batch is computed in, one by one, to save memory.", "ours", free=True, small=1
    )
    precision: Literal["fp32", "bf16", "auto"] = entry(
        "fp32",
        "Arithmetic of the networks; bf16 by autocast. Weights and averages stay fp32. auto: whichever is faster on "
        "this machine, tried when the run begins.",
        "Appendix B.2: mixed",
        small="fp32",
    )
    base_weights: Literal["fp32", "bf16", "int8", "int4"] = entry(
        "fp32",
        "How the frozen weights that adapters share are held. bf16 takes half the memory and, with precision=bf16, "
        "computes the same. int8 takes a quarter, with a scale per output; it moves each weight by at most 0.4 % of "
        "the largest of its output. int4 takes an eighth in the linear layers of blocks, with a scale for each 64 "
        "weights, of whose largest it moves each by 6 % at most, a few by 12 %; the rest is as with int8.",
        "ours; int8: LLM.int8, arXiv 2208.07339, with all values as integers; int4: rounding as in GGUF's Q4_0",
        small="fp32",
    )
    offload: bool = entry(
        False,
        "Keep the text encoders, and the decoder of previews, in the host's memory, and copy them to the device for "
        "each use. So they always are with prompts.cache, except with the term gan, which encodes captions.",
        "ours",
        free=True,
    )
    memory: Literal["fit"] | Annotated[float, Field(gt=0)] | None = entry(
        None,
        "Choose accumulate, gradient_checkpointing, offload, parallel, and with adapters base_weights, so that a step "
        "fits: into so many GB per device, or with fit into the one at hand; cuda_graphs becomes false if these need "
        "it. What is trained stays the same. A run that continues keeps the choice. null: as they are given.",
        "ours",
        free=True,
        small="null",
    )
    workers: Positive | Literal["auto"] = entry(
        "auto",
        "Threads that share each batch on a CPU, each with its part of the cores and gradients of its own. auto: as "
        "many as is fastest here, tried when the run begins. On GPUs and in several processes: 1.",
        "ours",
        free=True,
        small=1,
    )
    parallel: Literal["ddp", "fsdp"] = entry(
        "ddp", "How several processes hold the networks: ddp, each a copy; fsdp, each a part.", "ours", free=True
    )
    gradient_checkpointing: bool = entry(
        False, "Recompute activations instead of keeping them: less memory, more arithmetic.", "Appendix B.3", free=True
    )
    compile: bool = entry(False, "Compile the networks' blocks with torch.compile.", "ours", free=True)
    cuda_graphs: bool = entry(
        False,
        "On a GPU, record each update as a CUDA graph and replay it: for small networks, whose kernels take less time "
        "than their launch by Python; on a CPU it changes nothing. Only with one process, accumulate 1 and the terms "
        "match, guide and regress.",
        "ours",
        free=True,
    )
    device: str = entry(
        "auto", "cpu, cuda, cuda:1 or mps. auto: CUDA if available, else the CPU.", "ours", free=True, small="cpu"
    )
    log: Logging = entry(Logging(), "What is logged during training.", free=True)
    checkpoint: Checkpointing = entry(Checkpointing(), "Checkpoints, from which a run continues.", free=True)
    evaluate: Evaluation = entry(
        Evaluation(),
        "Frechet distances of the averaged student during training; the first space decides which checkpoint is best.",
        free=True,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        consistency.check(self)
        return self

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, tree: Any) -> Any:
        return renamed(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _stages_in_order(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if ends and (ends != sorted(set(ends)) or ends[-1] != self.steps):
            raise UserError(
                f"stages end at {ends}; expected rising step numbers, ending at steps ({self.steps}). For other steps "
                "give stages of your own, or stages=[] for one stage with all terms of the recipe"
            )
        for number in range(len(self.stages)):
            self.stage(number)  # raises if its changes are not entries
        return self

    @property
    def needs_images(self) -> bool:
        """Whether training reads real images."""
        return "gan" in self.terms or self.student.inputs == "data"

    def stage(self, number: int) -> "Recipe":
        """Return the recipe in stage `number`, from 0. Each stage changes the recipe, not the stage before."""
        tree = self.model_dump(exclude={"stages"})
        fixed = {name for name, _, _ in walk(Recipe)} - marked(Recipe, "stage").keys()
        for key, value in self.stages[number].change.items():
            if present_name(key) in fixed:
                raise UserError(
                    f"stage {number + 1} changes {key!r}; a stage can change terms, entries of match, guide, regress "
                    "and pairs, student.ema, fake.alone, and lr, warmup and decay of an optimizer"
                )
            set_entry(tree, present_name(key), value)
        found = parse_recipe(tree, f"stage {number + 1}")
        if found.match.divergence != self.match.divergence:
            raise UserError(f"stage {number + 1} changes 'match.divergence', whose averages belong to the whole run")
        if "gan" in found.terms and found.match.bins != self.match.bins:
            raise UserError(f"stage {number + 1} changes 'match.bins', by which the term gan counts in the whole run")
        span = self.span(number, "student.optimizer")
        if span is not None and consistency.only_the_fake_score(found, span[1] - span[0]):
            raise UserError(
                f"stage {number + 1} has {span[1] - span[0]} steps, no more than those that train only the fake score, "
                f"fake.alone {found.fake.alone}; the student would never be trained in it"
            )
        kept = ("gan", *self.own_terms)
        own = [[term for term in one.terms if term in kept] for one in (self, found)]
        if own[0] != own[1]:
            raise UserError(
                f"stage {number + 1} has the terms {own[1]} in addition to match and regress, the recipe {own[0]}; no "
                "stage changes these: a weight of 0 turns gan off"
            )
        return found

    def span(self, number: int, optimizer: str) -> tuple[int, int] | None:
        """Return the first step and the end of stage `number`, from 0, if the schedule of `optimizer` is its own.

        It is if the stage states a part of it, even with the recipe's value. `None`: the schedule is the whole run's.
        """
        stated = marked(Recipe, "schedule").keys() & map(present_name, self.stages[number].change)
        whose = {"student.optimizer" if name == "fake.alone" else name.rpartition(".")[0] for name in stated}
        if optimizer not in whose:
            return None
        return self.stages[number - 1].until if number else 0, self.stages[number].until

    def scale(self, guidance: float) -> float | None:
        """Return the scale to guide the teacher by: `guidance`, or `None` if each sample has its own."""
        return guidance if self.student.guidance is None else None

    @property
    def batches(self) -> dict[str, int]:
        """The batches of a step by the term that they are for, `match` and `regress`."""
        sizes = {"match": self.match.batch, "regress": self.regress.batch}
        return {term: size for term, size in sizes.items() if term in self.terms}

    @property
    def parts(self) -> "list[Recipe]":
        """The recipe in each of its stages; the recipe itself if it has none."""
        return [self.stage(number) for number in range(len(self.stages))] or [self]


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Return `tree` as a recipe; errors name the `source`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error.errors(), Recipe, source)) from error
