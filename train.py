"""Trains MR.Q, SAC, DDPG or MR.SAC with module-specific sparse training on a DeepMind Control task.

    python train.py --mst --env cartpole-swingup                       # the paper's preset: dense, DST, SST
    python train.py --mst --scale 5 --env dog-run                      # 371 M parameters, on a GPU
    python train.py --critic-regime dst --scale 5                      # one module's regime at a time
    python train.py --encoder-type 2 --encoder-regime s2d              # a cell of Figure 2
    python train.py --algo sac --mst --width-scale 4 --depth-scale 3   # Figure 14's size; --help after --algo: its flags

Steps are agent steps: two frames each. Each run writes runs/<name>/config.json, eval.csv and train.csv.
Paper: Sections 3 and 4, Algorithm 1, Tables 1 and 2.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import torch
import tyro
from tqdm import tqdm

import fast
import metrics
from envs import Env, LockstepEvaluation
from modules import ModuleConfig
from mrq import MRQ, MRQConfig
from replay import Batch, ReplayBuffer
from runlog import RunLog
from sac import DDPG, MRSAC, SAC, DDPGConfig, MRSACConfig, SACConfig

REFUSED = (ValueError, MemoryError, OSError, ImportError, RuntimeError)  # what building a run may raise; see `one_line`
ALGORITHMS = {"mrq": MRQ, "sac": SAC, "ddpg": DDPG, "mrsac": MRSAC}
METRIC_BATCH = 2048  # samples that SRank and the dormant ratio are read from
INTERFERENCE_SAMPLES = 32  # per-sample gradients that are compared


@dataclass
class EncoderArgs:
    encoder_type: int | None = None  # (mrq, mrsac) architecture 1-6; 4, or 6 with --mst
    encoder_regime: str | None = None  # (mrq, mrsac) dense | sst | dst | s2d | d2s; dense
    encoder_scale: float | None = None  # (mrq, mrsac) width and depth of this module; --scale
    encoder_sparsity: float | None = None  # (mrq, mrsac) share of weights pruned; --sparsity


@dataclass
class CriticArgs:
    critic_type: int | None = None  # (mrq, mrsac) architecture 1-6; 4, or 6 with --mst
    critic_regime: str | None = None  # dense | sst | dst | s2d | d2s; dense, or dst with --mst
    critic_scale: float | None = None  # width and depth of this module; --scale
    critic_sparsity: float | None = None  # share of weights pruned; --sparsity


@dataclass
class ActorArgs:
    actor_type: int | None = None  # (mrq, mrsac) architecture 1-6; 3, or 5 with --mst
    actor_regime: str | None = None  # dense | sst | dst | s2d | d2s; dense, or sst with --mst
    actor_scale: float | None = None  # width and depth of this module; --scale
    actor_sparsity: float | None = None  # share of weights pruned; --sparsity


@dataclass
class SparsityArgs:
    sparsity: float = 0.6  # share of weights pruned in every module whose regime is not dense; 0.8 for sac and ddpg
    distribution: str = "er"  # er | uniform: how sparsity is spread over the layers (Fig. 12)
    growth: str = "gradient"  # gradient (RigL) | random (SET): which weights grow (Fig. 12)
    update_interval: int = 1000  # a module's own updates between two changes of its topology
    drop_initial: float = 0.5  # share of active weights replaced by a topology update at the start, Eq. (1)
    drop_final: float = 0.0  # ... and at the end
    schedule_start: float = 0.2  # share of training after which S2D and D2S begin to move, Eq. (2)
    schedule_end: float = 0.8  # ... and when they arrive
    schedule_power: float = 2.0  # λ of Eq. (2)


@dataclass
class Args:
    algo: str = "mrq"  # mrq | sac | ddpg | mrsac
    env: str = "dog-run"  # a DeepMind Control task, domain-task
    seed: int = 0  # of environment, exploration, networks and masks
    total_steps: int = 500_000  # agent steps in all
    learning_starts: int = 10_000  # random steps before learning; 5,000 for sac and ddpg
    eval_every: int = 5_000  # agent steps between two evaluations
    eval_episodes: int = 10  # episodes an evaluation
    eval_workers: int = 0  # processes that step the evaluation's environments; they change no result
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    precision: str = "auto"  # auto | fp32 | tf32 | bf16, of matrix products; auto is tf32 on CUDA, fp32 elsewhere
    compile: bool = False  # torch.compile the losses (needs a C++ compiler on a CPU)
    cuda_graphs: bool = False  # capture updates as CUDA graphs
    mst: bool = False  # the paper's Module-Specific Training: encoder dense, critic DST, actor SST; types 6, 6, 5, if any
    scale: float = 1.0  # multiplies width and depth of every module
    width_scale: float | None = None  # width alone, of every module, instead of the scales
    depth_scale: float | None = None  # depth alone, of every module, instead of the scales
    residual: str = "pre"  # pre, Eq. (5) | post, Eq. (6): where residual connections start
    encoder: tyro.conf.OmitArgPrefixes[EncoderArgs] = field(default_factory=EncoderArgs)
    critic: tyro.conf.OmitArgPrefixes[CriticArgs] = field(default_factory=CriticArgs)
    actor: tyro.conf.OmitArgPrefixes[ActorArgs] = field(default_factory=ActorArgs)
    sparse: tyro.conf.OmitArgPrefixes[SparsityArgs] = field(default_factory=SparsityArgs)
    agent: tyro.conf.OmitArgPrefixes[tyro.conf.AvoidSubcommands[MRQConfig | SACConfig | DDPGConfig | MRSACConfig]] = field(
        default_factory=MRQConfig)
    buffer_size: int = 1_000_000  # replay rows; an episode takes its length + 1
    log_every: int = 500  # agent steps between two rows of train.csv
    runs: str = "runs"  # folder that runs are written into
    name: str | None = None  # the run's folder; default: the task and every setting that is not its default
    tensorboard: bool = False  # also write TensorBoard event files
    wandb_project: str | None = None  # also log to this Weights & Biases project


def defaults(algo):
    """The flags' defaults for this algorithm."""
    if algo not in ALGORITHMS:
        raise ValueError(f"unknown --algo {algo!r}: choose one of {', '.join(ALGORITHMS)}")
    agent_class = ALGORITHMS[algo]
    sparsity = agent_class.presets["default"]["critic"].sparsity
    return Args(algo=algo, learning_starts=agent_class.learning_starts, sparse=SparsityArgs(sparsity=sparsity),
                agent=agent_class.Config())


def parse(arguments=None):
    """Command line -> Args. The algorithm is read first: it has flags and defaults of its own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", default="mrq")
    algo = first.parse_known_args(arguments)[0].algo
    return tyro.cli(Args, args=arguments, default=defaults(algo), description=__doc__)


def module_configs(args):
    """The agent's modules as the flags describe them: the preset, then what was said of one module."""
    options = {"distribution": args.sparse.distribution, "grow": args.sparse.growth,
               "update_interval": args.sparse.update_interval, "drop_initial": args.sparse.drop_initial,
               "drop_final": args.sparse.drop_final, "schedule_start": args.sparse.schedule_start,
               "schedule_end": args.sparse.schedule_end, "power": args.sparse.schedule_power}
    presets = ALGORITHMS[args.algo].presets["mst" if args.mst else "default"]
    modules = {}
    for name in ("encoder", "critic", "actor"):
        own = {part: getattr(getattr(args, name), f"{name}_{part}") for part in ("type", "regime", "scale", "sparsity")}
        if name not in presets:
            given = [part for part, value in own.items() if value is not None]
            if given:
                raise ValueError(f"--{name}-{given[0]}: {args.algo} has no {name}, only {' and '.join(presets)}")
            continue
        preset = presets[name]
        if preset.arch_type == "simba" and own["type"] is not None:
            raise ValueError(f"--{name}-type: {args.algo} runs on SimBa networks; the six types are for mrq and mrsac")
        if preset.arch_type == "simba" and args.residual != "pre":
            raise ValueError(f"--residual: {args.algo} runs on SimBa networks, whose residual connections are fixed")
        scale = _first(own["scale"], args.scale)
        modules[name] = ModuleConfig(
            arch_type=_first(own["type"], preset.arch_type), regime=_first(own["regime"], preset.regime),
            width_scale=_first(args.width_scale, scale), depth_scale=_first(args.depth_scale, scale),
            sparsity=_first(own["sparsity"], args.sparse.sparsity), residual=args.residual, sparse_options=options)
    return modules


def run_name(args):
    """The task, the algorithm if it is not MR.Q, and every setting that is not its default, so that two different runs
    never share a name."""
    def settings(config, default):
        for spec in dataclasses.fields(config):
            value, usual = getattr(config, spec.name), getattr(default, spec.name)
            if dataclasses.is_dataclass(value):
                yield from settings(value, usual)
            elif value != usual and spec.name not in ("env", "seed", "device", "runs", "name", "tensorboard",
                                                      "wandb_project", "eval_workers"):
                flag = spec.name.replace("_", "-")
                yield flag if value is True else f"{flag}={value}"
    algo = [] if args.algo == "mrq" else [args.algo]
    return "__".join([args.env, *algo, *settings(args, defaults(args.algo)), f"seed={args.seed}"])


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown --device {name!r}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this PyTorch sees no CUDA device: use --device cpu, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and generators are those of the current device
    return device


def check(args):
    """What would otherwise fail late, or silently do something else."""
    at_least = {"total_steps": 1, "learning_starts": args.agent.horizon + 1, "eval_every": 1, "eval_episodes": 1,
                "eval_workers": 0, "log_every": 1, "batch_size": 1, "encoder_horizon": 1, "q_horizon": 1,
                "target_update_freq": 1, "reward_bins": 2}
    values = dataclasses.asdict(args) | dataclasses.asdict(args.agent)
    for name, least in at_least.items():
        if values.get(name, least) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {values[name]}")
    for name, value in dataclasses.asdict(args.agent).items():
        if not isinstance(value, float):
            continue
        above_zero = name in ("discount", "target_rate", "initial_temperature", "critic_grad_clip", "reward_range")
        least = -math.inf if name == "target_entropy" else 0.0
        most = 1.0 if name in ("discount", "target_rate") else math.inf
        if not (math.isfinite(value) and least <= value <= most) or (above_zero and value == 0):
            wanted = "finite" if least < 0 else "above 0" if above_zero else "at least 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}{' and at most 1' if most == 1 else ''}, not {value}")


def describe(agent, modules, args, device, folder):
    """What the run is, before it starts: modules, sizes, densities, and where it writes."""
    lines = [f"{args.algo} on {args.env}, seed {args.seed}, {args.total_steps:,} agent steps on {device}"]
    for name, network in agent.networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        config = modules[name]
        head = sum(parameter.numel() for parameter in network.model.parameters()) if name == "encoder" else 0
        lines.append(f"  {name:8} type {config.arch_type}  {config.regime:5}  width ×{config.width_scale:g}, depth "
                     f"×{config.depth_scale:g}  {(count - head) / 1e6:8.3f} M"
                     + (f" + {head / 1e6:.2f} M head" if head else "") + f"  density {agent.sparse[name].density():.3f}")
    collapsing = [name for name, config in modules.items()
                  if config.arch_type in (1, 2, 3, 4) and max(config.width_scale, config.depth_scale) >= 3]
    if collapsing:
        lines.append(f"  note: large networks without residual connections ({', '.join(collapsing)}) are what the paper "
                     "shows collapsing; --mst is its remedy")
    return "\n".join(lines + [f"  writes   {folder}"])


def measure(agent, replay):
    """The plasticity metrics of every module, as columns. NaN where there is nothing to measure yet."""
    ready = replay.sampleable > 0  # else: a batch of zeros, to know the columns from the first row on
    index = torch.zeros(2, dtype=torch.long, device=replay.device)
    batch = replay.sample(METRIC_BATCH) if ready else replay.gather(index)
    with contextlib.ExitStack() as stack:
        activations = {name: stack.enter_context(metrics.record_activations(network))
                       for name, network in agent.networks.items()}
        features = agent.probe(batch)
    losses = agent.probe_losses(Batch(*(part[:INTERFERENCE_SAMPLES] for part in batch)), replay)
    row = {}
    for name, network in agent.networks.items():
        columns = metrics.module_metrics(network, features[name], activations[name], losses[name],
                                         agent.sparse[name].masks)
        row |= {f"{name}/{column}": value if ready or column == "parameter_norm" else math.nan
                for column, value in columns.items()}
        row[f"{name}/density"] = agent.sparse[name].density()
    return row


def build(args):
    """Everything a run needs; whatever is wrong with the flags is found here, before the folder is made."""
    check(args)
    device = pick_device(args.device)
    precision = fast.pick_precision(args.precision, device)
    if args.cuda_graphs and device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a CUDA device, and this run is on {device}")
    modules = module_configs(args)
    torch.manual_seed(args.seed)
    env = Env(args.env, seed=args.seed)
    agent_class = ALGORITHMS[args.algo]
    total_updates = max(1, args.total_steps - args.learning_starts) * agent_class.updates_per_step
    agent = agent_class(env.obs_dim, env.action_dim, modules, args.agent, total_updates, device, args.seed)
    fast.speed_up(agent, precision, args.compile)
    if args.cuda_graphs:
        fast.captured(agent)
    rows = min(args.buffer_size, 2 * args.total_steps + 2 * agent.horizon + 2)  # no more than the run can fill
    replay = ReplayBuffer(env.obs_dim, env.action_dim, rows, agent.horizon, agent.prioritized, device=device)
    evaluation = LockstepEvaluation(args.env, args.eval_episodes, args.seed, workers=args.eval_workers)
    folder = os.path.join(args.runs, args.name or run_name(args))
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                **{package: version(package) for package in ("numpy", "dm_control", "mujoco")}}
    config = dataclasses.asdict(args) | {"modules": {name: dataclasses.asdict(m) for name, m in modules.items()},
                                         "versions": versions, "device_used": str(device)}
    log = RunLog(folder, config, args.tensorboard, args.wandb_project)
    print(describe(agent, modules, args, device, folder), flush=True)
    return device, env, agent, replay, evaluation, log


def train(args, device, env, agent, replay, evaluation, log):
    """The one loop. At step t: act on obs_t; update on what was stored up to t-1; step; store. Fast or slow, in this
    order: the device may train while the environment steps, and nothing but the clock changes."""
    began = time.time()
    logged_step, logged_time = 0, began
    last_return, episode_return = math.nan, 0.0
    bar = tqdm(total=args.total_steps, unit="step", dynamic_ncols=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 60)

    def evaluate(step):
        # Random numbers drawn in here are put back: evaluating changes nothing of what is learnt.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed + step)
            returns = evaluation(lambda obs: agent.act(obs, explore=False), step)
            log.write("eval", {"agent_step": step, "frames": env.frames, "return": returns.mean(),
                               "return_std": returns.std(), "seconds": time.time() - began} | measure(agent, replay))
        bar.set_postfix_str(f"return {returns.mean():.1f}", refresh=False)
        bar.write(f"step {step:>9,}  return {returns.mean():7.1f} ± {returns.std():.1f}")

    def write_training(step):
        nonlocal logged_step, logged_time
        info = {name: value.item() for name, value in agent.info.items()}
        speed = (step - logged_step) / (time.time() - logged_time)  # evaluations included
        logged_step, logged_time = step, time.time()
        log.write("train", {"agent_step": step, "frames": env.frames, "episode_return": last_return} | info
                  | {f"{name}_density": sparse.density() for name, sparse in agent.sparse.items()}
                  | {"steps_per_second": speed, "seconds": time.time() - began})
        bad = [name for name, value in info.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {info[bad[0]]} at agent step {step}; stopped. All rows up to here are "
                                     f"in {log.folder}")

    obs = env.reset()
    for step in range(args.total_steps):
        if step % args.eval_every == 0:
            evaluate(step)

        learning = step >= args.learning_starts
        if step == args.learning_starts:
            logged_step, logged_time = step, time.time()
        agent.observe(obs)
        action = agent.act(obs, explore=True) if learning else env.random_action()
        if not np.isfinite(action).all():  # the last update broke the actor: seen without asking the device each step
            write_training(step)  # names the loss that broke, if it shows already
            raise FloatingPointError(f"the action is {action} at agent step {step}: the actor has diverged; stopped. All "
                                     f"rows up to here are in {log.folder}")
        if learning:
            for _ in range(agent.updates_per_step):
                agent.update(replay)
        next_obs, reward, terminated, truncated = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        episode_return += reward
        obs = next_obs
        if terminated or truncated:
            obs, last_return, episode_return = env.reset(), episode_return, 0.0

        bar.update()
        if learning and ((step + 1) % args.log_every == 0 or step + 1 == args.total_steps):
            write_training(step + 1)
    evaluate(args.total_steps)
    bar.close()


def main():
    try:
        args = parse()
        parts = build(args)
    except REFUSED as error:
        sys.exit(f"train.py: {one_line(error)}")
    log = parts[-1]
    try:
        train(args, *parts)
    except (FloatingPointError, RuntimeError) as error:
        sys.exit(f"\ntrain.py: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"\ntrain.py: stopped by hand; all rows up to here are in {log.folder}")
    finally:
        log.close()
    print(f"done: {os.path.join(log.folder, 'eval.csv')}")


def one_line(error):
    """What to tell of it; what is no fault of the user's is raised again, with its traceback."""
    memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the CPU's is a plain one
    if isinstance(error, RuntimeError) and not memory:
        raise error
    advice = ": choose a smaller --scale, --batch-size or --buffer-size" if memory else ""
    return str(error).splitlines()[0] + advice


def _first(*values):
    """The first that was given."""
    return next(value for value in values if value is not None)


if __name__ == "__main__":
    main()
