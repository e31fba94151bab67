"""Draws any runs, or compares them in a table.

Guarantees: what a picture shows is in the CSV files, and nothing else is on it. A request that cannot be met prints one
line and exits with a non-zero status. Runs that are missing, unfinished or unreadable are named, and the rest is
drawn.

    python plot.py runs/                                        # every run there; writes curves.png and curves.pdf
    python plot.py runs/A__seed=0 runs/A__seed=1 others.csv     # single runs, and a CSV of runs (--save)
    python plot.py regimes.toml runs/ --table                   # your own grid (docs/figures.md): a table, no picture
    python plot.py runs/ --columns return critic/dormant_ratio train:critic/grad_norm --only mst=true
    python plot.py runs/ --reference published.csv --out figure.png

Runs that differ in more than the seed are different arms, labeled by the flags and values that differ. Statistics are
in runtime/aggregate.py. The paper's figures: ./sweep.sh plot fig6 runs/. Colors are Okabe and Ito's, which the
color-blind can tell apart; in gray, markers and lines differ.
"""

import argparse
import csv
import math
import os
import re
import sys
import textwrap
from collections import Counter

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from runtime.aggregate import STATISTICS, curve
from runtime.compare import check_columns, format_table, label_arms, select, table_rows, task_of, unfinished
from runtime.grid import add_filters, make_jobs, read_grid
from runtime.results import RunData, error_line, find_runs, gather, save

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no display)

REFERENCE_LINES = ((0, (1, 1)), (0, (4, 2)), (0, (4, 1, 1, 1)))
STYLES = {  # color (Okabe and Ito's, and gray), marker (the paper's), line
    "dense": ("#7f7f7f", "o", "-"), "sst": ("#0072B2", "s", "--"), "dst": ("#009E73", "D", "-"),
    "s2d": ("#E69F00", "<", ":"), "d2s": ("#D55E00", ">", "-."),
    "plain": ("#7f7f7f", "o", "--"), "MST": ("#009E73", "D", "-"),  # Figs. 13, 26: plain scaling is dashed
    "MR.Q": ("#7f7f7f", "o", "--"), "MR.Q + Res": ("#0072B2", "s", "-."), "MR.Q + Res + MST": ("#009E73", "D", "-"),
    "MST (ER, RigL, 0.6)": ("#009E73", "D", "-"), "critic DST, actor SST (MST)": ("#009E73", "D", "-"),
    "MST, 10,000 random steps": ("#0072B2", "s", "--")
}
OTHERS = [("#0072B2", "s", "--"), ("#E69F00", "<", ":"), ("#7f7f7f", "o", "-"), ("#D55E00", ">", "-."),
          ("#CC79A7", "v", "--"), ("#56B4E9", "^", "-"), ("#000000", "P", ":"), ("#009E73", "D", "-")]


def styles(names):
    """{name: (color, marker, line)}, no two alike: no color twice while one is left."""
    count, free = len(OTHERS), []
    for again in range(count):  # the second time, a color comes with another marker and line
        free += [(OTHERS[number][0], *OTHERS[(number + again) % count][1:]) for number in range(count)]
    found = {}
    for name in sorted(names, key=lambda name: name not in STYLES):  # those with a style of their own choose first
        number = names.index(name)
        choices = [STYLES.get(name, free[number % count]), *free[number:], *free[:number]]
        colors = {color for color, *_ in found.values()}
        unused = [choice for choice in choices if choice not in found.values()] or choices  # more than 64 arms
        found[name] = next((choice for choice in unused if choice[0] not in colors), unused[0])
    return found


def display_name(series):
    return {"dense": "Dense", "sst": "SST", "dst": "DST", "s2d": "S2D", "d2s": "D2S"}.get(series, series)


def draw_curves(axes, lines, published):
    """lines: [(style, number, _, frames, center, low, high)]; published: [(label, frames, center, low, high)], drawn
    no further than ours."""
    furthest = max((line[3][-1] for line in lines), default=np.inf)
    for number, (_, x, *values) in enumerate(published):
        x, center, low, high = (part[x <= furthest] for part in (x, *values))
        axes.fill_between(x, low, high, color="black", alpha=0.08, linewidth=0)
        axes.plot(x, center, color="black", linewidth=1, linestyle=REFERENCE_LINES[number % 3])
        if len(x) <= 10:
            axes.scatter(x, center, color="black", s=8)  # few points: nothing was measured between them
    for (color, marker, line), number, _, x, center, low, high in lines:
        every = max(1, len(x) // 6)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, center, color=color, linestyle=line, linewidth=1.6, marker=marker, markersize=4.5,
                  markevery=(number % every, every))  # markers apart from one another
    if lines:
        axes.set_xlim(-0.04 * furthest, 1.04 * furthest)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.locator_params(axis="x", nbins=5)


def draw_points(axes, points, ticks, joined, count):
    """points: [(style, number, place, center, low, high)]; ticks: label of each place; joined: connect each series."""
    by_series = {}
    for look, number, *point in points:
        by_series.setdefault((look, number), []).append(point)
    for ((color, marker, line), number), rows in by_series.items():
        place, center, low, high = np.array(rows, float).T
        spread = (number - (count - 1) / 2) * min(0.14, 0.7 / count)
        intervals = np.nan_to_num([center - low, high - center])
        axes.errorbar(place + spread, center, np.maximum(intervals, 0), color=color, marker=marker, markersize=5,
                      linestyle=line if joined else "none", linewidth=1.4, elinewidth=1.1, capsize=1.5)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7.5)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    if not joined:
        for place in range(1, len(ticks)):
            axes.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)


def sheet(rows, columns, width, height, room, caption, legend, title_lines, tick_lines):
    """A page of panels with the legend above and the caption below, each with the room that it needs, in inches.
    width, height: of a panel and what is around it; room: between two rows."""
    total = max(columns * width + 0.75, 7.0, min(14.0, 1 + 0.08 * max(len(label) for label, _ in legend)))
    lines = [part for text in caption for part in textwrap.wrap(text, int(total * 18.5)) or [""]]
    per_row = max(1, int((total - 0.5) / (0.75 + 0.07 * max(len(label) for label, _ in legend))))
    above = 0.3 + 0.22 * -(-len(legend) // per_row) + 0.15 * title_lines
    below = 0.48 + 0.13 * tick_lines + 0.145 * len(lines)
    page, grid = plt.subplots(rows, columns, figsize=(total, rows * height + above + below), squeeze=False)
    tall = page.get_figheight()
    page.subplots_adjust(left=0.75 / total, right=1 - 0.15 / total, top=1 - above / tall, bottom=below / tall,
                         hspace=room / (height - room * (rows - 1) / rows), wspace=0.3)
    page.legend([handle for _, handle in legend], [label for label, _ in legend], loc="upper center", ncols=per_row,
                bbox_to_anchor=(0.5, 1 - 0.02 / tall), frameon=False, fontsize=9, handlelength=3)
    page.text(0.12 / total, 0.1 / tall, "\n".join(lines), fontsize=7, va="bottom", linespacing=1.35)
    return page, grid


def lay_out(panels, rows, draw, caption, legend, x_label, tick_lines=1):
    """panels: [(title, y label)]; rows: names; draw(axes, panel's number, row) returns whether there was anything to
    draw. With one panel, the rows go across, three beside one another at most or in a square. Panels of one row and one
    y label share their scale."""
    across, title_lines = len(panels) == 1, 1 + max(title.count("\n") for title, _ in panels)
    if across:
        columns = len(rows) if len(rows) <= 3 else math.ceil(math.sqrt(len(rows)))
        shape = -(-len(rows) // columns), columns, 4.6, 3.0, 0.22 + 0.15 * title_lines + 0.13 * tick_lines
    else:
        shape = len(rows), len(panels), 2.75, 2.1, 0.3
    page, grid = sheet(*shape, caption, legend, title_lines, tick_lines)
    if across:
        for axes in grid.flat[len(rows):]:
            axes.remove()
        grid = grid.reshape(-1, 1)  # from here on, one column
    lowest = len(rows) - (shape[1] if across else 1)  # from here on nothing is below
    for number, row in enumerate(rows):
        tops, bottoms = {}, {}
        for column, (title, y_label) in enumerate(panels):
            axes = grid[number, column]
            axes.grid(True, axis="y", color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=7.5)
            axes.spines[["top", "right"]].set_visible(False)
            if not draw(axes, column, row):
                axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", fontsize=8, color="0.5")
                axes.set(xticks=[], yticks=[])
            else:
                tops[y_label] = max(tops.get(y_label, 0), axes.dataLim.y1)
                bottoms[y_label] = min(bottoms.get(y_label, 0), axes.dataLim.y0)
            if across:
                axes.set_title(f"{title}, {row}" if title else row, fontsize=9)
            elif number == 0:
                axes.set_title(title, fontsize=9)
            if across or column == 0 or panels[column - 1][1] != y_label:
                axes.set_ylabel(f"{row}\n{y_label}" if column == 0 and not across else y_label, fontsize=8.5)
            if number >= lowest:
                axes.set_xlabel(x_label, fontsize=8.5)
            elif not across:
                axes.tick_params(labelbottom=False)
        for column, (_, y_label) in enumerate(panels):
            if y_label in tops:
                bottom, span = bottoms[y_label], (tops[y_label] - bottoms[y_label]) or 1
                grid[number, column].set_ylim(bottom - 0.03 * span, bottom + 1.06 * span)
    return page


def legend_of(series, labels, published, joined=True):
    """series: {name: style}. [(label, handle)] of our lines, then of the published ones."""
    ours = [(labels(name), look) for name, look in series.items()]
    return [(label, Line2D([], [], color=color, marker=marker, markersize=5, linestyle=line if joined else "none"))
            for label, (color, marker, line) in ours] + [
        (label, Line2D([], [], color="black", linestyle=REFERENCE_LINES[number % 3], linewidth=1))
        for number, label in enumerate(dict.fromkeys(label for lines in published for label, *_ in lines))]


# ---- published curves ----

def references(path, statistic):
    """Published curves: task -> [(label, frames, center, low, high)]. Columns env, seed, return, agent_step (of two
    frames, on Gymnasium of one) or env_step (a frame), and, if there are several, algo."""
    runs = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        known = set(reader.fieldnames or ())
        if not {"env", "seed", "return"} <= known or not {"agent_step", "env_step"} & known:
            raise ValueError(f"--reference {path}: its columns must be env, seed, return, and agent_step or env_step")
        for row in reader:
            repeat = 1 if re.search(r":|-v\d+$", row["env"]) else 2  # Gymnasium's ids end in a version
            frames = float(row["env_step"]) if "env_step" in known else repeat * float(row["agent_step"])
            label = f"published {row['algo']}" if "algo" in known else "published"
            seeds = runs.setdefault((row["env"], label), {})
            seeds.setdefault(row["seed"], []).append((frames / repeat, frames, float(row["return"])))
    lines = {}
    for (task, label), seeds in runs.items():
        names = ("agent_step", "env_frames", "return")
        tables = [RunData(label, dict(zip(names, np.array(sorted(rows)).T))) for rows in seeds.values()]
        lines.setdefault(task, []).append((label, *curve([tables], ("return",), statistic, False)))
    return lines


# ---- any runs ----

def load(options):
    """({label: runs}, lines of the caption, notes): of a grid's file, or of whatever runs are there."""
    columns = [*options.columns, *["returns"] * options.episodes]
    grids = [path for path in options.paths
             if path.endswith((".toml", ".json")) and os.path.basename(path) != "config.json"]
    if not grids:
        runs, notes = find_runs(options.paths or ["runs"], columns)
        arms, common = label_arms(select(runs, options))
        notes += [f"{run.name}: unfinished, step {run.last_step:.0f} of {run.args.total_steps}"
                  for of_arm in arms.values() for run in of_arm if unfinished(run)]
        return arms, [f"All: {', '.join(common)}."] if common else [], notes
    if len(grids) > 1:
        raise ValueError(f"one grid at a time, not {' and '.join(grids)}")
    grid = read_grid(grids[0])
    jobs = list(make_jobs(grid.arms, grid.tasks, grid.seeds))
    paths = [path for path in options.paths if path not in grids] or ["runs"]
    runs, wrong, notes = gather({job.name: job.args for job in jobs}, paths, columns)
    if not runs:
        raise ValueError(f"none of the {len(wrong)} runs of {grids[0]} is in {' '.join(paths)}: ./sweep.sh {grids[0]}")
    kept, arms = set(map(id, select(list(runs.values()), options))), {}
    for job in jobs:
        if job.name in runs and id(runs[job.name]) in kept:
            arms.setdefault(job.arm.series, []).append(runs[job.name])
    lines = [f"{grid.title}."] if grid.title else []
    if wrong:
        lines.append(f"{len(wrong)} of {len(jobs)} runs are missing or unfinished.")
    return arms, lines, notes + [f"{name}: {what}" for name, what in wrong.items()]


def draw_runs(arms, lines, options):
    """A page with one row per task and one panel per column."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    tasks, looks = list(dict.fromkeys(map(task_of, runs))), styles(list(arms))
    statistic, what = STATISTICS[options.statistic]
    published = references(options.reference, statistic) if options.reference else {}
    shown = [published[task] for task in tasks if task in published]
    if options.reference and (not shown or "return" not in options.columns):
        reason = "it needs `return` in --columns" if shown else "it has none of the tasks " + ", ".join(tasks)
        raise ValueError(f"--reference {options.reference}: {reason}")

    def draw(axes, column, row):
        drawn = []
        for number, (name, of_arm) in enumerate(arms.items()):
            found = [run for run in of_arm if task_of(run) == row]
            result = curve([found], (options.columns[column],), statistic, options.episodes) if found else None
            if result is not None:
                drawn.append((looks[name], number, 0, *result))
        draw_curves(axes, drawn, published.get(row, []) if options.columns[column] == "return" else [])
        return bool(drawn)

    counts = Counter((name, task_of(run)) for name, of_arm in arms.items() for run in of_arm).values()
    few, many = min(counts), max(counts)
    number = f"{many} run{'s' * (many > 1)}" if few == many else f"{few} to {many} runs"
    text = [f"{what}, over {number} per line.", *lines]
    titles = [(column if len(options.columns) > 1 else "", column) for column in options.columns]
    return lay_out(titles, tasks, draw, text + reference_note(options.reference) if shown else text,
                   legend_of(looks, str, shown), "environment frames")


def reference_note(path):
    return [f"Published: {os.path.basename(path)}, the same statistic over its seeds."]


# ---- the command line ----

def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="run folders, folders of runs, CSVs of runs; at most one grid's file. Default: runs")
    parser.add_argument("--columns", nargs="+", default=["return"],
                        help="columns of eval.csv or train.csv; train:NAME for one that both have")
    parser.add_argument("--only", action="append", default=[], metavar="FLAG=VALUE", help="only runs with this setting")
    parser.add_argument("--table", nargs="?", const="text", choices=("text", "csv", "markdown"),
                        help="print a table of the last values instead of drawing; with --out, do both")
    add_output(parser)
    return add_filters(parser)


def add_output(parser):
    """How it is drawn and where it goes: here and in ./sweep.sh plot."""
    parser.add_argument("--statistic", choices=STATISTICS, default="iqm", help="center and interval over seeds")
    parser.add_argument("--episodes", action="store_true", help="pool episodes' returns in the IQM, not their means")
    parser.add_argument("--reference", metavar="FILE.csv", help="published curves to draw below ours: columns env, "
                        "seed, return, agent_step or env_step, and, if you like, algo")
    parser.add_argument("--save", metavar="FILE.csv", help="also write the runs as one CSV, which can be drawn again")
    parser.add_argument("--out", metavar="PATH",
                        help="folder of the pictures, or one .png, .pdf or .svg file; default: here")


def write_page(page, name, out):
    """Writes NAME.png and NAME.pdf into the folder `out`, or the one file that it names. Returns the paths."""
    one = out is not None and out.endswith((".png", ".pdf", ".svg"))
    if not one and out:
        os.makedirs(out, exist_ok=True)
    paths = [out] if one else [os.path.join(out or ".", f"{name}.{ending}") for ending in ("png", "pdf")]
    for path in paths:
        page.savefig(path, dpi=150)
    plt.close(page)
    return paths


def main():
    options = command_line().parse_args()
    if options.paths and options.paths[0] == "curves":  # the spelling until now
        options.paths = options.paths[1:]
    if options.paths and re.fullmatch(r"fig\d+|all", options.paths[0]) and not os.path.exists(options.paths[0]):
        sys.exit(f"plot.py: the paper's figures are drawn by ./sweep.sh plot {' '.join(sys.argv[1:])}")
    try:
        if options.table and options.reference and options.out is None:
            raise ValueError("--reference is for a picture: add --out, or drop --table")
        arms, lines, notes = load(options)
        check_columns([run for of_arm in arms.values() for run in of_arm], options)
        for note in notes:
            print(f"plot.py: {note}", file=sys.stderr)
        if options.table:
            print(format_table(list(table_rows(arms, options.columns)), options.table))
        if not options.table or options.out is not None:
            written = write_page(draw_runs(arms, lines, options), "curves", options.out)
            print(*written, file=sys.stderr if options.table else sys.stdout)
        if options.save:
            columns = [*options.columns, *["returns"] * options.episodes]
            save(options.save, [run for of_arm in arms.values() for run in of_arm], columns)
    except (ValueError, OSError) as error:
        sys.exit(f"plot.py: {error_line(error)}")


if __name__ == "__main__":
    main()
