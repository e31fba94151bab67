"""Module-specific training: an agent of several networks, each with a size, an optimiser and a regime of its own.

What it claims: one optimiser step of one module, in the order that sparse training needs, whatever the algorithm; and a
state that holds all of the agent, as tensors and plain values.

Paper: Section 4, "Module-Specific Training". The agents of mrq.py and sac.py stand on it; what they offer to the training
loop is listed at `ModularAgent`.
"""

import contextlib
import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from sparsity import SparseTraining

STATE = ("sparse", "networks", "targets", "optimizers")  # what an agent has by module name, and saves


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

    def sparse_training(self, network, optimizer, total_updates, seed):
        return SparseTraining(network, optimizer, self.regime, self.sparsity, total_steps=total_updates, seed=seed,
                              **self.sparse_options)


class ModularAgent:
    """What every agent here is made of, and the doors it has.

    Of the class: `Config` (its settings), `presets` ("default" and "mst": module name -> ModuleConfig), and the numbers
    `updates_per_step`, `learning_starts`, `prioritized`. Of the agent: `act`, `observe`, `update`, `probe`,
    `probe_losses`, `state_dict`, `load_state_dict`, and, by module name, `networks`, `targets`, `optimizers`, `sparse`
    and `updates`; `info` holds what the last updates saw, as device scalars.
    """

    losses = ()  # methods that return (one value a sample, ...): they may be compiled, and run in the chosen precision
    passes = ()  # further methods that run in the chosen precision
    captures = {}  # method that may be captured as a CUDA graph -> modules that one call of it updates

    def __init__(self, networks, modules, learning_rates, weight_decay, targets, total_updates, device, seed):
        """networks, modules, learning_rates: by module name; targets: names of the modules that have a target copy."""
        self.networks, self.device = networks, torch.device(device)
        self.optimizers, self.sparse = {}, {}
        for number, (name, network) in enumerate(networks.items()):
            network.to(self.device)
            # fused: one pass over the weights, and no host synchronisation
            self.optimizers[name] = torch.optim.AdamW(network.parameters(), lr=learning_rates[name],
                                                      weight_decay=weight_decay, fused=True)
            self.sparse[name] = modules[name].sparse_training(network, self.optimizers[name], total_updates,
                                                              seed=1000 * seed + number)
        self.targets = {name: copy.deepcopy(networks[name]).requires_grad_(False) for name in targets}  # as sparse
        self.updates = {name: 0 for name in networks}  # of each module
        self.info = {}

    def observe(self, obs):
        """Told of every observation of training, once. FloatingPointError for one that is not finite."""
        if not np.isfinite(obs).all():
            raise FloatingPointError(f"the observation holds {np.asarray(obs)[~np.isfinite(obs)][0]}: nothing can be "
                                     "learnt from it")

    def _step(self, name, loss, clip=None):
        """One optimiser step of one module, in the order that sparse training needs."""
        optimizer = self.optimizers[name]
        self.updates[name] += 1
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.sparse[name].update_topology(self.updates[name])  # ranks growth by this loss's dense gradient
        norm = self.mask_and_clip(name, clip)
        optimizer.step()
        return norm

    def mask_and_clip(self, name, clip):
        """What is pruned does not count towards the norm. Returns the norm before clipping, or None without a clip."""
        self.sparse[name].mask_gradients()
        return torch.nn.utils.clip_grad_norm_(list(self.networks[name].parameters()), clip) if clip else None

    def heads(self):
        """Last layers whose output stays in float32, whatever the precision: a Q of 100 in bfloat16 is known to ±0.25."""
        critics = (self.networks["critic"], self.targets["critic"])
        return [q.output for critic in critics for q in critic.children()]

    def tensors(self):
        """What else belongs to the agent's state: name -> tensor, restored in place."""
        return {}

    def state_dict(self):
        """Tensors and plain values, nothing else. The replay buffer and PyTorch's random generators are not part of it.

        As with any module's, weights and moments are the live ones: save or copy them before training goes on.
        """
        parts = {kind: {name: part.state_dict() for name, part in getattr(self, kind).items()} for kind in STATE}
        return parts | {"updates": dict(self.updates),
                        "tensors": {name: tensor.detach().clone() for name, tensor in self.tensors().items()}}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes back what `state_dict` gave; ValueError, before any weight changes, for another agent's or regime's.

        Learning rates and the like stay this agent's own.
        """
        for kind in STATE:
            if state[kind].keys() != getattr(self, kind).keys():
                raise ValueError(f"the saved {kind} are {', '.join(state[kind])}, this agent has "
                                 f"{', '.join(getattr(self, kind))}")
        for name, sparse in self.sparse.items():  # the masks refuse what does not fit: all are asked first
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
        for name, tensor in self.tensors().items():
            tensor.copy_(state["tensors"][name])


@contextlib.contextmanager
def frozen(*modules):
    """What is computed within asks no gradient of these modules' weights, and so spends nothing on them."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
