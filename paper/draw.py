"""Draws the paper's figures and the laptop studies from whatever runs are there.

Guarantees: runs that are missing, unfinished or have other settings are named under the picture and on the terminal,
and the rest is drawn.

    ./sweep.sh plot fig6 runs/                              # writes fig6.png and fig6.pdf
    ./sweep.sh plot fig11 runs/ --laptop --statistic mean-sd
    ./sweep.sh plot fig11 runs/ --laptop --save fig11.csv   # also all runs as one CSV, which can replace runs/

Layout, markers and axes are the paper's; plot.py draws them.
"""

import argparse
import itertools
import os
import sys

import plot
from paper.figures import RETURN
from paper.studies import add_options, all_figures, figure_size, get_runs, millions
from runtime.aggregate import STATISTICS, curve, final
from runtime.results import error_line, gather, save

ALL_TASKS = "all tasks"
SAVED = ("return", "seconds", "encoder/srank_zsa", "critic/srank_q1", "critic/srank_q2", "actor/srank_pi",
         *(f"{module}/{metric}" for metric in ("dormant_ratio", "parameter_norm", "grad_norm", "grad_cosine")
           for module in ("encoder", "critic", "actor")))  # by --save, besides what the figure shows


def draw_figure(name, options):
    """Reads, aggregates and draws one figure. Returns (the page, notes)."""
    figure, jobs = get_runs(name, options)
    statistic, _ = STATISTICS[options.statistic]
    columns = sorted({column for measure in figure.measures for column in measure.columns})
    columns += ["returns"] * options.episodes
    columns += [column for column in SAVED if options.save and column not in columns]
    runs, wrong, notes = gather({job.name: job.args for job in jobs}, options.paths, columns)
    if not runs:
        command = f"./sweep.sh {name}" + " --laptop" * options.laptop + " --smoke" * options.smoke
        raise ValueError(f"none of the {len(wrong)} runs of {name} is in {' '.join(options.paths)}; "
                         f"to run them: {command}")
    if options.save:
        save(options.save, runs.values(), columns)

    tasks = list(dict.fromkeys(job.task for job in jobs))
    of_return = figure.kind == "curves" and RETURN in figure.measures
    published = plot.references(options.reference, statistic) if options.reference and of_return else {}
    beside = [published[task] for task in tasks if task in published]
    if options.reference and not beside:
        raise ValueError(f"--reference: {name} shows no curves of return, or {options.reference} has none of its tasks")
    rows = [ALL_TASKS, *tasks] if len(tasks) > 1 and not beside else tasks  # nothing is published of all tasks together
    series = list(dict.fromkeys(arm.series for arm in figure.arms))
    looks = plot.styles(series)
    panels = list(itertools.product(dict.fromkeys(arm.panel for arm in figure.arms), figure.measures))
    found, ticks = {}, {}  # (panel, series, x) -> task -> runs; panel -> x -> label
    for job in jobs:
        arm = job.arm
        if arm.x not in ticks.setdefault(arm.panel, {}):
            ticks[arm.panel][arm.x] = tick(figure, arm)
        if job.name in runs:
            found.setdefault((arm.panel, arm.series, arm.x), {}).setdefault(job.task, []).append(runs[job.name])
    total_steps = jobs[0].args.total_steps

    def draw(axes, column, row):
        panel, measure = panels[column]
        drawn = []
        for (place, label, x), by_task in found.items():
            if place == panel:
                tasks_runs = [by_task.get(task, []) for task in (tasks if row == ALL_TASKS else [row])]
                if figure.kind == "curves":
                    result = curve(tasks_runs, measure.columns, statistic, options.episodes)
                else:
                    result = final(tasks_runs, measure.columns, total_steps, statistic, options.episodes)
                if result is not None:
                    drawn.append((looks[label], series.index(label), list(ticks[panel]).index(x), *result))
        if figure.kind == "curves":
            plot.draw_curves(axes, drawn, published.get(row, []) if measure == RETURN else [])
        else:
            plot.draw_points(axes, drawn, list(ticks[panel].values()), figure.x_is_size, len(series))
        return bool(drawn)

    several = len(figure.measures) > 1
    titles = [(f"{panel}\n{measure.label}" if several and panel else panel or measure.label * several, measure.label)
              for panel, measure in panels]
    text = caption(name, figure, options, jobs, wrong, ALL_TASKS in rows)
    text += plot.reference_note(options.reference) if beside else []
    legend = plot.legend_of(looks, plot.display_name, beside, figure.kind == "curves" or figure.x_is_size)
    tick_lines = 1 + max(label.count("\n") for labels in ticks.values() for label in labels.values())
    page = plot.lay_out(titles, rows, draw, text, legend, x_label(figure), tick_lines)
    return page, notes + [f"{name}: {line}" for line in missing_groups(jobs, wrong)]


def tick(figure, arm):
    """The label of an arm's place: its type, or its scale and the size that the figure is about."""
    return f"{arm.x}\n{millions(figure_size(figure, arm))}" if arm.x.startswith("×") else arm.x


def x_label(figure):
    if figure.kind == "curves":
        return "environment frames"
    return f"{'scale, and parameters' if figure.x_is_size else 'architecture'} of the {figure.module}"


def missing_groups(jobs, wrong):
    """What is missing, unfinished or refused: a line per arm and task, with its seeds."""
    groups = {}
    for job in jobs:
        if job.name in wrong:
            parts = (job.arm.panel, plot.display_name(job.arm.series), job.arm.x)
            arm = ", ".join(part.replace("\n", " ") for part in parts if part)
            groups.setdefault((wrong[job.name], arm, job.task), []).append(job.seed)
    return [f"{what}: {arm}, {task}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
            for (what, arm, task), seeds in groups.items()]


def caption(name, figure, options, jobs, wrong, together):
    total, seeds = (len({getattr(job, part) for job in jobs}) for part in ("name", "seed"))
    size = {"smoke": "A smoke test: it shows only that everything runs. ",
            "laptop": "Laptop study, smaller or shorter than the paper's. "}
    title = name.replace("fig", "Figure ") if name.startswith("fig") else f"Study {os.path.basename(name)!r}"
    lines = [f"{title}: {figure.title}. " + "".join(size[flag] for flag in size if getattr(options, flag))
             + f"{STATISTICS[options.statistic][1]}, {'up to ' * bool(wrong)}{seeds} seed{'s' * (seeds > 1)} per task"
             + (", all runs together in the panels of all tasks." if together else ".")
             + (" One seed has no interval." if seeds == 1 else "")]
    if figure.kind == "points":
        lines[0] += " Last evaluation of the run."
        if figure.x_is_size:
            lines[0] += f" Parameters: dense, on {figure.tasks[-1]}."
    lines += [measure.note for measure in figure.measures]
    lines += [figure.note] if figure.note else []
    if wrong:
        named, groups = [], missing_groups(jobs, wrong)
        while groups and sum(map(len, named)) < 500:
            named.append(groups.pop(0))
        lines.append(f"MISSING OR UNFINISHED, {len(wrong)} of {total} runs: {'; '.join(named)}"
                     + (f"; and {len(groups)} more groups, named on the terminal." if groups else "."))
    return lines


def main():
    parser = argparse.ArgumentParser(prog="sweep.sh plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", help="fig2 ... fig26, a laptop study, all, or a grid's file")
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="folders of runs, or CSVs that --save wrote; default: runs")
    plot.add_output(parser)
    options = add_options(parser).parse_args()
    options.paths = options.paths or ["runs/smoke" if options.smoke else "runs"]
    names = list(all_figures(options)) if options.figure == "all" else [options.figure]
    if len(names) > 1 and (options.save or (options.out or "").endswith((".png", ".pdf", ".svg"))):
        sys.exit("sweep.sh: --save FILE and --out FILE are for one figure, not for all")
    failed = False
    for name in names:
        try:
            page, notes = draw_figure(name, options)
            for note in notes:
                print(f"sweep.sh: {note}", file=sys.stderr)
            stem = os.path.splitext(os.path.basename(name))[0] + "-smoke" * options.smoke + "-laptop" * options.laptop
            print(*plot.write_page(page, stem, options.out))
        except (ValueError, OSError) as error:
            print(f"sweep.sh: {error_line(error)}", file=sys.stderr)
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
