"""Mutation testing: breaks one line at a time and lists the mutants that no test catches.

    python tools/mutate.py --number 400 --seed 0                # a random sample over all files
    python tools/mutate.py --number 50 --files runtime/log.py   # of one file
    python tools/mutate.py --number 200 --same ../old --log ../old/mutate.log   # an earlier version's sample, here

A mutant changes one comparison, operator, constant or argument, or deletes one statement; texts and types stay. The
suite runs once to record which test runs which line, itself or in a process that it starts. For each mutant, in a copy
of the project, it runs the tests that cover its line (all tests, if the line runs on import), fastest first, until one
fails or times out. A smaller sample is the beginning of a larger one. PYTEST_ADDOPTS='-m "not slow"' selects tests.

--same takes the sample that this program would draw from another version of the project, and runs each mutant whose
statement is unchanged here, in a function of the same name or where the statement is unique. --log is that version's
output: the comparison is over the mutants that it names.
"""

import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

HERE, SUITE = Path(__file__).resolve().parents[1], "test_all.py"
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.MatMult: ast.Add}


@dataclass
class Args:
    number: int = 400  # mutants in the sample
    seed: int = 0  # of the sample
    files: list[str] = field(default_factory=list)  # only these, relative to the project; default: all but the tests
    map: str = ""  # a file for the record of which test runs which line; read if it exists
    same: str = ""  # folder of another version: run its sample here
    log: str = ""  # that version's output, to compare with


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
    elif (isinstance(node, (ast.AugAssign, ast.Raise))
          or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
          or isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))):
        yield "deletion", ast.Pass()


def nodes(node):
    """Every node whose change can matter: no texts, types, messages or `if __name__ == "__main__"`."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            left_alone = (name in ("annotation", "returns")
                          or isinstance(node, ast.Raise) or isinstance(child, ast.JoinedStr)
                          or isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'"
                          or isinstance(child, ast.Subscript) and ast.unparse(child.value) == "Literal")
            if isinstance(child, ast.AST) and not left_alone:
                yield from nodes(child)


class Mutant(NamedTuple):
    path: Path
    lines: tuple  # its line, and its statement's first
    change: str
    source: bytes  # the whole mutated file
    place: tuple  # (names of the functions and classes around it, its statement without the statements within)


def places(tree):
    """id of every node -> its `Mutant.place`."""
    found = {}

    def visit(node, scope, statement):
        if isinstance(node, ast.stmt):
            head = copy.copy(node)
            for part in {"body", "orelse", "finalbody", "handlers", "cases"} & set(node._fields):
                setattr(head, part, [ast.Pass()] if part == "body" else [])
            statement = ast.unparse(head)
        found[id(node)] = scope, statement
        inner = (*scope, node.name) if hasattr(node, "body") and hasattr(node, "name") else scope
        for child in ast.iter_child_nodes(node):
            visit(child, inner, statement)
    visit(tree, (), "")
    return found


def mutants(path):
    """All mutants of one file, in its order."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    statement, tree = 0, ast.parse(source)
    place = places(tree)
    for node in nodes(tree):
        statement = node.lineno if isinstance(node, ast.stmt) else statement
        for operator, new in variants(node):
            first, last = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            old, new = ast.unparse(node), ast.unparse(new)
            text = f"({new})" if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp, ast.UnaryOp)) else new
            yield Mutant(path, (node.lineno, statement), f"{operator}: {old} -> {new}",
                         source[:first] + text.encode() + source[last:], place[id(node)])


def sample(root, args):
    """The first `number` of a project's mutants, in random order."""
    paths = {path for folder in (".", "runtime", "paper", "tools") for path in root.glob(f"{folder}/*.py")}
    files = [root / name for name in args.files] or sorted(
        path for path in paths if path.name not in (SUITE, "conftest.py", Path(__file__).name))
    everything = [mutant for path in files for mutant in mutants(path)]
    random.Random(args.seed).shuffle(everything)
    return everything[:args.number]


def counterparts(old, new):
    """A function from an old mutant to the new one with the same change of the same statement, or None. If a function
    has several, it must have as many in both, and they correspond in order; elsewhere the statement must be unique."""
    def index(mutants, key):
        found = {}
        for mutant in sorted(mutants, key=lambda mutant: (mutant.path, mutant.lines)):
            found.setdefault(key(mutant), []).append(mutant)
        return found
    in_function = lambda mutant: (mutant.place, mutant.change)
    anywhere = lambda mutant: (mutant.place[1], mutant.change)
    maps = [(key, index(old, key), index(new, key)) for key in (in_function, anywhere)]

    def counterpart(mutant):
        for key, theirs, ours in maps:
            mine, candidates = theirs[key(mutant)], ours.get(key(mutant), [])
            if len(candidates) == len(mine) and (key is in_function or len(mine) == 1):
                return candidates[mine.index(mutant)]
    return counterpart


# ---- running tests, each time in a process forked from this one, which has imported all that is slow to import ----

# Python runs a file of this name at its start: every process records its lines at once, since it may be killed. Only
# lines of functions (flag 1): what runs on import runs in all tests.
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
    """A plugin that records for each test its seconds, the project's lines that it runs, and whether it is red."""

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
        self.tests[item.name] = {"seconds": time.time() - began, "red": item.name in self.red,
                                 "lines": sorted(set(Path("lines").read_text().split()))}
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.red.add(report.nodeid.split("::", 1)[1])

    def pytest_sessionfinish(self):
        Path("map.json").write_text(json.dumps(self.tests))


class Chosen:
    """A plugin that runs the named tests in the given order and records the one that fails."""

    def __init__(self, names):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        by_name = {item.name: item for item in items}
        items[:] = [by_name[name] for name in self.names if name in by_name]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            Path("killer").write_text(report.nodeid.split("::", 1)[1])


def run_tests(folder, plugin, limit=1e9):
    """Runs the folder's suite until a test fails. Returns pytest's exit status; 124 after the limit (seconds)."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path[0], status = folder, 70
        try:
            first = [] if isinstance(plugin, Recorder) else ["-x"]
            options = ["-q", "-p", "no:cacheprovider", "--assert=plain", *first, SUITE]
            status = int(pytest.main(options, plugins=[plugin]))
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
    """(exit status, what the plugin wrote) of the suite in a copy of the project. changes: (file's name, content)."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"), dirs_exist_ok=True)
        for name, content in changes:
            Path(folder, name).write_bytes(content)
        status = run_tests(folder, plugin, limit)
        left = Path(folder, "map.json" if isinstance(plugin, Recorder) else "killer")
        return status, left.read_text() if left.exists() else ""


def main():
    args = tyro.cli(Args, description=__doc__)
    import dm_control.suite, hypothesis, torch, tqdm  # noqa: F401  slow to import: the children have them already
    numbered = list(enumerate(sample(HERE, args), start=1))
    if args.same:
        numbered = same_as(Path(args.same).resolve(), args)
    known = Path(args.map).read_text() if args.map and os.path.exists(args.map) else in_a_copy(Recorder())[1]
    if args.map:
        Path(args.map).write_text(known)
    tests, caught, survivors = json.loads(known), set(), []
    red = [name for name in tests if tests[name]["red"]]
    print(f"{len(numbered)} mutants, {len(tests)} tests; red: {', '.join(red) or 'none'}", flush=True)
    for number, mutant in numbered:
        file, began = mutant.path.relative_to(HERE), time.time()
        chosen = tests_for(tests, str(file), mutant.lines)
        limit = 60 + 4 * sum(tests[name]["seconds"] for name in chosen)
        status, killer = in_a_copy(Chosen(chosen), limit, [(file, mutant.source)])
        what = " ".join(f"{file}:{mutant.lines[0]} {mutant.change}".split())
        alive = status == 0 or not chosen
        survivors += [what] if alive else []
        caught |= set() if alive else {number}
        print(f"{number} {what[:200]} | {'SURVIVED' if alive else f'caught by {killer or status}'}, "
              f"{time.time() - began:.0f} s", flush=True)
    if args.log:
        before = outcomes(Path(args.log).read_text())
        both = {number for number, _ in numbered} & before.keys()
        lost = sorted(number for number in both - caught if before[number])
        there = sum(before[number] for number in both)
        print(f"\nOf {len(both)} mutants that ran in both versions, {there} were caught there and {len(both & caught)} "
              f"here. Caught only there: {', '.join(map(str, lost)) or 'none'}")
    print(f"\n{len(numbered) - len(survivors)} of {len(numbered)} caught. Survivors:", *survivors, sep="\n  ")


def same_as(root, args):
    """[(number in the other version's sample, the same mutant here)], where there is one."""
    everything = Args(number=10 ** 9, seed=args.seed)
    counterpart = counterparts(sample(root, everything), sample(HERE, everything))
    found = [(number, counterpart(mutant)) for number, mutant in enumerate(sample(root, args), start=1)]
    numbered = [(number, mutant) for number, mutant in found if mutant]
    print(f"{len(numbered)} of {len(found)} mutants of {root} are the same here", flush=True)
    return numbered


def outcomes(log):
    """number -> whether that mutant was caught, from this program's output."""
    return {int(number): word == "caught by"
            for number, word in re.findall(r"^(\d+) .* \| (SURVIVED|caught by)", log, re.MULTILINE)}


if __name__ == "__main__":
    main()
