"""Trains MR.Q, SAC, DDPG or MR.SAC with module-specific sparse training on a DeepMind Control task.

    python train.py --mst --env cartpole-swingup                       # the paper's preset: dense, DST, SST
    python train.py --mst --scale 5 --env dog-run                      # 371 M parameters, on a GPU
    python train.py --critic-regime dst --scale 5                      # one module's regime at a time
    python train.py --encoder-type 2 --encoder-regime s2d              # a cell of Figure 2
    python train.py --algo sac --mst --width-scale 4 --depth-scale 3   # Figure 14's size; --help after --algo: its flags

Steps are agent steps: two frames each. Each run writes runs/<name>/config.json, eval.csv and train.csv.
Paper: Sections 3 and 4, Algorithm 1, Tables 1 and 2.
"""

import contextlib
import dataclasses
import math
import os
import platform
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from tqdm import tqdm

import fast
import metrics
from agents import build_agent
from envs import Env, LockstepEvaluation
from replay import Batch, ReplayBuffer
from runlog import RunLog
from settings import check, module_configs, notes, parse, run_name

REFUSED = (ValueError, MemoryError, OSError, ImportError, RuntimeError)  # what building a run may raise; see `one_line`
METRIC_BATCH = 2048  # samples that SRank and the dormant ratio are read from
INTERFERENCE_SAMPLES = 32  # per-sample gradients that are compared


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
    device = fast.pick_device(args.device)
    modules = module_configs(args)
    torch.manual_seed(args.seed)
    env = Env(args.env, seed=args.seed)
    agent = build_agent(args, env.obs_dim, env.action_dim, device)
    rows = min(args.buffer_size, 2 * args.total_steps + 2 * agent.horizon + 2)  # no more than the run can fill
    replay = ReplayBuffer(env.obs_dim, env.action_dim, rows, agent.horizon, agent.prioritized, device=device)
    evaluation = LockstepEvaluation(args.env, args.eval_episodes, args.seed, workers=args.eval_workers)
    folder = os.path.join(args.runs, args.name or run_name(args))
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                **{package: version(package) for package in ("numpy", "dm_control", "mujoco")}}
    config = dataclasses.asdict(args) | {"modules": {name: dataclasses.asdict(m) for name, m in modules.items()},
                                         "versions": versions, "device_used": str(device)}
    log = RunLog(folder, config, args.tensorboard, args.wandb_project)
    speed_notes = fast.pick_speed(args.compile, args.cuda_graphs, fast.pick_precision(args.precision, device), device)[2]
    print("\n".join([describe(agent, modules, args, device, folder), *notes(args), *speed_notes]), flush=True)
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
        if fault := agent.fault():
            raise FloatingPointError(f"{fault[0]} was not finite at agent step {args.learning_starts + fault[1]:,}; stopped. "
                                     f"All rows up to here are in {log.folder}")

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
        args = parse(description=__doc__)
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


if __name__ == "__main__":
    main()
