"""Runs read from their CSV files, and brought together over seeds: interquartile means and intervals.

What it claims: no value is invented. A run that is missing, unfinished or not what its name says is told, and the rest is
used; intervals called 95 % cover about 95 %, also with five or eight seeds.

    runs, wrong, told = gather({run_name(args): args}, ["runs"], ["return"])
    frames, centre, low, high = curve([list(runs.values())], ["return"], iqm)

The centre is the interquartile mean (IQM) over seeds, for several tasks over all their runs (Agarwal et al., 2021); the
interval is a stratified percentile bootstrap, widened for few seeds (Hesterberg, 2015). `mean_sd` is the paper's mean
± one standard deviation. It needs no PyTorch.
"""

import csv
import json
import os
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm, t

from runtime.log import current_name
from settings import diff_settings, from_config

RESAMPLES = 5000


# ---- statistics ----

def trimmed_mean(values):
    """Interquartile mean over the last axis: a quarter of the values cut off at each end, as scipy.stats.trim_mean."""
    count = values.shape[-1]
    cut = int(0.25 * count)
    return np.sort(values, -1)[..., cut:count - cut].mean(-1)


def tail(counts):
    """Share of resamples beyond each end of a 95 % interval, for strata of these sizes.

    A percentile bootstrap of n values is too narrow by √((n - 1) / n), and by a normal quantile in place of Student's:
    with five seeds its "95 %" cover 83 to 90 %. Hesterberg (2015), "What teachers should know about the bootstrap".
    """
    n = np.mean(counts)
    return norm.sf(np.sqrt(n / (n - 1)) * t.ppf(0.975, sum(counts) - len(counts)))


def iqm(strata):
    """(centre, low, high), (points,) each. strata: a task each, (points, seeds, episodes).

    Seeds are resampled within their task, each with all its episodes: episodes of one network are no independent evidence.
    """
    flat = [stratum.reshape(len(stratum), -1) for stratum in strata]
    centre = trimmed_mean(np.concatenate(flat, 1))
    counts = [stratum.shape[1] for stratum in strata]
    if min(counts) < 2:
        return centre, np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    generator = np.random.default_rng(0)
    chosen = [generator.integers(0, n, (RESAMPLES, n)) for n in counts]
    low, high = np.empty_like(centre), np.empty_like(centre)
    beyond = tail(counts)
    for point in range(len(centre)):  # one at a time: all at once would not fit the cache
        resampled = np.concatenate([stratum[point][index].reshape(RESAMPLES, -1)
                                    for stratum, index in zip(strata, chosen)], 1)  # (resamples, values)
        low[point], high[point] = np.quantile(trimmed_mean(resampled), (beyond, 1 - beyond))
    return centre, low, high


def mean_sd(strata):
    """Mean over all runs ± one standard deviation between the seeds of a task (that between tasks is not noise)."""
    runs = [stratum.mean(-1) for stratum in strata]  # (points, seeds)
    centre = np.concatenate(runs, 1).mean(1)
    if min(run.shape[1] for run in runs) < 2:
        return centre, np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    spread = np.sqrt(np.mean([run.var(1, ddof=1) for run in runs], 0))
    return centre, centre - spread, centre + spread


STATISTICS = {"iqm": (iqm, "IQM and 95 % bootstrap interval"), "mean-sd": (mean_sd, "Mean ± one standard deviation")}


# ---- reading ----

@dataclass
class Run:
    """One run's evaluations: agent steps, frames, and column -> values, (rows,) each; `returns` is (rows, episodes)."""
    name: str
    table: dict
    config: dict | None = None
    notes: list = field(default_factory=list)

    @property
    def last_step(self):
        return self.table["agent_step"][-1] if len(self.table["agent_step"]) else -1

    def measure(self, columns, episodes=False):
        """(rows, episodes), or (rows, 1): the mean of the columns that are there; None if none is."""
        if columns == ("return",) and episodes and "returns" in self.table:
            return self.table["returns"]
        found = [self.table[column] for column in columns if column in self.table]
        return np.mean(found, 0)[:, None] if found else None


def parse_rows(lines, header, columns):
    """({column: array}, rows that are no whole rows). Later rows of one step replace earlier ones."""
    header = [current_name("eval", name) for name in header]
    wanted = [(name, header.index(current_name("eval", name))) for name in ("agent_step", "frames", *columns)
              if current_name("eval", name) in header]
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


def read_run(folder, columns):
    """A run's folder. OSError or ValueError, in one line, where there is nothing to read."""
    path = os.path.join(folder, "eval.csv")
    with open(path, newline="") as file:
        header = file.readline().rstrip("\r\n").split(",")
        if not {"agent_step", "env_frames"} <= {current_name("eval", name) for name in header}:
            raise ValueError(f"{path} has no columns agent_step and env_frames: not a run's")
        table, bad = parse_rows(file, header, columns)
    run = Run(os.path.basename(os.path.normpath(folder)), table)
    if bad:
        run.notes.append(f"{path}: {bad} row{'s' * (bad > 1)} cut short or broken, left out")
    try:
        with open(os.path.join(folder, "config.json")) as file:
            run.config = json.load(file)
    except (OSError, ValueError):
        run.notes.append(f"{folder}: no readable config.json; what the run is was taken from its name")
    return run


def read_saved(path, columns):
    """What --save wrote: one CSV of many runs, name -> Run."""
    with open(path, newline="") as file:
        header = file.readline().rstrip("\r\n").split(",")
        if [current_name("eval", name) for name in header[:3]] != ["run", "agent_step", "env_frames"]:
            raise ValueError(f"{path} is no file that --save wrote: its columns must begin with run, agent_step, frames")
        lines = {}
        for line in file:
            name, _, rest = line.partition(",")
            lines.setdefault(name, []).append(rest)
    parsed = {name: parse_rows(rows, header[1:], columns) for name, rows in lines.items()}
    return {name: Run(name, table, notes=[f"{path}: {name}: {bad} rows broken, left out"] if bad else [])
            for name, (table, bad) in parsed.items()}


def save(path, runs, columns):
    """Every value of these columns, a row an evaluation, digits as they were read; a column that no run has is left out."""
    runs = list(runs)
    columns = [column for column in columns if any(column in run.table for run in runs)]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "agent_step", "frames", *columns])
        for run in runs:
            cells = [run.table.get(name, np.full(len(run.table["agent_step"]), np.nan))
                     for name in ("agent_step", "frames", *columns)]
            for row in zip(*cells):
                writer.writerow([run.name, *(" ".join(f"{v:.6g}" for v in cell) if np.ndim(cell) else f"{cell:.10g}"
                                             for cell in row)])


def gather(wanted, paths, columns):
    """Reads the runs that are there. wanted: run's name -> settings.Args.

    Returns ({name: Run}, {name: what is wrong}, lines to tell)."""
    saved = {}
    for path in paths:
        if os.path.isfile(path):
            saved |= read_saved(path, columns)
        elif not os.path.isdir(path):
            raise ValueError(f"{path}: no such folder or file of runs")
    runs, wrong, told = {}, {}, []
    for folder, args in wanted.items():
        try:
            places = [os.path.join(path, folder) for path in paths if os.path.isdir(os.path.join(path, folder))]
            run = read_run(places[0], columns) if places else saved.get(folder)
        except (OSError, ValueError) as error:
            wrong[folder] = "not readable"
            told.append(f"{plainly(error)}; left out")
            continue
        if run is None:
            wrong[folder] = "missing"
            continue
        told += run.notes
        differs = difference(run.config, args) if run.config else None
        if differs:
            wrong[folder] = "of other settings"
            told.append(f"{folder}: {differs}; left out")
            continue
        if run.last_step < args.total_steps:
            wrong[folder] = "unfinished"
        runs[folder] = run
    return runs, wrong, told


def plainly(error):
    """An error as one line for the user."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def difference(config, args):
    """What a run's config.json says otherwise than these settings, in a line; empty if nothing."""
    try:
        said = diff_settings(from_config(config), args)
    except ValueError as error:
        return f"config.json: {error}"
    return said and f"config.json says {said}"


# ---- aggregation ----

def curve(tasks, columns, statistic, episodes):
    """tasks: a list of runs each. Returns frames and the statistic at every step, (points,) each; None for nothing.

    A step counts the seeds that have it: unfinished runs are drawn as far as they got, and named.
    """
    read = [[(run, run.measure(columns, episodes)) for run in runs] for runs in tasks]
    read = [[(run, values) for run, values in runs if values is not None] for runs in read]
    if not read or not all(read):
        return None
    steps = np.unique(np.concatenate([run.table["agent_step"] for runs in read for run, _ in runs]))
    width = min(values.shape[1] for runs in read for _, values in runs)  # episodes
    strata, frames = [], np.full((sum(map(len, read)), len(steps)), np.nan)
    row = 0
    for runs in read:
        stratum = np.full((len(steps), len(runs), width), np.nan)
        for seed, (run, values) in enumerate(runs):
            at = np.searchsorted(steps, run.table["agent_step"])
            stratum[at, seed], frames[row, at] = values[:, :width], run.table["frames"]
            row += 1
        strata.append(stratum)
    there = [~np.isnan(stratum).any(-1) for stratum in strata]  # (steps, seeds): NaN, nothing to measure, is not there
    result = np.full((3, len(steps)), np.nan)
    pattern = np.concatenate(there, 1)
    for seeds in np.unique(pattern, axis=0):  # points that have the same seeds, at once
        points = (pattern == seeds).all(1)
        split = np.split(seeds, np.cumsum([mask.shape[1] for mask in there])[:-1])
        if all(part.any() for part in split):  # else: a task without any
            result[:, points] = statistic([stratum[points][:, part] for stratum, part in zip(strata, split)])
    kept = ~np.isnan(result[0])
    return (np.nanmean(frames[:, kept], 0), *result[:, kept]) if kept.any() else None


def final(tasks, columns, total_steps, statistic, episodes):
    """(centre, low, high) of the last evaluation of the finished runs, or None."""
    strata = []
    for runs in tasks:
        values = [run.measure(columns, episodes)[-1] for run in runs
                  if run.last_step >= total_steps and run.measure(columns) is not None]
        width = min(map(len, values), default=0)
        strata.append(np.array([[value[:width] for value in values if not np.isnan(value).any()]]))
    if not strata or any(stratum.size == 0 for stratum in strata):
        return None
    return [value[0] for value in statistic(strata)]
