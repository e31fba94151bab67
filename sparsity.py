"""Sparse training for any PyTorch module: five regimes, one mask update.

Guarantees: a module trained through `SparseTraining` has exactly the sparsity that its regime asks for. Pruned weights
and their gradients are exactly zero, and a weight that grows starts at zero with fresh optimizer state. Use that cannot
keep this is refused in one line; pruned weights that other code has written are cleared, with one warning.

    regime   initial masks    during training                                        paper
    dense    none             nothing                                                Section 2.1
    sst      random, sparse   nothing: the topology is static                        Appendix B.1.1
    dst      random, sparse   drop and grow at constant sparsity (RigL or SET)       Appendix B.1.2, Algorithm 1
    s2d      random, sparse   drop, and grow more than was dropped, until dense      Appendix B.1.3, Eq. (2)
    d2s      dense            drop more than is grown, until sparse                  Appendix B.1.3, Eq. (2)

Paper: "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv 2510.12096).
License: MIT, Copyright (c) 2026 The authors of this repository. Copy this file into your project: it needs only torch.
Masks simulate sparsity: the arithmetic stays dense and saves neither time nor memory.

    import copy, torch
    from sparsity import SparseTraining

    model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparse = SparseTraining(model, optimizer, "dst", sparsity=0.6, total_steps=500, update_interval=50)
    target = copy.deepcopy(model).requires_grad_(False)  # in an RL loop: starts as sparse as its model
    for step in range(1, 501):  # counts the module's own updates
        obs, next_obs = torch.randn(2, 64, 8)
        td_error = model(obs) - (obs.sum(1, keepdim=True) + 0.1 * target(next_obs))
        optimizer.zero_grad()
        td_error.square().mean().backward()  # the module's own loss only
        if sparse.after_backward(step):  # changes the masks when due, then masks the gradients; clip after this
            sparse.apply_masks(target)  # a soft target still averages weights that were dropped since
        optimizer.step()
        for average, weight in zip(target.parameters(), model.parameters()):
            average.lerp_(weight.detach(), 0.005)
    print(f"error {td_error.abs().mean():.3f},", sparse)
"""

import copy
import math
import re
import warnings
import weakref

import torch
import torch.nn as nn
from torch.utils.weak import WeakTensorKeyDictionary

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
DISTRIBUTIONS = ("er", "uniform")
GROWTHS = ("gradient", "random")


def layer_densities(shapes, sparsity, distribution="er"):
    """Density of each layer such that all layers together keep exactly `1 - sparsity` of their weights.

    shapes: weight shapes in PyTorch's order: (out, in), or (out, in, height, width) for a convolution.
    distribution: "uniform", the same density in every layer; "er", Erdős–Rényi, density = ε·(sum of sides) /
        (product of sides), which keeps small layers denser than large ones. Appendix B.1.1, items 1 and 2.
    """
    _check_choices(sparsity=sparsity, distribution=distribution)
    if distribution == "uniform" or sparsity == 0:  # at sparsity 0, ε·ratio can round to 1 + 1e-10
        return [1.0 - sparsity] * len(shapes)

    sizes = [math.prod(shape) for shape in shapes]
    dense = {layer for layer, size in enumerate(sizes) if size == 0}  # Linear(4, 0): nothing to prune
    ratios = [sum(shape) / max(1, math.prod(shape)) for shape in shapes]  # linear: (n_in + n_out) / (n_in · n_out)
    # A layer whose density would exceed 1 stays dense, and ε is solved again for the others.
    while len(dense) < len(shapes):
        others = [layer for layer in range(len(shapes)) if layer not in dense]
        budget = (1.0 - sparsity) * sum(sizes) - sum(sizes[layer] for layer in dense)
        epsilon = budget / sum(ratios[layer] * sizes[layer] for layer in others)
        full = {layer for layer in others if epsilon * ratios[layer] > 1 + 1e-9}
        if not full:
            break
        dense |= full
    return [1.0 if layer in dense else min(1.0, epsilon * ratios[layer]) for layer in range(len(shapes))]


def drop_fraction(step, total_steps, initial=0.5, final=0.0):
    """ζ_t, the fraction of active weights that an update drops: a cosine from `initial` to `final`.  Eq. (1)"""
    progress = min(max(step / total_steps, 0.0), 1.0)
    return final + 0.5 * (initial - final) * (1.0 + math.cos(math.pi * progress))


def scheduled_sparsity(step, initial, final, start, end, power=2.0):
    """s_t: `initial` until `start`, `final` from `end` on, polynomial of degree `power` (λ) in between.  Eq. (2)"""
    if step >= end:  # the ends are returned as given: with rounding, D2S would end at 0.5996
        return final
    if step <= start:
        return initial
    return final + (initial - final) * (1.0 - (step - start) / (end - start)) ** power


def update_mask(weight, grad, mask, drop_fraction, num_active=None, grow="gradient", generator=None, active=None):
    """Algorithm 1 for one layer, lines 8 to 11 (line 12 is in `SparseTraining._change`): drop, then grow.

    weight, grad, mask: tensors of one shape; mask is bool, True where a weight is active; grad is the dense gradient.
    drop_fraction: ζ_t, the fraction of active weights to drop. num_active: how many are active afterwards (default: as
        many as now); fewer makes D2S, more makes S2D.
    grow: "gradient" (RigL: largest |gradient|) or "random" (SET; drawn from `generator`, on the generator's device).
    generator: if given, gradients of 0 rank in random order. All other ties go to the lower index.
    active: how many are active now, if known: it saves a device read. Returns the new mask and changes nothing.
    """
    mask = mask.bool()
    active = int(mask.sum()) if active is None else active
    num_active = active if num_active is None else num_active
    _check_choices(grow=grow)
    _require(weight.shape == grad.shape == mask.shape, f"shapes differ: {weight.shape}, {grad.shape}, {mask.shape}")
    _require(0 <= drop_fraction <= 1, f"drop_fraction must lie in [0, 1], not {drop_fraction}")
    _require(0 <= num_active <= mask.numel(), f"num_active is {num_active}, but the layer has {mask.numel()} weights")
    # Line 8. With a sparsity schedule, drop at least as many as the new count asks for.
    dropped = max(math.floor(drop_fraction * active), active - num_active)
    # Line 9. Inactive weights rank below every active one: an active weight may itself be 0.
    kept = _largest(_magnitude(weight).masked_fill(~mask, -1.0), active - dropped)
    # Line 10. Everything not kept competes, including the weights just dropped, as in the published RigL.
    score = _uniform(weight.shape, generator, weight.device) if grow == "random" else _magnitude(grad, generator)
    return kept | _largest(score.masked_fill(kept, -2.0), num_active - (active - dropped))  # line 11; scores are > -1


class SparseTraining:
    """Draws a module's masks, applies them throughout training, and changes them as the regime asks.

    module: any `nn.Module`. Masks the trainable weights of linear, convolution, embedding, attention and recurrent
        layers (MASKED_LAYERS); never biases, norms, or what is frozen now.
    optimizer: the `torch.optim` optimizer that trains the module, or a list of several; "dense" and "sst" take None.
        Its state follows the masks: SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD,
        Adafactor (its moments of rows and columns stay). Refused: Muon, LBFGS, SparseAdam, 8-bit state, and an `eps`
        that is 0 in the weights' precision. One of your own must not move weights without gradient and state.
    regime, sparsity: as above; the fraction of weights pruned always (sst, dst), at first (s2d) or at last (d2s).
    total_steps: T, the number of updates this module gets in all. dst, s2d and d2s need it.
    update_interval: ΔT, updates between topology changes. Not in the paper; 1000 as in published sparse SAC.
    distribution, grow: "er" or "uniform"; "gradient" (RigL) or "random" (SET).
    drop_fraction_start, drop_fraction_end: ζ at steps 0 and T, Eq. (1); from the same SAC. From 0, D2S is pure
        magnitude pruning; otherwise gradients decide which of the weights it drops return.
    schedule_start, schedule_end, schedule_power: of s_t, Eq. (2), as fractions of T (not in the paper), and λ.
    seed: of the masks. By default it follows from the weights: equal after the same `torch.manual_seed`.
    exclude, include: what to leave dense, and what to mask as well: names ("encoder.0", "0.weight"), kinds of layer
        (nn.Conv2d), layers, or tensors, one or a list. An included (n, out, in) counts as n matrices. NoisyLinear's
        sigma shares the mask of its mean.

    Masks are kept here and not in the module: its `state_dict` keys do not change, and a deep copy or a hard target is
    sparse too. Adam counts steps per tensor, so that the first moves of a new weight are 3 to 7 learning rates.
    """

    def __init__(self, module, optimizer, regime, sparsity=0.6, total_steps=None, update_interval=1000,
                 distribution="er", grow="gradient", drop_fraction_start=0.5, drop_fraction_end=0.0,
                 schedule_start=0.2, schedule_end=0.8, schedule_power=2.0, seed=None, exclude=(), include=()):
        self.module, self.optimizer, self.regime, self.sparsity, self.seed = module, optimizer, regime, sparsity, seed
        self.total_steps, self.update_interval = total_steps, update_interval
        self.distribution, self.grow = distribution, grow
        self.drop_fraction_start, self.drop_fraction_end = drop_fraction_start, drop_fraction_end
        self.schedule_start, self.schedule_end, self.schedule_power = schedule_start, schedule_end, schedule_power
        for name, value in vars(self).items():  # a state with NumPy's numbers is refused by `torch.load`
            setattr(self, name, value.item() if type(value).__module__ == "numpy" else value)
        _check_settings(self)
        sparsity = self.sparsity
        # A regime is only a schedule: initial sparsity, final sparsity, and whether the topology changes.
        self.initial, self.final, self.dynamic = {
            "dense": (0.0, 0.0, False), "sst": (sparsity, sparsity, False), "dst": (sparsity, sparsity, True),
            "s2d": (sparsity, 0.0, True), "d2s": (0.0, sparsity, True)}[regime]
        self.start, self.end = (round(fraction * (total_steps or 0)) for fraction in (schedule_start, schedule_end))
        self.sparsity, self.last_step = self.initial, 0  # s_t of the masks now; latest step given to `update_topology`
        self.masks, self.active = {}, {}  # by weight's name: bool tensor, True where active; how many are, on the host
        self.first_masks, self.last_update = {}, {}  # by name: masks before any change; what the latest change did
        self.waiting = []  # names of the layers whose change waits for a usable gradient
        self._leaders, self._matrices = {}, {}  # by name: whose mask it has; how many matrices it stacks
        self._own_seed, self._unstepped, self._warned = seed is None, 0, set()
        if regime != "dense":
            self._draw_masks(sparsity, exclude, include)

    # ---- each training step ----

    def after_backward(self, step):
        """All between `loss.backward()` and clipping, in the right order. Returns whether the topology changed."""
        changed = self.update_topology(step)
        self.mask_gradients()
        return changed

    @torch.no_grad()
    def update_topology(self, step, scores=None):
        """Drops and grows if `step` crosses a multiple of the update interval. Returns whether it did.

        step: number of this module's updates, this one included: 1, 2, ... It may skip some, as the steps of a delayed
        module do. Call it after `backward` and before `mask_gradients`: growth is ranked by the dense gradients, which
        must come only from the module's own loss, or by `scores` (weight's name -> dense tensor). A layer that nothing
        ranks (its gradient is missing, all zero, or not finite) changes as soon as something does.
        """
        step = _whole_step(step)
        due = self._is_due(step)
        self._check_weights(step, due or self.waiting)
        self.last_step = step
        if not self.dynamic or not (due or self.waiting):
            return False
        if due:
            self.sparsity = scheduled_sparsity(step, self.initial, self.final, self.start, self.end,
                                               self.schedule_power)  # Eq. (2), with ER solved anew for s_t
        counts = self._counts(self.masks, self.sparsity)
        if due:
            late = self.waiting
            self.waiting = [name for name, mask in self.masks.items()  # dense before and after: nothing to change
                            if not self.active[name] == counts[name] == mask.numel()]
            for name in set(late) & set(self.waiting):
                self._warn("stuck", f"the topology of {name} stands still, as its gradients are missing, zero or not "
                           "finite: call update_topology between backward and zero_grad, or exclude the layer")
        zeta = drop_fraction(step, self.total_steps, self.drop_fraction_start, self.drop_fraction_end)  # Eq. (1)
        weights = {name: weight for name, weight, _ in self._tensors()}
        ranks = {name: self._score(name, weights[name], scores) for name in self.waiting}
        for number, (name, score) in enumerate(ranks.items()):
            if score is not None:
                self._change(name, weights, score, zeta, counts[name], self._generator(step, number, score.device))
        self.waiting = [name for name, score in ranks.items() if score is None]
        return len(self.waiting) < len(ranks) or not ranks

    def _change(self, name, weights, score, zeta, count, generator):
        """One layer's topology change, and the record of it."""
        mask, active, first = self.masks[name], self.active[name], self.first_masks[name]
        new_mask = update_mask(weights[name], score, mask, zeta, count, self.grow, generator, active)
        # Line 12. A weight dropped and regrown at once is in both masks: its value and moments stay. Others start anew.
        for follower in [other for other, leader in self._leaders.items() if leader == name]:
            self._reset_pruned(weights[follower], mask & new_mask)
        dropped = max(math.floor(zeta * active), active - count)
        left, kept, first = _read(mask & ~new_mask, first & new_mask, first)
        self.last_update[name] = {"dropped": dropped, "grown": count - active + dropped, "regrown": dropped - left,
                                  "initial_kept": kept / max(1, first)}
        mask.copy_(new_mask)  # in place: a captured graph reads this tensor
        self.active[name] = count

    @torch.no_grad()
    def mask_gradients(self):
        """Zeroes the gradients of pruned weights. Call it before clipping, so that they do not count."""
        compiling = torch.compiler.is_compiling()
        # `update_topology`, which checks, may never be called. Compiled code that reads a step is compiled at each.
        if not compiling and not self.last_step:
            self._unstepped += 1
            self._check_weights(self._unstepped, self._unstepped % self.update_interval == 0)
        for _, weight, mask in self._tensors():
            if weight.grad is not None:
                _zero_pruned(weight.grad, mask)
                if not compiling:
                    weight.grad._masked = weight.grad._version, weight._version  # `_score` asks what came first

    def is_update_step(self, step):
        """Whether `update_topology(step)` would change anything."""
        return self.dynamic and (bool(self.waiting) or self._is_due(_whole_step(step)))

    def _is_due(self, step):  # at the schedule's end as well, or D2S would stop short of its final sparsity
        return (step // self.update_interval > self.last_step // self.update_interval
                or self.initial != self.final and self.last_step < max(1, self.end) <= step)

    # ---- reading, copying, saving ----

    @torch.no_grad()
    def apply_masks(self, module=None):
        """Zeroes in `module` what is pruned here: this module (default), or one of the same layout, such as a target.

        Either may be wrapped by torch.compile, DataParallel or AveragedModel. ValueError for another layout.
        """
        module = self.module if module is None else module
        theirs = _plain(dict(module.named_parameters()))
        pairs = [(theirs.get(name), mask) for name, _, mask in self._tensors()]
        _require(all(weight is not None and weight.shape == mask.shape for weight, mask in pairs),
                 f"parameter names or shapes of {type(module).__name__} differ from the masked module's")
        for weight, mask in pairs:
            _zero_pruned(weight, mask.to(weight.device))

    @torch.no_grad()
    def set_optimizer(self, optimizer):
        """Follows this optimizer (or list) from now on: one built anew, or built after parameters were replaced."""
        self.optimizer, self._checked = optimizer, False
        OWNERS.update((weight, weakref.ref(self)) for _, weight, _ in self._tensors())
        for weight, mask in self._check_trained().values():
            self._reset_pruned(weight, mask)
        self._versions = {name: weight._version for name, weight, _ in self._tensors()}

    def density(self):
        """Fraction of the module's maskable weights that are active: 1.0 if it is dense."""
        return sum(self.active.values()) / sum(mask.numel() for mask in self.masks.values()) if self.masks else 1.0

    def layer_densities(self):
        """Weight's name -> fraction of it that is active; empty for regime "dense"."""
        return {name: self.active[name] / mask.numel() for name, mask in self.masks.items()}

    def movement(self):
        """What the layers' latest topology changes did, in all; by layer: `last_update`. NaN before the first.

        dropped, grown: weights (Algorithm 1, lines 9 and 10); regrown: of these, dropped and grown back at once;
        initial_kept: fraction of the first masks that is still active.
        """
        records, first = self.last_update, self._counts(self.masks, self.initial)
        kept = [n * records[name]["initial_kept"] if name in records else n for name, n in first.items()]
        totals = {key: sum(record[key] for record in records.values()) for key in ("dropped", "grown", "regrown")}
        totals["initial_kept"] = sum(kept) / max(1, sum(first.values()))
        return {key: float(value) if records else math.nan for key, value in totals.items()}

    def __repr__(self):
        """A table of layers, shapes and densities."""
        rows = [(name, "x".join(map(str, self.masks[name].shape)), d) for name, d in self.layer_densities().items()]
        rows.append(("all", str(sum(mask.numel() for mask in self.masks.values())), self.density()))
        return f"SparseTraining of {type(self.module).__name__}: {self.regime}, step {self.last_step}" + "".join(
            f"\n  {name:<30} {shape:>16}  density {density:.4f}" for name, shape, density in rows)

    def state_dict(self):
        """Tensors and plain values: masks (bool), seed, schedule and progress. Names are the unwrapped module's."""
        names = ("regime", "last_step", "sparsity", "seed", "masks", "first_masks", "waiting", "last_update")
        return copy.deepcopy({name: getattr(self, name) for name in names} | {"schedule": self._schedule()})

    def _schedule(self):
        names = ("total_steps", "update_interval", "distribution", "grow", "drop_fraction_start", "drop_fraction_end",
                 "initial", "final", "schedule_start", "schedule_end", "schedule_power")  # the last three: if s_t moves
        return {name: getattr(self, name) for name in names[:8 if self.initial == self.final else 11] if self.dynamic}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restores what `state_dict` returned and clears what it prunes: load the module and the optimizer before.
        ValueError, before anything changes, if it belongs to another regime, layout, sparsity or schedule."""
        masks = self.check_state_dict(state)
        self.last_step, self.sparsity, self.seed = state["last_step"], state["sparsity"], state["seed"]
        # States of older versions have no first masks; they follow from the seed.
        first = state["first_masks"] if "first_masks" in state else self._first_masks(self.first_masks)
        for own, saved in ((self.masks, masks), (self.first_masks, first)):
            for name, mask in own.items():
                mask.copy_(saved[name])
        self.active = {name: int(mask.sum()) for name, mask in masks.items()}
        self.waiting, self.last_update = list(state.get("waiting", [])), copy.deepcopy(state.get("last_update", {}))
        self.set_optimizer(self.optimizer)

    def check_state_dict(self, state):
        """ValueError for a state that `load_state_dict` would not accept. Returns its masks by this object's names."""
        masks = state["masks"]
        if masks.keys() != self.masks.keys():  # older versions saved a wrapper's names
            masks = _plain(masks)
        own = {"regime": self.regime} | self._schedule() | {name: mask.shape for name, mask in self.masks.items()}
        saved = {name: mask.shape for name, mask in masks.items()} | state.get("schedule", self._schedule()) | {
            "regime": state["regime"]}
        odd = [f"{key}={saved.get(key)} (here {own.get(key)})" for key in own | saved if saved.get(key) != own.get(key)]
        _require(not odd, f"the saved masks have {', '.join(odd[:3])}: build with that; to change only the schedule, "
                 "delete state['schedule']")
        low, high = sorted((self.initial, self.final))
        wanted = self._counts(masks, state["sparsity"]) if low <= state["sparsity"] <= high else {}
        _require(all(mask.sum() == wanted.get(n) for n, mask in masks.items() if n not in state.get("waiting", ())),
                 "the saved masks do not match this sparsity and distribution")
        return masks

    def _draw_masks(self, sparsity, exclude, include):
        weights, self._leaders, self._matrices, dense = _choose_weights(self.module, exclude, include)
        counts = self._counts(weights, sparsity)
        least = min(counts, key=counts.get)
        _require(counts[least], f"{least} keeps no weight at this sparsity: lower the sparsity, or exclude it")
        if dense:
            self._warn("dense", f"left dense: {', '.join(dense)}; mask them by include=, or confirm by exclude=")
        if self.dynamic and sparsity > 0:
            most = max((n for name, n in counts.items() if n < weights[name].numel()), default=math.inf)
            zetas = [drop_fraction(step, self.total_steps, self.drop_fraction_start, self.drop_fraction_end)
                     for step in (self.update_interval, self.total_steps - self.total_steps % self.update_interval)]
            if self.update_interval > self.total_steps or self.regime == "dst" and max(zetas) * most < 1:
                self._warn("static", f"the topology never changes{'' if self.regime == 'dst' else ' before the end'}: "
                           f"lower update_interval ({self.update_interval}), or raise total_steps ({self.total_steps})")
        if self._own_seed:
            self.seed = hash(tuple(value for weight in weights.values() for value in weight.flatten()[:64].tolist()))
        self.masks, self.active = self._first_masks(weights), self._counts(weights, self.initial)
        self.first_masks = copy.deepcopy(self.masks) if self.dynamic else {}
        self.set_optimizer(self.optimizer)

    def _first_masks(self, weights):
        """Exact counts, never Bernoulli draws; drawn on the CPU, so that every device has the same masks."""
        generator, counts = torch.Generator().manual_seed(self.seed), self._counts(weights, self.initial)
        return {name: _largest(_uniform(weight.shape, generator, "cpu"), counts[name]).to(weight.device)
                for name, weight in weights.items()}

    def _counts(self, weights, sparsity):
        """Active weights per layer, exact in sum: shares are rounded down, the largest remainders up."""
        layers = [(name, weight.shape if self._matrices[name] == 1 else weight.shape[-2:])
                  for name, weight in weights.items() for _ in range(self._matrices[name])]
        densities = layer_densities([shape for _, shape in layers], sparsity, self.distribution)
        shares = {name: density * weights[name].numel() for (name, _), density in zip(layers, densities)}
        counts = {name: math.floor(share + 1e-6) for name, share in shares.items()}
        total = math.floor((1.0 - sparsity) * sum(weight.numel() for weight in weights.values()) + 0.5)
        by_remainder = sorted(counts, key=lambda name: counts[name] - shares[name])
        for name in by_remainder[:max(0, total - sum(counts.values()))]:
            counts[name] += 1
        return counts

    def _tensors(self):
        """(name, weight, mask) of all masked weights. Looked up at each use: `.to` and loading replace parameters."""
        parameters = _plain(dict(self.module.named_parameters())) if self.masks else {}
        for name, leader in self._leaders.items():
            weight, mask = parameters.get(name), self.masks[leader]
            if weight is None or weight.shape != mask.shape:
                raise RuntimeError(f"{name} is gone or has another shape: build SparseTraining after layers are "
                                   "replaced, tied, pruned or parametrized")
            if mask.device != weight.device:  # the module has moved: the masks follow
                self.masks[leader] = mask = mask.to(weight.device)
            yield name, weight, mask

    def _reset_pruned(self, weight, kept):
        """Where not `kept`, sets the weight to 0 and its optimizer state to that of a new weight."""
        _zero_pruned(weight, kept)
        for _, group, states in _trainers(self.optimizer, weight):
            for key, state in states.items():  # exp_avg, momentum_buffer, ...
                if torch.is_tensor(state) and state.shape == weight.shape:
                    _zero_pruned(state, kept)
                    if initial := group.get(INITIAL_STATE.get(key), 0):
                        state.masked_fill_(~kept, complex(initial, initial) if state.is_complex() else initial)

    def _generator(self, step, number, device):
        """For one layer at one step: a resumed run draws the same numbers, without a state to save. On the weights'
        device, as drawing 150 million numbers on the CPU would stall a GPU for a second."""
        return None if device.type == "meta" else torch.Generator(device).manual_seed(hash((self.seed, step, number)))

    def _check_trained(self):
        """name -> (weight, mask). ValueError if the optimizer does not train a weight, or moves its pruned entries."""
        tensors = {name: (weight, mask) for name, weight, mask in self._tensors()}
        _require(_optimizers(self.optimizer) or not self.dynamic, f"{self.regime} needs the optimizer, to reset state")
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        _require(not (tensors and self._own_seed and parallel and torch.distributed.get_world_size() > 1),
                 "each process would draw masks of its own: give SparseTraining the same seed in all of them")
        for name, (weight, _) in tensors.items():
            _check_weight(name, weight, self.optimizer)
            _require(OWNERS.get(weight, lambda: self)() in (self, None),
                     f"{name} is also masked by a SparseTraining built later: exclude it from one, or keep only one")
        return tensors

    def _check_weights(self, step, due):
        """At the first step, at topology changes and once per interval. Reads from the device only when due."""
        _require(step >= self.last_step or not self.masks, f"step {step} comes after step {self.last_step}: count "
                 "updates over the whole training, not per epoch; load_state_dict goes back")
        if not self.masks or self._checked and not due or (
                torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        for name, (weight, mask) in self._check_trained().items():
            count = _read((weight != 0) & ~mask)[0] if due or weight._version != self._versions[name] else 0
            if count or not self._checked:  # the first time in any case: `weight.data` has no version
                self._reset_pruned(weight, mask)
            if count:
                self._warn("written", f"{count} pruned weights of {name} were not 0 at step {step}, and are now. List "
                           "all optimizers, call set_optimizer() for a new one and apply_masks() after writing weights")
        self._checked = True

    def _score(self, name, weight, scores):
        """What ranks a layer's growth, or None if it has to wait. RuntimeError for a gradient masked already."""
        if self.grow == "random":
            return weight
        score = weight.grad if scores is None else scores.get(name)
        if score is None or not (score.is_meta or any(_read(score.isfinite().all() & (score != 0).any()))):
            return None
        masked, trained = getattr(score, "_masked", (None, None))  # versions of gradient and weight when it was masked
        # Versions tell this from dead units, whose gradients are 0 as well. Clipping writes a gradient once; before an
        # optimizer step, all that may happen to it is scaling.
        scaled = masked is not None and (score._version == masked + 1 or weight._version == trained)
        if self.active[name] < score.numel() and (
                score._version == masked or scaled and not any(_read((score != 0) & ~self.masks[name]))):
            raise RuntimeError("the gradients are masked already and cannot rank growth: use after_backward, or call "
                               "update_topology before mask_gradients and optimizer.step")
        return score

    def _warn(self, kind, message):
        if kind not in self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._warned.add(kind)


# ---- tensors ----

def _largest(scores, count):
    """Bool mask of exactly the `count` largest scores; ties go to the lower index. No sort and no device read."""
    if not 0 < count < scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    flat = scores.flatten()
    # The smallest accepted score. `kthvalue` is up to a fifth faster on a CPU, but uses one thread block on CUDA.
    threshold = flat.topk(count, sorted=False).values.amin()
    above, tied = flat > threshold, flat == threshold
    places = count - above.sum()  # how many of the tied are accepted
    return (above | (tied & (tied.cumsum(0) <= places))).view(scores.shape)


def _magnitude(tensor, generator=None):
    """|tensor|, finite, so that counts stay exact. With a generator, zeros become random numbers in (-1, 0]: they rank
    last as before, and among themselves at random, as position says nothing about a weight."""
    scores = torch.nan_to_num(tensor.detach().abs())
    if generator is None:
        return scores
    return scores.where(scores != 0, -_uniform(tensor.shape, generator, tensor.device).to(scores))


def _uniform(shape, generator, device):
    """Random scores in float64: float32 has 2^24 values, too few to rank a layer of millions without ties."""
    place = device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=place).to(device)


def _zero_pruned(tensor, mask):
    """tensor ⊙ mask, in place, on the bits as integers: NaN × 0 is NaN, but a NaN's bits times 0 are 0.0.

    `masked_fill_` with a random mask takes 30 times as long on a CPU. There PyTorch first writes the mask as integers:
    in pieces, these stay in the cache, which is six times faster again for millions of weights.
    """
    if tensor.is_complex():
        tensor, mask = torch.view_as_real(tensor.detach()), mask.unsqueeze(-1).expand(*mask.shape, 2)  # (..., 2)
    bits = tensor.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])
    if tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous():
        for piece, kept in zip(bits.view(-1).split(2 ** 20), mask.view(-1).split(2 ** 20)):
            piece.mul_(kept)
    else:
        bits.mul_(mask)


def _read(*flags):
    """How many entries of each bool tensor are True: a device read."""
    return [0 if flag.is_meta else flag.sum().tolist() for flag in flags]


# ---- guards: the algorithm ends here; the rest chooses what to mask and refuses what would break it ----

# By kind of layer: by number of dimensions, LayerNorm([4, 8]) and attention's bias_k would be masked. What one tensor
# stacks (q, k and v, or a GRU's gates) counts as one weight.
MASKED_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention,
                 nn.RNNBase, nn.RNNCellBase)
MASKED_NAMES = re.compile(r"weight|in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# Muon orthogonalizes matrices, LBFGS mixes the steps of all weights, SparseAdam needs sparse gradients.
REFUSED_OPTIMIZERS = {"Muon", "LBFGS", "SparseAdam"}
INITIAL_STATE = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop's and Adagrad's do not start at 0
OWNERS = WeakTensorKeyDictionary()  # weight -> weak reference to the latest SparseTraining that masks it


def _choose_weights(module, exclude, include):
    """(name -> weight, name -> whose mask it has, name -> number of matrices, names of matrices left dense)."""
    _require(isinstance(module, nn.Module), f"module must be an nn.Module, not a {type(module).__name__}")
    wanted = list(_find(module, include))  # by id, as layers may share a weight
    included, excluded = (set().union(*(ids for _, ids in found)) for found in (wanted, _find(module, exclude)))
    trained = {name: weight for name, weight in _plain(dict(module.named_parameters())).items()
               if weight.requires_grad and id(weight) not in excluded}
    names = {id(weight): name for name, weight in trained.items()}
    leaders, matrices = {}, {}
    for path, layer in sorted(module.named_modules(), key=lambda named: isinstance(named[1], MASKED_LAYERS)):
        standard = isinstance(layer, MASKED_LAYERS)
        if standard and any(id(weight) in names for weight in layer.parameters()):
            _check_layer(path or type(layer).__name__, layer)
        own = {key: weight for key, weight in layer._parameters.items() if id(weight) in names}
        for key, weight in own.items():
            name = names[id(weight)]
            if standard or id(weight) in included:
                _check_weight(name, weight)
            if nn.parameter.is_lazy(weight) or weight.ndim < 2 or "bias" in key or isinstance(layer, NORMS) or (
                    not weight.numel()):
                continue
            if standard and MASKED_NAMES.fullmatch(key):
                matrices[name] = 1
            elif id(weight) in included:
                matrices[name] = math.prod(weight.shape[:-2])
            means = [own.get(other) for other in (key.replace("sigma", "mu"), re.sub("_?sigma_?", "", key))]
            leaders[name] = next((names[id(m)] for m in means if m is not None and m.shape == weight.shape), name)
    leaders = {name: leader if leader in matrices else name for name, leader in leaders.items()}
    masked = {name: leader for name, leader in leaders.items() if leader in matrices}
    for choice, ids in wanted:
        _require(any(id(trained[name]) in ids for name in masked), f"include: {choice} holds no trainable matrix")
    _require(masked, f"{type(module).__name__} trains no weight of a masked layer: name weights by include=")
    weights = {name: trained[name] for name in trained if masked.get(name) == name}
    return weights, masked, matrices, [name for name in leaders if name not in masked]


def _find(module, choices):
    """(choice, ids of the parameters that it covers), for names, kinds of layer, layers and tensors."""
    things = dict(module.named_modules()) | dict(module.named_parameters(remove_duplicate=False))
    for choice in [choices] if isinstance(choices, (str, type, nn.Module, torch.Tensor)) else choices:
        found = [thing for name, thing in things.items() if thing is choice or isinstance(choice, type) and isinstance(
            thing, choice) or isinstance(choice, str) and name == choice]
        what = str(choice).splitlines()[0]
        _require(found, f"{type(module).__name__} has no layer or weight {what}")
        yield what, {id(p) for each in found for p in (each.parameters() if isinstance(each, nn.Module) else [each])}


def _plain(named):
    """The dict by names without what torch.compile ("_orig_mod.") and DataParallel or AveragedModel ("module.") add."""
    named = {name.replace("_orig_mod.", ""): value for name, value in named.items()}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): value for name, value in named.items()}
    return named


def _optimizers(optimizer):
    """The optimizer, or those of a list, and those that a wrapper holds (Lookahead, SAM, ZeRO)."""
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
    for one in found:  # grows meanwhile
        _require(hasattr(one, "param_groups"), f"{type(one).__name__} is no torch.optim optimizer: no param_groups")
        inner = [part for part in getattr(one, "__dict__", {}).values() if isinstance(part, torch.optim.Optimizer)]
        found += [part for part in inner if all(part is not other for other in found)]
    return found


def _trainers(optimizer, weight):
    """(optimizer, its parameter group, its state) for each that trains this weight."""
    return [(one, group, getattr(one, "state", {}).get(weight, {})) for one in _optimizers(optimizer)
            for group in one.param_groups if any(weight is parameter for parameter in group["params"])]


def _check_layer(name, layer):
    """ValueError for a layer whose trained weights are computed from others, or have sparse gradients."""
    # weight_norm and its like compute the weight: it is not 0 where their parameters are, and may become NaN.
    computed = any("weight" in key for key in getattr(layer, "parametrizations", ())) or any(
        re.fullmatch(".*weight.*_(g|v|orig)", key) for key in layer._parameters)
    what = "parametrization" if computed else "sparse gradients" if getattr(layer, "sparse", False) else None
    _require(what is None, f"masks cannot follow the {what} of {name}: build it without, or exclude it")


def _check_weight(name, weight, optimizer=None):
    """ValueError for a tensor that cannot be masked, or an optimizer that cannot keep its pruned entries at 0."""
    _require(nn.Parameter in type(weight).__mro__ and not nn.parameter.is_lazy(weight), f"{name} is a "
             f"{type(weight).__name__}, no plain tensor: first pass a batch through lazy layers; exclude it, or use "
             "DistributedDataParallel instead of fully_shard")
    trainers = _trainers(optimizer, weight)
    _require(trainers or optimizer is None, f"the optimizer does not train {name}: build one that does and call "
             "set_optimizer() (assign=True and new layers replace parameters)")
    for one, group, states in trainers:
        kinds = {kind.__name__ for kind in type(one).__mro__}
        fused, eps = group.get("fused") and "Adam" in kinds, group.get("eps")  # computes in float32
        limits = torch.finfo(torch.float32 if fused else weight.dtype)
        _require(not kinds & REFUSED_OPTIMIZERS, f"{type(one).__name__} cannot follow masks: use one that moves each "
                 "weight by its own gradient, as AdamW")
        _require(not isinstance(eps, (int, float)) or eps > limits.tiny * limits.eps / 2,  # less rounds to 0
                 f"eps={eps} is 0 in {weight.dtype}: pruned weights become 0 / 0; use at least eps={limits.tiny:.0e}")
        coded = [key for key, state in states.items() if torch.is_tensor(state) and (
            type(state) not in (torch.Tensor, nn.Parameter) or state.dtype in (torch.int8, torch.uint8))]
        _require(not coded, f"{type(one).__name__} keeps {coded} as codes, whose 0 is not the number 0: use 32 bits")


def _check_settings(own):
    _check_choices(own.regime, own.sparsity, own.distribution, own.grow)
    _require(own.total_steps is not None or own.regime in ("dense", "sst"), f"{own.regime} needs total_steps, the "
             "number of updates that this module will get")
    sizes = (1 if own.total_steps is None else own.total_steps, own.update_interval, own.schedule_power)
    _require(all(0 < size < math.inf for size in sizes), "total_steps, update_interval and schedule_power must be "
             f"above 0 and finite, not {sizes}")
    shares = (own.drop_fraction_start, own.drop_fraction_end, own.schedule_start, own.schedule_end)
    _require(all(0 <= share <= 1 for share in shares) and own.schedule_start <= own.schedule_end, "drop_fraction_start "
             f"and _end and schedule_start <= schedule_end must lie in [0, 1], not {shares}")


def _check_choices(regime="sst", sparsity=0, distribution="er", grow="random"):
    for name, value, choices in (("regime", regime, REGIMES), ("distribution", distribution, DISTRIBUTIONS),
                                 ("grow", grow, GROWTHS)):
        _require(value in choices, f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
    _require(0 <= sparsity < 1, f"sparsity is the fraction of weights pruned, in [0, 1), not {sparsity}")


def _whole_step(step):
    """The step as an int of its own: a tensor may be counted on in place."""
    _require(getattr(step, "is_cpu", True) and step >= 0 and step % 1 == 0,  # a device would be waited for
             f"the step must be a whole number of updates, counted on the host, not {step}")
    return int(step)


def _require(condition, message):
    if not condition:
        raise ValueError(message)
