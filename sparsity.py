"""Sparse training for any PyTorch module: five regimes, one mask update.

Guarantees: a module trained through `SparseTraining` has exactly the sparsity its regime asks for, at every step. Pruned
weights and their gradients are exactly zero, and a weight that grows starts at zero with fresh optimizer state. Use that
cannot keep this is refused in one line; pruned weights that other code has written are cleared, with one warning.

    regime   initial masks    during training                                        paper
    dense    none             nothing                                                Section 2.1
    sst      random, sparse   nothing: the topology is static                        Appendix B.1.1
    dst      random, sparse   drop and grow at constant sparsity (RigL or SET)       Appendix B.1.2, Algorithm 1
    s2d      random, sparse   drop, and grow more than was dropped, until dense      Appendix B.1.3, Eq. (2)
    d2s      dense            drop more than is grown, until sparse                  Appendix B.1.3, Eq. (2)

Paper: "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv 2510.12096), Section
2.1 and Appendix B.1. License: MIT, Copyright (c) 2026 The authors of this repository. Copy this file into your project: it
needs only torch. Masks simulate sparsity: the arithmetic stays dense, so they save neither time nor memory.

    import copy, torch
    from sparsity import SparseTraining

    model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparse = SparseTraining(model, optimizer, "dst", sparsity=0.6, total_steps=500, update_interval=50)
    for step in range(1, 501):
        x = torch.randn(64, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparse.after_backward(step)  # changes the masks when due, then masks the gradients; clip after this
        optimizer.step()
    print(f"loss {loss.item():.3f},", sparse)

In an RL loop, count the module's own updates, and use no other module's loss. A target network starts as sparse as its
model, but a soft target still averages weights that were dropped since; `apply_masks` clears them:

    target = copy.deepcopy(model).requires_grad_(False)
    sparse = SparseTraining(model, optimizer, "dst", sparsity=0.6, total_steps=200, update_interval=20)
    for update in range(1, 201):
        obs, reward, next_obs = torch.randn(64, 8), torch.randn(64, 1), torch.randn(64, 8)
        td_error = model(obs) - (reward + 0.99 * target(next_obs))
        optimizer.zero_grad()
        td_error.square().mean().backward()
        changed = sparse.after_backward(update)
        optimizer.step()
        for average, weight in zip(target.parameters(), model.parameters()):
            average.lerp_(weight.detach(), 0.005)
        if changed:
            sparse.apply_masks(target)
"""

import copy
import functools
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

    shapes: one weight shape per layer in PyTorch's order: (out, in), or (out, in, height, width) for a convolution.
    distribution: "uniform", the same density in every layer; "er", Erdős–Rényi, density = ε·(sum of the shape's sides) /
        (their product), which keeps small layers denser than large ones. Appendix B.1.1, items 1 and 2.
    Returns a float in [0, 1] per layer. Raises ValueError for a sparsity outside [0, 1) or an unknown distribution.
    """
    _require(distribution in DISTRIBUTIONS, f"unknown distribution {distribution!r}: choose one of {DISTRIBUTIONS}")
    _require(0 <= sparsity < 1, f"sparsity is the fraction of weights pruned and must lie in [0, 1), not {sparsity}")
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
    """Algorithm 1 for one layer: drop the smallest active weights, grow the most promising of the rest.

    weight, grad, mask: tensors of one shape; mask is bool, True where a weight is active; grad is the dense gradient.
    drop_fraction: ζ_t, the fraction of active weights to drop, in [0, 1].
    num_active: number of active weights afterwards (default: as many as now). Fewer makes D2S, more makes S2D.
    grow: "gradient" (RigL: largest |gradient|) or "random" (SET; drawn from `generator`, on the generator's device).
    generator: if given, gradients of 0 rank in random order. All other ties go to the lower index.
    active: number of active weights now, if known: it saves a device read.
    Returns the new bool mask and changes nothing. Raises ValueError for shapes or counts that do not fit.
    """
    mask = mask.bool()
    active = int(mask.sum()) if active is None else active
    num_active = active if num_active is None else num_active
    _check_update(weight, grad, mask, drop_fraction, num_active, grow)
    # Line 8. With a sparsity schedule, drop at least as many as the new count asks for.
    kept = active - max(math.floor(drop_fraction * active), active - num_active)
    # Line 9. Inactive weights rank below every active one: an active weight may itself be 0.
    keep = _largest(_magnitude(weight).masked_fill(~mask, -1.0), kept)
    # Line 10. Everything not kept competes, including the weights just dropped, as in the published RigL.
    promise = _uniform(weight, generator) if grow == "random" else _magnitude(grad, generator)
    return keep | _largest(promise.masked_fill(keep, -2.0), num_active - kept)  # line 11


class SparseTraining:
    """Draws a module's masks, applies them throughout training, and changes them as the regime asks.

    module: any `nn.Module`. It masks the trainable weights of linear, convolution, embedding, attention and recurrent
        layers (MASKED_LAYERS); never biases, norms, or what is frozen now.
    optimizer: the `torch.optim` optimizer that trains the module, or a list of several. Its state follows the masks: SGD,
        Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD, and Adafactor, whose moments are of
        rows and columns and stay. Refused: Muon, LBFGS, SparseAdam, 8-bit state, and an `eps` that is 0 in the weights'
        precision. One from elsewhere must not move weights without gradient and state. "dense" and "sst" take None.
    regime, sparsity: see the table above; the fraction of weights pruned always (sst, dst), at first (s2d) or at last (d2s).
    total_steps: T, the number of updates this module gets in all. Required for dst, s2d and d2s: it sets both schedules.
    update_interval: ΔT, updates between topology changes. Not in the paper; 1000 as in published sparse SAC.
    distribution, grow: "er" or "uniform"; "gradient" (RigL) or "random" (SET).
    drop_fraction_start, drop_fraction_end: ζ at steps 0 and T, Eq. (1). Not in the paper; 0.5 to 0 as in sparse SAC. From
        0, D2S is pure magnitude pruning; otherwise gradients decide which of the weights it drops return.
    schedule_start, schedule_end, schedule_power: when s_t begins and ends to change, as fractions of T (not in the paper),
        and λ (2 in the paper), Eq. (2).
    seed: of the masks' own generator; the global one is untouched. By default it is derived from the weights: equal
        after the same `torch.manual_seed`, different for different modules.
    exclude, include: what to leave dense, and what to mask as well: names ("encoder.0", "0.weight"), kinds of layer
        (nn.Conv2d), layers, or tensors, one or a list. An included (n, out, in) counts as n matrices. NoisyLinear's sigma
        shares the mask of its mean.

    Masks are kept here and not in the module, so its `state_dict` keys do not change. Stored weights are masked: a deep
    copy or a hard target update is sparse too. Known and small: Adam counts steps per tensor, so a newly grown weight has
    zero moments and a large step count. Its first moves are 3 to 7 times the learning rate.
    """

    def __init__(self, module, optimizer, regime, sparsity=0.6, total_steps=None, update_interval=1000,
                 distribution="er", grow="gradient", drop_fraction_start=0.5, drop_fraction_end=0.0,
                 schedule_start=0.2, schedule_end=0.8, schedule_power=2.0, seed=None, exclude=(), include=()):
        self.module, self.optimizer, self.regime, self.seed = module, optimizer, regime, seed
        self.total_steps, self.update_interval, self.distribution, self.grow = total_steps, update_interval, distribution, grow
        self.drop_fraction_start, self.drop_fraction_end = drop_fraction_start, drop_fraction_end
        self.schedule_start, self.schedule_end, self.schedule_power = schedule_start, schedule_end, schedule_power
        _check_settings(self, sparsity)
        # A regime is only a schedule: initial sparsity, final sparsity, and whether the topology changes.
        self.initial, self.final, self.dynamic = {
            "dense": (0.0, 0.0, False), "sst": (sparsity, sparsity, False), "dst": (sparsity, sparsity, True),
            "s2d": (sparsity, 0.0, True), "d2s": (0.0, sparsity, True)}[regime]
        self.start, self.end = round(schedule_start * (total_steps or 0)), max(1, round(schedule_end * (total_steps or 0)))
        self.sparsity, self.last_step = self.initial, 0  # s_t of the masks now; the latest step given to `update_topology`
        self.masks, self.active = {}, {}  # weight's name -> bool tensor, True where active; -> how many are, on the host
        self.first_masks, self.last_update = {}, {}  # by name too: masks before any change; what the latest change did
        self.waiting = []  # names of the layers whose change waits for a usable gradient
        self._leaders, self._matrices, self._warned = {}, {}, set()  # name -> whose mask it has; -> how many matrices it is
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

        step: number of this module's updates, this one included: 1, 2, ... It may skip multiples of the interval, as the
        steps of a delayed module do. Call it after `backward` and before `mask_gradients`: the dense gradients in `.grad`
        rank growth, so they must come from the module's own loss only. A layer whose gradient ranks nothing (missing, all
        zero, or not finite) changes at the next step that has a usable one.
        scores: weight's name -> dense tensor of its shape that ranks growth instead of the gradient.
        """
        step = _whole_step(step)
        begins = self._begins_change(step)
        self._check_weights(step, begins or bool(self.waiting))
        self.last_step = step
        if not (begins or self.waiting):
            return False
        late = self.waiting
        if begins:
            self.sparsity = scheduled_sparsity(step, self.initial, self.final, self.start, self.end, self.schedule_power)
        counts = self._counts(self.masks, self.sparsity)  # Eq. (2), with ER solved anew for s_t
        if begins:  # a layer that is dense before and after would only regrow what it drops
            self.waiting = [n for n, mask in self.masks.items() if not self.active[n] == counts[n] == mask.numel()]
            if stuck := [name for name in self.waiting if name in late]:
                self._warn("stuck", f"the topology of {stuck[0]} stands still: its gradients since the last interval were missing, "
                           "zero or not finite. Call update_topology between backward and zero_grad, or exclude the layer")
        zeta = drop_fraction(step, self.total_steps, self.drop_fraction_start, self.drop_fraction_end)  # Eq. (1)
        weights = {name: weight for name, weight, _ in self._tensors()}
        usable = self._usable(weights, scores)
        for number, name in enumerate(self.waiting):
            if name in usable:
                generator = self._generator(step, number, weights[name].device)
                self._change(name, weights, usable[name], zeta, counts[name], generator)
        self.waiting = [name for name in self.waiting if name not in usable]
        return bool(usable) or not self.waiting

    def _change(self, name, weights, score, zeta, count, generator):
        """One layer's topology change, and the record of it."""
        weight, mask, active, first = weights[name], self.masks[name], self.active[name], self.first_masks[name]
        new_mask = update_mask(weight, score, mask, zeta, count, self.grow, generator, active)
        # Line 12. A weight dropped and regrown at once is in both masks: it keeps its value and moments. Others start anew.
        for follower in [other for other, leader in self._leaders.items() if leader == name]:
            self._reset_pruned(weights[follower], mask & new_mask)
        dropped = max(math.floor(zeta * active), active - count)
        left, kept, size = _read(mask & ~new_mask, first & new_mask, first)
        self.last_update[name] = {"dropped": dropped, "grown": count - active + dropped, "regrown": dropped - left,
                                  "initial_kept": kept / max(1, size)}
        mask.copy_(new_mask)  # in place: a captured graph reads this tensor
        self.active[name] = count

    def is_update_step(self, step):
        """Whether `update_topology(step)` would change anything."""
        return bool(self.waiting) or self._begins_change(_whole_step(step))

    def _begins_change(self, step):  # at the schedule's end as well, or D2S would stop short of its final sparsity
        return self.dynamic and (self._crosses_interval(step) or self.initial != self.final and self.last_step < self.end <= step)

    def _crosses_interval(self, step):
        return step // self.update_interval > self.last_step // self.update_interval

    @torch.no_grad()
    def mask_gradients(self):
        """Zeroes the gradients of pruned weights. Before clipping: they must not count towards the norm."""
        for _, weight, mask in self._tensors():
            if weight.grad is not None:
                _zero_pruned(weight.grad, mask)
                if not torch.compiler.is_compiling():
                    weight.grad._masked_version = weight.grad._version  # `_usable` asks whether topology came first

    # ---- reading, copying, saving ----

    @torch.no_grad()
    def apply_masks(self, module=None):
        """Zeroes in `module` what is pruned here: this module (default), or one of the same layout, such as a soft target.

        Either may be wrapped by torch.compile, DataParallel or AveragedModel. ValueError for another layout.
        """
        module = self.module if module is None else module
        theirs = _plain_parameters(module)
        pairs = [(theirs.get(name), mask) for name, _, mask in self._tensors()]
        _require(all(weight is not None and weight.shape == mask.shape for weight, mask in pairs),
                 f"parameter names or shapes of {type(module).__name__} differ from the masked module's")
        for weight, mask in pairs:
            _zero_pruned(weight, mask.to(weight.device))

    @torch.no_grad()
    def set_optimizer(self, optimizer):
        """Follows this optimizer (or list) from now on: one built anew, or built after parameters were replaced."""
        self.optimizer = optimizer
        self._take_over()

    def density(self):
        """Fraction of the module's maskable weights that are active: 1.0 if it is dense."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(self.active.values()) / total if total else 1.0

    def layer_densities(self):
        """Weight's name -> fraction of it that is active; empty for regime "dense"."""
        return {name: self.active[name] / mask.numel() for name, mask in self.masks.items()}

    def movement(self):
        """What topology changes did, as floats, without a device read; NaN before the first. Per layer: `last_update`.

        dropped, grown: how many weights each layer's latest change dropped and grew (Algorithm 1, lines 9 and 10);
        regrown: dropped and grown back at once; initial_kept: fraction of the first masks that is still active.
        """
        first = self._counts(self.masks, self.initial) if self.last_update else {}
        kept = sum(n * self.last_update.get(name, {}).get("initial_kept", 1.0) for name, n in first.items())
        return {key: float(sum(layer[key] for layer in self.last_update.values())) if first else math.nan
                for key in ("dropped", "grown", "regrown")} | {"initial_kept": kept / sum(first.values()) if first else math.nan}

    def __repr__(self):
        """A table of layers, shapes and densities."""
        rows = [(name, "x".join(map(str, self.masks[name].shape)), density) for name, density in self.layer_densities().items()]
        rows.append(("all", str(sum(mask.numel() for mask in self.masks.values())), self.density()))
        return "\n".join([f"SparseTraining of {type(self.module).__name__}: {self.regime}, step {self.last_step}"]
                         + [f"  {name:<30} {shape:>16}  density {density:.4f}" for name, shape, density in rows])

    def state_dict(self):
        """Tensors and plain values: masks (bool), seed, schedule and progress. Names are the unwrapped module's."""
        names = ("regime", "last_step", "sparsity", "seed", "masks", "first_masks", "waiting", "last_update")
        return copy.deepcopy({name: getattr(self, name) for name in names} | {"schedule": self._schedule()})

    def _schedule(self):
        names = ("total_steps", "update_interval", "distribution", "grow", "drop_fraction_start", "drop_fraction_end",
                 "initial", "final", "schedule_start", "schedule_end", "schedule_power")  # the last three: if it changes
        return {name: getattr(self, name) for name in names[:8 if self.initial == self.final else None] if self.dynamic}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restores what `state_dict` returned and clears what it prunes: load the module and the optimizer before.

        ValueError, before anything changes, if it belongs to another regime, layout, sparsity, distribution or schedule.
        """
        masks = self.check_state_dict(state)
        self.last_step, self.sparsity, self.seed = state["last_step"], state["sparsity"], state["seed"]
        # States of older versions have no first masks; they follow from the seed.
        first = state["first_masks"] if "first_masks" in state else self._first_masks(self.first_masks)
        for own, saved in ((self.masks, masks), (self.first_masks, first)):
            for name, mask in own.items():
                mask.copy_(saved[name])
        self.active = {name: int(mask.sum()) for name, mask in masks.items()}
        self.waiting, self.last_update = list(state.get("waiting", [])), copy.deepcopy(state.get("last_update", {}))
        self._take_over()

    def check_state_dict(self, state):
        """ValueError for a state that `load_state_dict` would not accept. Returns its masks by this object's names."""
        _require(state["regime"] == self.regime,
                 f"the saved masks are for regime {state['regime']!r}, this module trains {self.regime!r}")
        masks = state["masks"]
        if masks.keys() != self.masks.keys():  # older versions saved a wrapper's names
            masks = dict(zip(_plain_names(masks), masks.values()))
        saved, own = ({name: tuple(mask.shape) for name, mask in each.items()} for each in (masks, self.masks))
        odd = [name for name in saved | own if saved.get(name) != own.get(name)]
        _require(not odd, f"the saved masks do not fit this module, first at {odd[:1]}")
        saved, own = state.get("schedule", {}), self._schedule()
        odd = [f"{key}={saved[key]} (here {own.get(key)})" for key in saved if saved[key] != own.get(key)]
        _require(not odd, f"the masks were saved under {', '.join(odd)}: build with that, or delete state['schedule'] to change it")
        low, high = sorted((self.initial, self.final))
        wanted = self._counts(masks, state["sparsity"]) if low <= state["sparsity"] <= high else {}
        _require(all(mask.sum() == wanted.get(name) for name, mask in masks.items() if name not in state.get("waiting", ())),
                 "the saved masks do not match this sparsity and distribution")
        return masks

    # ---- masks, weights and optimizer state ----

    def _draw_masks(self, sparsity, exclude, include):
        weights, self._leaders, self._matrices, dense = _choose_weights(self.module, exclude, include)
        _check_counts(self, self._counts(weights, sparsity), weights)
        if dense:
            self._warn("dense", f"left dense: {', '.join(dense)}; mask them by include=, or confirm by exclude=")
        self._own_seed = self.seed is None
        if self._own_seed:
            self.seed = hash(tuple(value for weight in weights.values() for value in weight.flatten()[:64].tolist()))
        self.masks, self.active = self._first_masks(weights), self._counts(weights, self.initial)
        self.first_masks = copy.deepcopy(self.masks) if self.dynamic else {}
        self._take_over()

    def _first_masks(self, weights):
        """Exact counts, never Bernoulli draws; drawn on the CPU, so that every device has the same masks."""
        generator, counts = torch.Generator().manual_seed(self.seed), self._counts(weights, self.initial)
        return {name: _largest(_uniform(weight, generator, "cpu"), counts[name]).to(weight.device)
                for name, weight in weights.items()}

    def _counts(self, weights, sparsity):
        """Active weights per layer, exact in sum: shares are rounded down, the largest remainders up. weights: by name."""
        copies = [self._matrices[name] for name in weights]  # n matrices are n layers of one density
        shapes = [tuple(w.shape) if n == 1 else tuple(w.shape[-2:]) for w, n in zip(weights.values(), copies)]
        densities = layer_densities([shape for shape, n in zip(shapes, copies) for _ in range(n)], sparsity, self.distribution)
        shares = [densities[sum(copies[:layer])] * w.numel() for layer, w in enumerate(weights.values())]
        counts = [math.floor(share + 1e-6) for share in shares]
        missing = math.floor((1.0 - sparsity) * sum(weight.numel() for weight in weights.values()) + 0.5) - sum(counts)
        by_remainder = sorted(range(len(shares)), key=lambda layer: counts[layer] - shares[layer])
        for layer in by_remainder[:max(0, missing)]:
            counts[layer] += 1
        return dict(zip(weights, counts))

    def _tensors(self):
        """(name, weight, mask) of all masked weights. Looked up at each use: `.to` and loading replace parameters."""
        parameters = _plain_parameters(self.module) if self.masks else {}
        for name, leader in self._leaders.items():
            weight, mask = parameters.get(name), self.masks[leader]
            if weight is None or weight.shape != mask.shape:
                raise RuntimeError(f"{name} is gone or has another shape: its layer was replaced, tied, pruned or parametrized "
                                   "after SparseTraining was built; build it after that")
            if mask.device != weight.device:  # the module has moved: the masks follow
                self.masks[leader] = mask = mask.to(weight.device)
            yield name, weight, mask

    def _reset_pruned(self, weight, kept):
        """Where not `kept`, sets the weight to 0 and its optimizer state to that of a new weight."""
        _zero_pruned(weight, kept)
        for optimizer in _optimizers(self.optimizer):
            group = next((g for g in optimizer.param_groups if any(weight is p for p in g["params"])), {})
            for key, state in getattr(optimizer, "state", {}).get(weight, {}).items():  # exp_avg, momentum_buffer, ...
                if torch.is_tensor(state) and state.shape == weight.shape:
                    _zero_pruned(state, kept)
                    if initial := group.get(INITIAL_STATE.get(key), 0):
                        state.masked_fill_(~kept, complex(initial, initial) if state.is_complex() else initial)

    def _generator(self, step, number, device):
        """For one layer at one step: there is no state to save, and a resumed run draws the same numbers.

        On the weights' device: drawing 150 million numbers on the CPU would stall a GPU for a second. So devices differ in
        what they grow at random; rounding makes their weights differ anyway.
        """
        return None if device.type == "meta" else torch.Generator(device).manual_seed(hash((self.seed, step, number)))

    # ---- guards ----

    def _take_over(self):
        """Checks that weights and optimizer can follow the masks, and clears what these prune."""
        tensors = list(self._tensors())
        self._checked = False
        OWNERS.update((weight, weakref.ref(self)) for _, weight, _ in tensors)
        _check_trained(self, tensors)
        for _, weight, mask in tensors:
            self._reset_pruned(weight, mask)
        self._versions = {name: weight._version for name, weight, _ in tensors}

    def _check_weights(self, step, due):
        """At the first step, at topology changes, and once per interval in between: refuses weights that the optimizer no
        longer trains, and clears pruned ones that are not 0. Only here and at changes does training read from the device."""
        if not self.masks:
            return
        _require(step >= self.last_step, f"step {step} comes after step {self.last_step}: count updates over the whole training, "
                 "not per epoch; load_state_dict goes back to an earlier state")
        due = due or self._crosses_interval(step)
        if not due and self._checked or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        tensors = list(self._tensors())
        _check_trained(self, tensors)
        written = [(name, weight, mask) for name, weight, mask in tensors if due or weight._version != self._versions[name]]
        for (name, weight, mask), count in zip(written, _read(*((weight != 0) & ~mask for _, weight, mask in written))):
            if count:
                self._reset_pruned(weight, mask)
                self._warn("written", f"{count} pruned weights of {name} were not 0 at step {step} and were cleared. List all "
                           "optimizers of the module, call set_optimizer() for a new one, and apply_masks() after writing weights")
        self._checked = True

    def _usable(self, weights, scores):
        """name -> what ranks growth, for the waiting layers where it can. RuntimeError if the gradients are masked already."""
        if self.grow == "random":
            return {name: weights[name] for name in self.waiting}
        ranks = {name: weights[name].grad if scores is None else scores[name] for name in self.waiting}
        ranks = {name: score for name, score in ranks.items() if score is not None}
        informs = _read(*(score.isfinite().all() & (score != 0).any() for score in ranks.values()))
        ranks = {name: score for (name, score), informative in zip(ranks.items(), informs) if informative or score.is_meta}
        for name, score in ranks.items():
            writes = score._version - getattr(score, "_masked_version", -9)  # since it was masked; clipping is one
            if self.active[name] < score.numel() and (
                    writes == 0 or writes == 1 and not any(_read((score != 0) & ~self.masks[name]))):
                raise RuntimeError("the gradients are masked already and cannot rank growth: call update_topology before "
                                   "mask_gradients and optimizer.step, or after_backward instead of both")
        return ranks

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
    """|tensor|, finite, so that counts stay exact. With a generator, zeros become random numbers in (-1, 0]: they rank last
    as before, and among themselves at random, as position says nothing about a weight."""
    scores = torch.nan_to_num(tensor.detach().abs())
    return scores if generator is None else scores.where(scores != 0, -_uniform(tensor, generator).to(scores))


def _uniform(like, generator, device=None):
    """Random scores in float64: float32 has 2^24 values, too few to rank a layer of millions without ties."""
    drawn = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=generator.device if generator else like.device)
    return drawn.to(like.device if device is None else device)


def _zero_pruned(tensor, mask):
    """tensor ⊙ mask, in place, on the bits as integers: NaN × 0 is NaN, but a NaN's bits times 0 are 0.0.

    Vectorized; `masked_fill_` with a random mask takes 30 times as long on a CPU. There PyTorch first writes the mask out as
    integers: in pieces, these stay in the cache, which is six times faster again for millions of weights.
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


# ---- guards: what can be masked, and by whom it may be trained ----

# Chosen by kind of layer: by number of dimensions, LayerNorm([4, 8]) and attention's bias_k would be masked. What one
# tensor stacks (q, k and v, or a GRU's gates) counts as one weight.
MASKED_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention,
                 nn.RNNBase, nn.RNNCellBase)
MASKED_NAMES = re.compile(r"weight|in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# Muon orthogonalizes matrices, LBFGS mixes the steps of all weights, SparseAdam needs sparse gradients.
REFUSED_OPTIMIZERS = ("Muon", "LBFGS", "SparseAdam")
INITIAL_STATE = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop's and Adagrad's do not start at 0
OWNERS = WeakTensorKeyDictionary()  # weight -> weak reference to the latest SparseTraining that masks it
OLD_NAMES = {"leave_out": "exclude", "power": "schedule_power", "drop_initial": "drop_fraction_start",
             "drop_final": "drop_fraction_end"}  # keyword arguments that were renamed


def maskable_weights(module, exclude=(), include=()):
    """name -> weight that SparseTraining masks; `exclude` and `include` as there. ValueError for what masks cannot follow."""
    return _choose_weights(module, exclude, include)[0]


def _choose_weights(module, exclude, include):
    """(name -> weight, name -> whose mask it has, name -> number of matrices, names of matrices left dense)."""
    excluded, included = (set().union(*_find(module, choices)) for choices in (exclude, include))
    masked, means, dense = {}, {}, {}  # by id, as two layers may share one weight: its matrices, its mean; by name: its id
    for path, layer in module.named_modules():
        standard = isinstance(layer, MASKED_LAYERS) and path not in excluded
        if standard:
            _check_layer(path or type(layer).__name__, layer)
        for short, weight in layer._parameters.items():
            name = f"{path}.{short}" if path else short
            if weight is None or not weight.requires_grad or name in excluded:
                continue
            if standard or name in included:
                _check_tensor(name, weight)
            matrix = not (nn.parameter.is_lazy(weight) or weight.ndim < 2 or "bias" in short or isinstance(layer, NORMS))
            if standard and MASKED_NAMES.fullmatch(short):
                masked[id(weight)] = 1
            elif matrix and name in included:
                masked[id(weight)] = math.prod(weight.shape[:-2])
            elif matrix:
                dense[name] = id(weight)
            for other in {short.replace("sigma", "mu"), re.sub("_?sigma_?", "", short)} - {short}:
                if matrix and getattr(layer._parameters.get(other), "shape", None) == weight.shape:
                    means[id(weight)] = id(layer._parameters[other])  # NoisyLinear
    every = {name: id(weight) for name, weight in module.named_parameters(remove_duplicate=False)}
    masked = {weight: n for weight, n in masked.items() if weight not in {every.get(name) for name in excluded}}
    means = {weight: mean for weight, mean in means.items() if mean in masked}
    for names in _find(module, include):
        _require(any(every.get(name) in masked | means for name in names),
                 f"include: {min(names)!r} holds no trainable matrix of weights")
    weights = {name: weight for name, weight in _plain_parameters(module).items()
               if id(weight) in masked.keys() | means and weight.numel()}
    names = {id(weight): name for name, weight in weights.items()}
    leaders = {name: names[means.get(id(weight), id(weight))] for name, weight in weights.items()}
    weights = {name: weight for name, weight in weights.items() if leaders[name] == name}
    _require(weights, f"{type(module).__name__} trains no weight of a layer that is masked: name weights by include=")
    return (weights, leaders, {name: masked[id(weight)] for name, weight in weights.items()},
            [name for name, weight in dense.items() if weight not in names])


def _find(module, choices):
    """For each choice (a name, a kind of layer, a layer or a tensor) the names of all layers and parameters it covers."""
    things = dict(module.named_modules()) | dict(module.named_parameters(remove_duplicate=False))
    for choice in [choices] if isinstance(choices, (str, type, nn.Module, torch.Tensor)) else choices:
        roots = [f".{name}." if name else "." for name, thing in things.items() if thing is choice
                 or isinstance(choice, type) and isinstance(thing, choice) or isinstance(choice, str) and name == choice]
        what = repr(choice) if isinstance(choice, (str, type)) else f"that is the given {type(choice).__name__}"
        _require(roots, f"{type(module).__name__} has no layer or weight {what}")
        yield {name for name in things if f".{name}.".startswith(tuple(roots))}


def _plain_names(names):
    """Names without what torch.compile ("_orig_mod.") and DataParallel or AveragedModel ("module.") add."""
    names = [name.replace("_orig_mod.", "") for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def _plain_parameters(module):
    named = dict(module.named_parameters())
    return dict(zip(_plain_names(named), named.values()))


def _optimizers(optimizer):
    """The optimizer, or those of a list, and those that a wrapper holds (Lookahead, SAM, ZeRO)."""
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
    for one in found:  # grows meanwhile
        inner = [value for value in vars(one).values() if isinstance(value, torch.optim.Optimizer)]
        found += [value for value in inner if all(value is not other for other in found)]
        _require(hasattr(one, "param_groups"), f"{type(one).__name__} is no torch.optim optimizer: it has no param_groups")
    return found


def _check_trained(own, tensors):
    """Raises if the optimizer of `own` does not train these (name, weight, mask), or cannot keep pruned ones at 0."""
    optimizers = _optimizers(own.optimizer)
    refused = [kind.__name__ for one in optimizers for kind in type(one).__mro__ if kind.__name__ in REFUSED_OPTIMIZERS]
    _require(not refused, f"{''.join(refused[:1])} cannot follow masks: use one that updates each weight on its own, as AdamW")
    _require(optimizers or not own.dynamic, f"{own.regime} resets the optimizer's state at changes: give it the optimizer")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    _require(not (tensors and own._own_seed and distributed and torch.distributed.get_world_size() > 1),
             "each process would draw masks from its own weights: give SparseTraining the same seed in all of them")
    groups = [(one, group, {id(p) for p in group["params"]}) for one in optimizers for group in one.param_groups]
    for name, weight, _ in tensors:
        _check_tensor(name, weight)
        _require(OWNERS.get(weight, lambda: own)() in (own, None),
                 f"{name} is also masked by a SparseTraining built later: exclude it from one, or keep only one")
        trainers = [(one, group) for one, group, members in groups if id(weight) in members]
        _require(trainers or not optimizers, f"the optimizer does not train {name}: give SparseTraining the module's own; if "
                 "parameters were replaced (assign=True, a new layer), build a new one and call set_optimizer()")
        for one, group in trainers:
            # Fused Adam computes in float32 whatever the weights are.
            dtype = torch.float32 if group.get("fused") and isinstance(one, torch.optim.Adam) else weight.dtype
            eps, least = group.get("eps"), torch.finfo(dtype).smallest_normal  # half the smallest subnormal rounds to 0
            _require(not isinstance(eps, (int, float)) or eps > least * torch.finfo(dtype).eps / 2, f"eps={eps} is 0 in {dtype}, and a "
                     f"pruned weight would become 0 / 0: give {type(one).__name__} at least eps={least:.0e}")
            for key, state in getattr(one, "state", {}).get(weight, {}).items():
                coded = torch.is_tensor(state) and state.shape == weight.shape and (
                    state.dtype in (torch.int8, torch.uint8) or type(state) not in (torch.Tensor, nn.Parameter))
                _require(not coded, f"{type(one).__name__} keeps {key} as codes, whose 0 is not the number 0: use its 32-bit form")


def _check_layer(name, layer):
    """ValueError for a layer whose trained weights are computed from others, or have sparse gradients."""
    own = [key for key in (*layer._parameters, *getattr(layer, "parametrizations", ())) if "weight" in key]
    # weight_norm and its like compute the weight: it is not 0 where their parameters are, and may become NaN.
    computed = any(key not in layer._parameters or key.endswith(("_g", "_v", "_orig")) for key in own)
    _require(not (computed or getattr(layer, "sparse", False)) or not any(p.requires_grad for p in layer.parameters()),
             f"masks cannot follow the {'parametrization' if computed else 'sparse gradients'} of {name}: build it without, or "
             "exclude it")


def _check_tensor(name, weight):
    _require(not nn.parameter.is_lazy(weight), f"{name} has no shape yet: first pass a batch through the module")
    _require(nn.Parameter in type(weight).__mro__, f"{name} is a {type(weight).__name__}, and masks need plain tensors: use "
             "DistributedDataParallel instead of fully_shard, or exclude it")


def _check_settings(own, sparsity):
    for what, choices in (("regime", REGIMES), ("distribution", DISTRIBUTIONS), ("grow", GROWTHS)):
        _require(getattr(own, what) in choices, f"unknown {what} {getattr(own, what)!r}: choose one of {', '.join(choices)}")
    _require(0 <= sparsity < 1, f"sparsity is the fraction of weights pruned and must lie in [0, 1), not {sparsity}")
    _require(own.total_steps is not None or own.regime in ("dense", "sst"),
             f"{own.regime} needs total_steps, the number of updates this module will get: it sets the schedule")
    ranges = (("total_steps", 1, math.inf), ("update_interval", 1, math.inf), ("drop_fraction_start", 0, 1),
              ("drop_fraction_end", 0, 1), ("schedule_start", 0, own.schedule_end), ("schedule_end", 0, 1),
              ("schedule_power", 0, math.inf))
    for name, low, high in ranges:
        value = getattr(own, name)
        _require(value is None or low <= value <= high and value != math.inf and (low or high < math.inf or value > 0),
                 f"{name} must lie between {low} and {high}, not {value}")


def _check_counts(own, counts, weights):
    """ValueError for a layer without weights, and a warning of a DST whose topology would never change."""
    empty = [name for name, count in counts.items() if count == 0]
    _require(not empty, f"{''.join(empty[:1])} keeps no weight at this sparsity, and its layer would pass nothing on: lower the "
                        "sparsity, or exclude it")
    most = max((count for name, count in counts.items() if count < weights[name].numel()), default=None)
    if own.regime == "dst" and most is not None:
        steps = (own.update_interval, own.total_steps // own.update_interval * own.update_interval)
        zeta = max(drop_fraction(step, own.total_steps, own.drop_fraction_start, own.drop_fraction_end) for step in steps)
        if own.update_interval > own.total_steps or zeta * most < 1:
            own._warn("static", f"the topology never changes, as in sst: lower update_interval ({own.update_interval}), or raise "
                      f"total_steps ({own.total_steps})")


def _check_update(weight, grad, mask, drop_fraction, num_active, grow):
    _require(grow in GROWTHS, f"unknown grow {grow!r}: choose one of {', '.join(GROWTHS)}")
    _require(weight.shape == grad.shape == mask.shape, f"weight {tuple(weight.shape)}, grad {tuple(grad.shape)} and mask "
             f"{tuple(mask.shape)} must have one shape")
    _require(0 <= drop_fraction <= 1, f"drop_fraction must lie in [0, 1], not {drop_fraction}")
    _require(0 <= num_active <= mask.numel(), f"num_active is {num_active}, but the layer has {mask.numel()} weights")


def _whole_step(step):
    """The step as an int of its own: a tensor may be counted on in place."""
    _require(not torch.is_tensor(step) or step.device.type == "cpu", "the step is on a device, and reading it would wait for "
             "that device: count on the host")
    _require(step >= 0 and step == int(step), f"the step must be a whole number of updates, not {step}")
    return int(step)


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _accept_old_names(function):
    """Also of NumPy's scalars makes Python's numbers: a state with the former does not load under weights_only."""
    @functools.wraps(function)
    def renamed(*arguments, **options):
        plain = lambda value: value.item() if hasattr(value, "dtype") and not torch.is_tensor(value) else value
        return function(*map(plain, arguments), **{OLD_NAMES.get(name, name): plain(value) for name, value in options.items()})
    return renamed


SparseTraining.__init__ = _accept_old_names(SparseTraining.__init__)
