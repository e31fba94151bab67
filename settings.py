"""What a run is: every flag with its help, the presets, the checks, and the run's name.

What it claims: what is wrong with the flags is told in one line that names the flag, before anything is built; two
different runs never share a name, and a flag that changes nothing is not part of it. It needs no PyTorch, so that sweeps
and plots can ask for a run's name without building an agent.

    args = parse(["--mst", "--scale", "5"])         # Args; tyro refuses what is no choice in a box of its own
    modules = module_configs(args)                  # {"encoder": ModuleConfig(6, "dense", 5, 5), "critic": ...}
    check(args)                                     # ValueError, one line
    run_name(args)                                  # dog-run__mst__scale=5__seed=0

Paper: Tables 1 and 2 are `MRConfig` and `MRQConfig`; Section 4 is `MR_MST`.
"""

import argparse
import copy
import dataclasses
import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

import tyro

Regime = Literal["dense", "sst", "dst", "s2d", "d2s"]  # sparsity.py says what each does
ArchType = Literal[1, 2, 3, 4, 5, 6]  # networks.ARCH_CONFIGS
WithResiduals = (5, 6)
SPARSE_OPTIONS = {  # what a regime reads beside its sparsity; the rest does nothing there
    "dense": (), "sst": ("distribution",),
    "dst": ("distribution", "grow", "update_interval", "drop_initial", "drop_final"),
    "s2d": ("distribution", "grow", "update_interval", "drop_initial", "drop_final", "schedule_start", "schedule_end", "power"),
    "d2s": ("distribution", "grow", "update_interval", "drop_initial", "drop_final", "schedule_start", "schedule_end", "power"),
}
NOT_IN_NAME = ("env", "seed", "device", "threads", "compile", "cuda_graphs", "eval_workers", "runs", "name", "tensorboard",
               "wandb_project", "resume", "save_every", "eval_only", "checkpoint",
               "video")  # all but the first two may differ when a run is resumed: they change results by rounding at most
LONGEST_NAME = 200  # bytes; file systems take 255, and a checkpoint's files want some of them


@dataclass(frozen=True)
class ModuleConfig:
    """How one module is built and trained. The agent's other settings never depend on it."""
    arch_type: int | str = 4  # 1 to 6, networks.ARCH_CONFIGS; "simba" for SAC and DDPG, which know no other
    regime: str = "dense"  # sparsity.REGIMES
    width_scale: float = 1.0  # multiplies the hidden width
    depth_scale: float = 1.0  # multiplies the number of blocks
    sparsity: float = 0.6  # Section 3, Setup
    residual: str = "pre"  # Eq. (5); "post" is Eq. (6)
    sparse_options: dict = field(default_factory=dict)  # further arguments of SparseTraining

    def size(self):
        """The arguments that MR.Q's classes in networks.py share."""
        return {"arch_type": self.arch_type, "width_scale": self.width_scale, "depth_scale": self.depth_scale,
                "residual": self.residual}

    def canonical(self):
        """The same module without the settings that its type and regime do not read."""
        return dataclasses.replace(
            self, sparsity=0.0 if self.regime == "dense" else self.sparsity,
            residual=self.residual if self.arch_type in WithResiduals else "pre",
            sparse_options={name: self.sparse_options[name] for name in SPARSE_OPTIONS[self.regime]
                            if name in self.sparse_options})


# ---- the algorithms' own settings ----

class Choices:
    """Refuses, at construction, what is none of a field's choices: these settings are also made by hand."""

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            choices, value = get_args(spec.type), getattr(self, spec.name)
            if choices and value not in choices:
                raise ValueError(f"{spec.name} is {value!r}: choose {' or '.join(choices)}")


MR_DEFAULT = {"encoder": ModuleConfig(4), "critic": ModuleConfig(4), "actor": ModuleConfig(3)}  # Table 2
MR_MST = {"encoder": ModuleConfig(6, "dense"), "critic": ModuleConfig(6, "dst"), "actor": ModuleConfig(5, "sst")}  # Sec. 4
# Sparsity 0.8: the published example of sparse SimBa networks; this paper follows its configurations (Section 4).
SIMBA = {"critic": ModuleConfig("simba", sparsity=0.8), "actor": ModuleConfig("simba", sparsity=0.8)}
SIMBA_MST = {"critic": ModuleConfig("simba", "dst", sparsity=0.8), "actor": ModuleConfig("simba", "sst", sparsity=0.8)}


@dataclass(frozen=True)
class MRConfig(Choices):
    """Tables 1 and 2, without the policy: MR.SAC has these settings too. Every comment is the flag's help text."""
    batch_size: int = 256  # transitions (or subtrajectories) a gradient step
    discount: float = 0.99  # γ, a step
    encoder_horizon: int = 5  # H_Enc, steps the dynamics are unrolled
    q_horizon: int = 3  # H_Q, steps of the multi-step return
    target_update_freq: int = 250  # updates between two copies of the targets, and encoder updates in a burst
    dynamics_weight: float = 1.0  # λ_Dynamics
    reward_weight: float = 0.1  # λ_Reward
    terminal_weight: float = 0.1  # λ_Terminal
    encoder_lr: float = 1e-4  # AdamW learning rate of the encoder
    critic_lr: float = 3e-4  # AdamW learning rate of the critic
    actor_lr: float = 3e-4  # AdamW learning rate of the actor
    weight_decay: float = 1e-4  # AdamW weight decay of all three
    critic_grad_clip: float = 20.0  # largest gradient norm of the critic; the others are not clipped
    reward_bins: int = 65  # bins of the two-hot reward
    reward_range: float = 10.0  # bins span ±this in symlog space: ±22,000 in rewards

    presets = {"default": MR_DEFAULT, "mst": MR_MST}
    updates_per_step = 1  # Table 1, replay ratio
    learning_starts = 10_000  # Table 1, initial random steps

    @property
    def horizon(self):
        """The longest subtrajectory that the replay buffer must keep."""
        return max(self.encoder_horizon, self.q_horizon)


@dataclass(frozen=True)
class MRQConfig(MRConfig):
    """... and MR.Q's deterministic policy."""
    exploration_noise: float = 0.2  # std of the Gaussian added to actions
    target_noise: float = 0.2  # std of the Gaussian added to target actions
    target_noise_clip: float = 0.3  # bound of that noise
    pre_activation_weight: float = 1e-5  # λ_pre-activ, on the actor's output before tanh


@dataclass(frozen=True)
class MRSACConfig(MRConfig):
    """MR.Q's settings without its policy, and SAC's temperature, which lives in units of the reward scale."""
    initial_temperature: float = 0.01  # α at the start
    temperature_lr: float = 3e-4  # Adam learning rate of log α
    target_entropy: float = -0.5  # what entropy is held near, times the number of action dimensions
    target_policy: Literal["target", "online"] = "target"  # which actor chooses the action of the TD target
    target_q: Literal["min", "mean"] = "min"  # which of two Q enters the TD target
    actor_q: Literal["min", "mean"] = "min"  # which of two Q the actor climbs


@dataclass(frozen=True)
class SimbaConfig(Choices):
    """The published SimBa's settings for DeepMind Control. Every comment is the flag's help text."""
    batch_size: int = 256  # transitions an update
    discount: float = 0.99  # γ, a step
    target_rate: float = 0.005  # τ, how far the target critic moves in an update
    actor_lr: float = 1e-4  # AdamW learning rate of the actor
    critic_lr: float = 1e-4  # AdamW learning rate of the critic
    weight_decay: float = 1e-2  # AdamW weight decay of both
    twin_critics: bool = False  # two Q networks instead of one
    target_q: Literal["min", "mean"] = "min"  # which of two Q enters the TD target
    actor_q: Literal["min", "mean"] = "min"  # which of two Q the actor climbs

    presets = {"default": SIMBA, "mst": SIMBA_MST}
    updates_per_step = 2
    learning_starts = 5_000
    horizon = 1  # one-step returns


@dataclass(frozen=True)
class SACConfig(SimbaConfig):
    """... and SAC's temperature."""
    initial_temperature: float = 0.01  # α at the start
    temperature_lr: float = 1e-4  # Adam learning rate of log α
    target_entropy: float = -0.5  # what entropy is held near, times the number of action dimensions


@dataclass(frozen=True)
class DDPGConfig(SimbaConfig):
    """... and DDPG's noise."""
    exploration_noise: float = 0.1  # std of the Gaussian added to actions: acting, in the target, and in the actor's loss


CONFIGS = {"mrq": MRQConfig, "sac": SACConfig, "ddpg": DDPGConfig, "mrsac": MRSACConfig}


# ---- the flags ----

@dataclass
class EncoderArgs:
    encoder_type: ArchType | None = None  # (mrq, mrsac) architecture; 4, or 6 with --mst
    encoder_regime: Regime | None = None  # (mrq, mrsac) dense
    encoder_scale: float | None = None  # (mrq, mrsac) width and depth of this module; --scale
    encoder_sparsity: float | None = None  # (mrq, mrsac) share of weights pruned; --sparsity


@dataclass
class CriticArgs:
    critic_type: ArchType | None = None  # (mrq, mrsac) architecture; 4, or 6 with --mst
    critic_regime: Regime | None = None  # dense, or dst with --mst
    critic_scale: float | None = None  # width and depth of this module; --scale
    critic_sparsity: float | None = None  # share of weights pruned; --sparsity


@dataclass
class ActorArgs:
    actor_type: ArchType | None = None  # (mrq, mrsac) architecture; 3, or 5 with --mst
    actor_regime: Regime | None = None  # dense, or sst with --mst
    actor_scale: float | None = None  # width and depth of this module; --scale
    actor_sparsity: float | None = None  # share of weights pruned; --sparsity


@dataclass
class SparsityArgs:
    sparsity: float = 0.6  # share of weights pruned in every module whose regime is not dense; 0.8 for sac and ddpg
    distribution: Literal["er", "uniform"] = "er"  # how sparsity is spread over the layers (Fig. 12)
    growth: Literal["gradient", "random"] = "gradient"  # which weights grow: RigL, or SET (Fig. 12)
    update_interval: int = 1000  # a module's own updates between two changes of its topology
    drop_initial: float = 0.5  # share of active weights replaced by a topology update at the start, Eq. (1)
    drop_final: float = 0.0  # ... and at the end
    schedule_start: float = 0.2  # share of training after which S2D and D2S begin to move, Eq. (2)
    schedule_end: float = 0.8  # ... and when they arrive
    schedule_power: float = 2.0  # λ of Eq. (2)


@dataclass
class Args:
    algo: Literal["mrq", "sac", "ddpg", "mrsac"] = "mrq"  # each has flags of its own: --algo sac --help
    env: str = "dog-run"  # a DeepMind Control task, domain-task
    seed: int = 0  # of environment, exploration, networks and masks
    total_steps: int = 500_000  # agent steps in all
    learning_starts: int = 10_000  # random steps before learning; 5,000 for sac and ddpg
    eval_every: int = 5_000  # agent steps between two evaluations
    eval_episodes: int = 10  # episodes an evaluation
    metrics_every: int = 1  # evaluations from one that measures the plasticity metrics to the next; the last one does
    eval_workers: int | None = None  # processes that step evaluations, without changing them; one for every four cores
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads of PyTorch; 0 is as many as the process may use: give 1 to each of several runs at once
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # of products; auto is tf32 on CUDA, fp32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the losses; auto: long mrq and mrsac runs on a CPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # capture updates as CUDA graphs; auto: off
    mst: bool = False  # the paper's Module-Specific Training: encoder dense, critic DST, actor SST; types 6, 6, 5, if any
    scale: float = 1.0  # multiplies width and depth of every module
    width_scale: float | None = None  # width alone, of every module, instead of the scales
    depth_scale: float | None = None  # depth alone, of every module, instead of the scales
    residual: Literal["pre", "post"] = "pre"  # where residual connections start: Eq. (5) or Eq. (6)
    encoder: tyro.conf.OmitArgPrefixes[EncoderArgs] = field(default_factory=EncoderArgs)
    critic: tyro.conf.OmitArgPrefixes[CriticArgs] = field(default_factory=CriticArgs)
    actor: tyro.conf.OmitArgPrefixes[ActorArgs] = field(default_factory=ActorArgs)
    sparse: tyro.conf.OmitArgPrefixes[SparsityArgs] = field(default_factory=SparsityArgs)
    agent: tyro.conf.OmitArgPrefixes[tyro.conf.AvoidSubcommands[MRQConfig | SACConfig | DDPGConfig | MRSACConfig]] = field(
        default_factory=MRQConfig)
    buffer_size: int = 1_000_000  # replay rows; an episode takes its length + 1
    log_every: int = 500  # agent steps between two rows of train.csv
    runs: str = "runs"  # folder that runs are written into
    resume: bool = False  # continue the run of this name at its last checkpoint, or start it if there is none
    save_every: int = 25_000  # agent steps between two checkpoints; SIGTERM, SIGINT and SIGUSR1 save too, and stop the run
    eval_only: bool = False  # train nothing: evaluate the run that --checkpoint names
    checkpoint: str | None = None  # with --eval-only: a run's folder
    video: str | None = None  # with --eval-only: also film an episode into this file (.mp4)
    name: str | None = None  # the run's folder; default: the task and every setting that is not its default
    tensorboard: bool = False  # also write TensorBoard event files
    wandb_project: str | None = None  # also log to this Weights & Biases project


def defaults(algo):
    """The flags' defaults for this algorithm."""
    config = CONFIGS[algo]
    sparsity = config.presets["default"]["critic"].sparsity
    return Args(algo=algo, learning_starts=config.learning_starts, sparse=SparsityArgs(sparsity=sparsity), agent=config())


def parse(arguments=None, description=None):
    """Command line -> Args. The algorithm is read first: it has flags and defaults of its own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", nargs="?")
    algo = first.parse_known_args(arguments)[0].algo
    # What is no algorithm is left to tyro, which says so beside the choices.
    return tyro.cli(Args, args=arguments, default=defaults(algo if algo in CONFIGS else "mrq"), description=description)


# ---- what they mean together ----

def module_configs(args):
    """The agent's modules as the flags describe them: the preset, then what was said of one module."""
    options = {"distribution": args.sparse.distribution, "grow": args.sparse.growth,
               "update_interval": args.sparse.update_interval, "drop_initial": args.sparse.drop_initial,
               "drop_final": args.sparse.drop_final, "schedule_start": args.sparse.schedule_start,
               "schedule_end": args.sparse.schedule_end, "power": args.sparse.schedule_power}
    modules = {}
    for name, preset in args.agent.presets["mst" if args.mst else "default"].items():
        own = own_settings(args, name)
        scale = _first(own["scale"], args.scale)
        modules[name] = ModuleConfig(
            arch_type=_first(own["type"], preset.arch_type), regime=_first(own["regime"], preset.regime),
            width_scale=_first(args.width_scale, scale), depth_scale=_first(args.depth_scale, scale),
            sparsity=_first(own["sparsity"], args.sparse.sparsity), residual=args.residual, sparse_options=options)
    return modules


def own_settings(args, name):
    """What was said of one module alone: part -> value, None where nothing was."""
    return {part: getattr(getattr(args, name), f"{name}_{part}") for part in ("type", "regime", "scale", "sparsity")}


def run_name(args, telling=None):
    """The task, the algorithm if it is not MR.Q, and the settings that make this run another than the default one.
    telling: `nondefault_flags(args)`, where that is known already: it is the same for all tasks and seeds.

    A setting that changes nothing (a default restated, `--sparsity` where every module is dense) is left out, one after
    the other, so that what remains still says all; two different runs never share a name.
    """
    algo = [] if args.algo == "mrq" else [args.algo]
    said = [flag[2:] if value is True else f"{flag[2:]}={format_value(value)}" for flag, value in telling or nondefault_flags(args)]
    name = "__".join([args.env, *algo, *said, f"seed={args.seed}"])
    if len(name.encode()) > LONGEST_NAME:  # too many for a folder's name: what does not fit goes into a checksum
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        tail = f"__{digest}__seed={args.seed}"
        name = name.encode()[:LONGEST_NAME - len(tail)].decode(errors="ignore") + tail
    return name


def format_value(value):
    """5.0 -> "5", 0.0001 -> "0.0001"; never so short that two numbers look alike."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def nondefault_flags(args):
    """The fewest (flag, value) that describe this run, in the order of the fields; seed, task and folder are not among
    them."""
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
    for said_by_modules in ("mst", "scale", "width_scale", "depth_scale", "residual"):
        del rest[said_by_modules]
    return rest, {name: module.canonical() for name, module in module_configs(args).items()}


def flag_names(args):
    """(group, name) of every setting that can be part of a run's name; group is None for those of Args itself."""
    for spec in dataclasses.fields(args):
        value = getattr(args, spec.name)
        if dataclasses.is_dataclass(value):
            yield from ((spec.name, inner.name) for inner in dataclasses.fields(value))
        elif spec.name not in NOT_IN_NAME:
            yield None, spec.name


# ---- a run that is there already ----

def from_config(config):
    """The Args that a run's config.json holds; a flag that is newer than the run had its default. ValueError, in one line,
    for what this code did not write, or wrote with flags that it has no more."""
    if not isinstance(config, dict) or config.get("algo") not in CONFIGS:
        raise ValueError("the run's config names no algorithm of this code")
    args = defaults(config["algo"])
    for spec in dataclasses.fields(args):
        value, saved = getattr(args, spec.name), config.get(spec.name)
        if dataclasses.is_dataclass(value) and spec.name in config:
            known = {inner.name for inner in dataclasses.fields(value)}
            odd = sorted(saved.keys() - known) if isinstance(saved, dict) else [spec.name]
            if odd:
                raise ValueError(f"the run's config is another version's: this code has no {', '.join(odd)}")
            saved = dataclasses.replace(value, **saved)
        setattr(args, spec.name, saved if spec.name in config else value)
    return args


def diff_settings(before, now):
    """What makes these settings two different runs, in a line: "--critic-lr 0.0003, not 0.001". Empty if nothing does; a
    flag may well differ that changes no result."""
    if (before.env, before.seed, canonical(before)) == (now.env, now.seed, canonical(now)):
        return ""
    names = [(None, "env"), (None, "seed"), *flag_names(before)]
    if before.algo != now.algo:  # the others' flags are not the same ones
        names = [(None, "algo")]
    return ", ".join(f"--{name.replace('_', '-')} {get_setting(before, group, name)}, not {get_setting(now, group, name)}"
                     for group, name in names if get_setting(before, group, name) != get_setting(now, group, name))


# ---- checks: ValueError in one line that names the flag, before anything is built ----

EPISODE_STEPS = 500  # agent steps: 1,000 frames of two each
RANGES = {  # what a number may be, where it is not [1, 1e12] for a whole one and [0, inf) for any other
    "seed": "[0, 4294967295]", "eval_workers": "[0, 1000]", "threads": "[0, 1024]", "eval_episodes": "[1, 10000]",
    "reward_bins": "[2, 100000]",
    "discount": "(0, 1]", "target_rate": "(0, 1]", "initial_temperature": "(0, inf)", "critic_grad_clip": "(0, inf)",
    "reward_range": "(0, 80]", "target_entropy": "(-inf, inf)", "sparsity": "[0, 1)", "encoder_sparsity": "[0, 1)",
    "critic_sparsity": "[0, 1)", "actor_sparsity": "[0, 1)", "drop_initial": "[0, 1]", "drop_final": "[0, 1]",
    "schedule_start": "[0, 1]", "schedule_end": "[0, 1]", "schedule_power": "(0, inf)", "scale": "(0, 1e4]",
    "width_scale": "(0, 1e4]", "depth_scale": "(0, 1e4]", "encoder_scale": "(0, 1e4]", "critic_scale": "(0, 1e4]",
    "actor_scale": "(0, 1e4]", "encoder_horizon": f"[1, {EPISODE_STEPS}]", "q_horizon": f"[1, {EPISODE_STEPS}]",
}


def check(args):
    """What would otherwise fail late, or silently do something else."""
    for group, name in [*flag_names(args), *((None, name) for name in ("seed", "eval_workers", "threads", "save_every"))]:
        value = get_setting(args, group, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_range(name, value, RANGES.get(name, "[1, 1e12]" if isinstance(value, int) else "[0, inf)"))
    if args.sparse.schedule_start > args.sparse.schedule_end:
        raise ValueError(f"--schedule-start {args.sparse.schedule_start} lies behind --schedule-end "
                         f"{args.sparse.schedule_end}")
    if args.learning_starts <= args.agent.horizon:
        raise ValueError(f"--learning-starts must be at least {args.agent.horizon + 1}, not {args.learning_starts}: the "
                         "longest subtrajectory must fit into what is stored by then")
    if args.total_steps <= args.learning_starts:
        raise ValueError(f"--total-steps {args.total_steps} trains nothing: it must be above --learning-starts "
                         f"{args.learning_starts}")
    if args.name is not None and (not args.name or args.name in (".", "..") or re.search(r"[/\\\0]", args.name)):
        raise ValueError(f"--name {args.name!r} must be the name of one folder: where it lies is said by --runs")
    if re.search(r"[/\\\0]", args.env):  # it is part of the folder's name
        raise ValueError(f"--env {args.env!r} is no task: they are written domain-task, as dog-run is")
    if args.eval_only != (args.checkpoint is not None):
        raise ValueError("--eval-only and --checkpoint RUN go together: the one says what to do, the other with which run")
    if args.eval_only and args.resume:
        raise ValueError("--resume trains, and --eval-only does not: leave one away")
    if args.video is not None and not (args.eval_only and args.video.endswith(".mp4")):
        raise ValueError(f"--video {args.video} must be an .mp4 file, and films what --eval-only evaluates")
    _check_modules(args)


def _check_range(name, value, interval):
    """ValueError unless value lies in the interval, written as in mathematics: "[0, 1)"."""
    least, most = (float(end) for end in interval[1:-1].split(","))
    above = value > least or (interval[0] == "[" and value == least)
    below = value < most or (interval[-1] == "]" and value == most)
    if not (above and below):  # NaN is neither
        raise ValueError(f"--{name.replace('_', '-')} must lie in {interval}, not {value}")


def _check_modules(args):
    """Flags that could do nothing."""
    presets = args.agent.presets["mst" if args.mst else "default"]
    simba = presets["critic"].arch_type == "simba"
    scales = ["scale"] if args.scale != 1.0 else []
    for name in ("encoder", "critic", "actor"):
        own = own_settings(args, name)
        given = [part for part, value in own.items() if value is not None]
        if name not in presets and given:
            raise ValueError(f"--{name}-{given[0]}: {args.algo} has no {name}, only {' and '.join(presets)}")
        if simba and own["type"] is not None:
            raise ValueError(f"--{name}-type: {args.algo} runs on SimBa networks; the six types are for mrq and mrsac")
        scales += [f"{name}-scale"] if own["scale"] is not None else []
    if scales and args.width_scale is not None and args.depth_scale is not None:
        raise ValueError(f"--{scales[0]} does nothing beside both --width-scale and --depth-scale: leave one of the three away")
    if args.residual != "pre" and simba:
        raise ValueError(f"--residual: {args.algo} runs on SimBa networks, whose residual connections are fixed")
    if args.residual != "pre" and not any(m.arch_type in WithResiduals for m in module_configs(args).values()):
        raise ValueError(f"--residual {args.residual} does nothing: no module has residual connections; choose types 5 or 6, "
                         "or --mst")
    if simba and not args.agent.twin_critics:
        for name in ("target_q", "actor_q"):
            if (reduction := getattr(args.agent, name)) != "min":
                raise ValueError(f"--{name.replace('_', '-')} {reduction} chooses between two Q networks, and there is one: "
                                 "add --twin-critics")


def unused_flag_notes(args):
    """What the user should be told in a line: flags that a grid over regimes rightly passes and that change nothing in
    this cell of it."""
    telling, usual, modules = dict(nondefault_flags(args)), defaults(args.algo), module_configs(args)
    idle = []
    for group, name in flag_names(args):
        flag, value = "--" + name.replace("_", "-"), get_setting(args, group, name)
        own = group in modules and name.endswith("_sparsity") and modules[group].regime == "dense"
        if value != get_setting(usual, group, name) and flag not in telling and (group == "sparse" or name == "scale" or own):
            idle.append(flag)
    regimes = ", ".join(f"{name} {module.regime}" for name, module in modules.items())
    return [f"note: {', '.join(idle)} changes nothing here ({regimes}), and is not in the run's name"] if idle else []


def get_setting(args, group, name):
    """One setting, by what `flag_names` calls it."""
    return getattr(args if group is None else getattr(args, group), name)


def set_setting(args, group, name, value):
    """The same, changed in place."""
    if group is None:
        setattr(args, name, value)
    else:
        setattr(args, group, dataclasses.replace(getattr(args, group), **{name: value}))


def _first(*values):
    """The first that was given."""
    return next(value for value in values if value is not None)
