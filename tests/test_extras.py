"""Without the optional packages every command says what it lacks: one message, the same everywhere."""

import ast
import re
import sys
import tomllib

import pytest
from test_architecture import ROOT, modules

from distmatch.commands.cli import app
from distmatch.system.extras import EXTRAS, need

IMPORTS = (ast.Import, ast.ImportFrom)


def asked_for(tree: ast.AST) -> set[str]:
    """The packages that calls of `need` in `tree` name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "need"]
    return {arg.value for call in named for arg in call.args if isinstance(arg, ast.Constant)}


def imported(tree: ast.AST) -> set[str]:
    """The optional packages that `tree` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add("tensorboard" if node.module == "torch.utils.tensorboard" else node.module.split(".")[0])
    return found & set(EXTRAS)


def test_whoever_imports_an_optional_package_asks_for_it_first():
    """In the same function; for the web page, the command `serve` asks."""
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items() if name != "commands.web_page"}
    functions = {
        f"{name}.{node.name}": node
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and imported(node)
    }
    assert len(functions) > 15
    assert not {name for name, node in functions.items() if imported(node) - asked_for(node)}
    assert not any(imported(node) for tree in trees.values() for node in tree.body if isinstance(node, IMPORTS))


def test_each_extra_brings_what_is_said_of_it():
    project = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text())["project"]
    brings = {extra: [re.split("[><=]", r)[0] for r in rs] for extra, rs in project["optional-dependencies"].items()}
    called = {"open_clip": "open-clip-torch", "huggingface_hub": "diffusers"}  # which comes with it
    for package, extra in EXTRAS.items():
        assert called.get(package, package.replace("_", "-")) in brings[extra]


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    need("json", by="anything")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"a LoRA needs peft \(.*\): pip install 'distmatch\[diffusers\]'$"):
        need("json", "peft", by="a LoRA")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train cifar10-cond --scale cpu-smoke", "metrics"),
        ("train sd15-laion-6.25 prompts.path=captions.txt --scale cpu-smoke", "diffusers"),
        ("train sd15-laion-6.25 prompts.path=captions.txt", "diffusers"),
        ("train mnist log.track=[wandb]", "wandb"),
        ("train mnist regress.loss=lpips", "metrics"),
        ("train mnist pairs.path=s3://bucket/pairs", "cloud"),
        ("plan sd15-laion-6.25", "diffusers"),
        ("pairs build sd15-laion-6.25 prompts.path=captions.txt", "diffusers"),
        ("pairs verify gs://bucket/pairs", "cloud"),
        ("teach s3://bucket/images.tar", "cloud"),
        ("sample diffusers:owner/name --teacher", "diffusers"),
        ("export diffusers anything", "diffusers"),
        ("export lora anything", "diffusers"),
        ("compare anything --prompts captions.txt", "diffusers"),
        ("eval mnist --features efficientnet --reference pictures", "metrics"),
        ("compare anything --prompts captions.parquet", "diffusers"),
        ("serve mnist", "serve"),
    ],
)
def test_commands_without_the_optional_packages(command, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a red bicycle\n")
    (tmp_path / "captions.parquet").touch()
    for package in EXTRAS:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs .*: pip install 'distmatch\[{extra}\]'"):
        app(command.split(), exit_on_error=False, result_action="return_value")
