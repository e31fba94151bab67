"""Any runs as arms: grouped by the settings that differ, filtered, and compared in a table.

Guarantees: two runs are in one arm if and only if their settings differ in task and seed only; a label names every flag
that tells an arm from another.

    arms, common = label_arms(runs)                  # {"critic-regime=dense": [...], "critic-regime=dst": [...]}
    print(format_table(list(table_rows(arms, ["return"])), "markdown"))
"""

import difflib
import math

import numpy as np

from runtime.aggregate import iqm, moments, welch
from runtime.grid import parse_seeds, parse_tasks
from runtime.results import current_flag
from settings import canonical, flag_names, format_value, module_configs, nondefault_flags


def setting(args, group, name):
    """The value that is used: of a module's own flag, or of the preset."""
    value = getattr(args if group is None else getattr(args, group), name)
    module = module_configs(args).get(group)
    if value is None and module:
        part = name.removeprefix(f"{group}_")
        return {"type": module.arch_type, "regime": module.regime, "sparsity": module.sparsity}.get(part, args.scale)
    return args.scale if value is None and name in ("width_scale", "depth_scale") else value


def _flag_text(name, value):
    name = name.replace("_", "-")
    return (name if value else f"no-{name}") if isinstance(value, bool) else f"{name}={format_value(value)}"


def settings_of(args):
    """flag -> value: every setting that can be part of a run's name and that the run reads."""
    dense = all(module.regime == "dense" for module in module_configs(args).values())
    return {name: setting(args, group, name) for group, name in flag_names(args)
            if not (dense and (group == "sparse" or name.endswith("_sparsity")))}


def label_arms(runs):
    """({label: runs}, what all have in common). Labels are the flags that differ, with their values."""
    arms = {}
    for run in runs:
        arms.setdefault(repr(canonical(run.args)) if run.args else run.name.partition("__seed=")[0], []).append(run)
    known = {key: of_arm[0].args for key, of_arm in arms.items() if of_arm[0].args}
    named = dict.fromkeys(flag[2:].replace("-", "_") for args in known.values() for flag, _ in nondefault_flags(args))
    values = {key: settings_of(args) for key, args in known.items()}
    differ = [name for name in ("algo", *named) if len({repr(of_arm.get(name)) for of_arm in values.values()}) > 1]
    common = [_flag_text(name, first[name]) for first in [*values.values()][:1] for name in named
              if name not in differ and name in first]
    labels = {}
    for key, of_arm in arms.items():
        given = values.get(key, {})
        parts = [_flag_text(name, given[name]) for name in dict.fromkeys(differ) if name in given]
        alone = len(arms) == 1 and key in known
        label = ", ".join(parts) or ("these runs" if alone else of_arm[0].name.partition("__seed=")[0])
        labels.setdefault(label, []).extend(of_arm)
    return labels, common


def select(runs, options):
    """The runs that pass --tasks, --seeds and --only. ValueError if a filter matches nothing."""
    filters = []
    if tasks := parse_tasks(options.tasks):
        filters += [("--tasks", task, lambda run, task=task: task_of(run) == task) for task in tasks]
    if options.seeds is not None:
        seeds = parse_seeds(options.seeds)
        filters += [("--seeds", options.seeds, lambda run: run.args is not None and run.args.seed in seeds)]
    for text in options.only:
        flag, equals, value = text.removeprefix("--").partition("=")
        name = current_flag(flag.replace("-", "_"))
        wanted = value.lower() if equals else "true"
        filters += [("--only", text, lambda run, name=name, wanted=wanted: run.args is not None
                     and str(format_value(settings_of(run.args).get(name))).lower() == wanted)]
    for option in dict.fromkeys(option for option, *_ in filters):
        matching = [(text, [run for run in runs if test(run)]) for name, text, test in filters if name == option]
        for text, kept in matching:
            if not kept:
                advice = _values(runs, text) if option == "--only" else ""
                raise ValueError(f"{option} {text} matches none of the runs{advice}")
        one_of = option == "--tasks"  # several tasks: any of them; several --only: all
        keep = [set(map(id, kept)) for _, kept in matching]
        keep = set.union(*keep) if one_of else set.intersection(*keep)
        runs = [run for run in runs if id(run) in keep]
        if not runs:
            raise ValueError(f"{option} {' '.join(text for text, _ in matching)} matches none of the runs together")
    return runs


def _values(runs, text):
    """What the runs have instead: "; they have mst=false"."""
    flag = text.removeprefix("--").partition("=")[0]
    of_runs = [settings_of(run.args) for run in runs if run.args is not None]
    name = current_flag(flag.replace("-", "_"))
    found = sorted({f"{flag}={format_value(given[name])}".lower() for given in of_runs if name in given})
    near = difflib.get_close_matches(name, {key for given in of_runs for key in given}, 1)
    if found:
        return f"; they have {', '.join(found)}"
    return f"; did you mean {near[0].replace('_', '-')}?" if near else ""


def task_of(run):
    return run.args.env if run.args else run.name.partition("__")[0]


def unfinished(run):
    return run.args is not None and run.last_step < run.args.total_steps


def check_columns(runs, options):
    """ValueError for a column that no run has."""
    for column in options.columns:
        if all(run.values((column,)) is None for run in runs):
            near = difflib.get_close_matches(column, {name for run in runs for name in run.header}, 3)
            advice = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"--columns {column}: no run has it, neither in eval.csv nor in train.csv{advice}")
    if options.episodes and not any("returns" in run.table for run in runs):
        raise ValueError("--episodes: no run has the column returns")


# ---- a table ----

HEADING = ("task", "column", "arm", "n", "IQM", "IQM low", "IQM high", "mean", "difference", "low", "high")


def table_rows(arms, columns):
    """HEADING's cells per task, column and arm: last value of each finished run. IQM with its 95 % bootstrap interval;
    mean, and its difference from the first arm's with Welch's 95 % interval."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    for task in dict.fromkeys(map(task_of, runs)):
        for column in columns:
            first = None
            for name, of_arm in arms.items():
                last = [series[2][-1, 0] for run in of_arm if task_of(run) == task and not unfinished(run)
                        and (series := run.values((column,))) is not None and len(series[2])]
                last = np.array([value for value in last if not np.isnan(value)])
                if not len(last):
                    yield task, column, name, 0, *[math.nan] * 7
                    continue
                center, low, high = (part[0] for part in iqm([last.reshape(1, -1, 1)]))
                own = moments(last)
                against = (math.nan,) * 3 if first is None else welch(own, first)
                first = first or own
                yield task, column, name, len(last), center, low, high, own[0], *against


def format_table(rows, style):
    """As text, CSV or Markdown. In text and Markdown, intervals are in brackets."""
    if style == "csv":
        digits = lambda value: "" if math.isnan(value) else f"{value:.6g}"
        lines = [HEADING, *([*row[:3], str(row[3]), *map(digits, row[4:])] for row in rows)]
        return "\n".join(",".join(f'"{cell}"' if "," in cell else cell for cell in line) for line in lines)
    number = lambda value: "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    bracket = lambda value, low, high: number(value) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")
    lines = [("task", "column", "arm", "n", "IQM [95 %]", "mean", "mean - first arm's [95 %]")]
    lines += [(*row[:3], str(row[3]), bracket(*row[4:7]), number(row[7]), bracket(*row[8:])) for row in rows]
    if style == "markdown":
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)
