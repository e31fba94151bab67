"""A grid of runs: arms (settings of train.py) × tasks × seeds, from a file of your own or from the paper's figures.

Guarantees: what is wrong in a grid is reported in one line, before anything runs; each run has the name and the
shortest command that train.py itself would give it.

    # regimes.toml: three arms, two tasks, three seeds
    title = "Regimes of the critic"              # optional
    tasks = ["walker-walk", "cheetah-run"]
    seeds = 3                                    # seeds 0, 1, 2; or a list
    [flags]                                      # of every run; optional
    total-steps = 50000
    [arms.dense]
    [arms.sst]
    critic-regime = "sst"
    [arms.dst]
    critic-regime = "dst"
    sparsity = 0.8

    ./sweep.sh regimes.toml                      # run it; --slurm, --print and --jobs as for the paper's figures
    python plot.py regimes.toml runs/ --table    # draw it, or compare the arms in a table

The same keys work in a JSON file. The first arm is the one that tables compare the others with.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
from dataclasses import dataclass

from runtime.results import current_flag
from settings import NOT_IN_NAME, check, defaults, flag_names, nondefault_flags, parse, run_name, set_setting

GIVEN_BY_THE_GRID = ("env", "seed", "runs", "name", "resume")


@dataclass(frozen=True)
class Arm:
    """The runs, one per task and seed, of one curve or one point."""
    panel: str  # title of the panel that shows it
    series: str  # its label in the legend
    flags: dict  # settings that are not the default, without task and seed
    x: str = ""  # its place on the x axis, in a figure of points


@dataclass(frozen=True)
class Grid:
    title: str
    arms: tuple
    tasks: tuple
    seeds: tuple


@dataclass(frozen=True)
class Job:
    """One run of a grid."""
    arm: Arm
    task: str
    seed: int
    args: object  # settings.Args
    name: str
    command: list  # the shortest arguments of train.py


def to_args(flags, task, seed, more=()):
    """settings.Args of one run. more: further flags of train.py, as on its command line; they override."""
    args = defaults(flags.get("algo", "mrq"))
    groups = {name: group for group, name in flag_names(args)}
    for name, value in flags.items():
        name = current_flag(name)
        set_setting(args, groups.get(name), name, float(value) if name.endswith(("scale", "sparsity")) else value)
    args.env, args.seed = task, seed
    if not more:
        return args
    args = parse([*arguments(args), *more])
    if (args.env, args.seed) != (task, seed):
        raise ValueError("--more cannot hold --env or --seed: use --tasks and --seeds")
    return args


def make_jobs(arms, tasks, seeds, more=()):
    """Every run of a grid; a run in two panels is listed twice under one name. ValueError for what cannot run."""
    for arm in arms:
        try:
            args = to_args(arm.flags, tasks[0], 0, more)
            check(args)
        except ValueError as error:
            raise ValueError(f"{arm.panel or 'arm'} {arm.series!r}: {error}".replace("\n", " ")) from None
        flags = nondefault_flags(args)
        for task, seed in itertools.product(tasks, seeds):
            args = dataclasses.replace(args, env=task, seed=seed)
            yield Job(arm, task, seed, args, run_name(args, flags), arguments(args, flags))


def arguments(args, flags=None):
    """The shortest command line of a run. Flags that are not part of its name, such as --device, come last."""
    usual = defaults(args.algo)
    rest = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in NOT_IN_NAME
            if name not in GIVEN_BY_THE_GRID and getattr(args, name) != getattr(usual, name)]
    words = ["--algo", args.algo] if args.algo != "mrq" else []
    words += ["--env", args.env]
    for flag, value in [*(nondefault_flags(args) if flags is None else flags), *rest]:
        words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, format_word(value)]
    return [*words, "--seed", str(args.seed)]


def format_word(value):
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


# ---- your own file ----

def read_grid(path):
    """A .toml or .json file as a Grid. ValueError or OSError, in one line that names the file and the key."""
    content = _load(path)
    unknown = content.keys() - {"title", "tasks", "seeds", "flags", "arms"}
    if unknown or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise ValueError(f"{path}: " + (f"unknown key {min(unknown)!r}" if unknown else "no arms") +
                         "; a grid has arms, tasks, and, if you like, seeds, flags and title")
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f'{path}: tasks must be a list of names, such as ["walker-walk"]')
    seeds = content.get("seeds", 1)
    seeds = list(range(seeds)) if type(seeds) is int else seeds
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: seeds must be a number of seeds, such as 3, or a list, such as [0, 1, 5]")
    common, arms = content.get("flags", {}), []
    for label, flags in content["arms"].items():
        if not isinstance(flags, dict) or not isinstance(common, dict):
            raise ValueError(f"{path}: arm {label!r}: give flags by name, such as critic-regime = \"dst\"")
        arms.append(Arm("", label, _settings(f"{path}: arm {label!r}", common | flags)))
    for arm in arms:
        same = [other.series for other in arms if other.flags == arm.flags]
        if len(same) > 1:
            raise ValueError(f"{path}: arms {' and '.join(same)} have the same flags")
    return Grid(content.get("title", ""), tuple(arms), tuple(tasks), tuple(dict.fromkeys(seeds)))


def _load(path):
    with open(path, "rb") as file:
        text = file.read()
    try:
        if path.endswith(".json"):
            return json.loads(text)
        try:
            import tomllib
        except ImportError:
            raise ValueError("TOML needs Python 3.11 or newer; write the grid as .json") from None
        return tomllib.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _settings(where, flags):
    """{"critic-regime": "dst"} -> {"critic_regime": "dst"}, each value as train.py reads it."""
    flags = {current_flag(name.replace("-", "_")): value for name, value in flags.items()}
    algo = flags.get("algo", "mrq")
    try:
        known = {name: group for group, name in flag_names(defaults(algo))}
    except KeyError:
        raise ValueError(f"{where}: unknown algo {algo!r}") from None
    known |= dict.fromkeys(NOT_IN_NAME) | {"algo": None}
    words = ["--algo", algo]
    for name, value in flags.items():
        dashed = name.replace("_", "-")
        if name in GIVEN_BY_THE_GRID:
            raise ValueError(f"{where}: {dashed} cannot be set here: a grid has the keys tasks and seeds")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            advice = f": did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"{where}: {algo} has no flag {dashed}{advice}")
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"{where}: {dashed} must be a number, a text or true")
        if name != "algo":
            words += [f"--{'no-' * (value is False)}{dashed}", *([] if isinstance(value, bool) else [str(value)])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = parse(words)
    except SystemExit:
        message = " ".join(re.sub(r"[^\x20-\x7e]|-{3,}", " ", said.getvalue().replace("\n", " ")).split())
        message = re.sub(r"^(Parsing error|Invalid choice) | For full helptext.*", "", message)
        raise ValueError(f"{where}: {message}") from None
    return {name: getattr(args if known[name] is None else getattr(args, known[name]), name) for name in flags}


# ---- a part of a grid ----

def add_filters(parser):
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, separated by commas or spaces")
    parser.add_argument("--seeds", metavar="N|A,B,..", help="only the first N seeds, or those listed")
    return parser


def parse_tasks(names):
    """["dog-run,dog-trot", "fish-swim"] -> all three; None, for all, stays None."""
    if names is None:
        return None
    names = [task for name in names for task in name.split(",") if task]
    if not names:
        raise ValueError("--tasks names no task: give some, such as dog-run,dog-trot")
    return names


def parse_seeds(text):
    """"3" -> 0, 1, 2; "3,5" -> 3, 5; "3," -> 3; None, for all, stays None."""
    if text is None:
        return None
    numbers = text.removesuffix(",").split(",") if "," in text else range(int(text) if text.isdecimal() else 0)
    if not numbers or not all(str(number).isdecimal() for number in numbers):
        raise ValueError(f"--seeds {text}: give a number of seeds, or a list such as 0,1,5 (one seed: 3,)")
    return [int(number) for number in numbers]
