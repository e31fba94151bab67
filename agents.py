"""The algorithms by name; an agent built from a run's settings; and how large its networks are.

    args = parse(["--algo", "sac", "--mst"])                                   # settings.parse
    agent = build_agent(args, obs_dim=24, action_dim=6, device=torch.device("cpu"))
    count_parameters(args, obs_dim=24, action_dim=6)                           # {"critic": ..., "actor": ...}
"""

import functools
import warnings

import torch

import envs
from base import ModuleConfig
from mrq import MRQ
from mrsac import MRSAC
from pixels import PixelMRQ, PixelMRSAC
from rendering import make_pixel_env
from replay import free_memory
from runtime import fast
from sac import DDPG, SAC
from stream import StreamAC

AGENTS = {"mrq": MRQ, "sac": SAC, "ddpg": DDPG, "mrsac": MRSAC, "stream": StreamAC}
PIXEL_AGENTS = {"mrq": PixelMRQ, "mrsac": PixelMRSAC}  # with --pixels
BYTES_PER_WEIGHT = 16  # weight, gradient, two moments


def agent_class(args):
    return (PIXEL_AGENTS if args.pixel.pixels else AGENTS)[args.algo]


def env_maker(args):
    """make(name, seed, action_repeat): this run's environments. Worker processes can pickle it."""
    if args.pixel.pixels:
        return functools.partial(make_pixel_env, args.pixel.image_size, args.pixel.frame_stack)
    return getattr(args.agent, "make_env", envs.make_env)


def module_configs(args):
    """ModuleConfig by module name: the preset, then the flags of all modules, then the module's own flags."""
    options = {"distribution": args.sparse.distribution, "grow": args.sparse.grow,
               "update_interval": args.sparse.update_interval, "drop_fraction_start": args.sparse.drop_fraction_start,
               "drop_fraction_end": args.sparse.drop_fraction_end, "schedule_start": args.sparse.schedule_start,
               "schedule_end": args.sparse.schedule_end, "schedule_power": args.sparse.schedule_power}
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
    """The flags of one module: type, regime, scale, sparsity -> value, None where the flag was not given."""
    return {part: getattr(getattr(args, name), f"{name}_{part}") for part in ("type", "regime", "scale", "sparsity")}


def total_updates(args):
    """T of the sparsity schedules: how many updates each module gets in the whole run."""
    per_step = args.agent.updates_per_step or 1  # 0: the agent learns in `add`
    return (args.total_steps - args.learning_starts) * per_step


def build_agent(args, obs_dim, action_dim, device, buffer_size=None):
    """The agent of these settings (settings.Args) on this device. ValueError or MemoryError, in one line."""
    precision = fast.resolve_precision(args.precision, device)
    compile, graphs, _ = fast.resolve_speed(args.compile, args.cuda_graphs, device)
    check_memory(args, obs_dim, action_dim, device)
    if args.pixel.pixels:
        fast.keep_freed_memory()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the topology never changes")  # settings.plan_notes says it in the header
        agent = agent_class(args)(obs_dim, action_dim, module_configs(args), args.agent, total_updates(args), device,
                                  args.seed, buffer_size=replay_rows(args) if buffer_size is None else buffer_size,
                                  **({"shift": args.pixel.shift} if args.pixel.pixels else {}))
    fast.speed_up(agent, precision, compile)
    on_host = getattr(agent.replay, "frame_device", device) != device
    if on_host and args.cuda_graphs == "on":
        raise ValueError("--cuda-graphs: the frames do not fit on the GPU, and fetching them from the host cannot be "
                         "captured; use a smaller --buffer-size or --image-size")
    if graphs and not on_host:
        fast.captured(agent)
    return agent


def replay_rows(args, shortest_episode=1):
    """Rows of the replay buffer: --buffer-size, or as many as the run can fill if those are fewer. An episode takes a
    row more than it has steps. shortest_episode: its steps."""
    episodes = -(-args.total_steps // shortest_episode)
    return min(args.buffer_size, args.total_steps + episodes + 2 * args.agent.horizon + 2)


def compiling_pays(args):
    """Whether a run on a CPU earns back the minute that compiling takes. Measured on an Intel Xeon: compiled, an update
    of MR.Q takes 0.75 times as long at a quarter of the width and 0.87 at scale 1; SimBa's takes 1.2 times as long.
    From pixels, it was not measured."""
    return args.algo in ("mrq", "mrsac") and not args.pixel.pixels and args.total_steps - args.learning_starts >= 10_000


# ---- sizes ----

def build_on_meta(args, obs_dim, action_dim):
    """The dense networks by module name, without any memory for their weights."""
    agent = object.__new__(agent_class(args))  # `make_networks` needs only the settings
    agent.config = args.agent
    with torch.device("meta"):
        return agent.make_networks(obs_dim, action_dim, module_configs(args))


def count(network):
    """(all parameters, those of the linear head of MR.Q's encoder): the paper's encoder sizes exclude the head."""
    head = getattr(network, "model", None)
    return tuple(sum(p.numel() for p in module.parameters()) if module else 0 for module in (network, head))


def count_parameters(args, obs_dim, action_dim):
    """Trainable parameters of each module, dense, without targets and without the encoder's head."""
    counts = {name: count(network) for name, network in build_on_meta(args, obs_dim, action_dim).items()}
    return {name: whole - head for name, (whole, head) in counts.items()}


def check_memory(args, obs_dim, action_dim, device):
    """MemoryError before anything is allocated: a huge --scale would otherwise swap for hours before it fails."""
    check_weights(sum(count(network)[0] for network in build_on_meta(args, obs_dim, action_dim).values()), device)


def check_weights(weights, device):
    """MemoryError if the device cannot train this many weights."""
    needed, free = weights * BYTES_PER_WEIGHT, free_memory(device)
    if needed > free:
        raise MemoryError(f"networks of {weights / 1e9:.3g} billion weights need {needed / 1e9:.3g} GB to train, "
                          f"but {device} has {free / 1e9:.3g} GB: choose a smaller --scale")


def _first(*values):
    return next(value for value in values if value is not None)
