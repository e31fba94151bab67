"""Trains MR.Q, SAC, DDPG, MR.SAC or Stream AC(λ) with module-specific sparse training.

    python train.py --mst --env cartpole-swingup                       # the paper's preset: dense, DST, SST
    python train.py --mst --scale 5 --env dog-run                      # 371 M parameters, on a GPU
    python train.py --critic-regime dst --scale 5                      # one module's regime at a time
    python train.py --encoder-type 2 --encoder-regime s2d              # one point of Figure 2
    python train.py --algo sac --mst --width-scale 4 --depth-scale 3   # Figure 14's size; its flags: --algo sac --help
    python train.py --algo stream --mst --env Hopper-v5                # Gymnasium: pip install "gymnasium[mujoco]"

    python train.py --mst --scale 5 --env dog-run --resume             # continues a run from its last checkpoint
    python train.py --extend runs/NAME --total-steps 1000000           # trains a finished run longer, as a new run
    python evaluate.py runs/dog-run__mst__scale=5__seed=0 --video dog.mp4

Steps are agent steps: two frames each on DeepMind Control, one on Gymnasium and for Stream AC(λ). Each run writes
runs/<name>/config.json, eval.csv and train.csv, checkpoints while it runs, and final.pt at its end. Exit status:
0 finished, 75 stopped by a signal and saved, 76 another process trains this run, 1 failed, 2 unknown flag or value.
Paper: Sections 3 and 4, Tables 1 and 2.
"""

from runtime import console

if __name__ == "__main__":
    console.before_imports()

import dataclasses
import json
import os
import re
import shutil
import sys

import numpy as np
import torch

from agents import build_agent, compiling_pays, env_maker, replay_rows
from envs import PhysicsError
from evaluate import measure
from runtime import fast
from runtime.checkpoint import Checkpoints
from runtime.evaluator import Evaluator
from runtime.log import RunFinished, RunLocked, RunLog, provenance
from runtime.resume import SavedRun, Stopped, StopSignals
from settings import (check, defaults, diff_settings, extended, from_config, module_configs, parse, plan_notes,
                      read_config, run_name)


def train(args, env, agent, evaluator, log, saved):
    """The loop. At step t: act on obs_t; update on what was stored up to t-1; step the environment; add the transition.

    The order is the same on every device, so a GPU can update while the environment steps. `run`: the loop's state.
    """
    obs = saved.restore(lambda config: difference(config, args))
    if obs is None:  # a new run
        obs = env.reset()
    run, monitor = saved.progress, Monitor(args, env, agent, evaluator, log, saved)
    if run.step:
        monitor.bar.write(f"resumes at step {run.step:,}")
    if env.restore_warning:
        monitor.bar.write(f"note: {env.restore_warning}")
    for run.step in range(run.step, args.total_steps):
        learning = run.step >= args.learning_starts
        if run.action is None:  # else the run was stopped during this step's update
            monitor.before_step()
            agent.update_obs_stats(obs)
            run.action = agent.act(obs, explore=True) if learning else env.random_action()
            monitor.check_action()
        while agent.num_updates < (run.step + 1 - args.learning_starts) * agent.updates_per_step:
            agent.update()
        try:
            next_obs, reward, terminated, truncated = env.step(run.action)
        except PhysicsError as error:
            monitor.report_discarded(error)
            agent.end_episode()
            obs, run.action, run.episode_return = env.reset(), None, 0.0
        else:
            agent.add(obs, run.action, reward, next_obs, terminated, truncated)
            run.episode_return += reward
            obs, run.action = next_obs, None
            if terminated or truncated:
                obs, run.last_return, run.episode_return = env.reset(), run.episode_return, 0.0
        monitor.after_step(run.step + 1, learning)
    run.step = args.total_steps
    monitor.finish()


class Monitor:
    """What surrounds the loop: evaluations, CSV rows, checkpoints, signals, progress bar. It never changes learning."""

    def __init__(self, args, env, agent, evaluator, log, saved):
        self.args, self.env, self.agent, self.evaluator, self.log, self.saved = args, env, agent, evaluator, log, saved
        self.run, self.signals, self.reported = saved.progress, StopSignals(), set()
        self.bar = console.Bar(args, agent, saved.progress.step)
        agent.on_encoder_update = self.between_updates

    def between_updates(self, message):
        """A safe point within a step: the run may stop here."""
        self.signals.check()
        self.bar.show(self.run.step, message)

    def before_step(self):
        step = self.run.step
        self.signals.check()
        self.saved.save_if_due()
        if step % self.args.eval_every == 0:
            self.evaluate(step)
        if step == self.args.learning_starts:
            self.run.logged_step, self.run.logged_seconds = step, self.saved.seconds()

    def check_action(self):
        """FloatingPointError if the last update broke the actor: noticed here without a sync."""
        if np.isfinite(self.run.action).all():
            return
        if self.run.step != self.run.logged_step:
            self.write_training(self.run.step)  # names the loss that became NaN, if it is known already
        raise FloatingPointError(f"the action is {self.run.action} at agent step {self.run.step}: the actor has "
                                 f"diverged; stopped. All rows up to here are in {self.log.folder}")

    def after_step(self, done, learning):
        """done: agent steps so far."""
        self.bar.show(done, "learning" if learning else "random steps")
        if learning and (done % self.args.log_every == 0 or done == self.args.total_steps):
            self.write_training(done)
        self.report_io_errors()

    def evaluate(self, step):
        args, agent = self.args, self.agent

        def act(obs):
            self.signals.check()  # a stopped evaluation is played again when the run resumes
            return agent.act(obs, explore=False)

        measured = step // args.eval_every % args.metrics_every == 0 or step == args.total_steps
        self.bar.show(step, "evaluating")
        # Evaluation draws from its own random state, so it does not change learning.
        with torch.random.fork_rng([self.saved.device] if self.saved.device.type == "cuda" else []):
            torch.manual_seed(args.seed + step)
            try:
                returns = self.evaluator(act, step)
            except ChildProcessError:
                self.signals.check()  # a signal to all processes ended the workers too
                raise
            every = " ".join(f"{value:.6g}" for value in returns)
            self.log.write("eval", {"agent_step": step, "env_frames": self.env.frames, "return": returns.mean(),
                                    "return_std": returns.std(), "returns": every,
                                    "seconds": self.saved.seconds()} | measure(agent, measured))
        self.bar.show(step, "learning", **{"return": f"{returns.mean():.1f}"})
        self.bar.write(f"step {step:>9,}  return {returns.mean():7.1f} ± {returns.std():.1f} "
                       f"(mean ± sd of {len(returns)} episodes"
                       + (f", of which {self.evaluator.diverged} diverged)" if self.evaluator.diverged else ")"))

    def write_training(self, step):
        run, now = self.run, self.saved.seconds()
        info = {name: value.mean().item() for name, value in self.agent.info.items()}
        speed = (step - run.logged_step) / (now - run.logged_seconds)  # evaluations included
        run.logged_step, run.logged_seconds = step, now
        self.log.write("train", {"agent_step": step, "env_frames": self.env.frames, "episode_return": run.last_return}
                       | info | {f"{name}/density": sparse.density() for name, sparse in self.agent.sparse.items()}
                       | {f"{name}/{key}": value for name, sparse in self.agent.sparse.items() if sparse.dynamic
                          for key, value in sparse.movement().items()}
                       | {"steps_per_second": speed, "seconds": now})
        self.saved.check_health()

    def report_discarded(self, error):
        """A step in which the simulator diverged teaches nothing: it is counted, and the episode ends before it."""
        self.run.discarded += 1
        self.bar.write(f"note: {error}; the step is discarded and the episode ends ({self.run.discarded} so far)")

    def report_io_errors(self):
        """A full disk does not stop a run. Each failure is reported once."""
        for failure in {self.saved.checkpoints.failure, *self.log.failures} - self.reported - {None}:
            self.reported.add(failure)
            self.bar.write(f"note: {failure}; the run continues")

    def finish(self):
        self.saved.save_for_extension()
        self.evaluate(self.args.total_steps)
        self.bar.close()
        self.log.close()
        self.saved.finish()


# ---- before the loop ----

def build(args):
    """All parts of a run. Wrong flags are refused here, before the folder is made."""
    source = None
    if args.extend:
        source, args = os.path.normpath(args.extend), extended(args, read_config(args.extend))
        args.resume = True
    check(args)
    folder = run_folder(args)
    if source and not os.path.exists(folder):
        copy_run(source, folder)
    started = check_same_run(args, folder)
    stream = args.algo == "stream"  # a GPU and further threads would only slow it down
    device = torch.device("cpu") if stream else fast.resolve_device(args.device)
    torch.set_num_threads(args.threads or (1 if stream else fast.usable_cores()))
    modules = module_configs(args)
    torch.manual_seed(args.seed)
    make = env_maker(args)
    env = make(args.env, args.seed, args.action_repeat)
    compiled, speed_notes = resolve_compile(args, device, started)
    agent = build_agent(dataclasses.replace(args, compile="on" if compiled else "off"), env.obs_dim, env.action_dim,
                        device, replay_rows(args, getattr(env, "shortest_episode", 1)))
    evaluator = Evaluator(args.env, args.eval_episodes, args.seed, args.action_repeat, args.eval_workers, make=make)
    config = dataclasses.asdict(args)
    config |= {"modules": {name: dataclasses.asdict(m) for name, m in modules.items()}} | provenance()
    config |= {"device_used": str(device), "threads_used": torch.get_num_threads(), "compiled": compiled,
               "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
               "renderer": env.renderer() if args.pixel.pixels else None}
    log = RunLog(folder, config, args.tensorboard, args.wandb_project, args.resume)
    saved = SavedRun(Checkpoints(folder), args, device, agent, env, log)
    pixel_notes = console.describe_pixels(agent, env, config["renderer"], started) if args.pixel.pixels else []
    notes = [*pixel_notes, *console.describe_saving(saved), *plan_notes(args), *speed_notes,
             *(extension_notes(args, source) if source else [] if started else shorter_runs(args, folder))]
    print("\n".join([console.describe(agent, modules, args, device, folder), *notes]), flush=True)
    return args, env, agent, evaluator, log, saved


def run_folder(args):
    """The run's folder; for --resume, under the name that an earlier version gave it, if only that exists."""
    names = [args.name] if args.name else [run_name(args), run_name(args, old=True)]
    folders = [os.path.join(args.runs, name) for name in names]
    return folders[-1] if args.resume and not os.path.exists(folders[0]) and os.path.exists(folders[-1]) else folders[0]


def resolve_compile(args, device, started):
    """(whether to compile, notes for the user). A resumed run keeps the choice in its config (`started`): compiled and
    plain losses differ in the last digits. ValueError if "on" does not work here."""
    # A config without "compiled" comes from a version whose "auto" was off.
    pays = started.get("compiled", started.get("compile") == "on") if started else compiling_pays(args)
    compiled, _, notes = fast.resolve_speed(args.compile, args.cuda_graphs, device, pays)
    trouble = fast.compile_error(device) if compiled else None
    if trouble and args.compile == "on":
        raise ValueError(trouble)
    if compiled:
        notes.append(f"  note: not compiled, which would make the run faster: {trouble}" if trouble else
                     "  compiled: the first updates take a minute or so longer; --compile off avoids that")
    return compiled and not trouble, notes


def check_same_run(args, folder):
    """The config of the run that --resume finds, or None. RunFinished if it has ended; ValueError if another run."""
    if args.resume and os.path.exists(os.path.join(folder, "config.json")):
        if different := diff_settings(read_config(folder), args):
            raise ValueError(f"--resume: {folder} was started with {different}: use the same flags, or another --name")
        if os.path.exists(os.path.join(folder, "final.pt")):
            raise RunFinished(folder)
        with open(os.path.join(folder, "config.json")) as file:
            return json.load(file)


# ---- a finished run, trained longer ----

def copy_run(source, folder):
    """Copies a finished run's last checkpoint and CSV files into the new run's folder. The finished run stays."""
    names = [name for name in os.listdir(source) if name.startswith(("checkpoint-", "rows-")) and name.endswith(".pt")]
    if not os.path.exists(os.path.join(source, "final.pt")):
        raise ValueError(f"--extend: {source} has not finished: continue it with --resume first")
    if not names:
        raise ValueError(f"--extend: {source} did not keep its last checkpoint: "
                         "train it again with --keep-checkpoint on")
    part = f"{folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for name in (*names, "eval.csv", "train.csv"):
        shutil.copy2(os.path.join(source, name), part)
    os.replace(part, folder)


def difference(config, args):
    """What makes a checkpoint's settings another run than this one. An extended run may differ in its length."""
    before = from_config(config)
    return diff_settings(dataclasses.replace(before, total_steps=args.total_steps) if args.extend else before, args)


def shorter_runs(args, folder):
    """Notes for those who expect --resume to train a finished run longer."""
    length, notes = re.compile("__total-steps=([0-9]+)"), []
    for name in sorted(os.listdir(args.runs)) if args.resume and os.path.isdir(args.runs) else ():
        path, steps = os.path.join(args.runs, name), int((length.findall(name) or [defaults(args.algo).total_steps])[0])
        same = length.sub("", name) == length.sub("", os.path.basename(folder))
        if same and steps < args.total_steps and os.path.exists(os.path.join(path, "final.pt")):
            notes.append(f"  note: a new run; to train a finished one longer: --extend {path} "
                         f"--total-steps {args.total_steps}")
    return notes


def extension_notes(args, source):
    """What the longer run does to the schedules."""
    dynamic = [name for name, module in module_configs(args).items() if module.regime == "dst"]
    note = "its regimes have no schedule, so this run equals one that was this long from the start"
    if dynamic:
        note = f"the drop fraction of the {' and '.join(dynamic)} follows Eq. (1) for the new length, so it rises again"
    return [f"  extends  {source}: {note}"]


# ---- the command ----

def main():
    log = None
    try:
        args = parse(description=__doc__)
        *parts, log, saved = build(args)
        try:
            train(*parts, log, saved)
        except Stopped as stopped:  # if a loss became NaN since the last row, saving raises, and the line below says so
            sys.exit(save_and_stop(saved, stopped))
    except RunFinished as folder:
        return print(f"finished already: {folder}")
    except RunLocked as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(console.EXIT_LOCKED)
    except console.USER_ERRORS as error:
        line = console.error_message(error)
        sys.exit(f"\ntrain.py: {line}; {saved.checkpoints.last()}" if log else f"train.py: {line}")
    print(f"done: {os.path.join(log.folder, 'eval.csv')}\n  plot it:   python plot.py {log.folder}\n"
          f"  watch it:  python evaluate.py {log.folder} --video out.mp4")


def save_and_stop(saved, stopped):
    """Returns the exit status: 75, or 1 if the run could not be saved."""
    step = saved.progress.step
    saved.save(wait=True)
    failure = saved.checkpoints.failure
    outcome = "and saved; the same command with --resume continues"
    if failure:
        outcome = f"but {failure}: {saved.checkpoints.last()}"
    print(f"\ntrain.py: stopped by {stopped} at agent step {step:,}, {outcome}", file=sys.stderr)
    return console.EXIT_FAILED if failure else console.EXIT_STOPPED


if __name__ == "__main__":
    sys.stdout, sys.stderr = console.SafeStream(sys.stdout), console.SafeStream(sys.stderr)
    main()
