"""Every test: `pytest test_all.py -n 2`. They live in tests/, one file per concept; this file only gathers them."""

import importlib
from pathlib import Path

import pytest

for path in sorted(Path(__file__).parent.glob("tests/test_*.py")):
    pytest.register_assert_rewrite(f"tests.{path.stem}")
    module = importlib.import_module(f"tests.{path.stem}")
    marks = getattr(module, "pytestmark", [])
    for name, value in vars(module).items():
        if name.startswith("test_"):
            assert name not in globals(), f"two tests are called {name}"
            value.pytestmark = [*getattr(value, "pytestmark", []), *(marks if isinstance(marks, list) else [marks])]
            globals()[name] = value
        elif type(value).__name__ == "FixtureFunctionDefinition":
            globals()[name] = value
