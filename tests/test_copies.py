"""Tests of copies."""

import os
import subprocess
import sys

import pytest

from tests.helpers import HERE


@pytest.mark.parametrize("name", ["sparsity", "networks", "replay", "metrics", "checkpoint"])
@pytest.mark.slow
def test_a_file_runs_alone(name, tmp_path):
    """Its docstring's example, in an empty folder, with everything but torch and numpy out of reach."""
    path = HERE / f"{name}.py" if (HERE / f"{name}.py").exists() else HERE / "runtime" / f"{name}.py"
    source = path.read_text()
    place = tmp_path / path.relative_to(HERE)
    place.parent.mkdir(exist_ok=True)
    place.write_text(source)
    docstring = source.split('"""')[1]
    example = "\n".join(line[4:] for line in docstring.splitlines() if line.startswith("    ") or not line)
    example = example[example.index("import"):]
    blocked = "import sys\nfor name in ('dm_control', 'mujoco', 'tyro', 'tqdm', 'pytest', 'hypothesis', 'scipy'): sys.modules[name] = None\n"
    (tmp_path / "example.py").write_text(blocked + example)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert result.returncode == 0 and result.stdout, result.stderr
