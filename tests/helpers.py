"""What several test files share: small agents and runs, and plain second implementations."""

import argparse
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import settings
from runtime import console
from runtime import checkpoint
from runtime.evaluator import Evaluator
from runtime.log import RunLog
from runtime.resume import SavedRun

import sparsity
import train
from envs import Env
from agents import AGENTS
from mrq import MRQ
from replay import ReplayBuffer
from settings import defaults, flag_names, parse, run_name, set_setting

REPLAY_AGENTS = [name for name, agent in AGENTS.items() if agent.Config.updates_per_step]  # the others learn in `add`
HERE = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tiny networks: threads would only wait for one another
property_test = settings(max_examples=40, deadline=None, derandomize=True)


def naive_update_mask(weight, grad, mask, zeta, wanted, order=None):
    """Algorithm 1 with Python's sort. order: ranks the gradients that are 0, lowest first, instead of their index."""
    order = range(mask.numel()) if order is None else order.flatten().tolist()
    weight, grad, active = weight.flatten().tolist(), grad.flatten().tolist(), mask.flatten().tolist()
    on = [i for i, a in enumerate(active) if a]
    drop = max(math.floor(zeta * len(on)), len(on) - wanted)
    kept = sorted(on, key=lambda i: (-abs(weight[i]), i))[:len(on) - drop]
    rest = sorted(set(range(len(active))) - set(kept), key=lambda i: (-abs(grad[i]), order[i] if grad[i] == 0 else i))
    chosen = set(kept) | set(rest[:wanted - len(kept)])
    return torch.tensor([i in chosen for i in range(len(active))]).view(mask.shape)


def mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = itertools.chain.from_iterable((nn.Linear(a, b), nn.ELU()) for a, b in itertools.pairwise(sizes))
    return nn.Sequential(*list(layers)[:-1])


def backward(model, width):
    x = torch.randn(32, width)
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    model.zero_grad()
    loss.backward()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def naive_activation(config):
    return {"relu": lambda v: v.clamp(min=0), "elu": lambda v: torch.where(v > 0, v, v.exp() - 1)}[config["activation"]]


def naive_block_mlp(model, x, config, residual, seen=None):
    """Appendix C and Eqs. (3)-(6), written out. seen: a list that takes what leaves each activation."""
    def norm_act(v):
        v = naive_activation(config)(layer_norm(v) if config["use_layer_norm"] else v)
        if seen is not None:
            seen.append(v)
        return v

    linear = lambda layer, v: v @ layer.weight.T + layer.bias
    x = linear(model.projection, x)
    for block in model.blocks:
        inner = norm_act(x)
        y = linear(block.linear2, norm_act(linear(block.linear1, inner)))
        if config["use_residual"]:
            y = y + (x if residual == "pre" else inner)
        x = y
    return linear(model.output, norm_act(x))


def naive_simba(q, x, seen):
    """SimBa's definition, written out: features and output. seen: a list that takes what leaves each activation."""
    def norm(layer, v):  # with parameters, and an epsilon of its own
        std = (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return (v - v.mean(-1, keepdim=True)) / std * layer.weight + layer.bias

    linear = lambda layer, v: v @ layer.weight.T + layer.bias
    x = linear(q.projection, x)
    for block in q.blocks:
        seen.append(linear(block.linear1, norm(block.norm, x)).clamp(min=0))
        x = x + linear(block.linear2, seen[-1])
    x = norm(q.norm, x)
    return x, linear(q.output, x)


def play(seed, capacity, horizon, steps, obs_dim=2, action_dim=1, prioritized=True, device="cpu"):
    """A buffer of random episodes, and the same episodes as plain lists, each step with the row it went to."""
    rng = np.random.RandomState(seed)
    buffer = ReplayBuffer(obs_dim, action_dim, capacity, horizon, prioritized, device=device)
    episodes, row, obs = [[]], 0, rng.randn(obs_dim)
    for t in range(steps):
        action, reward, next_obs = rng.randn(action_dim), rng.randn(), rng.randn(obs_dim)
        terminated, truncated = rng.rand() < 0.08, rng.rand() < 0.08
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        episodes[-1].append((row, obs, action, reward, next_obs, terminated))
        row, obs = row + 1, next_obs
        if terminated or truncated:
            episodes.append([])
            row, obs = row + 1, rng.randn(obs_dim)
    return buffer, episodes


def dense_two_hot(x, bins):
    row = torch.zeros(len(bins), dtype=bins.dtype)
    upper = next((i for i, b in enumerate(bins) if b > x), None)
    if x < bins[0] or upper is None:
        row[0 if x < bins[0] else -1] = 1
        return row
    width = bins[upper] - bins[upper - 1]
    row[upper - 1], row[upper] = (bins[upper] - x) / width, (x - bins[upper - 1]) / width
    return row


def tiny_of(algo, modules=None, seed=0, device="cpu", interval=3, total_updates=40, **settings):
    """Any of the four agents, and a buffer for it."""
    agent_class = AGENTS[algo]
    torch.manual_seed(seed)
    modules = {name: dataclasses.replace(m, width_scale=1 / 16 if m.arch_type == "simba" else 1 / 32,
                                         sparse_options={"update_interval": interval})
               for name, m in (modules or agent_class.Config.presets["mst"]).items()}
    period = {"target_update_freq": 4} if issubclass(agent_class, MRQ) else {}
    agent = agent_class(4, 2, modules, agent_class.Config(**({"batch_size": 16} | period | settings)), total_updates,
                        device, seed, buffer_size=1000)
    agent.replay = buffer = play(seed, 400, agent.config.horizon, 300, obs_dim=4, action_dim=2,
                                 prioritized=agent.config.prioritized, device="cpu" if device == "meta" else device)[0]
    if device != "meta":
        for obs in buffer.obs[:50].cpu().numpy():
            agent.update_obs_stats(2 * obs + 1)  # a normalizer that does something
    return agent, buffer


def regimes_dense(algo, *regimes):
    presets = AGENTS[algo].Config.presets["default"]
    return {name: dataclasses.replace(m, regime=regime) for (name, m), regime in
            zip(presets.items(), regimes or ("dense",) * len(presets))}


def naive_counts(sizes, sparsity):
    """ER by bisection of ε, then whole numbers by largest remainders. sizes: the shape of each layer's weight."""
    numbers, low, high = [math.prod(size) for size in sizes], 0.0, 1e6
    wanted = (1 - sparsity) * sum(numbers)
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(n, middle * sum(size)) for n, size in zip(numbers, sizes))
        low, high = (middle, high) if kept < wanted else (low, middle)
    shares = [min(n, low * sum(size)) for n, size in zip(numbers, sizes)]
    counts = [math.floor(share + 1e-6) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for layer in by_remainder[:math.floor(wanted + 0.5) - sum(counts)]:
        counts[layer] += 1
    return counts


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def damaged(path, whole, random):
    """Writes a damaged copy of the file, in one of five ways."""
    kind = random.choice(["cut", "flip", "zeros", "pickle", "type"])
    data = bytearray(whole)
    if kind == "cut":
        data = data[:random.randrange(len(data))]
    elif kind == "flip":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "zeros":
        start = random.randrange(len(data))
        data[start:start + random.randrange(1, 5000)] = bytes(len(data[start:start + random.randrange(1, 5000)]))
    if kind not in ("pickle", "type"):
        return path.write_bytes(data)
    content = torch.load(io.BytesIO(whole), weights_only=True)
    key = random.choice(list(content))
    wrong = [Evil(), {key: Evil()}] if kind == "pickle" else [3, None, "x", [], torch.zeros(2), {}, math.inf, {1: 2}]
    torch.save(content | {key: random.choice(wrong)} if random.random() < 0.8 else random.choice(wrong), path)


SHORT = ("--env", "cartpole-swingup", "--width-scale", "0.05", "--total-steps", "130", "--learning-starts", "60",
         "--eval-every", "50", "--eval-episodes", "2", "--log-every", "30", "--batch-size", "16",
         "--target-update-freq", "20")


def table(folder, name):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


class Recorder:
    """Records every method call in `calls`, as (name, arguments, keywords), and returns `results[name]`."""

    def __init__(self, **results):
        self.calls, self.results = [], results

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, arguments, named)) or self.results.get(name)


class RecordedRun:
    """Environment, agent, evaluator, checkpoints and log in one, which record all calls. Observations are numbers."""
    episodes = [(3, "terminated"), (2, "truncated"), (3, "truncated"), (1, "terminated"), (9, "truncated")]
    obs_dim, action_dim, horizon, updates_per_step, prioritized, folder = 1, 1, 1, 2, False, "here"
    device, networks, targets, sparse, failure, num_updates = torch.device("cpu"), {}, {}, {}, None, 0
    updates, replay = {}, argparse.Namespace(priority=(), stored_bytes=0)

    restore_warning, diverged = None, 0

    def __init__(self):
        self.events, self.rows, self.time, self.episode, self.length, self.frames, self.actions = [], [], 0, -1, 0, 0, 0
        self.info = {}

    def note(self, *event):
        self.events.append(event)

    def observation(self):
        self.time += 1
        return np.array([self.time], np.float32)

    # the environment
    def reset(self):
        self.episode, self.length = self.episode + 1, 0
        obs = self.observation()
        self.note("reset", obs[0])
        return obs

    def random_action(self):
        self.actions += 1
        self.note("random action")
        return np.array([-self.actions], np.float32)

    def step(self, action):
        self.note("step", action[0])
        self.length, self.frames = self.length + 1, self.frames + 2
        ended = self.episodes[self.episode][1] if self.length == self.episodes[self.episode][0] else ""
        return self.observation(), 10.0 ** self.length, ended == "terminated", ended == "truncated"

    # the agent
    def update_obs_stats(self, obs):
        self.note("observe", obs[0])

    def act(self, obs, explore):
        self.actions += 1
        self.note("act", obs.ravel().tolist(), explore, torch.rand(()).item())
        return np.full((*obs.shape[:-1], 1), self.actions, np.float32)

    def update(self):
        self.note("update")
        self.num_updates += 1
        self.info = {"loss": torch.tensor(float(len(self.events)))}

    def nonfinite_report(self):
        return None

    # checkpoints, replay, evaluation and log
    def load(self):
        return None

    def start(self):
        self.note("start")

    def close(self):
        self.note("close")

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        self.note("add", obs[0], action[0], reward, next_obs[0], terminated, truncated)

    def __call__(self, act, step):
        self.note("evaluate", step)
        before = self.actions
        act(np.array([[-1.0], [-2.0]]))
        self.actions = before
        return np.array([1.0, 4.0])

    def write(self, table, row):
        self.note("write", table)
        self.rows.append((table, row))

    failures = property(lambda self: [self.failure] if self.failure else [])
    on_encoder_update = lambda self, doing: None


def recorded_run(monkeypatch, run, **settings):
    """The loop on a recorded run. Returns all events, without random numbers, and the random numbers of training."""
    monkeypatch.setattr(train, "measure", lambda agent, wanted: run.note("measure", wanted) or {"metric": 0.5})
    monkeypatch.setattr(train, "StopSignals", lambda: argparse.Namespace(check=lambda: None))
    monkeypatch.setattr(SavedRun, "save", lambda self, wait=False: run.note("save", self.progress.step))
    monkeypatch.setattr(SavedRun, "finish", lambda self: run.note("finish", self.progress.step))
    args = args_with(**{"total_steps": 11, "learning_starts": 4, "eval_every": 5, "log_every": 3, "seed": 6,
                        "save_every": 2, "metrics_every": 2} | settings)
    torch.manual_seed(args.seed)
    checkpoints = argparse.Namespace(load=lambda: None, step=None, failure=None)
    train.train(args, run, run, run, run, SavedRun(checkpoints, args, torch.device("cpu"), run, run, run))
    draws = [event[3] for event in run.events if event[0] == "act" and event[2]]
    return [event[:3] if event[0] == "act" else event for event in run.events], draws


def flags_to_args(*flags):
    return parse(list(flags))


def args_with(algo="mrq", **values):
    """The default settings with these instead; faster than `parse`."""
    args = copy.deepcopy(defaults(algo))
    groups = {name: group for group, name in flag_names(args)}
    for name, value in values.items():
        set_setting(args, groups.get(name), name, value)
    return args


def refuses(function, *words, error=(ValueError, OSError, MemoryError, ImportError, FloatingPointError)):
    """The function must raise one of these errors, in one line that contains the words."""
    with pytest.raises(error) as raised:
        function()
    line = str(raised.value)
    assert "\n" not in line and all(str(word) in line for word in words), f"{words} not in {line!r}"


# Where a process is killed: at an entry of one of these, or a moment later.
MOMENTS = {"a save": (checkpoint, "write"), "an evaluation": (Evaluator, "__call__"), "a step": (Env, "step"),
           "an encoder burst": (MRQ, "update_encoder"), "a topology update": (sparsity, "update_mask"),
           "a log row": (RunLog, "write"), "the way back": (ReplayBuffer, "load_rows")}


def in_process(arguments, output, kill=None, record=None):
    """`train.py` in its own process, forked because importing PyTorch again takes seconds. Returns the exit status.

    kill: (moment, which entry of it, delay, signal). record: [step where it was killed, step where it resumed].
    """
    def body():
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = ["train.py", *arguments]
        show, restore = console.Bar.show, SavedRun.restore

        def note_step(bar, step, *rest, **more):
            record[0] = step
            show(bar, step, *rest, **more)

        def note_start(saved, *differs):
            obs = restore(saved, *differs)
            record[1] = saved.progress.step
            return obs
        if record is not None:
            console.Bar.show, SavedRun.restore = note_step, note_start
        if kill:
            (owner, name), which, delay, number = MOMENTS[kill[0]], *kill[1:]
            plain, entries = getattr(owner, name), itertools.count()

            def dies(*arguments, **options):
                if next(entries) == which:
                    if delay:
                        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
                    else:
                        os.kill(os.getpid(), number)
                return plain(*arguments, **options)
            setattr(owner, name, dies)
        status = 0
        try:
            train.main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) else stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(timeout=300)
    return process.exitcode


def tiny_run(algo, regimes=()):
    modules = ("encoder", "critic", "actor") if algo.startswith("mr") else ("critic", "actor")
    own = ("--target-update-freq", "20") if algo.startswith("mr") else ()
    said = [word for module, regime in zip(modules, regimes) for word in (f"--{module}-regime", regime)]
    return ["--algo", algo, "--env", "cartpole-swingup", "--width-scale", "0.05", "--total-steps", "130",
            "--learning-starts", "45", "--eval-every", "60", "--eval-episodes", "1", "--log-every", "15",
            "--batch-size", "16", "--save-every", "20", "--update-interval", "15", "--buffer-size", "100", "--device",
            "cpu", "--threads", "1", "--name", "run", *own, *(said or ["--mst"])]


def timeless(folder):
    """Both tables without their clocks."""
    return {name: [{k: v for k, v in row.items() if "second" not in k} for row in table(folder, name)]
            for name in ("eval.csv", "train.csv")}


def run_main(module, monkeypatch, capsys, *argv):
    """(status or message, stdout lines, stderr lines) of a command line of figures.py or plot.py."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    try:
        status = module.main()
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def write_run(folder, args, rows, columns=("return",), tail="", config=None):
    """A run's folder as train.py writes it: rows of (agent_step, values...)."""
    folder = Path(folder) / run_name(args)
    folder.mkdir(parents=True)
    table = [("agent_step", "frames", *columns), *((row[0], 2 * row[0], *row[1:]) for row in rows)]
    lines = [",".join(map(str, row)) for row in table]
    (folder / "eval.csv").write_text("\n".join(lines) + "\n" + tail)
    (folder / "config.json").write_text(json.dumps(config or dataclasses.asdict(args)))
    return folder
