"""The house of ARCHITECTURE.md: imports go downward only, files stay small, heavy imports wait."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distmatch
from distmatch.commands.cli import app

ROOT = Path(distmatch.__file__).parent

ROOMS = (
    *("commands", "planning", "recipe", "evaluation", "pipeline", "methods", "models", "training", "data"),
    *("diffusion", "system"),
)
"""A file imports from its own room and from rooms further right. `pipeline` is a file."""


def modules() -> dict[str, Path]:
    files = [p for p in ROOT.rglob("*.py") if not p.name.startswith("__")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found, known = set(), set(modules())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distmatch":
            base = (node.module or "").removeprefix("distmatch").removeprefix(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".removeprefix(".")
                found.add(deeper if deeper in known else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("distmatch.") for a in node.names if a.name.startswith("distmatch.")}
    return found


def room(module: str) -> int:
    return ROOMS.index(module.partition(".")[0])


def test_a_file_imports_from_its_own_room_and_from_rooms_further_down():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports(path)
        if room(other) < room(name)
    ]
    assert not upward


def test_no_file_is_over_500_lines_and_a_step_reads_in_under_900():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lines.values()) <= 500
    step = ("methods.distill", "methods.terms", "diffusion.losses", "diffusion.denoiser", "diffusion.schedule")
    assert sum(lines[m] for m in step) < 900


PUBLISHED = {f"models.edm.networks.{name}.__init__" for name in ("Block", "_UNet", "SongUNet", "DhariwalUNet")}
"""Constructors of networks, with the parameters that they were published with."""


def test_no_other_function_has_more_than_eight_parameters():
    wide = {
        f"{name}.{'.'.join(where)}"
        for name, path in modules().items()
        for where, node in functions(ast.parse(path.read_text()))
        if len(parameters(node.args)) - (len(where) > 1) > 8
    }
    assert wide == PUBLISHED


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


def test_help_and_what_is_wrong_with_a_recipe_come_without_torch(tmp_path):
    """It takes seconds to import."""
    calls = [[*command, "--help"] for command in ([], *([name] for name in app if not name.startswith("-")))]
    calls += [["train", "mnist", "--dry-run"], ["recipes"], ["sample", "mnist", "-n", "x"]]
    for command in (["train"], ["plan"], ["pairs", "build"]):
        calls += [[*command, *wrong] for wrong in (["mnst"], ["mnist", "terns=match"], ["later.yaml"])]
    code = """
import sys
from distmatch.commands.cli import main
for sys.argv in SAID:
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, 2), sys.argv
    assert "torch" not in sys.modules, sys.argv
"""
    said = repr([["distmatch", *call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SAID", said)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("distmatch: ") == 10


def test_importing_the_package_is_light():
    code = "import sys, distmatch as d; assert 'torch' not in sys.modules; d.EDM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
