"""Trains MR.Q, SAC, DDPG or MR.SAC with module-specific sparse training on a DeepMind Control task.

    python train.py --mst --env cartpole-swingup                       # the paper's preset: dense, DST, SST
    python train.py --mst --scale 5 --env dog-run                      # 371 M parameters, on a GPU
    python train.py --critic-regime dst --scale 5                      # one module's regime at a time
    python train.py --encoder-type 2 --encoder-regime s2d              # a cell of Figure 2
    python train.py --algo sac --mst --width-scale 4 --depth-scale 3   # Figure 14's size; --help after --algo: its flags

    python train.py --mst --scale 5 --env dog-run --resume             # goes on where a killed run was last saved
    python train.py --eval-only --checkpoint runs/dog-run__mst__scale=5__seed=0 --video dog.mp4    # watch what came of it

Steps are agent steps: two frames each. Each run writes runs/<name>/config.json, eval.csv, train.csv, checkpoints while it
lasts, and final.pt when it has ended. Exit status: 0 ended, 75 saved and stopped by a signal, 76 another process trains this
run, 1 failed.
Paper: Sections 3 and 4, Algorithm 1, Tables 1 and 2.
"""

import os
import signal
import sys


def exit_early(number, _):
    os.write(2, b"\ntrain.py: stopped before training began\n")
    os._exit(1 if number == signal.SIGINT else 75)  # 75: started again with --resume, it goes on


if __name__ == "__main__":  # a signal while PyTorch imports, or the run is built: nothing is there to save
    for early in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])):
        if signal.getsignal(early) != signal.SIG_IGN:  # nohup, or a shell's background job, has its way
            signal.signal(early, exit_early)
    # A thread that waits for another one spins. Without end, as is usual, an agent step takes 15 to 70 times as long while
    # a neighbour has one of two cores; this long, 3 to 6 times, and alone as long as ever. PyTorch reads it when imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import dataclasses
import json
import math
import shutil
import time

import numpy as np
import torch
from tqdm import tqdm

from runtime import fast
import metrics
import evaluate as watch
from agents import build_agent, compiling_pays
from runtime.checkpoint import Checkpoints
from envs import Env, Evaluator
from replay import Batch, ReplayBuffer
from runtime.log import RunLocked, RunFinished, RunLog, provenance
from settings import check, diff_settings, from_config, module_configs, unused_flag_notes, parse, run_name
from runtime.resume import SavedRun, Stopped, StopSignals

# What a run may raise: `error_message` tells it.
USER_ERRORS = (ValueError, MemoryError, OSError, ImportError, RuntimeError, FloatingPointError)
METRIC_BATCH = 2048  # samples that SRank and the dormant ratio are read from
INTERFERENCE_SAMPLES = 32  # per-sample gradients that are compared


class SafeStream:
    """A stream whose reader may leave (`| head -1`) or whose disk may be full: what is written then goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.stream = open(os.devnull, "w")

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


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
                     "shows collapsing; its remedy: types 5 and 6, which --mst has")
    return "\n".join(lines + [f"  writes   {folder}"])


def measure(agent, replay, wanted=True):
    """The plasticity metrics of every module, as columns. NaN where there is nothing to measure yet, or it is not wanted."""
    ready = wanted and replay.num_valid > 0  # else: two zeros for a batch, to know the columns
    index = torch.zeros(2, dtype=torch.long, device=replay.device)
    batch = replay.sample(METRIC_BATCH) if ready else replay.gather(index)
    with contextlib.ExitStack() as stack:
        activations = {name: stack.enter_context(metrics.record_activations(network))
                       for name, network in agent.networks.items()}
        features = agent.compute_features(batch)
    losses = agent.per_sample_losses(Batch(*(part[:INTERFERENCE_SAMPLES] for part in batch)), replay)
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
    folder = os.path.join(args.runs, args.name or run_name(args))
    begun = check_same_run(args, folder)
    device = fast.resolve_device(args.device)
    torch.set_num_threads(args.threads or fast.usable_cores())
    modules = module_configs(args)
    torch.manual_seed(args.seed)
    env = Env(args.env, seed=args.seed)
    compiled, speed_notes = pick_compile(args, device, begun)
    agent = build_agent(dataclasses.replace(args, compile="on" if compiled else "off"), env.obs_dim, env.action_dim, device)
    rows = min(args.buffer_size, 2 * args.total_steps + 2 * agent.horizon + 2)  # no more than the run can fill
    replay = ReplayBuffer(env.obs_dim, env.action_dim, rows, agent.horizon, agent.prioritized, device=device)
    evaluation = Evaluator(args.env, args.eval_episodes, args.seed, workers=args.eval_workers)
    config = dataclasses.asdict(args) | {"modules": {name: dataclasses.asdict(m) for name, m in modules.items()}} | provenance()
    config |= {"device_used": str(device), "threads_used": torch.get_num_threads(), "compiled": compiled,
               "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}
    log = RunLog(folder, config, args.tensorboard, args.wandb_project, args.resume)
    saved = SavedRun(Checkpoints(folder), args, device, agent, replay, env, log)
    print("\n".join([describe(agent, modules, args, device, folder), describe_saving(saved), *unused_flag_notes(args), *speed_notes]),
          flush=True)
    return device, env, agent, replay, evaluation, log, saved


def pick_compile(args, device, begun):
    """(whether to compile, lines that the user should be told). What "auto" chose when the run was `begun` (its config) holds
    until it ends: compiled and plain losses differ in the last digits. ValueError if "on" cannot be."""
    # Without that entry: of an older version, whose "auto" was off.
    pays = begun.get("compiled", begun.get("compile") == "on") if begun else compiling_pays(args)
    compiled, _, told = fast.resolve_speed(args.compile, args.cuda_graphs, device, pays)
    trouble = fast.compile_error(device) if compiled else None
    if trouble and args.compile == "on":
        raise ValueError(trouble)
    if compiled:
        told.append(f"  note: not compiled, which would make the run faster: {trouble}" if trouble else
                    "  compiled: the first updates wait a minute or so for it; --compile off does without")
    return compiled and not trouble, told


def check_same_run(args, folder):
    """The config of the run that --resume finds, or None. RunFinished, or ValueError in one line, if that has ended, or is
    another one."""
    path = os.path.join(folder, "config.json")
    if args.resume and os.path.exists(path):
        try:
            with open(path) as file:
                config = json.load(file)
            before = from_config(config)
        except ValueError as error:
            raise ValueError(f"--resume: {path} cannot be read: {str(error).splitlines()[0]}") from None
        if differing := diff_settings(before, args):
            raise ValueError(f"--resume: {folder} was begun with {differing}: choose another --name, or the same flags")
        if os.path.exists(os.path.join(folder, "final.pt")):
            raise RunFinished(folder)
        return config


def describe_saving(saved):
    one, buffer = saved.size()
    total, free = 3 * one + buffer, shutil.disk_usage(saved.log.folder).free  # two, and a third while it is written
    line = (f"  saves    every {saved.args.save_every:,} steps: up to {total / 1e9:.2f} GB (the last two, {one / 1e9:.2f} GB "
            f"each, one more while it is written, and a replay buffer of {buffer / 1e9:.2f} GB)")
    return line if total < free else line + f"\n  note: the disk has {free / 1e9:.2f} GB free: saving will fail, training not"


class Bar:
    """The progress bar: what is going on, the last return, and the time left. That goes by the updates of all modules
    alike, so that a burst of 250 encoder updates moves it, and the cheap random steps do not mislead it."""

    def __init__(self, args, agent, start):
        self.agent, self.lines = agent, {}
        self.all_updates = len(agent.updates) * (args.total_steps - args.learning_starts) * agent.updates_per_step
        self.bar = tqdm(total=args.total_steps, initial=start, dynamic_ncols=True,
                        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        self.interval = 0.5 if sys.stderr.isatty() else 60  # seconds between two drawings
        self.drawn, self.first, self.began = time.monotonic(), None, None
        self.write, self.close = self.bar.write, self.bar.close

    def show(self, step, doing, **more):
        now, done = time.monotonic(), sum(self.agent.updates.values())
        if self.first is None and done:  # of this process
            self.first, self.began = done, now
        self.bar.n, self.lines = step, self.lines | more
        if now - self.drawn < self.interval:
            return
        left = "?"
        if self.first is not None and done > self.first:
            left = tqdm.format_interval((now - self.began) / (done - self.first) * (self.all_updates - done))
        self.drawn = now
        self.bar.set_postfix_str(", ".join([f"{left} left", *(f"{key} {value}" for key, value in self.lines.items()), doing]))


def train(args, device, env, agent, replay, evaluation, log, saved):
    """The one loop. At step t: act on obs_t; update on what was stored up to t-1; step; store. Fast or slow, in this
    order: the device may train while the environment steps, and nothing but the clock changes. `run` is where it stands."""
    obs = saved.restore()  # of a run that is resumed
    if obs is None:
        obs = env.reset()
    run, stop, bar, told = saved.progress, StopSignals(), Bar(args, agent, saved.progress.step), set()
    agent.on_encoder_update = lambda doing: (stop.check(), bar.show(run.step, doing))

    def evaluate(step):
        def act(obs):
            stop.check()  # an evaluation is abandoned, and played anew when the run goes on
            return agent.act(obs, explore=False)

        measured = step // args.eval_every % args.metrics_every == 0 or step == args.total_steps
        bar.show(step, "evaluating")
        # Random numbers drawn in here are put back: evaluating changes nothing of what is learnt.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed + step)
            try:
                returns = evaluation(act, step)
            except ChildProcessError:
                stop.check()  # a signal to all processes has ended the workers too
                raise
            log.write("eval", {"agent_step": step, "frames": env.frames, "return": returns.mean(),
                               "return_std": returns.std(), "returns": " ".join(f"{value:.6g}" for value in returns),
                               "seconds": saved.seconds()} | measure(agent, replay, measured))
        bar.show(step, "learning", **{"return": f"{returns.mean():.1f}"})
        bar.write(f"step {step:>9,}  return {returns.mean():7.1f} ± {returns.std():.1f}")

    def write_training(step):
        info, now = {name: value.mean().item() for name, value in agent.info.items()}, saved.seconds()
        speed = (step - run.logged_step) / (now - run.logged_seconds)  # evaluations included
        run.logged_step, run.logged_seconds = step, now
        log.write("train", {"agent_step": step, "frames": env.frames, "episode_return": run.last_return} | info
                  | {f"{name}_density": sparse.density() for name, sparse in agent.sparse.items()}
                  | {"steps_per_second": speed, "seconds": now})
        saved.check_health()

    def report_io_errors():
        """A full disk stops nothing; each trouble is told once."""
        for failure in {saved.checkpoints.failure, log.failure} - told - {None}:
            told.add(failure)
            bar.write(f"note: {failure}; the run goes on")

    for run.step in range(run.step, args.total_steps):
        step, learning = run.step, run.step >= args.learning_starts
        if run.action is None:  # else the run is resumed in the midst of this step's update
            stop.check()
            saved.save_if_due()
            if step % args.eval_every == 0:
                evaluate(step)
            if step == args.learning_starts:
                run.logged_step, run.logged_seconds = step, saved.seconds()
            agent.update_obs_stats(obs)
            run.action = agent.act(obs, explore=True) if learning else env.random_action()
            if not np.isfinite(run.action).all():  # the last update broke the actor: seen without asking the device
                if step != run.logged_step:
                    write_training(step)  # names the loss that broke, if it shows already
                raise FloatingPointError(f"the action is {run.action} at agent step {step}: the actor has diverged; "
                                         f"stopped. All rows up to here are in {log.folder}")
        if learning:
            for _ in range(agent.updates_per_step):
                agent.update(replay)
        next_obs, reward, terminated, truncated = env.step(run.action)
        replay.add(obs, run.action, reward, next_obs, terminated, truncated)
        run.episode_return += reward
        obs, run.action = next_obs, None
        if terminated or truncated:
            obs, run.last_return, run.episode_return = env.reset(), run.episode_return, 0.0

        bar.show(step + 1, "learning" if learning else "random steps")
        if learning and ((step + 1) % args.log_every == 0 or step + 1 == args.total_steps):
            write_training(step + 1)
        report_io_errors()
    run.step = args.total_steps
    evaluate(run.step)
    bar.close()
    log.close()
    saved.finish()


def main():
    log = None
    try:
        args = parse(description=__doc__)
        if args.eval_only:
            check(args)
            return watch.main(args)
        *parts, log, saved = build(args)
        try:
            train(args, *parts, log, saved)
        except Stopped as stopped:  # a run that broke since its last row is not saved, and says so below
            sys.exit(save_and_stop(saved, stopped))
    except RunFinished as folder:
        return print(f"finished already: {folder}")
    except RunLocked as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(76)
    except USER_ERRORS as error:
        told = error_message(error)
        sys.exit(f"\ntrain.py: {told}; the last checkpoint is {saved.checkpoints.last()}" if log else f"train.py: {told}")
    print(f"done: {os.path.join(log.folder, 'eval.csv')}")


def save_and_stop(saved, stopped):
    """Returns the exit status: 75, or 1 if it could not be saved."""
    step = saved.progress.step
    saved.save(wait=True)
    failure = saved.checkpoints.failure
    told = "and saved; the same command with --resume goes on"
    if failure:
        told = f"but {failure}: the last is {saved.checkpoints.last()}"
    print(f"\ntrain.py: stopped by {stopped} at agent step {step:,}, {told}", file=sys.stderr)
    return 1 if failure else 75


def error_message(error):
    """What to tell of it; what is no fault of the user's is raised again, with its traceback."""
    memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the CPU's is a plain one
    if isinstance(error, RuntimeError) and not memory:
        raise error
    advice = ": choose a smaller --scale, --batch-size or --buffer-size" if memory else ""
    return str(error).splitlines()[0] + advice


if __name__ == "__main__":
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    main()
