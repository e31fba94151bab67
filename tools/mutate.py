"""How much the tests notice: one wrong line at a time, and which of them leave the suite green.

    python mutate.py --number 400 --seed 0             # a random sample over all files; survivors are listed at the end
    python mutate.py --number 50 --files sparsity.py   # of one file

A mutant changes one comparison, one operator, one constant or one argument, or deletes one statement; texts and types
stay. First the suite runs once, with a note of which test runs which line. Then each mutant, in a copy of the project,
meets the tests that run its line, in their own process or one that they start (all tests, if it runs on import), fast ones
first, until one fails or takes far too long. A smaller sample is the beginning of a larger one.
PYTEST_ADDOPTS='-m "not slow"' asks the mathematical part alone.
"""

import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

HERE, SUITE = Path(__file__).resolve().parents[1], "test_all.py"
FOLDERS = ("runtime", "paper", "tools", "tests", "docs")
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.MatMult: ast.Add}


@dataclass
class Args:
    number: int = 400  # mutants in the sample
    seed: int = 0  # of the sample
    files: list[str] = field(default_factory=list)  # of these alone; default: all but the tests
    map: str = ""  # a file to keep the note of which test runs which line in; read if it is there


# ---- what may be changed ----

def variants(node):
    """(operator, mutated node) for every way to change this one node."""
    def changed(**fields):
        return type(node)(**{name: fields.get(name, getattr(node, name)) for name in node._fields})
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield "comparison", changed(ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "operator", changed(op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield "operator", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: 2 * x or 1.0}[type(node.value)]
        yield "constant", changed(value=other(node.value))
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            yield "argument", changed(keywords=node.keywords[:i] + node.keywords[i + 1:])
        if len(node.args) > 1:
            yield "argument", changed(args=[node.args[1], node.args[0], *node.args[2:]])
    elif (isinstance(node, (ast.AugAssign, ast.Raise)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
          or isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))):
        yield "deletion", ast.Pass()


def nodes(node):
    """Every node whose change could matter: no texts, no types, no messages, no script's last lines."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            left_alone = (name in ("annotation", "returns") or isinstance(node, ast.Raise) or isinstance(child, ast.JoinedStr)
                          or isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'"
                          or isinstance(child, ast.Subscript) and ast.unparse(child.value) == "Literal")
            if isinstance(child, ast.AST) and not left_alone:
                yield from nodes(child)


def mutants(path):
    """(path, (line, its statement's first line), what changes, the whole mutated source) of one file, in its order."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    statement = 0
    for node in nodes(ast.parse(source)):
        statement = node.lineno if isinstance(node, ast.stmt) else statement
        for operator, new in variants(node):
            first, last = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            old, new = ast.unparse(node), ast.unparse(new)
            text = f"({new})" if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp, ast.UnaryOp)) else new
            yield path, (node.lineno, statement), f"{operator}: {old} -> {new}", source[:first] + text.encode() + source[last:]


# ---- running tests, each time in a process forked from this one, which has imported all that is slow to import ----

# Python runs a file of this name at its start: every process notes the lines that it runs, at once, as it may be killed.
# Lines of functions alone (flag 1): what runs on import runs in all tests.
TRACER = """
import os, sys, threading
folder, seen = os.environ["PYTHONPATH"], set()
file = open(os.path.join(folder, "lines"), "a", buffering=1)
def trace(frame, event, argument):
    code = frame.f_code
    name = os.path.relpath(code.co_filename, folder)
    if not code.co_flags & 1 or name.startswith(("..", "<", "test")) or not name.endswith(".py"):
        return None
    line = f"{name}:{frame.f_lineno}"
    if line not in seen:
        seen.add(line)
        print(line, file=file)
    return trace
threading.settrace(trace)
sys.settrace(trace)
"""


class Recorder:
    """A plugin that notes, by test: its seconds, the project's lines that it runs, and whether it is red."""

    def __init__(self):
        self.tests, self.red, self.tracer = {}, set(), {}

    def pytest_sessionstart(self):
        Path("sitecustomize.py").write_text(TRACER)
        os.environ["PYTHONPATH"] = os.getcwd()  # for the processes that tests start
        exec(TRACER, self.tracer)
        sys.settrace(None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        Path("lines").write_text("")
        self.tracer["seen"].clear()
        began = time.time()
        sys.settrace(self.tracer["trace"])
        yield
        sys.settrace(None)
        self.tests[item.name] = {"seconds": time.time() - began, "lines": sorted(set(Path("lines").read_text().split())),
                                 "red": item.name in self.red}
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.red.add(report.nodeid.split("::", 1)[1])

    def pytest_sessionfinish(self):
        Path("map.json").write_text(json.dumps(self.tests))


class Chosen:
    """A plugin that runs the named tests in the given order, and notes the one that fails."""

    def __init__(self, names):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        by_name = {item.name: item for item in items}
        items[:] = [by_name[name] for name in self.names if name in by_name]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            Path("killer").write_text(report.nodeid.split("::", 1)[1])


def run_tests(folder, plugin, limit=1e9):
    """Runs the folder's suite until a test fails. Returns pytest's exit status; 124 where the limit (seconds) was passed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path[0], status = folder, 70
        try:
            first = [] if isinstance(plugin, Recorder) else ["-x"]
            status = int(pytest.main(["-q", "-p", "no:cacheprovider", "--assert=plain", *first, SUITE], plugins=[plugin]))
        finally:
            os._exit(status)
    until = time.time() + limit
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def tests_for(tests, file, lines):
    """The names of the tests to run for a mutant there, in order."""
    wanted = {f"{file}:{line}" for line in lines}
    chosen = [name for name, test in tests.items() if not wanted.isdisjoint(test["lines"])] or tests
    return sorted((name for name in chosen if not tests[name]["red"]), key=lambda name: tests[name]["seconds"])


def in_a_copy(plugin, limit=1e9, changes=()):
    """(exit status, what the plugin left) of the suite in a copy of the project. changes: (file's name, its content)."""
    with tempfile.TemporaryDirectory() as folder:
        for path in HERE.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copy(path, folder)
        for name in FOLDERS:
            shutil.copytree(HERE / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name, content in changes:
            Path(folder, name).write_bytes(content)
        status = run_tests(folder, plugin, limit)
        left = Path(folder, "map.json" if isinstance(plugin, Recorder) else "killer")
        return status, left.read_text() if left.exists() else ""


def main():
    args = tyro.cli(Args, description=__doc__)
    import dm_control.suite, hypothesis, torch, tqdm  # slow to import: the children have them already
    files = [HERE / name for name in args.files] or sorted(
        {path for place in (".", "runtime", "paper", "tools") for path in HERE.glob(f"{place}/*.py")} - {HERE / SUITE, Path(__file__).resolve()})
    everything = [mutant for path in files for mutant in mutants(path)]
    random.Random(args.seed).shuffle(everything)
    known = Path(args.map).read_text() if args.map and os.path.exists(args.map) else in_a_copy(Recorder())[1]
    if args.map:
        Path(args.map).write_text(known)
    tests, survivors = json.loads(known), []
    print(f"{len(everything)} mutants, {len(tests)} tests; red: {', '.join(n for n in tests if tests[n]['red']) or 'none'}", flush=True)
    for number, (path, lines, change, source) in enumerate(everything[:args.number], start=1):
        chosen, began = tests_for(tests, str(path.relative_to(HERE)), lines), time.time()
        limit = 60 + 4 * sum(tests[name]["seconds"] for name in chosen)
        status, killer = in_a_copy(Chosen(chosen), limit, [(path.relative_to(HERE), source)])
        what = " ".join(f"{path.relative_to(HERE)}:{lines[0]} {change}".split())
        alive = status == 0 or not chosen
        survivors += [what] if alive else []
        print(f"{number} {what[:200]} | {'SURVIVED' if alive else f'caught by {killer or status}'}, {time.time() - began:.0f} s", flush=True)
    print(f"\n{args.number - len(survivors)} of {args.number} caught. Survivors:", *survivors, sep="\n  ")


if __name__ == "__main__":
    main()
