"""Module-specific training: an agent of several networks, each with a size, an optimiser and a regime of its own.

What it claims: one optimiser step of one module, in the order that sparse training needs, whatever the algorithm; and a
state that holds all of the agent, as tensors and plain values.

Paper: Section 4, "Module-Specific Training". The agents of mrq.py and sac.py stand on it; what they offer to the training
loop is listed at `BaseAgent`.
"""

import contextlib
import copy

import numpy as np
import torch

from sparsity import SparseTraining

STATE = ("sparse", "networks", "targets", "optimizers")  # what an agent has by module name, and saves


class BaseAgent:
    """What every agent here is made of, and the doors it has.

    Of the class: `Config` (its settings, in settings.py) and `prioritized`. Of the agent: `act`, `update_obs_stats`, `update`,
    `updates_per_step`, `compute_features`, `per_sample_losses`, `state_dict`, `load_state_dict`, and, by module name, `networks`,
    `targets`, `optimizers`, `sparse` and `updates`; `info` holds what the last updates saw, on the device: their means are
    what is logged.
    """

    compiled_methods = ()  # methods that return (one value a sample, ...): they may be compiled, and run in the chosen precision
    autocast_methods = ()  # further methods that run in the chosen precision
    graph_methods = {}  # method that may be captured as a CUDA graph -> modules that one call of it updates

    def __init__(self, networks, modules, learning_rates, weight_decay, targets, total_updates, device, seed):
        """networks, modules (ModuleConfig), learning_rates: by module name; targets: names of modules with a target copy."""
        self.networks, self.device = networks, torch.device(device)
        self.optimizers, self.sparse = {}, {}
        for number, (name, network) in enumerate(networks.items()):
            network.to(self.device)
            # fused: one pass over the weights, and no host synchronisation
            self.optimizers[name] = torch.optim.AdamW(network.parameters(), lr=learning_rates[name],
                                                      weight_decay=weight_decay, fused=True)
            config = modules[name]
            self.sparse[name] = SparseTraining(network, self.optimizers[name], config.regime, config.sparsity,
                                               total_steps=total_updates, seed=1000 * seed + number,
                                               **config.sparse_options)
        self.targets = {name: copy.deepcopy(networks[name]).requires_grad_(False) for name in targets}  # as sparse
        self.updates = {name: 0 for name in networks}  # of each module
        # 1.0 from the first loss or gradient on that is not finite: a device scalar, for nobody to wait for.
        self.nonfinite = {name: torch.zeros((), device=self.device) for name in networks}
        for name, optimizer in self.optimizers.items():
            optimizer.found_inf = self.nonfinite[name]
        self.info = {}

    @property
    def updates_per_step(self):
        """Calls of `update` that an agent step has."""
        return self.config.updates_per_step

    def update_obs_stats(self, obs):
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
        # Once a loss or gradient is not finite, this module takes no step any more (topology may still move, until the run
        # asks for `nonfinite_report`): AdamW's fused kernel reads the latch on the device. x - x is 0 where x is finite, else NaN,
        # which counts as true.
        x = loss.detach() + norm
        self.nonfinite[name].logical_or_(x - x)
        optimizer.step()
        self.info[f"{name}_grad_norm"] = norm

    def mask_and_clip(self, name, clip):
        """Masks the gradients, then clips them: what is pruned does not count. Returns their norm before clipping."""
        self.sparse[name].mask_gradients()
        parameters = [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def nonfinite_report(self):
        """(what broke first, its learning step), or None if all is well. Reads from the device: ask when logging or saving."""
        found = []
        for name, broken in self.nonfinite.items():
            if broken.item():
                state = next(iter(self.optimizers[name].state.values()), {})
                update = int(state.get("step", 0)) + 1  # the optimiser counts the steps that it took
                found.append((self.learning_step(name, update), f"the {name}'s loss or gradient (its update {update:,})"))
        if not found:
            return None
        first = min(step for step, _ in found)
        return " and ".join(text for step, text in found if step == first), first

    def learning_step(self, name, update):
        """The agent step, counted from the first that learns, in which a module makes this update of its own."""
        return (update - 1) // self.updates_per_step

    def float32_layers(self):
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
