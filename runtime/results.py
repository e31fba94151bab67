"""Runs read from their CSV files: folders of runs, single runs, or one CSV of many runs.

Guarantees: no value is invented. A run that is missing, unfinished, or has other settings than expected is reported,
and the rest is used. Columns and run names written by older versions are found under their current names.

    runs, wrong, notes = gather({run_name(args): args}, ["runs"], ["return"])     # the runs of a grid
    runs, notes = find_runs(["runs", "others.csv"], ["return", "train:seconds"])  # whatever runs are there

A column is looked up in eval.csv, then in train.csv; `train:NAME` and `eval:NAME` choose the table.
"""

import contextlib
import csv
import functools
import io
import json
import os
from dataclasses import dataclass, field, replace

import numpy as np

import settings
from runtime.log import current_name
from settings import canonical, defaults, diff_settings, from_config, parse, run_name

INDEX = ("agent_step", "env_frames")
FILES_OF_A_RUN = ("eval.csv", "train.csv", "config.json", "final.pt")


@dataclass
class RunData:
    """One run. table: column -> (rows,) values of eval.csv; `returns` is (rows, episodes). train: of train.csv."""
    name: str
    table: dict
    train: dict = field(default_factory=dict)
    config: dict | None = None
    notes: list = field(default_factory=list)
    header: list = field(default_factory=list)  # all columns of the files that were read
    args: object = None  # settings.Args; None if neither config.json nor the name says what the run is

    @property
    def last_step(self):
        steps = self.table.get("agent_step", ())
        return steps[-1] if len(steps) else -1

    def values(self, columns, episodes=False):
        """(agent steps, frames, values (rows, episodes or 1)): the mean of the columns that exist, or None."""
        if tuple(columns) == ("return",) and episodes and "returns" in self.table:
            return self.table["agent_step"], self.table["env_frames"], self.table["returns"]
        for prefix, table in (("eval", self.table), ("train", self.train)):
            names = [column if column in table else column.removeprefix(f"{prefix}:") for column in columns]
            found = [table[name] for name in names if name in table]
            if found:
                return table["agent_step"], table["env_frames"], np.mean(found, 0)[:, None]
        return None


def parse_rows(lines, header, columns):
    """({column: array}, number of bad rows). A later row of the same step replaces the earlier one."""
    wanted = [(name, header.index(name)) for name in (*INDEX, *columns) if name in header]
    rows, bad = {}, 0
    for line in lines:
        cells = line.rstrip("\r\n").split(",")
        try:
            if len(cells) != len(header) or not line.endswith("\n"):  # cut by a crash: even a number may lack digits
                raise ValueError
            row = [[float(part) for part in cells[index].split()] if name == "returns" else float(cells[index] or "nan")
                   for name, index in wanted]
            rows[row[0]] = row
        except ValueError:
            bad += 1
    ordered = [rows[step] for step in sorted(rows)]
    return {name: np.array([row[place] for row in ordered], float) for place, (name, _) in enumerate(wanted)}, bad


def _read_header(file, table):
    return [current_name(table, name) for name in file.readline().rstrip("\r\n").split(",")]


def read_table(folder, table, columns):
    """({column: array}, notes, header) of one CSV file of a run."""
    path = os.path.join(folder, f"{table}.csv")
    with open(path, newline="") as file:
        header = _read_header(file, table)
        if not set(INDEX) <= set(header):
            raise ValueError(f"{path} is not a run's table: it has no columns {' and '.join(INDEX)}")
        wanted = [column.removeprefix(f"{table}:") for column in columns]
        values, bad = parse_rows(file, header, dict.fromkeys(name for name in wanted if name not in INDEX))
    return values, [f"{path}: skipped {bad} malformed or truncated row{'s' * (bad > 1)}"] if bad else [], header


def read_run(folder, columns):
    """A run's folder. OSError or ValueError, in one line, if there is nothing to read."""
    of_eval = [column for column in columns if not column.startswith("train:")]
    table, notes, header = read_table(folder, "eval", of_eval)
    run = RunData(os.path.basename(os.path.normpath(os.path.abspath(folder))), table, notes=notes, header=header)
    rest = [column for column in columns if column not in of_eval or column.removeprefix("eval:") not in header]
    if rest and os.path.exists(os.path.join(folder, "train.csv")):
        run.train, notes, more = read_table(folder, "train", rest)
        run.notes, run.header = run.notes + notes, header + more
    try:
        with open(os.path.join(folder, "config.json")) as file:
            run.config = json.load(file)
    except (OSError, ValueError):
        run.notes.append(f"{folder}: no readable config.json; its settings are taken from its name")
    return run


def read_saved(path, columns):
    """One CSV of many runs, as --save writes it: {name: RunData}."""
    with open(path, newline="") as file:
        header = _read_header(file, "eval")
        if header[:3] != ["run", *INDEX]:
            raise ValueError(f"{path} is not a CSV of runs: its first columns must be run, {', '.join(INDEX)}")
        lines = {}
        for line in file:
            name, _, rest = line.partition(",")
            lines.setdefault(name, []).append(rest)
    wanted = [name for column in columns for name in (column, column.removeprefix("eval:"))]
    runs = {}
    for name, rows in lines.items():
        table, bad = parse_rows(rows, header[1:], dict.fromkeys(column for column in wanted if column not in INDEX))
        notes = [f"{path}: {name}: skipped {bad} malformed rows"] if bad else []
        runs[name] = RunData(name, table, notes=notes, header=header[1:])
    return runs


def save(path, runs, columns):
    """One CSV of these runs, a row per step; digits as they were read. A column that no run has is left out."""
    runs, found = list(runs), []
    for column in dict.fromkeys(columns):
        series = [(run.table["agent_step"], None, run.table["returns"])
                  if column == "returns" and "returns" in run.table else run.values((column,)) for run in runs]
        if any(values is not None for values in series):
            found.append((column, series))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", *INDEX, *(column for column, _ in found)])
        for number, run in enumerate(runs):
            tables = [table for table in (run.train, run.table) if table]
            frames = {step: frame for table in tables for step, frame in zip(*(table[column] for column in INDEX))}
            of_run = [series[number] for _, series in found]
            cells = [{} if one is None else dict(zip(one[0], one[2])) for one in of_run]
            for step in sorted(frames):
                row = [cell.get(step, (np.nan,)) for cell in cells]
                writer.writerow([run.name, f"{step:.10g}", f"{frames[step]:.10g}",
                                 *(" ".join(f"{value:.6g}" for value in np.atleast_1d(values)) for values in row)])


# ---- names ----

def current_flag(name):
    """`growth` -> `grow`: the current name of a setting, written with - or _ as given."""
    dashed, name = "-" in name, name.replace("-", "_")
    name = getattr(settings, "OLD_FLAGS", {}).get(name, name)
    return name.replace("_", "-") if dashed else name


def name_key(name):
    """What a run's name says, whatever the order and the version of its flags."""
    return frozenset("=".join([current_flag(part.partition("=")[0]), *part.partition("=")[2:]]) if number else part
                     for number, part in enumerate(name.split("__")))


@functools.cache
def _args_of_stem(stem):
    task, *parts = stem.split("__")
    words = ["--env", task]
    for number, part in enumerate(parts):
        flag, equals, value = part.partition("=")
        with contextlib.suppress(KeyError):
            if number == 0 and not equals and defaults(flag):
                words += ["--algo", flag]
                continue
        words += [f"--{current_flag(flag)}", *([value] if equals else [])]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return parse(words)
    except (SystemExit, ValueError):
        return None


def args_from_name(name):
    """settings.Args from a run's default name; None for another name."""
    stem, _, seed = name.rpartition("__seed=")
    args = _args_of_stem(stem) if stem and seed.isdecimal() else None
    if args is None:
        return None
    args = replace(args, seed=int(seed))
    return args if name_key(run_name(args)) == name_key(name) else None


# ---- the runs that are there ----

def gather(wanted, paths, columns):
    """Reads the runs of a grid. wanted: run's name -> settings.Args. paths: folders of runs, or CSVs of runs.

    Returns ({name: RunData}, {name: what is wrong}, notes)."""
    saved, folders = {}, {}
    for path in paths:
        if os.path.isfile(path):
            for name, run in read_saved(path, columns).items():
                saved[name_key(name)] = run
        elif os.path.isdir(path):
            for entry in os.listdir(path):
                folders.setdefault(name_key(entry), os.path.join(path, entry))
        else:
            raise ValueError(f"{path}: no such folder or file of runs")
    runs, wrong, notes = {}, {}, []
    for name, args in wanted.items():
        key = name_key(name)
        try:
            run = read_run(folders[key], columns) if key in folders else saved.get(key)
        except (OSError, ValueError) as error:
            wrong[name] = "not readable"
            notes.append(f"{error_line(error)}; left out")
            continue
        if run is None:
            wrong[name] = "missing"
            continue
        notes += run.notes
        if differs := run.config and difference(run.config, args):
            wrong[name] = "has other settings"
            notes.append(f"{name}: {differs}; left out")
            continue
        run.args = args
        if run.last_step < args.total_steps:
            wrong[name] = "unfinished"
        runs[name] = run
    return runs, wrong, notes


def find_runs(paths, columns):
    """Every run under these paths: (list of RunData, notes). A path is a run's folder, a file in it, a folder of runs,
    or a CSV of runs. ValueError, in one line, for a path without runs and for a run that is given twice."""
    runs, notes = [], []
    for path in paths:
        if os.path.basename(path) in FILES_OF_A_RUN and os.path.isfile(path):
            path = os.path.dirname(os.path.abspath(path))
        if os.path.isfile(path):
            found = sorted(read_saved(path, columns).values(), key=_order)
        elif os.path.isfile(os.path.join(path, "eval.csv")):
            found = [read_run(path, columns)]
        elif os.path.isdir(path):
            found = []
            for entry in sorted(os.listdir(path)):
                if os.path.isfile(os.path.join(path, entry, "eval.csv")):
                    try:
                        found.append(read_run(os.path.join(path, entry), columns))
                    except (OSError, ValueError) as error:
                        notes.append(f"{error_line(error)}; left out")
            found.sort(key=_order)
            if not found:
                raise ValueError(f"{path}: no runs here (a run is a folder with eval.csv and config.json)")
        else:
            raise ValueError(f"{path}: no such file or folder")
        runs += [(path, run) for run in found]
    seen = {}
    for path, run in runs:
        notes += run.notes
        try:
            run.args = from_config(run.config) if run.config else args_from_name(run.name)
        except ValueError as error:
            notes.append(f"{run.name}: {error_line(error)}; its settings are taken from its name")
            run.args = args_from_name(run.name)
        key = repr((run.args.env, run.args.seed, canonical(run.args))) if run.args else run.name
        if key in seen:
            raise ValueError(f"{run.name} is given twice: in {seen[key]} and in {path}")
        seen[key] = path
    return [run for _, run in runs], notes


def _order(run):
    """Fewest flags first, so that the first arm is the plainest; then by name, seeds in numeric order."""
    stem, _, seed = run.name.rpartition("__seed=")
    return run.name.count("__"), stem, int(seed) if seed.isdecimal() else 0


def error_line(error):
    """An error as one line for the user."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def difference(config, args):
    """How a run's config.json differs from these settings, in a line; empty if it does not."""
    try:
        differs = diff_settings(from_config(config), args)
    except ValueError as error:
        return f"config.json: {error}"
    return differs and f"config.json says {differs}"
