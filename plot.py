"""Draws the paper's figures from whatever runs are there.

What it claims: what a figure shows is in the CSV files, and nothing else is on it; runs that are missing, unfinished or of
other settings are named under the picture and on the terminal, and the rest is drawn.

    python plot.py fig6 runs/                              # writes fig6.png and fig6.pdf
    python plot.py fig11 runs/ --laptop --statistic mean-sd
    python plot.py fig11 runs/ --laptop --save fig11.csv   # ... and all that was drawn; read again in place of runs/
    python plot.py curves runs/walker-walk__* --columns return critic/dormant --reference published.csv

Statistics: aggregate.py. Layout, markers and axes are the paper's; colours are Okabe and Ito's, which the colour-blind can
tell apart, and in grey the markers and lines do.
"""

import argparse
import csv
import dataclasses
import math
import os
import sys
import textwrap

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from paper import figures
from runtime.aggregate import STATISTICS, Run, curve, difference, final, gather, plainly, read_run, save
from paper.estimate import millions
from settings import from_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no display)

BOTH = "all tasks"
SAVED = ("return", "seconds", "encoder/srank_zsa", "critic/srank_q1", "critic/srank_q2", "actor/srank_pi",
         *(f"{module}/{metric}" for metric in ("dormant", "parameter_norm", "gradient_norm", "interference")
           for module in ("encoder", "critic", "actor")))  # of --save, beside what the figure shows
REFERENCE_LINES = ((0, (1, 1)), (0, (4, 2)), (0, (4, 1, 1, 1)))
STYLES = {  # colour (Okabe and Ito's, and grey), marker (the paper's), line
    "dense": ("#7f7f7f", "o", "-"), "sst": ("#0072B2", "s", "--"), "dst": ("#009E73", "D", "-"),
    "s2d": ("#E69F00", "<", ":"), "d2s": ("#D55E00", ">", "-."),
    "plain": ("#7f7f7f", "o", "--"), "MST": ("#009E73", "D", "-"),  # Figs. 13, 26: plain scaling is dashed
    "MR.Q": ("#7f7f7f", "o", "--"), "MR.Q + Res": ("#0072B2", "s", "-."), "MR.Q + Res + MST": ("#009E73", "D", "-"),
    "MST (ER, RigL, 0.6)": ("#009E73", "D", "-"), "critic DST, actor SST (MST)": ("#009E73", "D", "-"),
    "MST, 10,000 random steps": ("#0072B2", "s", "--")
}
OTHERS = [("#0072B2", "s", "--"), ("#E69F00", "<", ":"), ("#7f7f7f", "o", "-"), ("#D55E00", ">", "-."),
          ("#CC79A7", "v", "--"), ("#56B4E9", "^", "-"), ("#000000", "P", ":"), ("#009E73", "D", "-")]


# ---- drawing ----

def style(series, number):
    """(colour, marker, line)"""
    again, number = divmod(number, len(OTHERS))  # the second time round, a colour comes with another marker and line
    other = OTHERS[(number + again) % len(OTHERS)]
    return STYLES.get(series, (OTHERS[number][0], *other[1:]))


def shown(series):
    return {"dense": "Dense", "sst": "SST", "dst": "DST", "s2d": "S2D", "d2s": "D2S"}.get(series, series)


def draw_curves(axes, lines, published):
    """lines: [(series, number, _, frames, centre, low, high)]; published: [(label, frames, centre, low, high)], drawn no
    further than ours."""
    furthest = max((line[3][-1] for line in lines), default=np.inf)
    for number, (_, x, *values) in enumerate(published):
        x, centre, low, high = (part[x <= furthest] for part in (x, *values))
        axes.fill_between(x, low, high, color="black", alpha=0.08, linewidth=0)
        axes.plot(x, centre, color="black", linewidth=1, linestyle=REFERENCE_LINES[number % 3])
        if len(x) <= 10:
            axes.scatter(x, centre, color="black", s=8)  # between so few points nothing was measured
    for series, number, _, x, centre, low, high in lines:
        colour, marker, line = style(series, number)
        every = max(1, len(x) // 6)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, centre, color=colour, linestyle=line, linewidth=1.6, marker=marker, markersize=4.5,
                  markevery=(number % every, every))  # not on one another
    if lines:
        axes.set_xlim(-0.04 * furthest, 1.04 * furthest)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.locator_params(axis="x", nbins=5)


def draw_points(axes, points, ticks, joined, count):
    """points: [(series, number, place, centre, low, high)]; ticks: label of every place; joined: a line a series."""
    by_series = {}
    for series, number, *point in points:
        by_series.setdefault((series, number), []).append(point)
    for (series, number), rows in by_series.items():
        place, centre, low, high = np.array(rows, float).T
        colour, marker, line = style(series, number)
        spread = (number - (count - 1) / 2) * min(0.14, 0.7 / count)
        intervals = np.nan_to_num([centre - low, high - centre])
        axes.errorbar(place + spread, centre, np.maximum(intervals, 0), color=colour, marker=marker, markersize=5,
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
    """panels: [(title, y label)]; rows: names; draw(axes, panel's number, row) says whether there was anything to draw.
    With one panel, the rows go across, three beside one another at most or in a square. Panels of one row and one y label
    share their scale."""
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
        grid = grid.reshape(-1, 1)  # below, each panel is a row's only one
    lowest = len(rows) - (shape[1] if across else 1)  # from here on nothing stands below
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
                axes.set_yticks([])
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
    """[(label, handle)] of our lines, then of the published ones."""
    ours = [(labels(name), style(name, number)) for number, name in enumerate(series)]
    return [(label, Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=line if joined else "none"))
            for label, (colour, marker, line) in ours] + [
        (label, Line2D([], [], color="black", linestyle=REFERENCE_LINES[number % 3], linewidth=1))
        for number, label in enumerate(dict.fromkeys(label for lines in published for label, *_ in lines))]


# ---- a figure of the paper ----

def draw_figure(name, options):
    """Reads, aggregates and draws one figure. Returns (the page, lines to tell)."""
    figure, found = figures.selected(name, options)
    statistic, _ = STATISTICS[options.statistic]
    columns = sorted({column for measure in figure.measures for column in measure.columns})
    columns += ["returns"] * options.episodes
    columns += [column for column in SAVED if options.save and column not in columns]
    runs, wrong, told = gather({run.name: run.args for run in found}, options.paths, columns)
    if not runs:
        raise ValueError(f"{' '.join(options.paths)}: none of the {len(wrong)} runs of {name} is there; their commands: "
                         f"python figures.py commands {name}")
    if options.save:
        save(options.save, runs.values(), columns)

    tasks = list(dict.fromkeys(run.task for run in found))
    of_return = figure.kind == "curves" and figures.RETURN in figure.measures
    published = references(options.reference, statistic) if of_return else {}
    laid = [published[task] for task in tasks if task in published]
    rows = [BOTH, *tasks] if len(tasks) > 1 and not laid else tasks  # nothing is published of all tasks together
    series = list(dict.fromkeys(cell.series for cell in figure.cells))
    places = dict.fromkeys(cell.panel for cell in figure.cells)
    panels = [(panel, measure) for panel in places for measure in figure.measures]
    cells, ticks = {}, {}  # (panel, series, x) -> task -> runs; panel -> x -> label
    for run in found:
        cell = run.cell
        if cell.x not in ticks.setdefault(cell.panel, {}):
            ticks[cell.panel][cell.x] = tick(figure, cell)
        if run.name in runs:
            cells.setdefault((cell.panel, cell.series, cell.x), {}).setdefault(run.task, []).append(runs[run.name])
    total_steps = found[0].args.total_steps

    def draw(axes, column, row):
        panel, measure = panels[column]
        drawn = []
        for (place, label, x), by_task in cells.items():
            if place == panel:
                chosen = [by_task.get(task, []) for task in (tasks if row == BOTH else [row])]
                result = (curve(chosen, measure.columns, statistic, options.episodes) if figure.kind == "curves" else
                          final(chosen, measure.columns, total_steps, statistic, options.episodes))
                if result is not None:
                    drawn.append((label, series.index(label), list(ticks[panel]).index(x), *result))
        if figure.kind == "curves":
            draw_curves(axes, drawn, published.get(row, []) if measure == figures.RETURN else [])
        else:
            draw_points(axes, drawn, list(ticks[panel].values()), figure.joined, len(series))
        return bool(drawn)

    several = len(figure.measures) > 1
    titles = [(f"{panel}\n{measure.label}" if several and panel else panel or measure.label * several, measure.label)
              for panel, measure in panels]
    text = caption(name, figure, options, found, wrong, BOTH in rows) + reference_note(options, laid)
    page = lay_out(titles, rows, draw, text,
                   legend_of(series, shown, laid, figure.kind == "curves" or figure.joined), x_label(figure),
                   1 + max(label.count("\n") for labels in ticks.values() for label in labels.values()))
    if options.reference and not laid:
        told.append(f"--reference: {name} shows no curves of return, or none of the file's tasks; left out")
    return page, told + [f"{name}: {line}" for line in listed(found, wrong)]


def tick(figure, cell):
    """The label of a cell's place: its type, or its scale and the size that the figure is about."""
    return f"{cell.x}\n{millions(figures.size(figure, cell))}" if cell.x.startswith("×") else cell.x


def x_label(figure):
    if figure.kind == "curves":
        return "environment frames"
    return f"scale, and parameters of the {figure.sized}" if figure.joined else f"architecture of the {figure.sized}"


def listed(found, wrong):
    """What is missing, unfinished or refused: a line a cell and task, with its seeds."""
    groups = {}
    for run in found:
        if run.name in wrong:
            parts = (run.cell.panel, shown(run.cell.series), run.cell.x)
            said = ", ".join(part.replace("\n", " ") for part in parts if part)
            groups.setdefault((wrong[run.name], said, run.task), []).append(run.seed)
    return [f"{what}: {said}, {task}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
            for (what, said, task), seeds in groups.items()]


def caption(name, figure, options, found, wrong, together):
    total, seeds = (len({getattr(run, part) for run in found}) for part in ("name", "seed"))
    size = {"smoke": "A smoke test, which shows nothing but that all runs. ", "laptop": figures.LAPTOP_NOTE + " "}
    title = name.replace("fig", "Figure ") if name.startswith("fig") else f"The study {name!r}"
    lines = [f"{title}: {figure.shows}. " + "".join(size[s] for s in size if getattr(options, s))
             + f"{STATISTICS[options.statistic][1]}, {'up to ' * bool(wrong)}{seeds} seed{'s' * (seeds > 1)} a task"
             + (", all their runs together in the panels of all tasks." if together else ".")
             + (" One seed has no interval." if seeds == 1 else "")]
    if figure.kind == "points":
        lines[0] += " Last evaluation of the run."
        if figure.joined:
            lines[0] += f" Parameters: dense, on {figure.tasks[-1]}."
    lines += [measure.note for measure in figure.measures]
    lines += [figure.choice] if figure.choice else []
    if wrong:
        shown_lines, names = [], listed(found, wrong)
        while names and sum(map(len, shown_lines)) < 500:
            shown_lines.append(names.pop(0))
        lines.append(f"NOT SHOWN OR NOT WHOLE, {len(wrong)} of {total} runs: {'; '.join(shown_lines)}"
                     + (f"; and {len(names)} groups more, named on the terminal." if names else "."))
    return lines


def reference_note(options, laid):
    return [f"Published: {os.path.basename(options.reference)}, the same statistic over its seeds."] if laid else []


def references(path, statistic):
    """Published curves: task -> [(label, frames, centre, low, high)]. Columns env, seed, return, agent_step (of two
    frames) or env_step (a frame), and, if there are several, algo."""
    if path is None:
        return {}
    runs = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        known = set(reader.fieldnames or ())
        if not {"env", "seed", "return"} <= known or not {"agent_step", "env_step"} & known:
            raise ValueError(f"--reference {path}: its columns must be env, seed, return, and agent_step or env_step")
        for row in reader:
            frames = float(row["env_step"]) if "env_step" in known else 2 * float(row["agent_step"])
            label = f"published {row['algo']}" if "algo" in known else "published"
            seeds = runs.setdefault((row["env"], label), {})
            seeds.setdefault(row["seed"], []).append((frames / 2, frames, float(row["return"])))
    lines = {}
    for (task, label), seeds in runs.items():
        names = ("agent_step", "frames", "return")
        tables = [Run(label, dict(zip(names, np.array(sorted(rows)).T))) for rows in seeds.values()]
        lines.setdefault(task, []).append((label, *curve([tables], ("return",), statistic, False)))
    return lines


# ---- any runs ----

def draw_runs(options):
    """Compares run folders: seeds of one name are one line. Returns (the page, lines to tell)."""
    groups, firsts, told = {}, {}, []
    for folder in options.paths:
        try:
            run = read_run(folder, [*options.columns, *["returns"] * options.episodes])
            own = from_config(run.config) if run.config else None
            label = run.name.partition("__seed=")[0]
            task = own.env if own else label.partition("__")[0]
            first = firsts.setdefault(label, own)
            differs = difference(run.config, dataclasses.replace(first, seed=own.seed)) if own and first else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            told.append(f"{folder}: left out: {plainly(error)}")
            continue
        told += run.notes
        if differs:
            told.append(f"{folder}: {differs}, as another run of its name; left out")
        else:
            groups.setdefault(task, {}).setdefault(label.removeprefix(task).removeprefix("__"), []).append(run)
    if not groups:
        raise ValueError("; ".join(told))
    names = list(dict.fromkeys(name for by_name in groups.values() for name in by_name))
    common = set.intersection(*(set(name.split("__")) for name in names))
    plain = "default" if len(names) > 1 else "these runs"
    labels = {name: ", ".join(part for part in name.split("__") if part not in common) or plain for name in names}
    statistic, said = STATISTICS[options.statistic]
    published = references(options.reference, statistic)

    def draw(axes, column, row):
        drawn = []
        for name, runs in groups[row].items():
            result = curve([runs], (options.columns[column],), statistic, options.episodes)
            if result is not None:
                drawn.append((name, names.index(name), 0, *result))
        draw_curves(axes, drawn, published.get(row, []) if options.columns[column] == "return" else [])
        return bool(drawn)

    counts = sorted({len(runs) for by_name in groups.values() for runs in by_name.values()})
    text = [f"{said}, over {' to '.join(map(str, sorted({counts[0], counts[-1]})))} run{'s' * (counts[-1] > 1)} a line."
            + (f" All: {', '.join(sorted(common - {''}))}." if common - {""} else "")]
    laid = [published[task] for task in groups if task in published]
    titles = [(column if len(options.columns) > 1 else "", column) for column in options.columns]
    page = lay_out(titles, list(groups), draw,
                   text + reference_note(options, laid), legend_of(names, labels.get, laid), "environment frames")
    return page, told


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="fig2 ... fig26, all, or curves")
    parser.add_argument("paths", nargs="*", default=["runs"], help="folders of runs, or files that --save wrote; "
                        "after curves: the runs themselves")
    parser.add_argument("--statistic", choices=STATISTICS, default="iqm")
    parser.add_argument("--episodes", action="store_true",
                        help="pool single episodes' returns in the IQM, not their means")
    parser.add_argument("--columns", nargs="+", default=["return"], help="curves: columns of eval.csv")
    parser.add_argument("--reference", metavar="FILE.csv", help="published curves to lay under ours, task by task")
    parser.add_argument("--save", metavar="FILE.csv", help="also write the values that were drawn")
    parser.add_argument("--out", default=".", help="folder of the pictures")
    return figures.options(parser)


def main():
    options = command_line().parse_args()
    names = list(figures.chosen(options)) if options.what == "all" else [options.what]
    failed = False
    os.makedirs(options.out, exist_ok=True)
    for name in names:
        try:
            page, told = draw_runs(options) if name == "curves" else draw_figure(name, options)
        except (ValueError, OSError) as error:
            print(f"plot.py: {plainly(error)}", file=sys.stderr)
            failed = True
            continue
        for line in told:
            print(f"plot.py: {line}", file=sys.stderr)
        path = os.path.join(options.out, name + "-smoke" * options.smoke + "-laptop" * options.laptop)
        for ending in ("png", "pdf"):
            page.savefig(f"{path}.{ending}", dpi=150)
        plt.close(page)
        print(f"{path}.png {path}.pdf")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
