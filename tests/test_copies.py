"""Tests that parts run alone: their docstrings' examples, in an empty folder."""

import os
import subprocess
import sys

import pytest

from tests.helpers import HERE

pytestmark = pytest.mark.slow
GROUP = ("sparsity", "networks", "replay", "base", "mrq")
ALONE = {  # example -> the files it needs; `envs` and what plays it need the simulator
    "sparsity": (), "networks": (), "replay": (), "metrics": (), "simba": ("networks",), "runtime/checkpoint": (),
    "envs": (), "runtime/evaluator": ("envs",), "mrq": GROUP, "sac": (*GROUP, "simba"), "obgd": (),
    "stream": (*GROUP, "obgd", "online")}
BLOCKED = ("tyro", "tqdm", "pytest", "hypothesis", "matplotlib")


def example(source):
    """The indented lines of the docstring that follow the first import."""
    lines = source.split('"""')[1].splitlines()
    text = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    return text[min(text.index(word) for word in ("import ", "from ") if word in text):]


@pytest.mark.parametrize("name", ALONE)
def test_part_runs_alone(name, tmp_path):
    for part in {name, *ALONE[name]}:
        place = tmp_path / f"{part}.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text((HERE / f"{part}.py").read_text())
    blocked = [*BLOCKED, *([] if "envs" in (name, *ALONE[name]) else ["dm_control", "mujoco"]),
               *([] if name in ("envs", "runtime/evaluator", "obgd", "stream") else ["scipy"])]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n" + example((HERE / f"{name}.py").read_text())
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert result.returncode == 0 and result.stdout, result.stderr
