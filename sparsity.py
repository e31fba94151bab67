"""Sparse training for any PyTorch module: five regimes, one mask update.

What it claims: a module trained through `SparseTraining` holds exactly the sparsity its regime asks for, at every
step. Pruned weights and their gradients are exactly zero, not nearly, and a weight that grows starts at zero with the
optimiser state of a new one.

    regime   masks at the start   what happens then                                  paper
    dense    none                 nothing                                            Section 2.1
    sst      random, sparse       nothing: the topology stands still                 Appendix B.1.1
    dst      random, sparse       drop and grow at constant sparsity (RigL or SET)   Appendix B.1.2, Algorithm 1
    s2d      random, sparse       drop, and grow more than was dropped, to dense     Appendix B.1.3, Eq. (2)
    d2s      dense                drop more than is grown, down to sparse            Appendix B.1.3, Eq. (2)

D2S is RigL's drop and grow with fewer grown than dropped (Appendix B.1.3): a change sets aside the smallest weights, a
share ζ, and gradients decide which of them return. So most of what leaves is chosen by gradient, among small weights;
`drop_fraction_start=0` is pure magnitude pruning.

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
import torch.nn as nn

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
DISTRIBUTIONS = ("er", "uniform")
GROWTHS = ("gradient", "random")

# What is masked, by kind of layer: of each, the parameters named "...weight...". By number of dimensions it would take
# LayerNorm([4, 8]) and attention's bias_k. What one matrix stacks (q, k and v, or a GRU's gates) counts as one weight.
MASKED_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention,
                 nn.RNNBase, nn.RNNCellBase)
# Muon orthogonalises matrices, LBFGS mixes steps of all weights, SparseAdam wants gradients with rows left out.
REFUSED_OPTIMIZERS = ("Muon", "LBFGS", "SparseAdam")
INITIAL_STATE = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop's and Adagrad's do not start at 0


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
    dense = {layer for layer, size in enumerate(sizes) if size == 0}  # Linear(4, 0): nothing to prune
    ratios = [sum(shape) / max(1, math.prod(shape)) for shape in shapes]  # linear: (n_in + n_out) / (n_in · n_out)
    # Layers whose share would pass 1 stay whole as well, and ε is solved again for the others.
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
    grow: "gradient" (RigL: largest |gradient|) or "random" (SET; drawn from `generator`, where that lives).
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
        promise = _uniform(weight.shape, generator, weight.device).to(weight.device)
    return keep | _largest(promise.masked_fill(keep, -1.0), num_active - kept)  # line 11


def _largest(scores, count):
    """Bool mask of exactly `count` largest scores; ties go to the lower index. No sort, and no host synchronisation."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    # The smallest score to get in. `kthvalue` is up to a fifth faster on a CPU, but has one thread block on CUDA.
    threshold = flat.topk(count, sorted=False).values.amin()
    above = flat > threshold
    tied = flat == threshold
    places = count - above.sum()  # how many of the tied get in
    return (above | (tied & (tied.cumsum(0) <= places))).view(scores.shape)


def _zero_pruned(tensor, mask):
    """tensor ⊙ mask, in place, on the bits as integers: NaN × 0 is NaN, but a NaN's bits times 0 are 0.0.

    Vectorised; `masked_fill_` with a random mask takes 30 times as long on a CPU. There, PyTorch first writes the mask out
    as integers: piece by piece these stay in the cache, which makes it six times faster again for millions of weights.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach())  # (..., 2)
        mask = mask.unsqueeze(-1).expand(tensor.shape)
    bits = tensor.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])
    if tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous():
        for piece, kept in zip(bits.view(-1).split(2 ** 20), mask.view(-1).split(2 ** 20)):
            piece.mul_(kept)
    else:
        bits.mul_(mask)


def _uniform(shape, generator, device="cpu"):
    """Random scores in float64: float32 has 2^24 values, too few to rank a layer of millions without ties."""
    device = device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)


def maskable_weights(module, exclude=()):
    """name -> weight: what SparseTraining masks, the trained weights of MASKED_LAYERS less those named in `exclude`.

    ValueError for a weight that masks cannot follow, and for a name to leave out that the module does not have.
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    layers, parameters = dict(module.named_modules()), dict(module.named_parameters(remove_duplicate=False))
    if unknown := [name for name in exclude if name not in layers and name not in parameters]:
        raise ValueError(f"{type(module).__name__} has no layer or weight {unknown[0]!r} that could be left out")
    left_out = {name for name in (*layers, *parameters) if any(f"{name}.".startswith(f"{part}.") for part in exclude)}
    chosen = set()  # ids, as two layers may share one weight
    for path, layer in layers.items():
        if not isinstance(layer, MASKED_LAYERS) or path in left_out:
            continue
        own = [name for name in (*layer._parameters, *getattr(layer, "parametrizations", ())) if "weight" in name]
        # weight_norm and its like compute the weight: it has no zeros where their parameters have, and may become NaN.
        computed = any(name not in layer._parameters or name.endswith(("_g", "_v", "_orig")) for name in own)
        if (computed or getattr(layer, "sparse", False)) and any(p.requires_grad for p in layer.parameters()):
            raise ValueError(f"masks cannot follow the {'parametrization' if computed else 'sparse gradients'} of "
                             f"{path or type(layer).__name__}: build it without, or leave it out")
        chosen |= {id(layer._parameters[name]) for name in own if name in layer._parameters}
    chosen -= {id(parameters[name]) for name in left_out & parameters.keys()}
    return {name: weight for name, weight in module.named_parameters()
            if id(weight) in chosen and weight.requires_grad and weight.numel()}


class SparseTraining:
    """Draws a module's masks, keeps them true through training, and moves them as the regime asks.

    module: any `nn.Module`. Masked are the weights of linear, convolution (transposed too), embedding, attention and
        recurrent layers (MASKED_LAYERS); biases and norms never, nor what is frozen when this object is made.
    optimizer: the `torch.optim` optimiser that trains it; its state follows the masks. SGD, Adam, AdamW, NAdam, RAdam,
        Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD, and Adafactor, whose moments are of rows and columns and stay.
        Refused: Muon, LBFGS, SparseAdam, and an `eps` that is 0 in the weights' precision (AdamW's 1e-8 in float16,
        unless fused): pruned weights would be 0 / 0. One from elsewhere must not move what has neither gradient nor state.
    regime: "dense", "sst", "dst", "s2d" or "d2s"; see the table at the top of this file.
    sparsity: share of weights pruned: held (sst, dst), left behind (s2d) or reached (d2s). In [0, 1), and refused if a
        layer would keep no weight at all: nothing passes through it, and most networks would be constant.
    total_steps: T, how many updates this module will get in all: it sets both schedules.
    update_interval: ΔT, updates between two changes of topology.
        The paper gives no ΔT; 1000 is the published setting for sparse SAC.
    distribution, grow: "er" or "uniform"; "gradient" (RigL) or "random" (SET).
    drop_fraction_start, drop_fraction_end: ζ at step 0 and at T, Eq. (1). Not in the paper; 0.5 to 0 as for sparse SAC.
    schedule_start, schedule_end: when s_t moves, as shares of T, Eq. (2). Not in the paper; 0.2 and 0.8.
    power: λ of Eq. (2); the paper's 2.
    seed: masks have random numbers of their own, so that drawing them leaves the caller's alone. By default they come
        from the weights as they are: `torch.manual_seed` repeats them, and only exact copies get the same masks.
    exclude: names of layers or weights that stay dense: "output", or ["0", "encoder.1.weight"].

    The masks live here and not in the module: the keys of its `state_dict` stay as they were, and because the stored
    weights are already masked, a deep copy or a hard target update is sparse by itself. A soft target is not: after
    a change of topology its average still holds weights that were dropped. `apply_masks(target)` clears them.

    Known and small: Adam counts its steps by tensor, not by weight, so a freshly grown weight has zero moments and a
    large step count; its first moves are 3 to 7 times the learning rate.
    """

    def __init__(self, module, optimizer, regime, sparsity=0.6, total_steps=1_000_000, update_interval=1000,
                 distribution="er", grow="gradient", drop_fraction_start=0.5, drop_fraction_end=0.0,
                 schedule_start=0.2, schedule_end=0.8, schedule_power=2.0, seed=None, exclude=()):
        _check_choice("regime", regime, REGIMES)
        _check_choice("distribution", distribution, DISTRIBUTIONS)
        _check_choice("grow", grow, GROWTHS)
        _check_sparsity(sparsity)
        if not (1 <= total_steps < math.inf and 1 <= update_interval < math.inf):
            raise ValueError(f"total_steps ({total_steps}) and update_interval ({update_interval}) must be at least 1")
        if not 0 <= schedule_start <= schedule_end <= 1:
            raise ValueError(f"0 <= schedule_start <= schedule_end <= 1 must hold, not {schedule_start}, {schedule_end}")
        if not (0 <= drop_fraction_start <= 1 and 0 <= drop_fraction_end <= 1):
            raise ValueError(f"drop_fraction_start ({drop_fraction_start}) and drop_fraction_end ({drop_fraction_end}) must lie in [0, 1]")
        if not 0 < schedule_power < math.inf:
            raise ValueError(f"power, the degree of the sparsity schedule, must be above 0, not {schedule_power}")
        self.module, self.optimizer, self.regime = module, optimizer, regime
        self.total_steps, self.update_interval = total_steps, update_interval
        self.distribution, self.grow = distribution, grow
        self.drop_fraction_start, self.drop_fraction_end = drop_fraction_start, drop_fraction_end
        self.power, self.seed = schedule_power, seed
        self.start, self.end = round(schedule_start * total_steps), max(1, round(schedule_end * total_steps))
        # A regime is only a schedule: the sparsity at the start, at the end, and whether topology moves at all.
        self.initial, self.final, self.dynamic = {
            "dense": (0.0, 0.0, False), "sst": (sparsity, sparsity, False), "dst": (sparsity, sparsity, True),
            "s2d": (sparsity, 0.0, True), "d2s": (0.0, sparsity, True)}[regime]
        self.sparsity = self.initial  # s_t that the masks hold now
        self.last_step = 0  # the latest step that `update_topology` has seen
        self.masks = {}  # weight's name -> bool tensor of its shape, True where the weight is active
        self.active = {}  # weight's name -> how many are active, kept on the host so that no step has to ask
        if regime == "dense":
            return

        weights = maskable_weights(module, exclude)
        if not weights:
            raise ValueError(f"{type(module).__name__} trains no weight of a layer that is masked: nothing to sparsify")
        _check_optimizer(optimizer, weights)
        if empty := [name for name, count in self._counts(weights, sparsity).items() if count == 0]:
            raise ValueError(f"at sparsity {sparsity} {empty[0]} keeps no weight, and its layer passes nothing on: "
                             "lower the sparsity, or leave it out")
        if seed is None:
            self.seed = hash(tuple(value for weight in weights.values() for value in weight.flatten()[:64].tolist()))
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same masks on every device
        for name, count in self._counts(weights, self.initial).items():
            mask = _largest(_uniform(weights[name].shape, generator), count)  # exact counts, never Bernoulli draws
            self.masks[name], self.active[name] = mask.to(weights[name].device), count
        for name, weight in self._weights():
            self._reset_pruned(weight, self.masks[name])

    # ---- each training step, after loss.backward() ----

    @torch.no_grad()
    def update_topology(self, step, scores=None):
        """Drops and grows when `step` has crossed a multiple of the update interval; returns whether it did.

        step: the number of this module's updates, this one included: 1, 2, ... It need not hit the multiples (a
        delayed or bursting module does not). Call it right after `backward`: growth is ranked by the dense gradients
        then in `.grad`, so those must come from the module's own loss and from nothing else.
        scores: weight's name -> dense tensor of its shape, to rank growth by |score| instead of the gradient.
        """
        if not self.is_update_step(step):
            self.last_step = max(step, self.last_step)
            return False
        # The sparsity wanted now, with ER solved anew for it.  Eq. (2)
        sparsity = scheduled_sparsity(step, self.initial, self.final, self.start, self.end, self.power)
        zeta = drop_fraction(step, self.total_steps, self.drop_fraction_start, self.drop_fraction_end)  # Eq. (1)
        counts = self._counts(self.masks, sparsity)
        # Dense before and after: whatever is dropped would come straight back.
        moving = [(name, weight) for name, weight in self._weights()
                  if not self.active[name] == counts[name] == weight.numel()]
        for name, weight in moving:  # all of them before any changes
            if self.grow == "gradient" and scores is None and weight.grad is None:
                raise RuntimeError(f"{name} has no gradient: call update_topology after loss.backward()")
        for number, (name, weight) in enumerate(moving):
            mask = self.masks[name]
            score = weight.grad if scores is None else scores[name]
            new_mask = _drop_and_grow(weight, score, mask, zeta, self.active[name], counts[name], self.grow,
                                      self._generator(step, number, weight.device))
            # Algorithm 1, line 12. A weight that was dropped and came back at once is in both masks: it keeps its
            # value and its moments. All others start anew.
            self._reset_pruned(weight, mask & new_mask)
            mask.copy_(new_mask)  # in place: whoever holds the mask (a captured graph, say) sees the new one
            self.active[name] = counts[name]
        self.last_step, self.sparsity = step, sparsity
        return True

    def is_update_step(self, step):
        """Whether `update_topology(step)` would change anything."""
        boundary = step // self.update_interval > self.last_step // self.update_interval
        # The schedule's end is itself an update, or D2S would stop a little short of its sparsity.
        return self.dynamic and (boundary or (self.initial != self.final and self.last_step < self.end <= step))

    @torch.no_grad()
    def mask_gradients(self):
        """Zeroes the gradients of pruned weights. Before clipping: they must not count towards the norm."""
        for name, weight in self._weights():
            if weight.grad is not None:
                _zero_pruned(weight.grad, self.masks[name])

    # ---- reading, copying, saving ----

    @torch.no_grad()
    def apply_masks(self, module):
        """Zeroes in `module` (this one, or another of the same layout, such as a soft target) what is pruned here.

        Either may be wrapped by torch.compile, DataParallel or AveragedModel. ValueError for another layout.
        """
        theirs = dict(zip(_plain_names(module), module.parameters()))
        plain = dict(zip(dict(self.module.named_parameters()), _plain_names(self.module)))
        pairs = [(theirs.get(plain[name]), mask) for name, mask in self.masks.items()]
        if any(weight is None or weight.shape != mask.shape for weight, mask in pairs):
            raise ValueError(f"{type(module).__name__} has not the layout of the module that the masks belong to")
        for weight, mask in pairs:
            _zero_pruned(weight, mask.to(weight.device))

    def density(self):
        """Share of the module's maskable weights that are active: 1.0 if it is dense."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(self.active.values()) / total if total else 1.0

    def layer_densities(self):
        """Weight's name -> share of it that is active; empty if the module is dense."""
        return {name: self.active[name] / mask.numel() for name, mask in self.masks.items()}

    def state_dict(self):
        """Tensors and plain values: masks (bool), their sparsity and seed, and how far the schedule has come."""
        return {"regime": self.regime, "last_step": self.last_step, "sparsity": self.sparsity, "seed": self.seed,
                "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave, and clears what it prunes: load the module and the optimiser before.

        ValueError, before anything changes, if it belongs to another regime, layout, sparsity or distribution.
        """
        self.check_state_dict(state)
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)
            self.active[name] = int(mask.sum())
        self.last_step, self.sparsity, self.seed = state["last_step"], state["sparsity"], state["seed"]
        for name, weight in self._weights():
            self._reset_pruned(weight, self.masks[name])

    def check_state_dict(self, state):
        """ValueError for what `load_state_dict` would not take."""
        if state["regime"] != self.regime:
            raise ValueError(f"the saved masks are for regime {state['regime']!r}, this module trains {self.regime!r}")
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        saved = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        if saved != shapes:
            odd = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
            raise ValueError(f"the saved masks do not fit this module, first at {odd[0]!r}")
        low, high = sorted((self.initial, self.final))
        kept = {name: int(mask.sum()) for name, mask in state["masks"].items()}
        if not low <= state["sparsity"] <= high or kept != self._counts(state["masks"], state["sparsity"]):
            raise ValueError(f"the saved masks keep {sum(kept.values())} weights for sparsity {state['sparsity']}: "
                             f"{self.distribution!r} between {low} and {high}, as here, would not")

    def _weights(self):
        """(name, weight) of all masked weights, looked up anew each time: `.to` and loading replace parameters."""
        parameters = dict(self.module.named_parameters())
        for name, mask in self.masks.items():
            weight = parameters[name]
            if mask.device != weight.device:  # the module has moved: the masks follow
                self.masks[name] = mask.to(weight.device)
            yield name, weight

    def _reset_pruned(self, weight, stays):
        """Where not `stays`: the weight becomes 0, and its optimiser state that of a new weight."""
        _zero_pruned(weight, stays)
        group = next((group for group in self.optimizer.param_groups if any(weight is p for p in group["params"])), {})
        for key, state in self.optimizer.state.get(weight, {}).items():  # exp_avg, momentum_buffer, ...
            if torch.is_tensor(state) and state.shape == weight.shape:
                _zero_pruned(state, stays)
                if initial := group.get(INITIAL_STATE.get(key), 0):
                    state.masked_fill_(~stays, complex(initial, initial) if state.is_complex() else initial)

    def _generator(self, step, number, device):
        """For random growth of one layer at one step: nothing to save, and a resumed run draws the same.

        On the weights' device: drawing 150 million numbers on the CPU would hold a GPU up for a second. Another device
        grows other weights, then; but rounding makes weights differ there anyway, and with them what is dropped.
        """
        if self.grow == "gradient" or device.type == "meta":
            return None
        return torch.Generator(device).manual_seed(hash((self.seed, step, number)))

    def _counts(self, weights, sparsity):
        """Whole numbers of active weights a layer, whose sum is exact for the module: each layer's share is rounded
        down, and the largest remainders are rounded up. weights: name -> weight, or its mask."""
        densities = layer_densities([tuple(weight.shape) for weight in weights.values()], sparsity, self.distribution)
        shares = [density * weight.numel() for density, weight in zip(densities, weights.values())]
        counts = [math.floor(share + 1e-6) for share in shares]
        missing = math.floor((1.0 - sparsity) * sum(weight.numel() for weight in weights.values()) + 0.5) - sum(counts)
        by_remainder = sorted(range(len(shares)), key=lambda layer: counts[layer] - shares[layer])
        for layer in by_remainder[:max(0, missing)]:
            counts[layer] += 1
        return dict(zip(weights, counts))


def _plain_names(module):
    """Parameters' names without what torch.compile ("_orig_mod."), DataParallel and AveragedModel ("module.") add."""
    names = [name.replace("_orig_mod.", "") for name, _ in module.named_parameters()]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def _check_optimizer(optimizer, weights):
    """ValueError if it does not train the weights, or would not leave pruned ones at 0."""
    if refused := [kind.__name__ for kind in type(optimizer).__mro__ if kind.__name__ in REFUSED_OPTIMIZERS]:
        raise ValueError(f"{refused[0]} cannot follow masks: take one that moves each weight for itself, such as AdamW")
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, weight in weights.items():
        if id(weight) not in groups:
            raise ValueError(f"the optimizer does not train {name}: give SparseTraining the module's own optimizer")
        group, dtype = groups[id(weight)], weight.dtype
        if group.get("fused") and isinstance(optimizer, torch.optim.Adam):
            dtype = torch.float32  # it computes in float32 whatever the weights are
        if isinstance(group.get("eps"), (int, float)) and torch.tensor(group["eps"], dtype=dtype, device="cpu") == 0:
            raise ValueError(f"eps={group['eps']} is 0 in {dtype}, and a pruned weight would become 0 / 0: give "
                             f"{type(optimizer).__name__} at least eps={torch.finfo(dtype).smallest_normal:.0e}")


def _check_choice(what, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


def _check_sparsity(sparsity):
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of weights pruned and lies in [0, 1), not {sparsity}")
