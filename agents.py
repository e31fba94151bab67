"""The algorithms by name, and an agent as a run's settings describe it, made as fast as they ask for.

    agent = build_agent(parse(["--algo", "sac", "--mst"]), obs_dim=24, action_dim=6, device=torch.device("cpu"))
"""

from runtime import fast
from mrq import MRQ
from mrsac import MRSAC
from networks import SIMBA_SIZES, scaled_size
from replay import free_memory
from sac import DDPG, SAC
from settings import module_configs

AGENTS = {"mrq": MRQ, "sac": SAC, "ddpg": DDPG, "mrsac": MRSAC}
BYTES_A_WEIGHT = 16  # weight, gradient, two moments


def build_agent(args, obs_dim, action_dim, device):
    """The agent of these settings (settings.Args) on this device; ValueError or MemoryError, in one line."""
    precision = fast.resolve_precision(args.precision, device)
    compile, graphs, _ = fast.resolve_speed(args.compile, args.cuda_graphs, device)
    modules = module_configs(args)
    check_memory(modules, device)
    total_updates = (args.total_steps - args.learning_starts) * args.agent.updates_per_step
    agent = AGENTS[args.algo](obs_dim, action_dim, modules, args.agent, total_updates, device, args.seed)
    fast.speed_up(agent, precision, compile)
    if graphs:
        fast.captured(agent)
    return agent


def compiling_pays(args):
    """Whether a run on a CPU earns back the minute that compiling takes. Measured on an Intel Xeon: compiled, an update of
    MR.Q takes 0.75 times as long at a quarter of the width and 0.87 at scale 1; SimBa's takes 1.2 times as long."""
    return args.algo in ("mrq", "mrsac") and args.total_steps - args.learning_starts >= 10_000


def check_memory(modules, device):
    """MemoryError, before anything is allocated, if the hidden layers alone would not fit: a scale of 3000 takes hours to
    fail otherwise, or the machine with it."""
    weights = 0
    for name, config in modules.items():
        if config.arch_type == "simba":
            hidden, blocks = scaled_size(1, config.width_scale, config.depth_scale, *SIMBA_SIZES[name])
            weights += blocks * 8 * hidden ** 2
        else:
            hidden, blocks = scaled_size(1, config.width_scale, config.depth_scale)
            weights += (1 if name == "actor" else 2) * blocks * 2 * hidden ** 2  # encoder and critic are two MLPs
    if weights * BYTES_A_WEIGHT > free_memory(device):
        raise MemoryError(f"networks of {weights / 1e9:.3g} billion weights take {weights * BYTES_A_WEIGHT / 1e9:.3g} GB to "
                          f"train, but {device} has {free_memory(device) / 1e9:.3g} GB: choose a smaller --scale")
