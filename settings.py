"""Every flag of a run with its help, the checks, and the run's name.

Guarantees: a wrong flag is refused in one line that names it, before anything is built; two different runs never share
a name, and a flag that changes nothing is not part of it; flags, configs and run names of earlier versions still work.

    args = parse(["--mst", "--scale", "5"])         # Args
    check(args)                                     # ValueError, one line
    module_configs(args)                            # {"encoder": ModuleConfig(6, "dense", 5, 5), "critic": ...}
    run_name(args)                                  # dog-run__mst__scale=5__seed=0

Paper: Tables 1 and 2 are in mrq.py beside the losses that use them.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Literal, Union

import tyro

from agents import AGENTS, PIXEL_AGENTS, module_configs, own_settings, total_updates
from networks import ARCH_CONFIGS, RESIDUALS
from sparsity import DISTRIBUTIONS, GROWTHS, REGIMES

CONFIGS = {name: agent.Config for name, agent in AGENTS.items()}
Regime, ArchType = Literal[REGIMES], Literal[tuple(ARCH_CONFIGS)]
# Not part of a run's name. All but the first two may change on resuming: they change results by rounding at most.
NOT_IN_NAME = ("env", "seed", "device", "threads", "compile", "cuda_graphs", "eval_workers", "runs", "name",
               "tensorboard", "wandb_project", "resume", "save_every", "keep_checkpoint", "extend")
OLD_FLAGS = {"growth": "grow", "drop_initial": "drop_fraction_start", "drop_final": "drop_fraction_end",
             "target_rate": "tau", "reward_range": "reward_symlog_limit", "target_q": "target_q_reduce",
             "actor_q": "actor_q_reduce"}
LONGEST_NAME = 200  # bytes; file systems allow 255, and a checkpoint's files need some of them


# ---- the flags ----

@dataclass
class EncoderArgs:
    encoder_type: ArchType | None = None  # (mrq, mrsac) architecture type; default: 4, or 6 with --mst
    encoder_regime: Regime | None = None  # (mrq, mrsac) default: dense
    encoder_scale: float | None = None  # (mrq, mrsac) multiplies the encoder's width and depth; default: --scale
    encoder_sparsity: float | None = None  # (mrq, mrsac) fraction of weights pruned; default: --sparsity


@dataclass
class CriticArgs:
    critic_type: ArchType | None = None  # (mrq, mrsac) architecture type; default: 4, or 6 with --mst
    critic_regime: Regime | None = None  # default: dense, or dst with --mst
    critic_scale: float | None = None  # multiplies the critic's width and depth; default: --scale
    critic_sparsity: float | None = None  # fraction of weights pruned; default: --sparsity


@dataclass
class ActorArgs:
    actor_type: ArchType | None = None  # (mrq, mrsac) architecture type; default: 3, or 5 with --mst
    actor_regime: Regime | None = None  # default: dense, or sst with --mst
    actor_scale: float | None = None  # multiplies the actor's width and depth; default: --scale
    actor_sparsity: float | None = None  # fraction of weights pruned; default: --sparsity


@dataclass
class SparsityArgs:
    sparsity: float = 0.6  # fraction of weights pruned in each module that is not dense
    distribution: Literal[DISTRIBUTIONS] = "er"  # how sparsity is spread over the layers (Fig. 12)
    grow: Literal[GROWTHS] = "gradient"  # which weights grow: by gradient (RigL) or at random (SET) (Fig. 12)
    update_interval: int = 1000  # a module's updates between two changes of its topology
    drop_fraction_start: float = 0.5  # fraction of active weights that a topology update replaces at the start, Eq. (1)
    drop_fraction_end: float = 0.0  # fraction of active weights that a topology update replaces at the end, Eq. (1)
    schedule_start: float = 0.2  # fraction of training at which the sparsity of S2D and D2S starts to change, Eq. (2)
    schedule_end: float = 0.8  # fraction of training at which S2D and D2S reach their final sparsity, Eq. (2)
    schedule_power: float = 2.0  # λ of Eq. (2)


@dataclass
class PixelArgs:
    pixels: bool = False  # (mrq, mrsac) observe rendered frames instead of states; DeepMind Control tasks only
    image_size: int = 84  # with --pixels: height and width of a frame
    frame_stack: int = 3  # with --pixels: frames per observation, the newest ones
    shift: int = 4  # with --pixels: pixels that a stack is shifted at random, at most; 0: none


@dataclass
class Args:
    algo: Literal[tuple(AGENTS)] = "mrq"  # the algorithm; each has its own flags: --algo sac --help
    env: str = "dog-run"  # a DeepMind Control task (domain-task), or an id registered with Gymnasium (Hopper-v5)
    seed: int = 0  # random seed of environment, exploration, networks and masks
    action_repeat: int | None = None  # environment frames per agent step; default: 2 for DeepMind Control, 1 otherwise
    total_steps: int = 500_000  # agent steps of the whole run
    learning_starts: int = 10_000  # random steps before learning
    eval_every: int = 5_000  # agent steps between two evaluations
    eval_episodes: int = 10  # episodes per evaluation
    metrics_every: int = 1  # measure plasticity metrics every N evaluations (and always at the last)
    eval_workers: int | None = None  # evaluation worker processes (default: cores / 4); does not change results
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads of PyTorch; 0: all cores. Use 1 for each of several runs side by side
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # matmul precision; auto: tf32 on CUDA, else fp32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the losses; auto: for long mrq and mrsac runs on CPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # capture the updates as CUDA graphs; auto: off
    mst: bool = False  # the paper's Module-Specific Training: encoder dense, critic DST, actor SST; types 6, 6, 5
    scale: float = 1.0  # multiplies the width and depth of every module
    width_scale: float | None = None  # multiplies only the width, of every module; overrides --scale
    depth_scale: float | None = None  # multiplies only the depth, of every module; overrides --scale
    residual: Literal[RESIDUALS] = "pre"  # residual connections before (Eq. 5) or after (Eq. 6) norm and activation
    encoder: tyro.conf.OmitArgPrefixes[EncoderArgs] = field(default_factory=EncoderArgs)
    critic: tyro.conf.OmitArgPrefixes[CriticArgs] = field(default_factory=CriticArgs)
    actor: tyro.conf.OmitArgPrefixes[ActorArgs] = field(default_factory=ActorArgs)
    sparse: tyro.conf.OmitArgPrefixes[SparsityArgs] = field(default_factory=SparsityArgs)
    pixel: tyro.conf.OmitArgPrefixes[PixelArgs] = field(default_factory=PixelArgs)
    agent: tyro.conf.OmitArgPrefixes[tyro.conf.AvoidSubcommands[Union[tuple(CONFIGS.values())]]] = field(
        default_factory=CONFIGS["mrq"])
    buffer_size: int = 1_000_000  # replay capacity in rows (an episode uses length + 1)
    log_every: int = 500  # agent steps per row of train.csv
    runs: str = "runs"  # folder for all runs
    resume: bool = False  # continue the run of this name from its last checkpoint; start it if there is none
    save_every: int = 25_000  # agent steps between checkpoints; SIGTERM, SIGINT, SIGHUP, SIGUSR1 save and stop the run
    keep_checkpoint: Literal["auto", "on", "off"] = "auto"  # keep the last checkpoint, for --extend; auto: below 0.1 GB
    extend: str | None = None  # folder of a finished run: train it longer, to --total-steps, as a new run
    name: str | None = None  # the run's folder name; default: the task and every non-default setting
    tensorboard: bool = False  # also write TensorBoard event files
    wandb_project: str | None = None  # also log to this Weights & Biases project


def defaults(algo):
    """The flags' defaults for this algorithm."""
    config = CONFIGS[algo]
    sparsity = config.presets["default"]["critic"].sparsity
    return Args(algo=algo, learning_starts=config.learning_starts, sparse=SparsityArgs(sparsity=sparsity),
                agent=config(), **getattr(config, "defaults", {}))


def parse(arguments=None, description=None):
    """Command line -> Args. The algorithm is read first, because it has its own flags and defaults."""
    arguments = current_spelling(sys.argv[1:] if arguments is None else arguments)
    flags = {word.partition("=")[0] for word in arguments}
    if moved := [flag for flag in ("--eval-only", "--checkpoint", "--video") if flag in flags]:
        raise ValueError(f"{moved[0]} is now part of evaluate.py: python evaluate.py RUN [--video out.mp4]")
    if "--extend" in flags and not flags & {"--total-steps", "-h", "--help"}:
        raise ValueError("--extend needs --total-steps: how long the whole run shall be")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", nargs="?")
    algo = first.parse_known_args(arguments)[0].algo  # tyro reports an unknown one
    return tyro.cli(Args, args=arguments, default=defaults(algo if algo in CONFIGS else "mrq"), description=description)


WHOLE_NUMBERS = {spec.name for part in (Args, SparsityArgs, PixelArgs, *CONFIGS.values())
                 for spec in dataclasses.fields(part) if spec.type is int}


def current_spelling(arguments):
    """Flags of earlier versions become today's; 1e6 becomes 1000000 where a flag takes whole numbers."""
    words, flag = [], None
    for word in arguments:
        start, value = "", word
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flag = name[2:].replace("-", "_")
            flag = OLD_FLAGS.get(flag, flag)
            start = "--" + flag.replace("_", "-") + equals
        power = flag in WHOLE_NUMBERS and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", value)
        words.append(start + (str(int(float(value))) if power and float(value).is_integer() else value))
    return words


# ---- what they mean together ----

def run_name(args, flags=None, old=False):
    """The task, the algorithm if it is not MR.Q, and the settings that differ from the defaults.

    flags: `nondefault_flags(args)` if it is already known; it is the same for all tasks and seeds. old: the name that
    earlier versions gave this run. A flag that changes nothing (a default restated, `--sparsity` where every module is
    dense) is left out. Two different runs never share a name.
    """
    algo = [] if args.algo == "mrq" else [args.algo]
    spelling = {new.replace("_", "-"): before.replace("_", "-") for before, new in OLD_FLAGS.items()} if old else {}
    parts = [(spelling.get(flag[2:], flag[2:]), value) for flag, value in flags or nondefault_flags(args)]
    parts = [flag if value is True else f"{flag}={format_value(value)}" for flag, value in parts]
    name = "__".join([args.env.replace("/", "%2F"), *algo, *parts, f"seed={args.seed}"])
    if len(name.encode()) > LONGEST_NAME:  # too long for a folder's name: a checksum replaces the rest
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        tail = f"__{digest}__seed={args.seed}"
        name = name.encode()[:LONGEST_NAME - len(tail)].decode(errors="ignore") + tail
    return name


def format_value(value):
    """5.0 -> "5", 0.0001 -> "0.0001"; never so short that two numbers look alike."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def nondefault_flags(args):
    """The fewest (flag, value) that describe this run, in the order of the fields, without seed, task and folder."""
    least, usual, wanted = copy.deepcopy(args), defaults(args.algo), canonical(args)
    for group, name in flag_names(args):
        value, default = get_setting(least, group, name), get_setting(usual, group, name)
        if value != default:
            set_setting(least, group, name, default)
            if canonical(least) != wanted:
                set_setting(least, group, name, value)
    return [("--" + name.replace("_", "-"), get_setting(least, group, name)) for group, name in flag_names(args)
            if get_setting(least, group, name) != get_setting(usual, group, name)]


def canonical(args):
    """What the run does, as plain data: equal for two command lines that mean the same."""
    rest = {name: get_setting(args, group, name) for group, name in flag_names(args) if group in (None, "agent")}
    for in_modules in ("mst", "scale", "width_scale", "depth_scale", "residual"):
        del rest[in_modules]
    if args.pixel.pixels:
        rest |= dataclasses.asdict(args.pixel)
    return rest, {name: module.canonical() for name, module in module_configs(args).items()}


def flag_names(args):
    """(group, name) of every setting that can be part of a run's name; group is None for those of Args itself."""
    for spec in dataclasses.fields(args):
        value = getattr(args, spec.name)
        if dataclasses.is_dataclass(value):
            yield from ((spec.name, inner.name) for inner in dataclasses.fields(value))
        elif spec.name not in NOT_IN_NAME:
            yield None, spec.name


# ---- an existing run ----

def extended(args, before):
    """The settings of a run that trains a finished one (`before`) longer, to args.total_steps. ValueError if it cannot.

    Everything that changes results is the finished run's own; device, threads and the like are the command line's.
    """
    own = dataclasses.replace(args, total_steps=defaults(args.algo).total_steps, env=before.env, seed=before.seed)
    if given := [flag for flag, _ in nondefault_flags(own)]:
        raise ValueError(f"--extend continues a run with its own settings: drop {given[0]}")
    if args.total_steps <= before.total_steps:
        raise ValueError(f"--extend: the run has {before.total_steps:,} steps already, --total-steps must be above "
                         f"that, not {args.total_steps:,}")
    if moving := [name for name, module in module_configs(before).items() if module.regime in ("s2d", "d2s")]:
        regime = module_configs(before)[moving[0]].regime
        raise ValueError(f"--extend: the {moving[0]}'s regime {regime} has a sparsity schedule that ended with the run "
                         "(Eq. 2); a longer schedule would move it back. Start a new run with more --total-steps")
    longer = {name: getattr(args, name) for name in NOT_IN_NAME if name not in ("env", "seed")}
    if args.runs == Args.runs:  # beside the finished run
        longer["runs"] = os.path.dirname(os.path.normpath(args.extend)) or os.curdir
    return dataclasses.replace(before, total_steps=args.total_steps, **longer)


def read_config(folder):
    """The Args in a run's folder. ValueError or OSError, in one line."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder} is not a run's folder: it has no config.json")
    with open(path) as file:
        try:
            return from_config(json.load(file))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def from_config(config):
    """The Args in a run's config.json; flags newer than the run take their defaults.

    ValueError, in one line, for a config that is not a run's, or that has flags which this version does not know.
    """
    if not isinstance(config, dict) or config.get("algo") not in CONFIGS:
        raise ValueError("the run's config names no algorithm of this code")
    args = defaults(config["algo"])
    for spec in dataclasses.fields(args):
        value, saved = getattr(args, spec.name), config.get(spec.name)
        if dataclasses.is_dataclass(value) and spec.name in config:
            known = {inner.name for inner in dataclasses.fields(value)}
            saved = saved if isinstance(saved, dict) else {spec.name: 0}
            saved = {OLD_FLAGS.get(name, name): one for name, one in saved.items()}
            if odd := sorted(saved.keys() - known):
                raise ValueError(f"the run's config is from another version: this code does not have {', '.join(odd)}")
            saved = dataclasses.replace(value, **saved)
        setattr(args, spec.name, saved if spec.name in config else value)
    return args


def diff_settings(before, now):
    """What makes these two settings different runs, in a line: "--critic-lr 0.0003, not 0.001". Empty if equal.

    Flags that do not change results are ignored.
    """
    if (before.env, before.seed, canonical(before)) == (now.env, now.seed, canonical(now)):
        return ""
    names = [(None, "env"), (None, "seed"), *flag_names(before)]
    if before.algo != now.algo:  # two algorithms do not have the same flags
        names = [(None, "algo")]
    pairs = [(name, get_setting(before, group, name), get_setting(now, group, name)) for group, name in names]
    return ", ".join(f"--{name.replace('_', '-')} {old}, not {new}" for name, old, new in pairs if old != new)


# ---- checks: ValueError in one line that names the flag, before anything is built ----

EPISODE_STEPS = 500  # agent steps: 1,000 frames of two each
RANGES = {  # allowed numbers; default: [1, 1e12] for whole numbers and [0, inf) for others
    "seed": "[0, 4294967295]", "learning_starts": "[0, 1e12]", "trace_decay": "[0, 1]", "step_size": "(0, inf)",
    "actor_kappa": "(0, inf)", "critic_kappa": "(0, inf)", "sparse_init": "[0, 1)", "reward_clip": "(0, inf]",
    "eval_workers": "[0, 1000]", "threads": "[0, 1024]", "eval_episodes": "[1, 10000]", "reward_bins": "[2, 100000]",
    "discount": "(0, 1]", "tau": "(0, 1]", "updates_per_step": "[1, 1000]", "initial_temperature": "(0, inf)",
    "critic_grad_clip": "(0, inf)", "reward_symlog_limit": "(0, 80]", "target_entropy": "(-inf, inf)",
    "sparsity": "[0, 1)", "encoder_sparsity": "[0, 1)", "critic_sparsity": "[0, 1)", "actor_sparsity": "[0, 1)",
    "drop_fraction_start": "[0, 1]", "drop_fraction_end": "[0, 1]", "schedule_start": "[0, 1]",
    "schedule_end": "[0, 1]", "schedule_power": "(0, inf)", "scale": "(0, 1e4]",
    "width_scale": "(0, 1e4]", "depth_scale": "(0, 1e4]", "encoder_scale": "(0, 1e4]", "critic_scale": "(0, 1e4]",
    "actor_scale": "(0, 1e4]", "image_size": "[31, 1000]", "frame_stack": "[1, 100]", "shift": "[0, 1000]",
    "encoder_horizon": f"[1, {EPISODE_STEPS}]", "q_horizon": f"[1, {EPISODE_STEPS}]",
}


def check(args):
    """Refuses flags that would fail late or silently do something else."""
    unnamed = [(None, name) for name in ("seed", "eval_workers", "threads", "save_every")]
    for group, name in [*flag_names(args), *unnamed]:
        value = get_setting(args, group, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_range(name, value, RANGES.get(name, "[1, 1e12]" if isinstance(value, int) else "[0, inf)"))
    if args.sparse.schedule_start > args.sparse.schedule_end:
        raise ValueError(f"--schedule-start ({args.sparse.schedule_start}) must not exceed --schedule-end "
                         f"({args.sparse.schedule_end})")
    if args.agent.updates_per_step and args.learning_starts <= args.agent.horizon:
        raise ValueError(f"--learning-starts must be at least {args.agent.horizon + 1}, not {args.learning_starts}: "
                         "the longest subtrajectory must fit into what is stored by then")
    if args.total_steps <= args.learning_starts:
        raise ValueError(f"--total-steps {args.total_steps} trains nothing: it must be above --learning-starts "
                         f"{args.learning_starts}")
    if args.name is not None and (not args.name or args.name in (".", "..") or re.search(r"[/\\\0]", args.name)):
        raise ValueError(f"--name {args.name!r} must be a plain folder name; set its location with --runs")
    if args.pixel.pixels and args.algo not in PIXEL_AGENTS:
        raise ValueError(f"--pixels: {args.algo} learns from states; {' and '.join(PIXEL_AGENTS)} "
                         "have an image encoder")
    _check_modules(args)


def _check_range(name, value, interval):
    """ValueError unless the value is in the interval, written as in mathematics: "[0, 1)"."""
    least, most = (float(end) for end in interval[1:-1].split(","))
    above = value > least or (interval[0] == "[" and value == least)
    below = value < most or (interval[-1] == "]" and value == most)
    if not (above and below):  # NaN is neither
        raise ValueError(f"--{name.replace('_', '-')} must lie in {interval}, not {value}")


def _check_modules(args):
    """Refuses flags that could not have an effect."""
    presets = args.agent.presets["mst" if args.mst else "default"]
    simba = presets["critic"].arch_type in ("simba", "stream")  # networks without the six types
    family = {"simba": "SimBa", "stream": "LayerNorm"}.get(presets["critic"].arch_type)
    scales = ["scale"] if args.scale != 1.0 else []
    for name in ("encoder", "critic", "actor"):
        own = own_settings(args, name)
        given = [part for part, value in own.items() if value is not None]
        if name not in presets and given:
            raise ValueError(f"--{name}-{given[0]}: {args.algo} has no {name}, only {' and '.join(presets)}")
        if simba and own["type"] is not None:
            raise ValueError(f"--{name}-type: {args.algo} uses {family} networks; the six types are for mrq and mrsac")
        scales += [f"{name}-scale"] if own["scale"] is not None else []
    if scales and args.width_scale is not None and args.depth_scale is not None:
        raise ValueError(f"--{scales[0]} has no effect with both --width-scale and --depth-scale: "
                         "drop one of the three")
    if args.residual != "pre" and simba:
        raise ValueError(f"--residual: {args.algo} uses {family} networks, whose residual connections are fixed")
    if args.residual != "pre" and not any(m.has_residual() for m in module_configs(args).values()):
        raise ValueError(f"--residual {args.residual} has no effect: no module has residual connections; "
                         "choose types 5 or 6, or --mst")
    if args.algo == "stream":
        _check_stream(args)
    elif simba and not args.agent.twin_critics:
        for name in ("target_q_reduce", "actor_q_reduce"):
            if (reduction := getattr(args.agent, name)) != "min":
                raise ValueError(f"--{name.replace('_', '-')} {reduction} combines two Q networks, but there is only "
                                 "one: add --twin-critics")


def _check_stream(args):
    """Refuses flags that mean nothing to an agent without a replay buffer."""
    usual = defaults("stream")
    for name in ("buffer_size", "learning_starts"):
        if getattr(args, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect: stream learns from each transition at once "
                             "and stores none")
    for name, off in (("compile", ("auto", "off")), ("cuda_graphs", ("auto", "off")), ("precision", ("auto", "fp32"))):
        if getattr(args, name) not in off:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: stream computes one sample per step "
                             "in float32 with numpy; drop the flag")
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device {args.device}: stream computes one sample per step, which is slower on a GPU; "
                         "use --device cpu")


def plan_notes(args):
    """Lines for the header: what these settings cannot do, though each is valid."""
    lines = unused_flag_notes(args)
    for name, module in module_configs(args).items():
        if module.regime in ("dst", "s2d", "d2s") and total_updates(args) < args.sparse.update_interval:
            lines.append(f"note: the {name}'s topology never changes ({module.regime}): it gets "
                         f"{total_updates(args):,} updates, and --update-interval is {args.sparse.update_interval:,}")
    if args.algo == "stream":
        return lines
    if args.buffer_size < args.agent.batch_size:
        lines.append(f"note: --buffer-size {args.buffer_size:,} is smaller than one batch ({args.agent.batch_size:,})")
    elif args.buffer_size <= EPISODE_STEPS:
        lines.append(f"note: --buffer-size {args.buffer_size:,} is smaller than one episode ({EPISODE_STEPS} steps)")
    return lines


def unused_flag_notes(args):
    """A line for flags that change nothing in this run, as a grid over regimes may pass them."""
    telling, usual, modules = dict(nondefault_flags(args)), defaults(args.algo), module_configs(args)
    idle = []
    for group, name in flag_names(args):
        flag, value = "--" + name.replace("_", "-"), get_setting(args, group, name)
        own = group in modules and name.endswith("_sparsity") and modules[group].regime == "dense"
        may_be_idle = group == "sparse" or name == "scale" or own
        if value != get_setting(usual, group, name) and flag not in telling and may_be_idle:
            idle.append(flag)
    regimes = ", ".join(f"{name} {module.regime}" for name, module in modules.items())
    notes = [f"note: {', '.join(idle)} changes nothing here ({regimes}), and is not in the run's name"] if idle else []
    frames = ["--" + name.replace("_", "-") for group, name in flag_names(args) if group == "pixel"
              and not args.pixel.pixels and get_setting(args, group, name) != get_setting(usual, group, name)]
    return notes + ([f"note: {', '.join(frames)} changes nothing without --pixels"] if frames else [])


def get_setting(args, group, name):
    """One setting, by its (group, name) in `flag_names`."""
    return getattr(args if group is None else getattr(args, group), name)


def set_setting(args, group, name, value):
    """Changes one setting in place."""
    if group is None:
        setattr(args, name, value)
    else:
        setattr(args, group, dataclasses.replace(getattr(args, group), **{name: value}))
