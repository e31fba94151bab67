"""How much the tests notice: one wrong line at a time, and which of them leave the suite green.

    python mutate.py --number 400 --seed 0             # a random sample over all files; survivors are listed at the end
    python mutate.py --number 50 --files sparsity.py   # of one file

Mutants change one comparison, one operator of arithmetic or logic, one constant or one argument, or delete one statement;
texts, types and what is only said (errors, docstrings) stay as they are. First the suite runs once, with a note of which
test touches which line; then each mutant, in a copy of the project, meets the tests that touch its line, fast ones first,
until one fails or takes far too long. A line that runs on import meets every test that touches its file. Tests that start
processes of their own come last: what runs there cannot be seen. A smaller number is a prefix of a larger one's sample.
"""

import ast
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

HERE = Path(__file__).resolve().parent
SUITE = "test_all.py"
PATIENCE, MEMORY = 4.0, 24 * 2 ** 30  # times what the tests took unchanged; bytes a mutant may ask for
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.MatMult: ast.Add}


@dataclass
class Args:
    number: int = 400  # mutants in the sample
    seed: int = 0  # of the sample
    files: list[str] = field(default_factory=list)  # of these alone; default: all but the tests
    map: str = ""  # keep the note of which test touches which line here, and read it from here if it is there


# ---- what may be changed ----

def variants(node):
    """(operator, mutated node) for every way to change this one node."""
    def changed(**fields):
        return ast.copy_location(type(node)(**{name: fields.get(name, getattr(node, name)) for name in node._fields}), node)
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield "comparison", changed(ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "arithmetic", changed(op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield "arithmetic", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        yield "constant", changed(value=not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0)
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg:
                yield "argument", changed(keywords=node.keywords[:i] + node.keywords[i + 1:])
        if len(node.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in node.args):
            yield "argument", changed(args=[node.args[1], node.args[0], *node.args[2:]])
    elif isinstance(node, (ast.AugAssign, ast.Raise)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))):
        yield "deletion", ast.Pass()


def nodes(node):
    """Every node whose change could matter: no texts, no types, no messages, no script's last lines."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            script = isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'"
            literal = isinstance(child, ast.Subscript) and ast.unparse(child.value) == "Literal"
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and not script and not literal:
                yield from nodes(child)


def mutants(path):
    """(line, operator, old text, new text, the whole mutated source) of one file, in the order of the file."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in nodes(ast.parse(source)):
        for operator, new in variants(node):
            first, last = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            text = ast.unparse(new)
            text = f"({text})" if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp, ast.UnaryOp)) else text
            yield node.lineno, operator, ast.unparse(node), text, source[:first] + text.encode() + source[last:]


# ---- running tests, each time in a process forked from this one, which has imported all that is slow to import ----

class Recorder:
    """A plugin that notes, by test: its seconds, the lines of the project that it ran, and whether it started processes."""

    def __init__(self):
        self.tests, self.lines = {}, set()

    def trace(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(os.getcwd()) or file.endswith(SUITE):
            return None
        return self.trace_line(frame, event, argument)

    def trace_line(self, frame, event, argument):
        self.lines.add(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        return self.trace_line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines.clear()
        began, started = time.time(), len(self.processes)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.tests[item.name] = {"seconds": time.time() - began, "lines": sorted(self.lines),
                                     "processes": len(self.processes) > started, "passed": item.name not in self.failed}

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid.split("::", 1)[1])

    def pytest_sessionstart(self):
        self.processes, self.failed = [], set()
        sys.addaudithook(lambda event, _: self.processes.append(1) if event == "subprocess.Popen" else None)

    def pytest_sessionfinish(self):
        Path("map.json").write_text(json.dumps(self.tests))


class Chosen:
    """A plugin that runs the named tests in the given order, and notes the first that fails."""

    def __init__(self, names):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        by_name = {item.name: item for item in items}
        items[:] = [by_name[name] for name in self.names if name in by_name]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            Path("killer").write_text(report.nodeid.split("::", 1)[1])


def run_tests(folder, plugin, limit=None):
    """Runs the folder's suite. Returns pytest's exit status, or None where the limit (seconds) was passed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.path[0] = folder
        status = 70
        try:
            status = int(pytest.main(["-q", "-p", "no:cacheprovider", "--assert=plain", SUITE, *(["-x"] if limit else [])], plugins=[plugin]))
        finally:
            os._exit(status)
    until = time.time() + (limit or 1e9)
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def copy_project(folder):
    for path in HERE.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)


def touching(tests, file, line):
    """The tests to run for a mutant there, in order."""
    chosen = [name for name, test in tests.items() if f"{file}:{line}" in test["lines"]]
    if not chosen:  # it runs on import, or nowhere
        chosen = [name for name, test in tests.items() if any(touched.startswith(f"{file}:") for touched in test["lines"])]
    chosen = sorted({*chosen, *(name for name, test in tests.items() if test["processes"])})
    return sorted((name for name in chosen if tests[name]["passed"]), key=lambda name: (tests[name]["processes"], tests[name]["seconds"]))


def main():
    args = tyro.cli(Args, description=__doc__)
    import dm_control.suite, hypothesis, torch.utils.flop_counter, tqdm  # noqa: slow to import; each child has them already
    files = [HERE / name for name in args.files] or sorted(path for path in HERE.glob("*.py") if path.name not in (SUITE, "mutate.py"))
    everything = [(path, *mutant) for path in files for mutant in mutants(path)]
    random.Random(args.seed).shuffle(everything)
    with tempfile.TemporaryDirectory() as folder:
        if args.map and os.path.exists(args.map):
            tests = json.loads(Path(args.map).read_text())
        else:
            copy_project(folder)
            run_tests(folder, Recorder())
            tests = json.loads(Path(folder, "map.json").read_text())
            if args.map:
                shutil.copy(Path(folder, "map.json"), args.map)
    red = [name for name, test in tests.items() if not test["passed"]]
    print(f"{len(everything)} mutants, {len(tests)} tests" + (f"; red or skipped unchanged: {', '.join(red)}" if red else ""), flush=True)
    survivors = []
    for number, (path, line, operator, old, new, source) in enumerate(everything[:args.number], start=1):
        chosen = touching(tests, path.name, line)
        with tempfile.TemporaryDirectory() as folder:
            copy_project(folder)
            Path(folder, path.name).write_bytes(source)
            limit = 60 + PATIENCE * sum(tests[name]["seconds"] for name in chosen)
            began, status = time.time(), run_tests(folder, Chosen(chosen), limit) if chosen else 0
            killer = Path(folder, "killer").read_text() if Path(folder, "killer").exists() else "import" if status else "time"
        verdict = f"caught by {killer}" if status != 0 else "SURVIVED"
        what = f"{path.name}:{line} {operator}: {old[:90]} -> {new[:90]}".replace("\n", " ")
        survivors += [what] if status == 0 else []
        print(f"{number} {what} | {verdict}, {time.time() - began:.0f} s", flush=True)
    print(f"\n{args.number - len(survivors)} of {args.number} caught. Survivors:", *survivors, sep="\n  ")


if __name__ == "__main__":
    main()
