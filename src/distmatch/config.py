"""Recipes: every number of an experiment in one YAML file, strict, with dotted overrides."""

import difflib
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distmatch.errors import UserError
from distmatch.paths import expand
from distmatch.plain import fitting, read_yaml, yaml_of

Place = Annotated[str, AfterValidator(expand)]
"""A path, a URL, or a model's name."""

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average, which would never move at 1
Scale = Annotated[float, Field(ge=0)]  # of guidance


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Optimiser(_Strict):
    """AdamW of one network; see `optim.Optimizer`."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Fraction = 0.0
    clip: Annotated[float, Field(ge=0)] = 10.0


class Critic(Optimiser):
    """The fake score's optimizer, and how many updates it makes per update of the student."""

    steps: Positive = 1


class Network(_Strict):
    """A new network, for a teacher without weights of its own (a mixture); see `models.mlp.MLP`."""

    type: Literal["mlp"] = "mlp"
    width: Positive = 64
    depth: Positive = 2


Scales = tuple[Scale, Scale]
"""A range of guidance scales."""


class Student(_Strict):
    """`t: null` evaluates the student at the schedule's `t_max`. The student starts as a copy of the teacher, unless
    `init` names a student (a folder, a run, one of the package) to go on from, or `network` is a new one.

    `guidance: [low, high]` makes the guidance scale an input of the student; training draws it for each sample, and
    the entries `match.guidance`, `pairs.guidance` are left aside. `lora_rank` trains adapters of that rank alone.
    """

    t: Annotated[float, Field(ge=0)] | None = None
    init: Place | None = None
    network: Network | None = None
    guidance: Scales | None = None
    lora_rank: Annotated[int, Field(ge=0)] = 0
    ema: Decay = 0.999

    @model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.guidance is not None and not self.guidance[0] < self.guidance[1]:
            raise UserError(f"expected guidance: [low, high] with low < high, not {list(self.guidance)}")
        return self


class MatchTerm(_Strict):
    """Distribution matching; see `distill.Match`. `pairs: true` matches the images of the regression's noise as well,
    `concat(x, x_ref)` in Algorithm 1.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    batch: Positive = 64
    weighting: Literal["algorithm2", "eq8", "dreamfusion", "prolificdreamer"] = "algorithm2"
    bins: Positive = 1000
    min_step: Annotated[int, Field(ge=0)] = 20
    max_step: Positive = 980
    guidance: Scale = 1.0
    pairs: bool = False

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if not self.min_step < self.max_step <= self.bins:
            raise UserError(f"expected min_step < max_step <= bins, not {self.min_step}, {self.max_step}, {self.bins}")
        return self


class Pairs(_Strict):
    """The noise-image pairs; `path: null` builds them once per teacher and settings, beside the runs."""

    path: Place | None = None
    count: Positive = 100_000
    sampler: Literal["heun", "euler", "pndm"] = "heun"
    steps: Positive = 18
    guidance: Scale = 1.0
    seed: int = 0
    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    shard: Positive = 1024
    batch: Positive = 256


class RegressTerm(_Strict):
    """Regression to the teacher's samples; `weight` is lambda_reg. LPIPS compares at `size` x `size` pixels, by the
    networks in the folder `weights`; see `perceptual.Lpips`. Latents are compared as images where `decoder` says by
    which: the model's own, `full`, or the autoencoder `tiny` (folder or model id); see `models.codec.Decoder`.
    """

    weight: Annotated[float, Field(ge=0)] = 0.25
    batch: Positive = 64
    loss: Literal["mse", "huber", "lpips"] = "mse"
    size: Positive = 224
    weights: Place | None = None
    decoder: Literal["none", "tiny", "full"] = "none"
    tiny: Place = "madebyollin/taesd"


class Prompts(_Strict):
    """The texts of a text-to-image teacher: one per line, or of the `column` of JSON lines or Parquet; see `prompts`.
    `cache` is a folder for their embeddings, computed once; `null` encodes them again for every batch.
    """

    path: Place | None = None
    column: str | None = None
    cache: Place | None = None


class Stage(_Strict):
    """A part of a run that ends after iteration `until`; `change` overrides entries of the recipe by dotted names."""

    until: Positive
    change: dict[str, float | int | str | bool] = {}


class Logging(_Strict):
    """In steps; 0 is never."""

    every: Positive = 20
    preview: Annotated[int, Field(ge=0)] = 0
    track: list[Literal["tensorboard", "wandb"]] = []


class Checkpointing(_Strict):
    every: Positive = 500
    keep: Positive = 2


class Evaluation(_Strict):
    """Frechet distances of the EMA student while training; `features`, `reference` as in `distmatch eval`.

    The first space decides which checkpoint is the best: of a folder, that which keeps positions.
    """

    every: Annotated[int, Field(ge=0)] = 0
    images: Positive = 2000
    features: Place | None = None
    reference: Place | None = None


def _unique(terms: list[str]) -> list[str]:
    if len(set(terms)) < len(terms):
        raise UserError(f"a term is named twice: {', '.join(terms)}")
    return terms


class Recipe(_Strict):
    """One distillation experiment. `name` is the file's; every other entry can be overridden on the command line.

    A file may name another recipe as its `base`, whose entries hold where it has none.
    """

    name: str
    description: str = ""
    expected: str = ""
    teacher: Place
    seed: int = 0
    steps: Positive
    terms: Annotated[list[Literal["match", "regress"]], Field(min_length=1), AfterValidator(_unique)] = [
        "match",
        "regress",
    ]
    prompts: Prompts = Prompts()
    student: Student = Student()
    match: MatchTerm = MatchTerm()
    regress: RegressTerm = RegressTerm()
    pairs: Pairs = Pairs()
    generator: Optimiser = Optimiser()
    critic: Critic = Critic()
    stages: list[Stage] = []
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    log: Logging = Logging()
    checkpoint: Checkpointing = Checkpointing()
    evaluate: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _stages_in_order(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if ends and (ends != sorted(set(ends)) or ends[-1] != self.steps):
            raise UserError(f"stages end at {ends}; expected rising iterations, the last of them `steps`, {self.steps}")
        for number in range(len(self.stages)):
            self.stage(number)  # raises where its changes are no entries
        return self

    def stage(self, number: int) -> "Recipe":
        """The recipe as it is in stage `number`, from 0. Each stage changes the recipe, not the stage before."""
        tree = self.model_dump(exclude={"stages"})
        for key, value in self.stages[number].change.items():
            if key.split(".")[0] not in CHANGEABLE:
                raise UserError(f"stage {number + 1} changes {key!r}; a stage can change {', '.join(CHANGEABLE)}")
            set_entry(tree, key, value)
        return parse_recipe(tree, f"stage {number + 1}")


CHANGEABLE = ("match", "regress", "pairs")
"""The entries that a stage can change: the terms, and how many pairs there are."""


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("distmatch"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The recipe called `name`, or in the file `name`, with `key=value` overrides such as `match.weighting=eq8`.

    Raises `UserError` for an unknown recipe, an unknown key (naming its nearest neighbour) or a bad value; it names
    the override where that is to blame.
    """
    path, tree = _read(name)
    tree.setdefault("name", path.stem)
    file = deepcopy(tree)
    overrides = [_trimmed(override) for override in overrides]
    for override in overrides:
        _apply(tree, override)
    keys = {override.partition("=")[0] for override in overrides}
    if "stages" not in keys:  # what is asked for holds in every stage
        stages = fitting(tree.get("stages") or [], f"{path}: stages", list[dict[str, Any]])
        for stage in stages:
            change = fitting(stage.get("change") or {}, f"{path}: stages.change", dict[str, Any])
            stage["change"] = {k: v for k, v in change.items() if k not in keys}
        tree["stages"] = stages
    source = f"recipe {name}" if name in recipes() else str(path)
    found, own = _errors(tree), {error["loc"] for error in _errors(file)}
    if found:
        raise UserError("\n".join(_explain(e, source, () if e["loc"] in own else overrides) for e in found))
    return Recipe.model_validate(tree)


def _read(name: str, above: tuple[str, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, and what it says together with its base."""
    path = Path(expand(name))
    if path.suffix not in (".yaml", ".yml"):
        if "=" in name:
            raise UserError(f"{name!r} is no recipe; the recipe comes first, what it changes after it: RECIPE {name}")
        if path.exists() or len(path.parts) > 1:
            raise UserError(f"{name} is neither a recipe of the package nor a file called .yaml or .yml")
        if name not in recipes():
            raise UserError(f"recipe {name!r} is unknown{_nearest(name, recipes())}; see `distmatch recipes`")
        path = recipes()[name]
    elif not path.exists():
        raise UserError(f"recipe file {name} does not exist")
    tree = read_yaml(path)
    if "base" in tree:
        base = str(tree.pop("base"))
        if base in (name, *above):
            raise UserError(f"{path}: its base {base!r} has itself as base")
        tree = _merged(_read(base, (name, *above))[1], tree)
    return path, tree


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, group by group."""
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """`tree` as a recipe; `source` is named in the errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, source) for e in error.errors())) from error


def _errors(tree: dict[str, Any]) -> list[Any]:
    """What pydantic has to say against `tree`."""
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        return error.errors()
    return []


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe with dotted keys, as overrides name them."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


FREE = (
    *("log", "checkpoint", "evaluate", "device", "description", "expected"),
    *("accumulate", "parallel", "gradient_checkpointing", "compile"),
)
"""Entries of a recipe that may change when a run continues: they don't touch the result, but for roundings."""

PLACES = ("prompts.path", "prompts.column", "prompts.cache", "pairs.path", "regress.weights")
"""Entries that say where something lies on this machine."""


def run_name(base: Recipe, recipe: Recipe) -> str:
    """Return the default name of a run's folder: the recipe's, and what was overridden in `base`.

    For example `mnist-terms=match`. `FREE` and `PLACES` are left out, and paths are cut to their last part. Runs that
    differ all the same in one of these share a folder's name, and there the second is refused.
    """
    before, now = (flat(r.model_dump(mode="json")) for r in (base, recipe))
    changed = [k for k, v in now.items() if before.get(k) != v and k.split(".")[0] not in (*FREE, "name", "stages")]
    name = recipe.name + "".join(f"-{key}={_in_a_name(now[key])}" for key in changed if key not in PLACES)
    return name if len(name) <= 120 else f"{name[:111]}-{sha256(name.encode()).hexdigest()[:8]}"


def _in_a_name(value: Any) -> str:
    """An entry's value as part of a file's name."""
    if isinstance(value, list):
        return ",".join(map(_in_a_name, value))
    text = value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.,+-]", "_", text)


def entries(group: type[BaseModel] = Recipe) -> list[str]:
    """The dotted names of all entries that an override can set."""
    names = []
    for name, field in group.model_fields.items():
        inner = _group(field.annotation)
        names += [name] if inner is None else [f"{name}.{entry}" for entry in entries(inner)]
    return names


def meant(name: str) -> list[str]:
    """The entries that `name` may stand for: itself, those of this last name, or else the nearest one."""
    known = entries()
    same = [entry for entry in known if name in (entry, entry.rpartition(".")[2])]
    return [name] if name in same else same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def _trimmed(override: str) -> str:
    """An override without the spaces that quotes let in."""
    key, equals, value = override.partition("=")
    return f"{key.strip()}{equals}{value.strip()}"


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in the nested `tree`."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(f"override {override!r} is not of the form key=value, e.g. match.weighting=eq8")
    value = yaml_of(text, f"override {override!r}: the value")
    if dotted == "terms" and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    set_entry(tree, dotted, value)


def set_entry(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the entry `a.b` of the nested `tree`. Raises `UserError` where `a` is no group."""
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{dotted}: {parent} is a value, not a group of entries")
    tree[last] = value


def _explain(error: Any, source: str, overrides: Sequence[str] = ()) -> str:
    """One pydantic error in the words of the recipe, with the `overrides` that can have caused it."""
    *parents, last = [str(part) for part in error["loc"]] or [""]
    key, kind = ".".join([*parents, last]), error["type"]
    if guilty := [o for o in overrides if _touches(o.partition("=")[0], key)]:
        source = f"{' '.join(guilty)} on the command line"
    if kind == "extra_forbidden":
        fields = _fields(parents)
        where = f"in {'.'.join(parents)}" if parents else "at the top level"
        return f"{source}: unknown key {key!r}{_nearest(last, fields)}; {where} there are {', '.join(fields)}"
    if kind == "missing":
        return f"{source}: {key!r} is missing"
    if kind == "value_error":  # ours, and says what it is about
        return f"{source}: {error['msg'].removeprefix('Value error, ')}"
    expected = KINDS.get(kind) or f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{source}: {key} = {error['input']!r:.80}: {expected}"


KINDS = {
    "tuple_type": "expected a list of values, e.g. [1, 2]",
    "list_type": "expected a list of values, e.g. [a, b]",
    "model_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
    "model_attributes_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
}
"""What pydantic's errors of a value's kind mean in a recipe."""


def _touches(entry: str, key: str) -> bool:
    """Whether an override of `entry` can be what is wrong at `key`: the same, around it, or within it."""
    return f"{key}.".startswith(f"{entry}.") or f"{entry}.".startswith(f"{key}.") or not key


def _fields(parents: list[str]) -> list[str]:
    """The entries of the group at `parents`."""
    model: Any = Recipe
    for parent in parents:
        if not parent.isdigit():  # a place in a list
            annotation = model.model_fields[parent].annotation
            model = _group(annotation) or _group(get_args(annotation)[0])
    return list(model.model_fields)


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group of entries that a field is, if it is one, optional or not."""
    kinds = (annotation, *(() if get_origin(annotation) is list else get_args(annotation)))
    return next((m for m in kinds if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
