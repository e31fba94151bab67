"""Time and memory of one agent step, split by phase, with the floor that arithmetic and bytes allow beside it.

    python tools/bench.py                                  # scale 1, this machine, dog-run shapes
    python tools/bench.py --variants dense mst mst+bf16    # which forms to compare
    python tools/bench.py --algo sac --env humanoid-run --width-scale 4 --depth-scale 3
    # the GPU rows of docs/speed.md:
    python tools/bench.py --scales 1 3 5 --variants mst mst+graphs mst+bf16+compile+graphs --csv gpu.csv

Each number is the median time in milliseconds per agent step. Rare work (encoder updates, target copies, topology
updates) is spread over the steps that it serves. Variants take turns within one run, so machine noise affects all of
them: compare ratios. FLOPs come from PyTorch's counter, bytes from the optimizer's reads and writes; the rates that
turn both into a floor are measured at run time. Phases are timed separately and uncaptured; "masks" is the plain pass
over the gradients, which +compile fuses with clipping on CUDA.
"""

import contextlib
import csv
import dataclasses
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the project

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from runtime import fast
from agents import AGENTS, check_weights, count
from envs import Env
from base import frozen
from mrq import MRQ
from replay import ReplayBuffer
from runtime.console import USER_ERRORS, error_message

PHASES = ("refresh", "sample", "encoder", "critic", "actor", "optimizer", "masks", "topology", "environment", "act",
          "observe", "add")
BYTES_PER_WEIGHT = 28  # AdamW: reads weight, gradient and two moments, writes all but the gradient, 4 bytes each


@dataclass
class Args:
    algo: Literal["mrq", "sac", "ddpg", "mrsac"] = "mrq"
    scales: list[float] = field(default_factory=lambda: [1.0])  # width and depth of every module
    width_scale: float | None = None  # only the width, instead of the scales
    depth_scale: float | None = None  # only the depth, instead of the scales
    # dense | mst, then +fp32 | +tf32 | +bf16, +compile, +graphs
    variants: list[str] = field(default_factory=lambda: ["dense", "mst"])
    env: str = "dog-run"  # whose shapes and whose step are timed
    steps: int = 20  # timed repetitions of each phase
    device: str = "auto"  # auto | cpu | cuda
    csv: str | None = None  # also write the rows here
    pixels: bool = False  # MR.Q from pixels instead, on one CPU core, beside a plain form: tools/bench_pixels.py
    image_size: int = 84  # with --pixels
    batch_size: int = 256  # with --pixels


class Clock:
    """Milliseconds of a function, by the device's own clock on CUDA."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __call__(self, function):
        if not self.cuda:
            begin = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def module_configs(kind, scale, args):
    """dense or mst, of this size. The regime is all in which the two differ."""
    width, depth = (scale if own is None else own for own in (args.width_scale, args.depth_scale))
    return {name: dataclasses.replace(module, width_scale=width, depth_scale=depth,
                                      regime=module.regime if kind == "mst" else "dense")
            for name, module in AGENTS[args.algo].Config.presets["mst"].items()}


def plain_agent(kind, scale, env, device, args):
    """dense or mst, as it comes."""
    torch.manual_seed(0)
    return AGENTS[args.algo](env.obs_dim, env.action_dim, module_configs(kind, scale, args), device=device)


def check_variant(variant, device):
    """ValueError for a name that describes no agent, or none that can run here."""
    kind, *options = variant.split("+")
    unknown = set(options) - {*fast.PRECISIONS, "compile", "graphs"}
    twice = len(options) > len(set(options)) or len(set(options) & set(fast.PRECISIONS)) > 1
    if kind not in ("dense", "mst") or unknown or twice:
        raise ValueError(f"unknown variant {variant!r}: dense or mst, then at most one of +fp32, +tf32, +bf16, then "
                         "+compile, +graphs, each once")
    on = ["on" if option in options else "off" for option in ("compile", "graphs")]
    precision_of(variant, device)  # refuses what this device does not have, as does the next line
    fast.resolve_speed(*on, device)


def check_size(scale, args, device):
    """ValueError for a scale that is not one, MemoryError for networks that do not fit."""
    env, modules = Env(args.env), module_configs("dense", scale, args)
    blank = object.__new__(AGENTS[args.algo])
    blank.config = blank.Config()
    with torch.device("meta"):
        networks = blank.make_networks(env.obs_dim, env.action_dim, modules)
    check_weights(sum(count(network)[0] for network in networks.values()), device)


def variant_agent(variant, scale, env, device, args):
    """The agent that a variant's name describes, e.g. mst+bf16+compile."""
    kind, *options = variant.split("+")
    agent = plain_agent(kind, scale, env, device, args)
    fast.speed_up(agent, precision_of(variant, device), "compile" in options)
    if "graphs" in options:
        fast.captured(agent)
    return agent


def precision_of(variant, device):
    precision = next((part for part in variant.split("+") if part in fast.PRECISIONS), "auto")
    return fast.resolve_precision(precision, device)


def release_memory():
    gc.collect()
    torch.cuda.empty_cache()  # nothing without CUDA


def filled_replay(env, agent, steps=2000):
    """Gives the agent a buffer with some random steps in it, and returns that."""
    agent.replay = replay = ReplayBuffer(env.obs_dim, env.action_dim, 1_000_000, agent.config.horizon,
                                         agent.config.prioritized, device=agent.device)
    obs = env.reset()
    for _ in range(steps):
        agent.update_obs_stats(obs)
        action = env.random_action()
        next_obs, reward, terminated, truncated = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset() if terminated or truncated else next_obs
    return replay


def mrq_phases(agent, replay):
    """What the agents on an encoder do: phase -> function."""
    config = agent.config
    batch = replay.sample(config.batch_size, config.encoder_horizon)
    short = replay.sample(config.batch_size, config.q_horizon)
    zs = agent.encode(short.obs[:, 0])

    def sample():
        replay.gather(batch.index, config.encoder_horizon)  # drawn before, with all of the burst
        drawn = replay.sample(config.batch_size, config.q_horizon)
        replay.update_priority(drawn.index, drawn.reward[:, 0])

    def actor():
        with frozen(agent.encoder, agent.critic):
            losses = agent.actor_loss(zs)[0]
        backward(agent, "actor", losses)

    def step_optimizers():
        torch.nn.utils.clip_grad_norm_(list(agent.critic.parameters()), config.critic_grad_clip)
        for optimizer in agent.optimizers.values():
            optimizer.step()

    return {"sample": sample,
            "encoder": lambda: backward(agent, "encoder", agent.encoder_loss(batch, replay.termination_seen)[0]),
            "critic": lambda: backward(agent, "critic", agent.critic_loss(short, agent.encode(short.obs[:, 0]))[0]),
            "actor": actor, "optimizer": step_optimizers}


def backward(agent, name, losses):
    """As in an update, with no gradients yet: adding to those of the call before would be timed as well."""
    agent.optimizers[name].zero_grad(set_to_none=True)
    losses.mean().backward()


def simba_phases(agent, replay):
    """What SAC and DDPG do: phase -> function."""
    batch = agent.draw()

    def actor():
        with frozen(agent.critic):
            losses = agent.actor_loss(batch.obs[:, 0])[0]
        backward(agent, "actor", losses)

    def step_optimizers():  # and the soft target
        for optimizer in agent.optimizers.values():
            optimizer.step()
        agent.update_target(topology_changed=False)

    return {"sample": lambda: agent.draw(), "critic": lambda: backward(agent, "critic", agent.critic_loss(batch)[0]),
            "actor": actor, "optimizer": step_optimizers}


def phases(agent, replay, env):
    """Each phase as a function that can be timed by itself: name -> (function, how often an agent step has it)."""
    obs, action = env.reset(), env.random_action()

    def masks():
        for sparse in agent.sparse.values():
            sparse.mask_gradients()

    def topology():
        for sparse in agent.sparse.values():
            before, sparse.last_step = sparse.last_step, 0
            weights = dict(sparse.module.named_parameters())  # by their gradients, which are masked by now
            scores = {name: weights[name].grad.detach() for name in sparse.masks}
            sparse.update_topology(sparse.update_interval, scores=scores)
            sparse.last_step = before

    def environment():
        if any(env.step(env.random_action())[2:]):  # terminated, truncated
            env.reset()

    own = mrq_phases(agent, replay) if isinstance(agent, MRQ) else simba_phases(agent, replay)
    updates = agent.updates_per_step
    if isinstance(agent, MRQ):
        refresh = {"refresh": (lambda: agent.refresh_targets(), 1 / agent.config.target_update_freq)}
    else:
        refresh = {}
    return refresh | {name: (function, updates) for name, function in (own | {"masks": masks}).items()} | {
        "topology": (topology, updates / agent.sparse["critic"].update_interval), "environment": (environment, 1),
        "act": (lambda: agent.act(obs, explore=True), 1), "observe": (lambda: agent.update_obs_stats(obs), 1),
        "add": (lambda: replay.add(obs, action, 0.0, obs, False, False), 1)}


def memory(agent, replay):
    """Bytes by what they are for; a peak beyond their sum is activations and work space."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    weights = [p for network in agent.networks.values() for p in network.parameters()]
    states = [state for optimizer in agent.optimizers.values() for values in optimizer.state.values()
              for state in values.values() if torch.is_tensor(state)]
    masks = [mask for sparse in agent.sparse.values()
             for mask in (*sparse.masks.values(), *sparse.first_masks.values())]
    return {"weights": size(weights), "gradients": size([p.grad for p in weights if p.grad is not None]),
            "moments": size(states), "targets": size(p for t in agent.targets.values() for p in t.parameters()),
            "masks": size(masks),
            "buffer": size(value for value in vars(replay).values() if torch.is_tensor(value))}


def rates(device, precision):
    """(FLOP/s of a large matrix product, bytes/s of a large copy), measured here and now."""
    fast.set_precision(precision)
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    source = torch.randn((2 ** 28 if device.type == "cuda" else 2 ** 25), device=device)
    target, time_of = torch.empty_like(source), Clock(device)
    multiply = fast.onednn_linear if precision == "fp32" and device.type == "cpu" and fast.use_onednn() else torch.mm
    product = min(time_of(lambda: multiply(x, x)) for _ in range(6))
    copy = min(time_of(lambda: target.copy_(source)) for _ in range(6))
    return 2 * n ** 3 / product * 1e3, 2 * source.numel() * 4 / copy * 1e3


def bench_scale(scale, args, device):
    """All variants of one scale, taking turns. Returns one row per variant."""
    env, time_of = Env(args.env), Clock(device)
    cases, flops = {}, {}
    for variant in args.variants:
        kind = variant.split("+")[0]
        if kind not in flops:  # on a plain agent of its own: the counter knows PyTorch's own products alone
            agent = plain_agent(kind, scale, env, device, args)
            replay = filled_replay(env, agent, steps=20)
            with FlopCounterMode(display=False) as counter:
                for update in agent.graph_methods:
                    getattr(agent, update)()
            flops[kind] = counter.get_total_flops() * agent.updates_per_step
            del agent, replay
            release_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        agent = variant_agent(variant, scale, env, device, args)
        replay = filled_replay(env, agent)
        if isinstance(agent, MRQ):
            agent.refresh_targets()
        for _ in range(fast.WARM_UP + 1):
            for update in agent.graph_methods:
                getattr(agent, update)()
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else float("nan")
        cases[variant] = agent, replay, phases(agent, replay, env), precision_of(variant, device), peak
    times = {variant: {} for variant in cases}
    for _ in range(args.steps):
        for variant, (agent, replay, parts, precision, _) in cases.items():
            fast.set_precision(precision)  # one setting for the whole process: each variant's turn has its own
            for update in agent.graph_methods:
                times[variant].setdefault(update, []).append(time_of(lambda: getattr(agent, update)()))
            for name, (function, _) in parts.items():
                times[variant].setdefault(name, []).append(time_of(function))
    rows = []
    for variant, (agent, replay, parts, precision, peak) in cases.items():
        medians = {name: statistics.median(values) for name, values in times[variant].items()}
        weights = sum(p.numel() for network in agent.networks.values() for p in network.parameters())
        flop_rate, byte_rate = rates(device, precision)
        count = flops[variant.split("+")[0]]
        row = {"algo": args.algo, "env": args.env, "scale": scale, "variant": variant, "weights": weights,
               "update": sum(medians[update] for update in agent.graph_methods) * agent.updates_per_step}
        row |= {name: medians[name] * parts[name][1] if name in parts else "" for name in PHASES}
        row["update"] += row["refresh"] or 0.0
        optimizer_bytes = weights * BYTES_PER_WEIGHT * agent.updates_per_step
        if not isinstance(agent, MRQ):  # the soft target: reads both, writes one
            optimizer_bytes += 12 * agent.updates_per_step * sum(p.numel() for p in agent.critic.parameters())
        row |= {"floor": 1e3 * (count / flop_rate + optimizer_bytes / byte_rate), "gflop": count / 1e9,
                "tflop_per_s": flop_rate / 1e12, "gb_per_s": byte_rate / 1e9}
        row |= {f"mb_{name}": size / 1e6 for name, size in memory(agent, replay).items()}
        row["mb_peak"] = peak / 1e6 if device.type == "cuda" else ""  # the host's peak is not the agent's alone
        rows.append(row)
    return rows


COLUMNS = ("update", *PHASES, "floor")


def show(rows, heading=True):
    """Rows of a Markdown table; update is one agent step of learning, and the phases are its parts timed apart."""
    if heading:
        print("| | " + " | ".join(COLUMNS) + " | ÷ first |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for row in rows:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        print(f"| scale {row['scale']:g}, {row['variant']} | " + " | ".join(cells)
              + f" | {row['update'] / rows[0]['update']:.3f} |", flush=True)


def show_sizes(rows):
    for row in rows:
        sizes = ", ".join(f"{name[3:]} {value:.0f}" for name, value in row.items()
                          if name.startswith("mb_") and value != "")
        per_weight = (row["mb_weights"] + row["mb_gradients"] + row["mb_moments"]) * 1e6 / row["weights"]
        print(f"scale {row['scale']:g} {row['variant']}: {row['weights'] / 1e6:.1f} M weights, "
              f"{row['gflop']:.1f} GFLOP per step, {per_weight:.1f} bytes per weight in training; MB: {sizes}")


def check(args):
    """The device. Whatever is wrong with the flags is reported here, before anything is timed."""
    device = fast.resolve_device(args.device)
    if args.steps < 1 or not args.scales or not args.variants:
        raise ValueError("--steps must be at least 1, and --scales and --variants must name at least one each")
    for flag, values in (("--scales", args.scales), ("--variants", args.variants)):
        if len(set(values)) < len(values):
            raise ValueError(f"{flag} names {next(v for v in values if values.count(v) > 1)} twice: once is enough")
    for variant in args.variants:
        check_variant(variant, device)
    for scale in args.scales:
        check_size(scale, args, device)
    if args.csv and os.path.exists(args.csv):
        raise ValueError(f"{args.csv} exists: choose another --csv, or move it away")
    return device


def run(args, device):
    """Times, shows and writes one scale after the other: what is known stays, whatever happens to the next."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    apart = (("width", args.width_scale), ("depth", args.depth_scale))
    sizes = "".join(f", {what} ×{value:g}" for what, value in apart if value is not None)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(args.csv, "x", newline="")) if args.csv else None
        print(f"{name}, PyTorch {torch.__version__}, {args.algo} on {args.env}{sizes}; milliseconds per agent step, "
              f"medians of {args.steps}\n")
        rows = []
        for scale in args.scales:
            new = bench_scale(scale, args, device)
            show(new, heading=not rows)
            if file:
                writer = csv.DictWriter(file, list(new[0]))
                if not rows:
                    writer.writeheader()
                writer.writerows(new)
                file.flush()
            rows += new
            release_memory()
    show_sizes(rows)


def main():
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.pixels:
            from tools import bench_pixels
            return bench_pixels.run({"image_size": args.image_size, "batch_size": args.batch_size,
                                     "width_scale": args.width_scale or 1.0}, max(1, args.steps // 10))
        run(args, check(args))
    except USER_ERRORS as error:
        sys.exit(f"bench.py: {error_message(error)}")


if __name__ == "__main__":
    main()
