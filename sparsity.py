"""Sparse training for any PyTorch module: five regimes, one mask update.

What it claims: a module trained through `SparseTraining` holds exactly the sparsity its regime asks for, at every
step. Pruned weights, their gradients and their optimiser moments are exactly zero, not nearly.

    regime   masks at the start   what happens then                                  paper
    dense    none                 nothing                                            Section 2.1
    sst      random, sparse       nothing: the topology stands still                 Appendix B.1.1
    dst      random, sparse       drop and grow at constant sparsity (RigL or SET)   Appendix B.1.2, Algorithm 1
    s2d      random, sparse       drop, and grow more than was dropped, to dense     Appendix B.1.3, Eq. (2)
    d2s      dense                drop more than is grown, down to sparse            Appendix B.1.3, Eq. (2)

Paper: "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning", Section 2.1 and
Appendix B.1. This file needs torch alone; copy it into your project. Masks simulate sparsity: the arithmetic stays
dense, so they save neither time nor memory by themselves.

    import torch
    from sparsity import SparseTraining                                                                 # 1 of 4

    model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparse = SparseTraining(model, optimizer, "dst", sparsity=0.6, total_steps=500, update_interval=50)  # 2
    for step in range(1, 501):
        x = torch.randn(64, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparse.update_topology(step)                                                                    # 3
        sparse.mask_gradients()                                                                         # 4
        optimizer.step()
    print(f"loss {loss.item():.3f}, density {sparse.density():.3f}, by layer {sparse.layer_densities()}")
"""

import math

import torch

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
DISTRIBUTIONS = ("er", "uniform")
GROWTHS = ("gradient", "random")


def layer_densities(shapes, sparsity, distribution="er"):
    """Share of weights each layer keeps, so that all layers together keep exactly `1 - sparsity` of them.

    shapes: one weight shape a layer, PyTorch's order: (out, in), or (out, in, height, width) for a convolution.
    distribution: "uniform", the same density everywhere; "er", Erdős–Rényi, density = ε·(sum of the shape's sides) /
        (their product), which leaves small layers denser than large ones. Appendix B.1.1, items 1 and 2.
    Returns a float in [0, 1] a layer. Raises ValueError for a sparsity outside [0, 1) or an unknown distribution.
    """
    _check_choice("distribution", distribution, DISTRIBUTIONS)
    _check_sparsity(sparsity)
    if distribution == "uniform" or sparsity == 0:  # ε·p can land at 1 + 1e-10 when nothing is pruned
        return [1.0 - sparsity] * len(shapes)

    sizes = [math.prod(shape) for shape in shapes]
    ratios = [sum(shape) / math.prod(shape) for shape in shapes]  # linear: (n_in + n_out) / (n_in · n_out)
    dense = set()  # layers whose share would pass 1: they stay whole, and ε is solved again for the others
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
    """ζ_t, the share of active weights that an update replaces: a cosine from `initial` to `final`.  Eq. (1)"""
    progress = min(max(step / total_steps, 0.0), 1.0)
    return final + 0.5 * (initial - final) * (1.0 + math.cos(math.pi * progress))


def scheduled_sparsity(step, initial, final, start, end, power=2.0):
    """s_t: `initial` until `start`, `final` from `end` on, polynomial of degree `power` (λ) between.  Eq. (2)"""
    if step >= end:  # the ends are returned as given: rounding must not leave D2S at 0.5996
        return final
    if step <= start:
        return initial
    return final + (initial - final) * (1.0 - (step - start) / (end - start)) ** power


def update_mask(weight, grad, mask, drop_fraction, num_active=None, grow="gradient", generator=None):
    """Algorithm 1 for one layer: drop the weakest active weights, grow the most promising of the rest.

    weight, grad, mask: tensors of one shape; mask is bool, True where a weight is active; grad is the dense gradient.
    drop_fraction: ζ_t, the share of active weights to drop, in [0, 1].
    num_active: how many shall be active afterwards (default: as many as now). Fewer makes D2S, more makes S2D.
    grow: "gradient" (RigL: largest |gradient|) or "random" (SET; drawn from `generator`, on its own device).
    Returns the new bool mask; weight and mask are left as they were.
    """
    _check_choice("grow", grow, GROWTHS)
    if not weight.shape == grad.shape == mask.shape:
        raise ValueError(f"weight {tuple(weight.shape)}, grad {tuple(grad.shape)} and mask {tuple(mask.shape)} "
                         "must have one shape")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is a share of the active weights and lies in [0, 1], not {drop_fraction}")
    mask = mask.bool()
    active = int(mask.sum())
    num_active = active if num_active is None else num_active
    if not 0 <= num_active <= mask.numel():
        raise ValueError(f"num_active is {num_active}, but the layer has {mask.numel()} weights")
    return _drop_and_grow(weight, grad, mask, drop_fraction, active, num_active, grow, generator)


def _drop_and_grow(weight, grad, mask, drop_fraction, active, num_active, grow, generator):
    """`update_mask` with the active count known, so that nothing has to be read back from the device."""
    # Algorithm 1, line 8; with a schedule, at least as many as the new count asks for.
    dropped = max(math.floor(drop_fraction * active), active - num_active)
    kept = active - dropped
    # Line 9. Inactive weights are ranked below every active one: an active weight may well be 0 itself.
    magnitude = torch.nan_to_num(weight.detach().abs()).masked_fill(~mask, -1.0)  # a NaN must not upset the count
    keep = _largest(magnitude, kept)
    # Line 10. Everything not kept competes, the weights just dropped included, as in the published RigL.
    if grow == "gradient":
        promise = torch.nan_to_num(grad.detach().abs())
    else:
        promise = _uniform(weight.shape, generator).to(weight.device)
    return keep | _largest(promise.masked_fill(keep, -1.0), num_active - kept)  # line 11


def _largest(scores, count):
    """Bool mask of exactly `count` largest scores; ties go to the lower index. No sort, and no host synchronisation."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values  # the smallest score that still gets in
    above = flat > threshold
    tied = flat == threshold
    places = count - above.sum()  # how many of the tied get in
    return (above | (tied & (tied.cumsum(0) <= places))).view(scores.shape)


def _zero_pruned(tensor, mask):
    """tensor ⊙ mask, in place, on the bits as integers: NaN × 0 is NaN, but a NaN's bits times 0 are 0.0.

    Vectorised; `masked_fill_` with a random mask takes 30 times as long on a CPU. There, PyTorch first writes the mask out
    as integers: piece by piece these stay in the cache, which makes it six times faster again for millions of weights.
    """
    bits = tensor.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
    if tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous():
        for piece, kept in zip(bits.view(-1).split(2 ** 20), mask.view(-1).split(2 ** 20)):
            piece.mul_(kept)
    else:
        bits.mul_(mask)


def _uniform(shape, generator):
    """Random scores in float64: float32 has 2^24 values, too few to rank a layer of millions without ties."""
    device = generator.device if generator is not None else "cpu"
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)


class SparseTraining:
    """Draws a module's masks, keeps them true through training, and moves them as the regime asks.

    module: any `nn.Module`. Its weights with two dimensions or more are masked; biases and norms never.
    optimizer: the `torch.optim` optimiser that trains it (its moments follow the masks).
    regime: "dense", "sst", "dst", "s2d" or "d2s"; see the table at the top of this file.
    sparsity: share of weights pruned: held (sst, dst), left behind (s2d) or reached (d2s). In [0, 1).
    total_steps: T, how many updates this module will get in all: it sets both schedules.
    update_interval: ΔT, updates between two changes of topology.
        The paper gives no ΔT; 1000 is the published setting for sparse SAC.
    distribution, grow: "er" or "uniform"; "gradient" (RigL) or "random" (SET).
    drop_initial, drop_final: ζ at step 0 and at T, Eq. (1). Not in the paper; 0.5 to 0 as for sparse SAC.
    schedule_start, schedule_end: when s_t moves, as shares of T, Eq. (2). Not in the paper; 0.2 and 0.8.
    power: λ of Eq. (2); the paper's 2.
    seed: masks come from a generator of their own, so that drawing them leaves the caller's random numbers alone.

    The masks live here and not in the module: the keys of its `state_dict` stay as they were, and because the stored
    weights are already masked, a deep copy or a hard target update is sparse by itself. A soft target is not: after
    a change of topology its average still holds weights that were dropped. `apply_masks(target)` clears them.

    Known and small: Adam counts its steps by tensor, not by weight, so a freshly grown weight has zero moments and a
    large step count; its first moves are 3 to 7 times the learning rate.
    """

    def __init__(self, module, optimizer, regime, sparsity=0.6, total_steps=1_000_000, update_interval=1000,
                 distribution="er", grow="gradient", drop_initial=0.5, drop_final=0.0,
                 schedule_start=0.2, schedule_end=0.8, power=2.0, seed=0):
        _check_choice("regime", regime, REGIMES)
        _check_choice("distribution", distribution, DISTRIBUTIONS)
        _check_choice("grow", grow, GROWTHS)
        _check_sparsity(sparsity)
        if total_steps < 1 or update_interval < 1:
            raise ValueError(f"total_steps ({total_steps}) and update_interval ({update_interval}) must be at least 1")
        if not 0 <= schedule_start <= schedule_end <= 1:
            raise ValueError(f"0 <= schedule_start <= schedule_end <= 1 must hold, not {schedule_start}, {schedule_end}")
        if not (0 <= drop_initial <= 1 and 0 <= drop_final <= 1):
            raise ValueError(f"drop_initial ({drop_initial}) and drop_final ({drop_final}) must lie in [0, 1]")
        self.module, self.optimizer, self.regime = module, optimizer, regime
        self.total_steps, self.update_interval = total_steps, update_interval
        self.distribution, self.grow = distribution, grow
        self.drop_initial, self.drop_final = drop_initial, drop_final
        self.power = power
        self.start, self.end = round(schedule_start * total_steps), max(1, round(schedule_end * total_steps))
        # A regime is only a schedule: the sparsity at the start, at the end, and whether topology moves at all.
        self.initial, self.final, self.dynamic = {
            "dense": (0.0, 0.0, False), "sst": (sparsity, sparsity, False), "dst": (sparsity, sparsity, True),
            "s2d": (sparsity, 0.0, True), "d2s": (0.0, sparsity, True)}[regime]
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same masks on every device
        self.last_step = 0  # the latest step that `update_topology` has seen
        self.masks = {}  # weight's name -> bool tensor of its shape, True where the weight is active
        self.active = {}  # weight's name -> how many are active, kept on the host so that no step has to ask
        if regime == "dense":
            return

        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = {name: weight for name, weight in module.named_parameters() if weight.ndim >= 2}
        if not weights:
            raise ValueError(f"{type(module).__name__} has no weight with two dimensions or more: nothing to sparsify")
        missing = [name for name, weight in weights.items() if id(weight) not in trained]
        if missing:
            raise ValueError(f"the optimizer does not train {missing[0]}: give SparseTraining the module's own optimizer")
        counts = self._counts(weights, self.initial)
        for name, weight in weights.items():
            # Exact counts, never Bernoulli draws.
            mask = _largest(_uniform(weight.shape, self.generator), counts[name])
            self.masks[name], self.active[name] = mask.to(weight.device), counts[name]
        self.apply_masks(module)

    # ---- each training step, after loss.backward() ----

    @torch.no_grad()
    def update_topology(self, step):
        """Drops and grows when `step` has crossed a multiple of the update interval; returns whether it did.

        step: the number of this module's updates, this one included: 1, 2, ... It need not hit the multiples (a
        delayed or bursting module does not). Call it right after `backward`: growth is ranked by the dense gradients
        then in `.grad`, so those must come from the module's own loss and from nothing else.
        """
        last, self.last_step = self.last_step, max(step, self.last_step)
        if not self.due(step, last):
            return False
        # The sparsity wanted now, with ER solved anew for it.  Eq. (2)
        sparsity = scheduled_sparsity(step, self.initial, self.final, self.start, self.end, self.power)
        zeta = drop_fraction(step, self.total_steps, self.drop_initial, self.drop_final)  # Eq. (1)
        weights = dict(self._weights())
        counts = self._counts(weights, sparsity)
        for name, weight in weights.items():
            if self.active[name] == counts[name] == weight.numel():
                continue  # dense before and after: whatever is dropped would come straight back
            if self.grow == "gradient" and weight.grad is None:
                raise RuntimeError(f"{name} has no gradient: call update_topology after loss.backward()")
            mask = self.masks[name]
            new_mask = _drop_and_grow(weight, weight.grad, mask, zeta, self.active[name], counts[name],
                                      self.grow, self.generator)
            # Algorithm 1, line 12. A weight that was dropped and came back at once is in both masks: it keeps its
            # value and its moments. All others start from zero.
            stays = mask & new_mask
            for tensor in (weight, *self._moments(weight)):
                _zero_pruned(tensor, stays)
            mask.copy_(new_mask)  # in place: whoever holds the mask (a captured graph, say) sees the new one
            self.active[name] = counts[name]
        return True

    def due(self, step, last=None):
        """Whether `update_topology(step)` would change anything."""
        last = self.last_step if last is None else last
        boundary = step // self.update_interval > last // self.update_interval
        # The schedule's end is itself an update, or D2S would stop a little short of its sparsity.
        return self.dynamic and (boundary or (self.initial != self.final and last < self.end <= step))

    @torch.no_grad()
    def mask_gradients(self):
        """Zeroes the gradients of pruned weights. Before clipping: they must not count towards the norm."""
        for name, weight in self._weights():
            if weight.grad is not None:
                _zero_pruned(weight.grad, self.masks[name])

    # ---- reading, copying, saving ----

    @torch.no_grad()
    def apply_masks(self, module):
        """Zeroes in `module` (this one, or another of the same layout, such as a soft target) what is pruned here."""
        parameters = dict(module.named_parameters())
        for name, mask in self.masks.items():
            _zero_pruned(parameters[name], mask.to(parameters[name].device))

    def density(self):
        """Share of the module's maskable weights that are active: 1.0 if it is dense."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(self.active.values()) / total if total else 1.0

    def layer_densities(self):
        """Weight's name -> share of it that is active; empty if the module is dense."""
        return {name: self.active[name] / mask.numel() for name, mask in self.masks.items()}

    def state_dict(self):
        """Tensors and plain values: masks (bool), the random generator, and how far the schedule has come."""
        return {"regime": self.regime, "last_step": self.last_step, "generator": self.generator.get_state(),
                "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave; ValueError if it belongs to another regime or another layout."""
        if state["regime"] != self.regime:
            raise ValueError(f"the saved masks are for regime {state['regime']!r}, this module trains {self.regime!r}")
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        saved = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        if saved != shapes:
            odd = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
            raise ValueError(f"the saved masks do not fit this module, first at {odd[0]!r}")
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)
            self.active[name] = int(mask.sum())
        self.last_step = state["last_step"]
        self.generator.set_state(state["generator"].cpu())

    def _weights(self):
        """(name, weight) of all masked weights, looked up anew each time: `.to` and loading replace parameters."""
        parameters = dict(self.module.named_parameters())
        for name, mask in self.masks.items():
            weight = parameters[name]
            if mask.device != weight.device:  # the module has moved: the masks follow
                self.masks[name] = mask.to(weight.device)
            yield name, weight

    def _moments(self, weight):
        """Every optimiser state of the weight's shape: exp_avg, exp_avg_sq, momentum_buffer, ... None before a step."""
        return [state for state in self.optimizer.state.get(weight, {}).values()
                if torch.is_tensor(state) and state.shape == weight.shape]

    def _counts(self, weights, sparsity):
        """Whole numbers of active weights a layer, whose sum is exact for the module: each layer's share is rounded
        down, and the largest remainders are rounded up."""
        densities = layer_densities([tuple(weight.shape) for weight in weights.values()], sparsity, self.distribution)
        shares = [density * weight.numel() for density, weight in zip(densities, weights.values())]
        counts = [math.floor(share + 1e-6) for share in shares]
        missing = math.floor((1.0 - sparsity) * sum(weight.numel() for weight in weights.values()) + 0.5) - sum(counts)
        by_remainder = sorted(range(len(shares)), key=lambda layer: counts[layer] - shares[layer])
        for layer in by_remainder[:max(0, missing)]:
            counts[layer] += 1
        return dict(zip(weights, counts))


def _check_choice(what, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


def _check_sparsity(sparsity):
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of weights pruned and lies in [0, 1), not {sparsity}")
