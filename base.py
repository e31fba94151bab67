"""What all agents share: each module with its own size, optimizer and regime, and one optimizer step of one module.

Guarantees: the order that sparse training needs (backward, topology, masking, clipping, optimizer step), whatever the
algorithm; a state of tensors and plain values that restores the agent exactly; and no read from the device during an
update, except where a topology change is due.

Paper: Section 4, "Module-Specific Training". The methods that the training loop calls are listed at `BaseAgent`.

CUDA graphs. `runtime/fast.py` can record an update once and replay it, which saves the cost of launching a thousand
small operations. A recorded update sees new values only in tensors that stay where they are. So the agents keep
changing numbers (reward scales, priorities, the `nonfinite` flags) in tensors, change weights, masks and moments in
place, and never read a value back inside an update. Comments that begin with "CUDA graph:" mark the lines that are
written for this.
"""

import contextlib
import copy
import dataclasses
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch

from networks import ARCH_CONFIGS
from replay import ReplayBuffer
from sparsity import SparseTraining

STATE = ("sparse", "networks", "targets", "optimizers")  # parts of an agent's state that are kept by module name
SPARSE_OPTIONS = {  # what a regime reads besides its sparsity; other options have no effect there
    "dense": (),
    "sst": ("distribution",),
    "dst": ("distribution", "grow", "update_interval", "drop_fraction_start", "drop_fraction_end")}
SPARSE_OPTIONS["s2d"] = (*SPARSE_OPTIONS["dst"], "schedule_start", "schedule_end", "schedule_power")
SPARSE_OPTIONS["d2s"] = SPARSE_OPTIONS["s2d"]


@dataclass(frozen=True)
class ModuleConfig:
    """How one module is built and trained. The agent's other settings do not depend on it."""
    arch_type: int | str = 4  # 1 to 6, networks.ARCH_CONFIGS; "simba" for SAC and DDPG, "stream" for Stream AC
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

    def has_residual(self):
        return ARCH_CONFIGS.get(self.arch_type, {}).get("use_residual", False)

    def canonical(self):
        """The same module without the settings that its type and regime ignore."""
        return dataclasses.replace(
            self, sparsity=0.0 if self.regime == "dense" else self.sparsity,
            residual=self.residual if self.has_residual() else "pre",
            sparse_options={name: self.sparse_options[name] for name in SPARSE_OPTIONS[self.regime]
                            if name in self.sparse_options})


class Choices:
    """Base of the agents' settings: refuses a value that is not one of a field's choices."""

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            choices, value = get_args(spec.type), getattr(self, spec.name)
            if choices and value not in choices:
                raise ValueError(f"{spec.name} is {value!r}: choose {' or '.join(choices)}")


class BaseAgent:
    """Networks, optimizers, masks, targets and experience, by module name, and what the training loop calls.

    A subclass has `Config` (its settings, with `presets`, `learning_starts`, `horizon` and `prioritized`),
    `make_networks`, `network_calls`, `act`, `update`, `compute_features` and `per_sample_losses`. The loop calls `add`
    once per agent step and `update` `updates_per_step` times once learning has started. `info` holds what the last
    updates computed, on the device; the log writes means.

    To train a network of your own, override `make_encoder`, `make_critic` or `make_actor`: they take the sizes and a
    ModuleConfig, and return a module. `network_calls` says which methods and shapes the agent needs; they are checked
    at construction. `features(x)`, for SRank, is optional: without it, that metric is NaN.
    """

    compiled_methods = ()  # methods that return (one value per sample, ...): compiled, and run in the chosen precision
    autocast_methods = ()  # further methods that run in the chosen precision
    graph_methods = {}  # method that may be captured as a CUDA graph -> modules that one call of it updates
    target_modules = ()  # modules that have a target copy

    def __init__(self, obs_dim, action_dim, modules=None, config=None, total_updates=None, device="cpu", seed=0,
                 buffer_size=1_000_000):
        """modules: ModuleConfig by module name. buffer_size: replay rows.

        total_updates: T of the sparsity schedules; by default, the updates of a run of 500,000 agent steps.
        """
        self.config = config = config or self.Config()
        total_updates = total_updates or (500_000 - config.learning_starts) * config.updates_per_step
        modules = modules or config.presets["default"]
        self.device, self.action_dim = torch.device(device), action_dim
        self.networks = self.make_networks(obs_dim, action_dim, modules)
        for name, network in self.networks.items():
            setattr(self, name, network.to(self.device))
        self.check_networks(obs_dim)
        self.optimizers, self.sparse = {}, {}
        for number, (name, network) in enumerate(self.networks.items()):
            self.optimizers[name] = self.make_optimizer(name, network)
            module = modules[name]
            self.sparse[name] = SparseTraining(network, self.optimizers[name], module.regime, module.sparsity,
                                               total_steps=total_updates, seed=1000 * seed + number,
                                               **module.sparse_options)
        # Copied after masking, so that targets start as sparse as their networks.
        self.targets = {name: copy.deepcopy(self.networks[name]).requires_grad_(False) for name in self.target_modules}
        self.updates = {name: 0 for name in self.networks}  # optimizer steps of each module
        # CUDA graph: 1.0 from the first loss or gradient that is not finite. Kept on the device to avoid a sync.
        self.nonfinite = {name: torch.zeros((), device=self.device) for name in self.networks}
        for name in self.networks:
            self.optimizers[name].found_inf = self.nonfinite[name]
        self.info = {}
        self.replay = self.make_replay(obs_dim, action_dim, buffer_size)

    def make_replay(self, obs_dim, action_dim, buffer_size):
        return ReplayBuffer(obs_dim, action_dim, buffer_size, self.config.horizon, self.config.prioritized,
                            device=self.device)

    @torch.no_grad()
    def check_networks(self, obs_dim):
        """ValueError, in one line, for an overridden network whose methods or output shapes do not fit. `network_calls`
        yields (module, what is called, its output, the shape it must have), with None for any size."""
        try:
            obs = torch.zeros(2, *np.atleast_1d(obs_dim), device=self.device)
            action = torch.zeros(2, self.action_dim, device=self.device)
            for name, call, output, shape in self.network_calls(obs, action):
                found = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
                if (not torch.is_tensor(output) or len(found) != len(shape)
                        or any(b not in (None, a) for a, b in zip(found, shape))):
                    wanted = f"({', '.join('any' if size is None else str(size) for size in shape)})"
                    raise ValueError(f"make_{name}: {call} must return a tensor of shape {wanted}, not {found}")
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"the agent's own networks do not fit together: {str(error).splitlines()[0]}") from error

    def make_optimizer(self, name, network):
        """AdamW with the module's own learning rate. fused: one pass over the weights and no sync with the host."""
        return torch.optim.AdamW(network.parameters(), lr=getattr(self.config, f"{name}_lr"),
                                 weight_decay=self.config.weight_decay, fused=True)

    @property
    def updates_per_step(self):
        """Calls of `update` per agent step."""
        return self.config.updates_per_step

    @property
    def num_updates(self):
        """Completed calls of `update`."""
        return min(self.updates.values())

    # ---- experience ----

    def update_obs_stats(self, obs):
        """Call once per training observation. FloatingPointError if it is not finite."""
        if not np.isfinite(obs).all():
            raise FloatingPointError(f"the observation contains {np.asarray(obs)[~np.isfinite(obs)][0]}")

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        """Stores one transition. obs must be the last call's next_obs, unless that call ended an episode."""
        self.replay.add(obs, action, reward, next_obs, terminated, truncated)

    def end_episode(self):
        """The episode ends without a last transition: the simulator diverged in it. The next `add` starts another."""
        self.replay.end_episode()

    def metric_batch(self, size):
        """(a batch for the metrics, True), or (a blank batch of two, False) for size 0 or while nothing is stored."""
        if size and self.replay.num_valid:
            return self.replay.sample(size), True
        return self.replay.gather(torch.zeros(2, dtype=torch.long, device=self.device)), False

    # ---- learning ----

    def _step(self, name, loss, clip=None):
        """One optimizer step of one module, in the order that sparse training needs."""
        optimizer = self.optimizers[name]
        self.updates[name] += 1
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.sparse[name].update_topology(self.updates[name])  # ranks growth by this loss's dense gradient
        norm = self.mask_and_clip(name, clip)
        # CUDA graph: a module whose loss or gradient is not finite stops updating, without a sync: AdamW's
        # fused kernel skips its step while `nonfinite` is true. x - x is 0 if x is finite, else NaN, which is true.
        x = loss.detach() + norm
        self.nonfinite[name].logical_or_(x - x)
        optimizer.step()
        self.info[f"{name}/grad_norm"] = norm

    def mask_and_clip(self, name, clip):
        """Masks the gradients, then clips them, so that pruned weights do not count. Returns the norm before."""
        self.sparse[name].mask_gradients()
        parameters = [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def nonfinite_report(self):
        """(what became NaN or infinite first, its learning step), or None. Syncs with the device: call it for logs."""
        found = []
        for name, nonfinite in self.nonfinite.items():
            if nonfinite.item():
                state = next(iter(self.optimizers[name].state.values()), {})
                update = int(state.get("step", 0)) + 1  # the optimizer counts only the steps that it took
                what = f"the {name}'s loss or gradient (its update {update:,})"
                found.append((self.learning_step(name, update), what))
        if not found:
            return None
        first = min(step for step, _ in found)
        return " and ".join(text for step, text in found if step == first), first

    def learning_step(self, name, update):
        """The agent step, counted from the first that learns, at which a module makes this update (1, 2, ...)."""
        return (update - 1) // self.updates_per_step

    # ---- precision, metrics, state ----

    def float32_layers(self):
        """Last layers whose output stays in float32 at any precision: a Q of 100 in bfloat16 has an error of ±0.25."""
        critics = (self.critic, self.targets["critic"])
        return [q.output for critic in critics for q in critic.children() if hasattr(q, "output")]

    def tensors(self):
        """Further state: name -> tensor, restored in place."""
        return {}

    def state_dict(self):
        """Tensors and plain values. The replay buffer and PyTorch's random generators are not included.

        Weights and moments are the live ones, as in any state_dict: save or copy them before training continues.
        """
        parts = {kind: {name: part.state_dict() for name, part in getattr(self, kind).items()} for kind in STATE}
        return parts | {"updates": dict(self.updates),
                        "tensors": {name: tensor.detach().clone() for name, tensor in self.tensors().items()}}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restores what `state_dict` returned. Learning rates and other optimizer settings stay this agent's own.

        ValueError, before any weight changes, for the state of another agent or regime.
        """
        for kind in STATE:
            if state[kind].keys() != getattr(self, kind).keys():
                raise ValueError(f"the saved {kind} are {', '.join(state[kind])}, this agent has "
                                 f"{', '.join(getattr(self, kind))}")
        for name, sparse in self.sparse.items():  # all masks are checked before anything changes
            sparse.check_state_dict(state["sparse"][name])
        for kind in ("sparse", "networks", "targets"):
            for name, part in getattr(self, kind).items():
                part.load_state_dict(state[kind][name])
        for name, optimizer in self.optimizers.items():
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, options in zip(optimizer.param_groups, own):
                group.update(options)
        self.updates = dict(state["updates"])
        load_tensors(self, state["tensors"])


def features(network, *inputs):
    """`network.features`, for SRank: (batch, ·). Without that method: a pass for the hooks, and (batch, 0)."""
    if hasattr(network, "features"):
        return network.features(torch.cat(inputs, -1))
    network(*inputs)
    return inputs[0].new_empty(len(inputs[0]), 0)


def q_features(critic, *inputs):
    """The features of each Q network: name -> (batch, ·)."""
    if all(hasattr(q, "features") for q in critic.children()):
        return {name: features(q, *inputs) for name, q in critic.named_children()}
    return {"q": features(critic, *inputs)}


OLD_TENSORS = {"encoder_indices": "burst", "encoder_position": "burst_position"}  # names in states of earlier versions


@torch.no_grad()
def load_tensors(agent, saved):
    """Restores `agent.tensors()` in place."""
    for name, tensor in agent.tensors().items():
        tensor.copy_(saved[name] if name in saved else saved[OLD_TENSORS[name]])


@contextlib.contextmanager
def frozen(*modules):
    """Within the block, losses compute no gradient for these modules' weights."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
