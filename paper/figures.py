"""The paper's figures as data: which runs each needs, what is read from them, and how it is laid out.

What it claims: each grid is what the paper's text describes, and where the text leaves something open, `choice` says what
was chosen; a run that several figures share has one name, and is run once. It needs no PyTorch.

    python figures.py list                         # what each figure shows, its runs, sizes, hours and columns
    python figures.py commands fig6 --tasks dog-run --seeds 3     # the arguments of train.py, one run a line
    python figures.py names fig2 fig3 --laptop     # the folders that these runs write, in the same order

--smoke: the same grid with one seed, tiny networks and few steps on one cheap task; it shows that everything runs.
--laptop: studies of some figures that two cores finish in hours: narrow networks at the paper's depths.
Paper: Sections 3 and 4, Appendices B.2.2, D and E. Figures 18-25 are the rows of 2, 4, 5, 6, 8 and 9, task by task.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shlex
import sys
from dataclasses import dataclass

from paper.estimate import millions, sizes, step_ms
from settings import check, defaults, flag_names, parse, run_name, set_setting, nondefault_flags

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
TYPES = (1, 2, 3, 4, 5, 6)
TYPE_LABELS = {1: "Type 1\nReLU", 2: "Type 2\nELU", 3: "Type 3\nLN, ReLU", 4: "Type 4\nLN, ELU",
               5: "Type 5\nLN, ReLU,\nresidual", 6: "Type 6\nLN, ELU,\nresidual"}
TASKS = ("dog-run", "humanoid-run")  # Section 3, Setup
SMOKE_TASK, LAPTOP_TASK = "cartpole-balance", "walker-walk"


@dataclass(frozen=True)
class Measure:
    """What is read from eval.csv, and what a reader must know of it."""
    columns: tuple  # averaged
    label: str
    note: str = ""


RETURN = Measure(("return",), "return", "Return: mean of an evaluation's episodes, no exploration noise.")
_SRANK = "SRank: smallest k whose singular values reach 1 - δ of their sum, δ = 0.01, batch of 2,048, of "
_DORMANT = "Dormant: mean |activation| at most τ = 0.025 of its layer's mean, batch of 2,048, all hidden layers of the "
ENCODER_SRANK = Measure(("encoder/srank_zsa",), "SRank of z_sa", _SRANK + "the encoder's z_sa.")
CRITIC_SRANK = Measure(("critic/srank_q1", "critic/srank_q2"), "SRank, critic",
                       _SRANK + "each Q network's last hidden layer, mean of both.")
CRITIC_DORMANT = Measure(("critic/dormant",), "dormant ratio, critic", _DORMANT + "critic.")
ACTOR_DORMANT = Measure(("actor/dormant",), "dormant ratio, actor", _DORMANT + "actor.")


@dataclass(frozen=True)
class Cell:
    """The runs, one a task and seed, behind one curve or one point."""
    panel: str  # whose panel it stands in
    series: str  # its entry in the legend
    flags: dict  # settings of train.py that are not the default, without task and seed
    x: str = ""  # where it stands, in a figure of points


@dataclass(frozen=True)
class Figure:
    shows: str
    kind: str  # "points": final performance over x; "curves": over environment frames
    cells: tuple
    measures: tuple = (RETURN,)  # one panel each
    tasks: tuple = TASKS
    seeds: int = 8
    sized: str = "agent"  # whose parameters the figure is about: encoder, critic, actor, or the agent's in all
    choice: str = ""  # what the paper's text leaves open, and what was chosen

    @property
    def joined(self):
        """Whether the points lie on an axis of sizes, so that lines between them mean something."""
        return self.kind == "points" and self.cells[0].x.startswith("×")


def grid(module, types, scales=(1,), regimes=REGIMES, by_type=True, **others):
    """A study of one module: types × regimes × scales. by_type: a panel a type, or else one panel with the types as x."""
    for arch_type, scale, regime in itertools.product(types, scales, regimes):
        flags = {f"{module}_type": arch_type, f"{module}_regime": regime, f"{module}_scale": scale, **others}
        label = TYPE_LABELS[arch_type]
        yield Cell(label.replace("\n", " ", 1).replace("\n", " ") if by_type else "", regime, flags,
                   f"×{scale}" if by_type else label)


def dimensions(points, **others):
    """Scaling in width, in depth and in both: (panel's name, x, flags). Scale 1 is the first point of each."""
    for name, flag, scales in (("width", "width_scale", points[0]), ("depth", "depth_scale", points[1]),
                               ("width and depth", "scale", points[2])):
        for scale in scales:
            yield name, f"×{scale}", {flag: scale, **others} if scale != 1 else others


# ---- the paper's ----

STRONG_ENCODER = {"encoder_type": 6, "encoder_scale": 3}  # Section 3.2: "Type 6, 37M parameters", dense
RES = {"encoder_type": 6, "critic_type": 6, "actor_type": 5}  # MST's architecture, all dense: "+ Res"

_SCALES = (1, 3, 5)  # Section 3, Setup
_SIMBA_POINTS = (1, 2, 4), (1, 2, 4), (1, 2, 3)
_MRSAC_POINTS = (1, 3, 5), (1, 3, 5), (1, 3, 5)
_MST5 = {"scale": 5, "mst": True}
_FIG14 = {"algo": "sac", "width_scale": 4, "depth_scale": 3}


def _mst_ablation(base, dense, levels):
    """Fig. 12: MST as it is, in every panel, beside MST with one part changed."""
    for panel, series, flags in (("distribution", "uniform", {"distribution": "uniform"}),
                                 ("growth (critic)", "SET", {"grow": "random"})):
        yield Cell(panel, "MST (ER, RigL, 0.6)", base)
        yield Cell(panel, series, {**base, **flags})
    for level in levels:
        series = {0: "sparsity 0 (dense)", 0.6: "MST (ER, RigL, 0.6)"}.get(level, f"sparsity {level}")
        yield Cell("sparsity", series, {0: dense, 0.6: base}.get(level, {**base, "sparsity": level}))


def _plain_and_mst(name, points, plain, **others):
    for dimension, x, flags in dimensions(points, **others):
        yield Cell(f"{name}, {dimension}", "plain", {**plain, **flags}, x)
        yield Cell(f"{name}, {dimension}", "MST", {**flags, "mst": True}, x)


FIGURES = {
    "fig2": Figure(
        "encoder: architecture types and training regimes, default size", "points",
        tuple(grid("encoder", TYPES, by_type=False)), sized="encoder"),
    "fig3": Figure(
        "encoder: SRank with LayerNorm and without", "curves", tuple(grid("encoder", (2, 4))), (ENCODER_SRANK,),
        sized="encoder", choice="Types 2 and 4 are the text's; all five regimes are a choice."),
    "fig4": Figure(
        "encoder scaled in width and depth", "points", tuple(grid("encoder", (2, 4, 6), _SCALES)), sized="encoder"),
    "fig5": Figure(
        "critic: architecture types and training regimes, default size", "points",
        tuple(grid("critic", TYPES, by_type=False, **STRONG_ENCODER)), sized="critic"),
    "fig6": Figure(
        "critic scaled in width and depth", "points", tuple(grid("critic", TYPES, _SCALES, **STRONG_ENCODER)),
        sized="critic", choice="All six types are a choice: the text speaks of Types 1-4 and of 5-6."),
    "fig7": Figure(
        "critic at scale 5: SRank and dormant neurons", "curves", tuple(grid("critic", (4, 6), (5,), **STRONG_ENCODER)),
        (CRITIC_SRANK, CRITIC_DORMANT), sized="critic",
        choice="Types 4 and 6, without and with residual connections, are a choice."),
    "fig8": Figure(
        "actor: architecture types and training regimes, default size", "points",
        tuple(grid("actor", TYPES, by_type=False, **STRONG_ENCODER)), sized="actor"),
    "fig9": Figure(
        "actor scaled in width and depth", "points", tuple(grid("actor", (1, 3, 5), _SCALES, **STRONG_ENCODER)),
        sized="actor"),  # types: the captions of Figs. 24 and 25
    "fig10": Figure(
        "actor at scale 5: dormant neurons", "curves", tuple(grid("actor", (3, 5), (5,), **STRONG_ENCODER)),
        (ACTOR_DORMANT,), sized="actor"),
    "fig11": Figure(
        "all modules at scale 5: MR.Q, with residual connections, with MST", "curves",
        (Cell("", "MR.Q", {"scale": 5}), Cell("", "MR.Q + Res", {"scale": 5, **RES}),
         Cell("", "MR.Q + Res + MST", _MST5)), (RETURN, CRITIC_SRANK, CRITIC_DORMANT, ACTOR_DORMANT),
        choice="Which modules' metrics stand in the right panel is a choice: both of the critic, dormant of the actor."),
    "fig12": Figure(
        "MST at scale 5: distribution, growth and level of sparsity", "curves",
        tuple(_mst_ablation(_MST5, {"scale": 5, **RES}, (0, 0.4, 0.6, 0.8, 0.9))), tasks=("dog-run",),
        choice="The levels are a choice, the same for critic and actor; 0 is Fig. 11's \"+ Res\", dense."),
    "fig13": Figure(
        "SAC and DDPG on SimBa scaled, plain and with MST", "points",
        (*_plain_and_mst("SAC", _SIMBA_POINTS, {}, algo="sac"), *_plain_and_mst("DDPG", _SIMBA_POINTS, {}, algo="ddpg")),
        choice="The scales are a choice; sparsity 0.8 is the companion paper's public example."),
    "fig14": Figure(
        "SAC at 207 M: static or dynamic, actor and critic in all pairings", "curves",
        tuple(Cell("", f"critic {critic.upper()}, actor {actor.upper()}" + " (MST)" * (critic == "dst" and actor == "sst"),
                   {**_FIG14, "critic_regime": critic, "actor_regime": actor})
              for critic in ("dst", "sst") for actor in ("sst", "dst")), tasks=("humanoid-run",),
        choice="Width 4 and depth 3 are a choice that has the text's 207 M."),
    "fig17": Figure(
        "residual connections before or after norm and activation, scales 1 and 3", "points",
        tuple(Cell("", {"pre": "pre-layer", "post": "post-layer"}[residual], {"scale": scale, **RES, "residual": residual},
                   f"×{scale}") for scale in (1, 3) for residual in ("pre", "post")),
        choice="All three modules, types 6, 6 and 5, dense, are a choice."),
    "fig26": Figure(
        "MR.SAC scaled, plain and with MST", "points", tuple(_plain_and_mst("MR.SAC", _MRSAC_POINTS, RES, algo="mrsac")),
        seeds=5,  # the caption
        choice="The scales are a choice; the plain arms have MST's types 6, 6 and 5, so that only regimes differ."),
}


# ---- the same, small ----

def smoke(figure):
    """The same grid, tiny: every flag that makes a cell stays, its width becomes 1/32, its depth stays."""
    tiny = {"total_steps": 120, "learning_starts": 40, "eval_every": 60, "eval_episodes": 1, "batch_size": 16,
            "buffer_size": 2000, "update_interval": 20}
    cells = []
    for cell in figure.cells:
        width = cell.flags.get("width_scale", cell.flags.get("scale", 1)) / 32
        bursts = {} if cell.flags.get("algo") in ("sac", "ddpg") else {"target_update_freq": 20}
        cells.append(dataclasses.replace(cell, flags={**cell.flags, **tiny, **bursts, "width_scale": width}))
    return dataclasses.replace(figure, cells=tuple(cells), tasks=(SMOKE_TASK,), seeds=1)


LAPTOP_NOTE = "Laptop study, smaller or shorter than the paper's."
_SHORT = {"learning_starts": 2000, "total_steps": 12000, "eval_every": 1000}
_NARROW = {"width_scale": 0.25, **_SHORT}
_LAPTOP_STRONG = {"encoder_type": 6, "encoder_scale": 3, **_NARROW}
_LAPTOP_ACTOR = {"encoder_type": 6, "actor_scale": 5, **_NARROW}
_LAPTOP_RES = {"depth_scale": 5, **RES, **_NARROW}
_LAPTOP_MST = {"depth_scale": 5, "mst": True, **_NARROW}


def _laptop(figure, cells, size="Width ×0.25", **changes):
    return dataclasses.replace(FIGURES[figure], cells=tuple(cells), tasks=(LAPTOP_TASK,), seeds=5,
                               choice=f"{size}; 12,000 agent steps, of which 2,000 are random.", **changes)


def _types(module, types, **others):
    """Dense networks of these types as the curves of one panel."""
    return (Cell("types, dense", TYPE_LABELS[t].replace("\n", " "), {f"{module}_type": t, **others}) for t in types)


def _regimes(module, arch_type, **others):
    return (Cell(f"regimes, Type {arch_type}", regime, {f"{module}_type": arch_type, f"{module}_regime": regime, **others})
            for regime in REGIMES)


def _simba_laptop(algo):
    width, depth = ((1, {}), (4, {"width_scale": 0.5})), ((1, {}), (4, {"depth_scale": 4}))
    for name, points in (("width", width), ("depth", depth)):
        for scale, flags in points:
            for series, mst in (("plain", {}), ("MST", {"mst": True})):
                yield Cell(f"{algo.upper()}, {name}", series,
                           {"algo": algo, **_SHORT, "width_scale": 0.125, **flags, **mst}, f"×{scale}")


_DEEP_CRITIC = tuple(_regimes("critic", 6, critic_scale=5, **_LAPTOP_STRONG))
_DEEP_ACTOR = tuple(_regimes("actor", 5, **_LAPTOP_ACTOR))
_FIRST = {"width_scale": 0.25, "learning_starts": 1000, "eval_every": 3000}
_FIRST_MST = {"mst": True, **_FIRST}
_CUP = {"mst": True, "width_scale": 0.25, "learning_starts": 1000, "total_steps": 20000, "eval_every": 4000}
_CRITIC = (RETURN, CRITIC_SRANK, CRITIC_DORMANT)
LAPTOP = {
    "first": Figure("the README's first command: longer, shorter, dense, and after more random steps", "curves",
                    (Cell("", "MST", {**_FIRST_MST, "total_steps": 24000}),
                     Cell("", "MST, 30,000 steps", {**_FIRST_MST, "total_steps": 30000}),
                     Cell("", "MST, 18,000 steps", {**_FIRST_MST, "total_steps": 18000}),
                     Cell("", "dense, 18,000 steps", {**RES, **_FIRST, "total_steps": 18000}),
                     Cell("", "MST, 10,000 random steps", {**_FIRST_MST, "learning_starts": 10000, "total_steps": 27000})),
                    _CRITIC, tasks=("cartpole-swingup",),
                    choice="Width ×0.25; 24,000 steps, 30,000 or 18,000, of which 1,000 are random, or 27,000 with 10,000 of "
                           "them; all of types 6, 6 and 5."),
    "cup": Figure("short runs of narrow SAC and DDPG agents", "curves",
                  (Cell("", "MST, SAC", {"algo": "sac", **_CUP}), Cell("", "MST, DDPG", {"algo": "ddpg", **_CUP})), _CRITIC,
                  tasks=("ball_in_cup-catch",), choice="Width ×0.25, 20,000 agent steps, of which 1,000 are random."),
    # Full size, for `plot.py --reference`: default settings, as published.
    "mrq": Figure("MR.Q as published, but for a layer more in encoder and actor", "curves",
                  (Cell("", "this code", {"total_steps": 20000}),),
                  tasks=("cartpole-swingup", "walker-walk", "dog-run", "dog-trot", "humanoid-run", "humanoid-walk"), seeds=5,
                  choice="Types 4, 4 and 3, dense; 20,000 agent steps, of which 10,000 are random."),
    "simba": Figure("SAC on SimBa networks, as published", "curves",
                    (Cell("", "this code", {"algo": "sac", "total_steps": 25000}),),
                    tasks=("walker-walk", "cheetah-run", "dog-run", "dog-trot", "humanoid-run", "humanoid-walk"), seeds=5,
                    choice="25,000 agent steps, of which 5,000 are random."),
    # Longer than the two above: to where policies are good. At scale 1, which the paper has no comparison of MST for.
    "length": Figure("MR.Q over 100,000 agent steps, dense as published and with MST", "curves",
                     (Cell("", "dense", {"total_steps": 100_000}), Cell("", "MST", {"total_steps": 100_000, "mst": True})),
                     tasks=("walker-walk", "cartpole-swingup", "cheetah-run"), seeds=2,
                     choice="Types 4, 4 and 3, dense, and types 6, 6 and 5 with MST, scale 1, fp32; 10,000 random steps."),
    "fig2": _laptop("fig2", _types("encoder", (1, 2, 3, 4, 6), **_NARROW), kind="curves",
                    shows="encoder: architecture types"),
    "fig3": _laptop("fig3", _types("encoder", (1, 2, 3, 4, 6), **_NARROW)),
    "fig6": _laptop("fig6", _DEEP_CRITIC, kind="curves", shows="critic five times as deep: training regimes"),
    "fig7": _laptop("fig7", _DEEP_CRITIC, shows="critic five times as deep: SRank and dormant neurons"),
    "fig8": _laptop("fig8", _types("actor", (3, 4, 5, 6), **_LAPTOP_ACTOR), kind="curves",
                    shows="actor five times as deep: architecture types"),
    "fig9": _laptop("fig9", _DEEP_ACTOR, kind="curves", shows="actor five times as deep: training regimes"),
    "fig10": _laptop("fig10", _DEEP_ACTOR, shows="actor five times as deep: dormant neurons"),
    "fig11": _laptop("fig11", (Cell("", "MR.Q", {"depth_scale": 5, **_NARROW}), Cell("", "MR.Q + Res", _LAPTOP_RES),
                               Cell("", "MR.Q + Res + MST", _LAPTOP_MST)),
                     shows="all modules five times as deep: MR.Q, with residual connections, with MST"),
    "fig12": _laptop("fig12", _mst_ablation(_LAPTOP_MST, _LAPTOP_RES, ()),
                     shows="MST, all modules five times as deep: distribution and growth"),
    "fig13": _laptop("fig13", (*_simba_laptop("sac"), *_simba_laptop("ddpg")),
                     size="Width ×0.125 of SimBa's published sizes (called ×1 here), beside four times as wide or deep"),
}


# ---- runs ----

def to_args(flags, task, seed, more=()):
    """settings.Args of one run. more: further flags of train.py, as on its command line; they win."""
    args = defaults(flags.get("algo", "mrq"))
    groups = {name: group for group, name in flag_names(args)}
    for name, value in flags.items():
        set_setting(args, groups[name], name, float(value) if name.endswith(("scale", "sparsity")) else value)
    args.env, args.seed = task, seed
    if not more:
        return args
    args = parse([*arguments(args), *more])
    if (args.env, args.seed) != (task, seed):
        raise ValueError("--more cannot hold --env or --seed: --tasks and --seeds choose them")
    return args


@dataclass(frozen=True)
class Run:
    cell: Cell
    task: str
    seed: int
    args: object  # settings.Args
    name: str
    command: list  # the shortest arguments of train.py


def runs(figure, tasks=None, seeds=None, more=()):
    """Every run of a figure; one that stands in two panels comes twice, by one name. ValueError for what cannot run."""
    tasks, seeds = tasks or figure.tasks, range(figure.seeds) if seeds is None else seeds
    for cell in figure.cells:
        args = to_args(cell.flags, tasks[0], 0, more)
        check(args)
        telling = nondefault_flags(args)
        for task, seed in itertools.product(tasks, seeds):
            args = dataclasses.replace(args, env=task, seed=seed)
            yield Run(cell, task, seed, args, run_name(args, telling), arguments(args, telling))


def arguments(args, telling=None):
    """The shortest command line of a run."""
    said = []
    for flag, value in telling or nondefault_flags(args):
        said += [flag] if value is True else [flag, repr(value).removesuffix(".0").strip("'")]
    return [*(["--algo", args.algo] if args.algo != "mrq" else []), "--env", args.env, *said, "--seed", str(args.seed)]


# ---- the command line ----

def size(figure, cell):
    """Millions of parameters that the figure is about, on its last task (the paper prints humanoid-run's)."""
    counts = sizes(to_args(cell.flags, figure.tasks[-1], 0))
    return (sum(counts.values()) if figure.sized == "agent" else counts[figure.sized]) / 1e6


# Milliseconds of an agent step of the laptop studies, the mean of their arms, each timed for some steps on one core of an
# Intel Xeon (AVX-512); two runs fit two cores.
LAPTOP_MS = {"first": 29, "cup": 29, "mrq": 200, "simba": 210, "length": 200, "fig2": 28, "fig3": 28, "fig6": 67, "fig7": 67, "fig8": 32,
             "fig9": 31, "fig10": 31, "fig11": 87, "fig12": 89, "fig13": 37}
SMOKE_SECONDS = 6  # of one core: a run, start included


def hours(name, found, options):
    """Of two CPU cores, for all these runs."""
    if options.smoke:
        return len(found) * SMOKE_SECONDS / 2 / 3600
    steps = [run.args.total_steps - run.args.learning_starts for run in found]
    if options.laptop:
        return sum(steps) * LAPTOP_MS[name] / 2 / 3.6e6
    return sum(count * step_ms(run.args) for count, run in zip(steps, found)) / 3.6e6


def table(options, names):
    """A row a figure: what it shows, its runs, sizes, hours, and the columns of eval.csv that it is drawn from."""
    for name in names:
        figure, found = selected(name, options)
        found = list({run.name: run for run in found}.values())
        counts = [millions(count) for count in sorted({round(size(figure, cell), 3) for cell in figure.cells})]
        span = dict.fromkeys(counts if len(set(counts)) <= 3 else [counts[0], "...", counts[-1]])
        time = float(f"{hours(name, found, options):.2g}")
        yield {"figure": name, "shows": figure.shows, "runs": f"{len(found):,}",
               "parameters": f"{figure.sized} {' / '.join(span)}",
               "hours": f"{time:,g}",
               "columns": ", ".join(column for measure in figure.measures for column in measure.columns)}


def show_table(options, names):
    rows = list(table(options, names))
    if options.markdown:
        print("| figure | shows | runs | parameters | hours | columns of eval.csv |\n|---|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(f"`{cell}`" if key == "figure" else cell for key, cell in row.items()) + " |")
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(f"{row[key]:{width}}" for key, width in widths.items()).rstrip())
    distinct = {run.name for name in names for run in selected(name, options)[1]}
    print(f"\n{len(distinct):,} distinct runs: what figures share is run once. Hours are of two CPU cores, estimated from "
          "measured times of a step; not measured on a GPU.")


def options(parser):
    """What narrows a figure's runs: the same for sweep.sh and plot.py."""
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks instead of the figure's own, with commas or spaces between")
    parser.add_argument("--seeds", metavar="N|A,B,..", help="the first N seeds, or those named")
    parser.add_argument("--steps", type=int, metavar="N", help="agent steps instead of the figure's own")
    parser.add_argument("--more", default="", metavar="'FLAGS'", help="further flags of train.py for every run, in quotes")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="one seed, tiny networks, few steps, one cheap task")
    size.add_argument("--laptop", action="store_true", help="the study at a size that two cores finish in hours")
    return parser


def chosen(options):
    """name -> Figure of the size asked for."""
    if options.laptop:
        return LAPTOP
    return {name: smoke(figure) for name, figure in FIGURES.items()} if options.smoke else FIGURES


def find(name, options):
    figures = chosen(options)
    if name in figures:
        return figures[name]
    known = f"choose one of {', '.join(figures)}"
    raise ValueError(f"{name} has no laptop study: {known}" if name in FIGURES else f"unknown figure {name!r}: {known}")


def selected(name, options):
    """The figure, and its runs as the options narrow them. ValueError in one line."""
    figure = find(name, options)
    if options.steps is not None:
        figure = dataclasses.replace(figure, cells=tuple(
            dataclasses.replace(cell, flags={**cell.flags, "total_steps": options.steps}) for cell in figure.cells))
    return figure, list(runs(figure, _tasks(options.tasks), _seeds(options.seeds), shlex.split(options.more)))


def _tasks(names):
    """["dog-run,dog-trot", "fish-swim"] -> all three; None, the figure's own, stays None."""
    if names is None:
        return None
    names = [task for name in names for task in name.split(",") if task]
    if not names:
        raise ValueError("--tasks names no task: give some, as dog-run,dog-trot")
    if not {*names} <= {task for figure in (*FIGURES.values(), *LAPTOP.values()) for task in figure.tasks}:
        from envs import check_task
        with contextlib.suppress(ImportError):  # one may print commands, and draw runs, without dm_control
            for name in names:
                check_task(name)
    return names


def _seeds(text):
    """"3" -> 0, 1, 2; "3,5" -> 3, 5; None, the figure's own, stays None."""
    if text is None:
        return None
    numbers = text.split(",") if "," in text else range(int(text) if text.isdecimal() else 0)
    if not numbers or not all(str(number).isdecimal() for number in numbers):
        raise ValueError(f"--seeds {text}: give how many, or a list as 0,1,5")
    return [int(number) for number in numbers]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "commands", "names"))
    parser.add_argument("figures", nargs="*", metavar="FIG", help="fig2 ... fig26, or all")
    parser.add_argument("--markdown", action="store_true", help="list: as the README has it")
    parsed = options(parser).parse_args()
    try:
        names = parsed.figures if parsed.figures not in ([], ["all"]) else list(chosen(parsed))
        if parsed.what == "list":
            return show_table(parsed, names)
        if not parsed.figures:
            raise ValueError("name a figure, or all")
        for run in {run.name: run for name in names for run in selected(name, parsed)[1]}.values():
            print(run.name if parsed.what == "names" else shlex.join(run.command))
        sys.stdout.flush()
    except ValueError as error:
        sys.exit(f"figures.py: {error}")
    except BrokenPipeError:  # `| head`: the rest is not wanted, at the interpreter's own last flush neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
