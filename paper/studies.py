"""The figures and studies by name: their runs, sizes and hours, and the part of sweep.sh that is written in Python.

    ./sweep.sh list                              # calls `list`
    ./sweep.sh fig6 --tasks dog-run --seeds 3    # calls `runs`: one line per run, its name and train.py's arguments

A name is a figure of the paper (figures.py), with --laptop a laptop study (laptop.py), or a file of your own
(runtime/grid.py).
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys

from agents import count_parameters, module_configs
from paper.figures import FIGURES, Figure, smoke
from paper.laptop import LAPTOP, OLD_NAMES
from runtime.grid import add_filters, make_jobs, parse_seeds, parse_tasks, read_grid, to_args
from runtime.results import error_line


# ---- by name ----

def all_figures(options):
    """name -> Figure, at the size that is asked for."""
    if options.laptop:
        return LAPTOP
    return {name: smoke(figure) for name, figure in FIGURES.items()} if options.smoke else FIGURES


def get_figure(name, options):
    """A figure, a study, or the grid of a file. ValueError, in one line, for an unknown name."""
    if name.endswith((".toml", ".json")):
        own = read_grid(name)
        title = own.title or os.path.splitext(os.path.basename(name))[0]
        figure = Figure(title, "curves", own.arms, tasks=own.tasks, seeds=own.seeds)
        if options.laptop:
            raise ValueError(f"{name}: --laptop is for the studies that ./sweep.sh list names")
        return smoke(figure) if options.smoke else figure
    name = OLD_NAMES.get(name, name)
    figures = all_figures(options)
    if name in figures:
        return figures[name]
    if name in LAPTOP:
        raise ValueError(f"{name} is a laptop study: add --laptop" + (", without --smoke" if options.smoke else ""))
    if name in FIGURES:
        raise ValueError(f"{name} has no laptop study: choose one of {', '.join(figures)}")
    raise ValueError(f"unknown figure {name!r}: choose one of {', '.join(figures)}, or a grid in a .toml or .json file")


def get_jobs(figure, tasks=None, seeds=None, more=()):
    """Every run of a figure, panel by panel, all arms of a seed before the next seed: a part compares all arms."""
    panels = list(dict.fromkeys(arm.panel for arm in figure.arms))
    seeds = figure.seed_list if seeds is None else seeds
    jobs = make_jobs(figure.arms, tasks or figure.tasks, seeds, more)
    return sorted(jobs, key=lambda job: (panels.index(job.arm.panel), seeds.index(job.seed)))


def get_runs(name, options):
    """(Figure, its runs as the options narrow them). ValueError in one line."""
    figure = get_figure(name, options)
    if options.steps is not None:
        figure = dataclasses.replace(figure, arms=tuple(
            dataclasses.replace(arm, flags={**arm.flags, "total_steps": options.steps}) for arm in figure.arms))
    tasks = parse_tasks(options.tasks)
    known = {task for study in (*FIGURES.values(), *LAPTOP.values(), figure) for task in study.tasks}
    if tasks and not {*tasks} <= known:
        from envs import check_task
        with contextlib.suppress(ImportError):  # printing and drawing need no simulator
            for task in tasks:
                check_task(task)
    return figure, get_jobs(figure, tasks, parse_seeds(options.seeds), shlex.split(options.more))


# ---- sizes and hours ----

# task -> (obs_dim, action_dim)
SHAPES = {"dog-run": (223, 38), "humanoid-run": (67, 21), "walker-walk": (24, 6), "walker-run": (24, 6),
          "cartpole-balance": (5, 1), "quadruped-run": (78, 12), "hopper-hop": (15, 4), "walker-stand": (24, 6)}
# Milliseconds per agent step at millions of parameters: two cores of an AMD EPYC (AVX-512), fp32. "agent": SAC, DDPG.
TIMED = {"encoder": ((2.09, 51), (36.97, 595), (154.69, 2420)), "critic": ((1.58, 20), (33.06, 267), (144.24, 1140)),
         "actor": ((0.81, 13), (16.58, 191), (72.22, 808)), "agent": ((4.39, 85), (207.96, 3100))}


_SIZES = {}  # building a network on the meta device takes milliseconds, and a figure has up to 90


def sizes(args):
    """module -> trainable parameters, dense, without MR.Q's prediction head; for an unknown shape, humanoid-run's."""
    scales = [(module.width_scale, module.depth_scale) for module in module_configs(args).values()]
    key = repr((args.algo, args.env, args.agent, args.pixel, scales))
    if key not in _SIZES:
        obs, action = SHAPES.get(args.env, SHAPES["humanoid-run"])
        frames = (3 * args.pixel.frame_stack, args.pixel.image_size, args.pixel.image_size)
        _SIZES[key] = count_parameters(args, frames if args.pixel.pixels else obs, action)
    return _SIZES[key]


def figure_size(figure, arm):
    """Millions of parameters that the figure is about, on its last task (the paper prints humanoid-run's)."""
    counts = sizes(to_args(arm.flags, figure.tasks[-1], 0))
    return (sum(counts.values()) if figure.module == "agent" else counts[figure.module]) / 1e6


def millions(count):
    """12 M, 1.3 M or 45 k, from millions."""
    return f"{count:.0f} M" if count >= 9.95 else f"{count:.1f} M" if count >= 0.095 else f"{1e3 * count:.0f} k"


def step_ms(args):
    """An estimate for two cores: per module, between the sizes that were timed (log-log); MR.SAC as MR.Q."""
    counts = sizes(args)
    if args.algo in ("sac", "ddpg"):
        counts = {"agent": sum(counts.values())}
    return sum(_between(TIMED[name], count / 1e6) for name, count in counts.items())


def _between(points, x):
    logs = [(math.log(size), math.log(ms)) for size, ms in points]
    (x0, y0), (x1, y1) = next(((a, b) for a, b in zip(logs, logs[1:]) if math.log(x) <= b[0]), logs[-2:])
    return math.exp(y0 + (y1 - y0) * (math.log(x) - x0) / (x1 - x0))


def hours(figure, jobs):
    """Hours on two CPU cores, rounded to two digits. A study's step was timed on one core; two runs fit at a time."""
    jobs = {job.name: job for job in jobs}.values()
    each = [(job.args.total_steps - job.args.learning_starts)
            * (figure.step_ms / 2 if figure.step_ms else step_ms(job.args)) for job in jobs]
    return f"{float(f'{sum(each) / 3.6e6:.2g}'):,g}"


# ---- the command line of sweep.sh ----

def table_rows(names, options):
    """One row per figure: what it shows, its runs, sizes, hours, and the columns of eval.csv that it is drawn from."""
    for name in names:
        figure, jobs = get_runs(name, options)
        counts = [millions(count) for count in sorted({round(figure_size(figure, arm), 3) for arm in figure.arms})]
        span = dict.fromkeys(counts if len(set(counts)) <= 3 else [counts[0], "...", counts[-1]])
        yield {"figure": name, "shows": figure.title, "runs": f"{len({job.name for job in jobs}):,}",
               "parameters": f"{figure.module} {' / '.join(span)}", "hours": hours(figure, jobs),
               "columns": ", ".join(column for measure in figure.measures for column in measure.columns)}


def show_table(names, options):
    rows = list(table_rows(names, options))
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(f"{row[key]:{width}}" for key, width in widths.items()).rstrip())


def list_all(options):
    """The paper's figures, then the laptop studies; or the one list that --laptop or --smoke asks for."""
    for title, laptop in (("figures of the paper", False), ("laptop studies: add --laptop", True)):
        if options.laptop <= laptop and not (options.smoke and laptop):
            part = argparse.Namespace(**{**vars(options), "laptop": laptop})
            print(f"{title}{', tiny: --smoke' if options.smoke else ''}\n")
            show_table(list(all_figures(part)), part)
            print()
    print("Hours are for two CPU cores, estimated from measured times of a step; not measured on a GPU.\n"
          "Runs that figures share are run once. Your own grid: a .toml file, see docs/figures.md.")


def add_options(parser):
    """What narrows a figure's runs: the same in every command of sweep.sh."""
    add_filters(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="agent steps instead of the figure's own")
    parser.add_argument("--more", default="", metavar="'FLAGS'",
                        help="further flags of train.py for every run, in quotes")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="one seed, tiny networks, few steps, one cheap task")
    size.add_argument("--laptop", action="store_true", help="the study at a size that two cores finish in hours")
    return parser


def main():
    parser = argparse.ArgumentParser(prog="sweep.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "runs"))
    parser.add_argument("figures", nargs="*", metavar="FIG", help="fig2 ... fig26, all, or a grid's file")
    options = add_options(parser).parse_args()
    try:
        if options.what == "list" and not options.figures:
            return list_all(options)
        names = list(all_figures(options)) if options.figures == ["all"] else options.figures
        if options.what == "list":
            return show_table(names, options)
        if not names:
            raise ValueError("name a figure, or all")
        for job in {job.name: job for name in names for job in get_runs(name, options)[1]}.values():
            print(job.name, shlex.join(job.command), sep="\t")
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` closed the pipe: the interpreter's last flush must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        sys.exit(f"sweep.sh: {error_line(error)}")


if __name__ == "__main__":
    main()
