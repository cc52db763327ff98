"""The house of ARCHITECTURE.md: imports go downward only, files stay small, heavy imports wait."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distmatch

ROOT = Path(distmatch.__file__).parent

# Floors from the top down; a module may import only from floors below its own.
FLOORS = [
    ["cli"],
    [
        "cli_mistakes",
        "commands.checkpoints",
        "commands.classifier",
        "commands.compare",
        "commands.demo",
        "commands.eval",
        "commands.export",
        "commands.import_edm",
        "commands.pairs",
        "commands.plan",
        "commands.recipes",
        "commands.report",
        "commands.sample",
        "commands.serve",
        "commands.teach",
        "commands.train",
    ],
    ["commands.shared"],
    ["run", "toy2d", "plan", "sheet"],
    ["preflight", "binding", "comparison"],
    ["cost"],
    ["rehearsal"],
    ["build", "report", "smoke", "export", "serve", "weightless", "samples", "spaces"],
    ["train", "evaluation", "baselines"],
    ["distill", "teach", "pipeline"],
    ["terms"],
    ["pair_builder", "features", "embeddings"],
    ["pairs", "ownership"],
    ["claims"],
    ["models.library"],
    ["models.published"],
    ["models.folder"],
    ["models.diffusers.families"],
    ["models.stable"],
    ["models.diffusers.family"],
    [
        "models.unet",
        "models.edm",
        "models.mlp",
        "models.mixture",
        "models.classifier",
        "models.pixels",
        "models.inception",
        "models.text",
        "models.codec",
        "solvers",
        "perceptual",
        "clip",
    ],
    [
        "models.guidance",
        "models.family",
        "models.hub",
        "models.tiny",
        "models.diffusers.lora",
        "models.diffusers.schedulers",
        "conditions",
        "losses",
        "sampler",
        "metrics",
        "data",
        "clipping",
    ],
    ["images"],
    ["tables", "collect"],
    ["layouts"],
    ["sidecars"],
    ["decode", "parquet"],
    ["archives"],
    ["denoiser", "models.info", "models.layout", "arrays"],
    ["iddpm"],
    ["schedule_config"],
    ["schedule", "log", "prompts", "storage", "download"],
    ["checkpoint", "optim", "progress"],
    ["shards", "terminal"],
    ["digests"],
    ["config", "recipe_docs"],
    ["recipe_entries"],
    ["recipe_mistakes"],
    ["ranges", "files", "rng", "ema", "clock", "finite", "unpickle", "parallel", "engine", "options", "interrupt"],
    ["entry", "watch", "betas", "plain", "extras", "process", "paths"],
    ["limits", "disk", "screen"],
    ["errors"],
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def modules() -> dict[str, Path]:
    files = [p for p in ROOT.rglob("*.py") if not p.name.startswith("__")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distmatch":
            base = (node.module or "").removeprefix("distmatch").removeprefix(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".removeprefix(".")
                found.add(deeper if deeper in FLOOR else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("distmatch.") for a in node.names if a.name.startswith("distmatch.")}
    return found


def test_every_module_has_a_floor():
    assert set(modules()) == set(FLOOR)


def test_imports_go_downward_only():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports(path)
        if FLOOR[other] <= FLOOR[name]
    ]
    assert not upward


def test_no_file_is_over_500_lines_and_a_step_reads_in_under_900():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lines.values()) <= 500
    assert sum(lines[m] for m in ("distill", "terms", "losses", "denoiser", "schedule")) < 900


WIDE = {
    "terms.Match.__init__",
    "distill.Distiller.__init__",
    "sampler.heun",
    "pair_builder.build",
    "models.edm.Block.__init__",
    "models.edm._UNet.__init__",
    "models.edm.SongUNet.__init__",
    "models.edm.DhariwalUNet.__init__",
}
"""Functions of more than eight parameters: the methods' own settings, and networks as they were published."""


def test_no_other_function_has_more_than_eight_parameters():
    wide = {
        f"{name}.{'.'.join(where)}"
        for name, path in modules().items()
        for where, node in functions(ast.parse(path.read_text()))
        if len(parameters(node.args)) - (len(where) > 1) > 8
    }
    assert wide == WIDE


def functions(tree: ast.AST, within: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """All functions below `tree`, each with the names of the classes and functions it is in."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inside = (*within, node.name) if named else within
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside, node
        yield from functions(node, inside)


def parameters(given: ast.arguments) -> list[ast.arg]:
    return [a for a in [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg] if a]


def test_help_does_not_import_torch():
    code = "import sys; from distmatch.cli import app; app.help_print([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_is_light():
    code = "import sys, distmatch as d; assert 'torch' not in sys.modules; d.EDM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
