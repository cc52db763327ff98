"""The scripts in examples/ and the code in the README run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parent.parent


def run(*arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=tiny.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_teacher(tmp_path):
    assert "the student is in" in run(ROOT / "examples" / "own_teacher.py", cwd=tmp_path)
    assert (tmp_path / "runs" / "own_teacher" / "model" / "config.json").exists()


def test_the_readmes_python(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for i, block in enumerate(blocks):
        (tmp_path / f"block{i}.py").write_text(block)
        run(tmp_path / f"block{i}.py", cwd=tmp_path)
