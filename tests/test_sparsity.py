"""Tests of sparsity."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune as prune
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity import REGIMES, SparseTraining, _zero_pruned, drop_fraction, layer_densities, scheduled_sparsity, update_mask
from tests.helpers import backward, count, mlp, naive_counts, naive_update_mask, property_test


@pytest.mark.parametrize("shapes, sparsity, pruned", [  # computed by running RLx2's published ER code
    ([(512, 223), (512, 512), (512, 512), (512, 512)], 0.6, [0.3908483, 0.6303651, 0.6303651, 0.6303651]),
    ([(512, 223), (512, 512), (512, 512), (512, 512)], 0.9, [0.8477121, 0.9075913, 0.9075913, 0.9075913]),
    ([(512, 512), (512, 512), (512, 512), (1, 512)], 0.6, [0.6003906, 0.6003906, 0.6003906, 0.0]),
    ([(512, 4), (512, 512), (1, 512)], 0.9, [0.0, 0.9087891, 0.0]),
    ([(1, 512), (1, 256)], 0.6, [0.6002597, 0.5994805]),
    ([(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)], 0.6,
     [0.0, 0.4582218, 0.3795019, 0.6121651, 0.0]),
    ([(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)], 0.9,
     [0.7331006, 0.8665503, 0.8471601, 0.9044693, 0.0]),
])
def test_er_densities_against_a_published_implementation(shapes, sparsity, pruned):
    np.testing.assert_allclose([1 - d for d in layer_densities(shapes, sparsity)], pruned, atol=2e-7)


shape_lists = st.lists(st.one_of(st.tuples(st.integers(1, 60), st.integers(1, 60)),
                                 st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))),
                       min_size=1, max_size=6)


@property_test
@given(shape_lists, st.floats(0, 0.99))
def test_er_is_exact_overall_and_proportional_below_one(shapes, sparsity):
    densities = layer_densities(shapes, sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    assert all(0 <= density <= 1 for density in densities)
    assert sum(d * n for d, n in zip(densities, sizes)) == pytest.approx((1 - sparsity) * sum(sizes), rel=1e-9)
    epsilon = [d / (sum(s) / math.prod(s)) for d, s in zip(densities, shapes) if d < 1 - 1e-9]
    if sparsity > 0 and epsilon:
        assert max(epsilon) == pytest.approx(min(epsilon), rel=1e-6)  # one ε for all layers that are not full
        full = [1 / (sum(s) / math.prod(s)) for d, s in zip(densities, shapes) if d >= 1 - 1e-9]
        assert all(e <= max(epsilon) * (1 + 1e-6) for e in full)  # a layer is full only if ε would overfill it


def test_uniform_and_dense_densities():
    assert layer_densities([(4, 4), (9, 2)], 0.25, "uniform") == [0.75, 0.75]
    assert layer_densities([(4, 4), (9, 2)], 0.0) == [1.0, 1.0]
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            layer_densities([(4, 4)], bad)
    with pytest.raises(ValueError, match="distribution"):
        layer_densities([(4, 4)], 0.5, "erk")


def test_equation_1_by_hand():
    for step, zeta in ((0, 0.5), (250, 0.4267767), (500, 0.25), (1000, 0.0), (1100, 0.0), (-5, 0.5)):
        assert drop_fraction(step, 1000, 0.5, 0.0) == pytest.approx(zeta, abs=1e-7)
    assert drop_fraction(750, 1000, 0.5, 0.05) == pytest.approx(0.115901, abs=1e-6)  # optax.cosine_decay_schedule


def test_equation_2_by_hand():
    # D2S with λ = 2: the values of jaxpruner's polynomial schedule, which is one step ahead.
    for step, sparsity in ((101, 0.0011994), (351, 0.2633994), (601, 0.4505994), (851, 0.5627995), (1100, 0.6)):
        assert scheduled_sparsity(step, 0.0, 0.6, 100, 1100, 2) == pytest.approx(sparsity, abs=2e-7)
    assert scheduled_sparsity(0, 0.6, 0.0, 100, 1100, 2) == 0.6
    assert scheduled_sparsity(600, 0.6, 0.0, 100, 1100, 2) == scheduled_sparsity(600, 0.6, 0.0, 100, 1100) == pytest.approx(0.15)
    assert scheduled_sparsity(1100, 0.6, 0.0, 100, 1100, 2) == 0.0
    assert scheduled_sparsity(5000, 0.0, 0.6, 100, 1100, 2) == 0.6  # exactly, not 0.5996
    assert scheduled_sparsity(7, 0.1, 0.6, 8, 8, 2) == 0.1 and scheduled_sparsity(8, 0.1, 0.6, 8, 8, 2) == 0.6


def test_mask_update_by_hand():
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0] * 4, [0] * 4])
    grad = torch.tensor([[5.0, 0.15, 0.01, 0.02], [0.03, 0.04, 0.05, 0.06], [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    mask = torch.tensor([[1] * 4, [1] * 4, [0] * 4, [0] * 4]).bool()
    # Drops 0.1 and 0.2. 0.1 comes back (gradient 5), 0.2 does not (0.15); the last weight (0.8) is new.
    expected = torch.tensor([[1, 0, 1, 1], [1] * 4, [0] * 4, [0, 0, 0, 1]]).bool()
    assert torch.equal(update_mask(weight, grad, mask, 0.25), expected)  # as five published implementations do
    # Fewer wanted (D2S): drops the three smallest at least. More wanted (S2D): the largest gradients come.
    assert update_mask(weight, grad, mask, 0.0, num_active=5).flatten().nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert update_mask(weight, grad, mask, 0.0, num_active=10).flatten().nonzero().flatten().tolist() == [
        0, 1, 2, 3, 4, 5, 6, 7, 14, 15]


def test_an_inactive_zero_never_outranks_an_active_zero():
    weight = torch.tensor([0.9, 0.8, 0.7, 0.6] + [0.0] * 12)
    mask = torch.tensor([1] * 4 + [0] * 8 + [1] * 4).bool()  # four active weights are exactly 0
    grad = torch.linspace(0.01, 0.16, 16)
    assert torch.equal(update_mask(weight, grad, mask, 0.25), mask)  # two zeros go and, with the best gradients, return


def test_ties_go_to_the_lower_index_and_small_drops_round_down():
    weight = torch.tensor([[0.5] * 4, [0.1] * 4, [0.0] * 4, [0.0] * 4])
    grad = torch.tensor([[0.0] * 4, [0.0] * 4, [1.0] * 4, [1.0] * 4])
    mask = torch.tensor([[1] * 4, [1] * 4, [0] * 4, [0] * 4]).bool()
    expected = torch.tensor([[1] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]).bool()
    assert torch.equal(update_mask(weight, grad, mask, 0.25), expected)
    assert torch.equal(update_mask(weight, grad, mask, 0.1), mask)  # 0.8 of a weight: none


@property_test
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6), st.data())
def test_mask_update_against_a_sort(rows, columns, zeta, seed, data):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values: ties everywhere.
    weight, grad = (torch.randint(-2, 3, (rows, columns), generator=generator) / 2 for _ in range(2))
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    wanted = data.draw(st.integers(0, rows * columns))
    for num_active in (None, wanted):
        new = update_mask(weight, grad, mask, zeta, num_active)
        assert torch.equal(new, naive_update_mask(weight, grad, mask, zeta,
                                                  int(mask.sum()) if num_active is None else wanted))


def test_random_growth_is_drawn_where_the_weights_are():
    class Drawn(TorchDispatchMode):
        devices = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            self.devices += [result.device.type] if function.name().startswith("aten::rand") else []
            return result

    model = nn.Linear(30, 30, device="meta")
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters()), "dst", grow="random", update_interval=1, seed=0)
    with Drawn() as drawn:
        assert sparse.update_topology(1)
    assert drawn.devices == ["meta"]
    draw = lambda *place: torch.rand(4, generator=sparse._generator(*place, torch.device("cpu"))).tolist()
    assert draw(1, 0) == draw(1, 0) and len({*map(tuple, (draw(1, 0), draw(1, 1), draw(2, 0), draw(0, 1)))}) == 4
    one, sparse.seed = draw(1, 0), 1
    assert one != draw(1, 0)


def test_random_growth_ignores_gradients_and_keeps_the_count():
    weight, grad = torch.rand(40, 40), torch.arange(1600.0).view(40, 40)
    mask = torch.rand(40, 40) < 0.4
    one, same, other = (update_mask(weight, grad, mask, 0.5, grow="random", generator=torch.Generator().manual_seed(s))
                        for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.sum() == other.sum() == mask.sum()
    grown = (one & ~mask).nonzero()[:, 0].double()  # rows of new weights: RigL would take the last rows alone
    assert 14 < grown.mean() < 25


@property_test
@given(st.sampled_from(REGIMES), st.floats(0, 0.95), st.sampled_from(["er", "uniform"]), st.sampled_from(["gradient", "random"]),
       st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)), st.integers(1, 60), st.integers(1, 12),
       st.lists(st.integers(1, 7), min_size=8, max_size=30))
def test_density_invariants(regime, sparsity, distribution, grow, sizes, total, interval, strides):
    model = mlp(*sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    size = sum(w.numel() for w in weights)
    try:
        sparse = SparseTraining(model, optimizer, regime, sparsity, total_steps=total, update_interval=interval,
                                distribution=distribution, grow=grow)
    except ValueError as refusal:  # only where a layer's share is less than one weight
        densities = layer_densities([tuple(w.shape) for w in weights], sparsity, distribution)
        assert "keeps no weight" in str(refusal) and min(d * w.numel() for d, w in zip(densities, weights)) < 1
        return
    final = {"dense": 0, "sst": sparsity, "dst": sparsity, "s2d": 0, "d2s": sparsity}[regime]
    densities, step = [sparse.density()], 0
    for stride in strides + [total]:
        step += stride  # a bursting module's steps never need to land on a multiple
        backward(model, sizes[0])
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
        densities.append(sparse.density())
        for name, mask in sparse.masks.items():
            weight = dict(model.named_parameters())[name]
            assert int(mask.sum()) == sparse.active[name]
            assert not weight[~mask].any()
            assert not any(optimizer.state[weight][moment][~mask].any() for moment in ("exp_avg", "exp_avg_sq"))
    assert abs(densities[-1] * size - (1 - final) * size) <= 0.5 + 1e-6  # exact: no weight too many, none too few
    ordered = {"d2s": sorted(densities, reverse=True), "s2d": sorted(densities)}.get(regime, [densities[0]] * len(densities))
    assert densities == ordered  # monotone, or constant
    if regime == "s2d":
        assert densities[-1] == 1.0


OPTIMIZERS = sorted(name for name, value in vars(torch.optim).items()
                    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer")


@pytest.mark.parametrize("name, options", [(name, {}) for name in OPTIMIZERS] + [
    ("AdamW", {"weight_decay": 0.1, "fused": True}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"momentum": 0.5, "centered": True}), ("Adagrad", {"initial_accumulator_value": 0.1})])
@pytest.mark.slow
def test_pruned_weights_stay_exactly_zero_with_every_optimiser_of_torch_or_it_is_refused(name, options):
    assert re.search(rf"\b{name}\b", SparseTraining.__doc__)
    model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.ELU(), nn.Linear(32, 32, bias=False), nn.ELU(),
                          nn.Linear(32, 1, bias=False))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    steps = 3000 if "fused" in options else 200
    if name in ("LBFGS", "Muon", "SparseAdam"):
        with pytest.raises(ValueError, match=f"{name} cannot follow masks"):
            SparseTraining(model, optimizer, "dst")
        return
    for _ in range(3 if len(options) < 2 else 0):  # the optimiser may have run before
        backward(model, 6)
        optimizer.step()
    sparse = SparseTraining(model, optimizer, "dst", 0.8, total_steps=2 * steps, update_interval=steps // 4, seed=1)
    new = 0
    for step in range(1, steps + 1):
        backward(model, 6)
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        if sparse.update_topology(step):  # what grows starts as everything started
            for key, mask in sparse.masks.items():
                weight, grown = model.get_parameter(key), mask & ~before[key]
                new += int(grown.sum())
                assert not weight[grown].any()
                for part, state in optimizer.state[weight].items():
                    start = {"step_size": 1e-3, "sum": options.get("initial_accumulator_value", 0.0)}.get(part, 0.0)
                    assert state.shape != weight.shape or (state[grown] == torch.tensor(start)).all(), part
        sparse.mask_gradients()
        optimizer.step()
        assert not any(model.get_parameter(key)[~mask].any() for key, mask in sparse.masks.items())
    assert new > 20
    for key, mask in sparse.masks.items():
        weight = model.get_parameter(key)
        assert weight.isfinite().all()
        assert weight[mask].count_nonzero() > 0.9 * sparse.active[key]
        if name == "AdamW":
            assert not any(state[~mask].any() for state in optimizer.state[weight].values() if state.shape == mask.shape)


def test_an_eps_that_vanishes_in_the_weights_precision_is_refused():
    model = mlp(6, 32, 1).half()
    for options in ({}, {"eps": 0}):
        for kind in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Adagrad):
            with pytest.raises(ValueError, match="is 0 in torch.float16.*at least eps=6e-05"):
                SparseTraining(model, kind(model.parameters(), **options), "sst")
    for options in ({"eps": 1e-4}, {"fused": True}):  # the fused one computes in float32
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        sparse = SparseTraining(model, optimizer, "sst", 0.8)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            sparse.mask_gradients()
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters()) and not model[0].weight[~sparse.masks["0.weight"]].any()


def test_a_topology_update_resets_what_is_new_and_leaves_what_stays():
    model = mlp(10, 40, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = SparseTraining(model, optimizer, "dst", 0.6, total_steps=100, update_interval=10)
    for step in range(1, 10):
        backward(model, 10)
        assert not sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
    backward(model, 10)
    weight, old_mask = model[0].weight, sparse.masks["0.weight"].clone()
    old_weight, old_moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    expected = update_mask(old_weight, weight.grad, old_mask, drop_fraction(10, 100, 0.5, 0.0))
    held = sparse.masks["0.weight"]
    with torch.no_grad():  # whatever an optimiser state loaded from elsewhere may hold there
        for tensor in (weight, optimizer.state[weight]["exp_avg"]):
            tensor[~old_mask] = 7.0
    assert sparse.update_topology(10)
    new_mask = sparse.masks["0.weight"]
    assert new_mask is held and torch.equal(new_mask, expected) and not torch.equal(new_mask, old_mask)
    stays, fresh = old_mask & new_mask, ~(old_mask & new_mask)
    assert torch.equal(weight[stays], old_weight[stays]) and not weight[fresh].any()
    assert torch.equal(optimizer.state[weight]["exp_avg"][stays], old_moment[stays])
    assert not optimizer.state[weight]["exp_avg"][fresh].any() and not optimizer.state[weight]["exp_avg_sq"][fresh].any()


SPARSE_ARGUMENTS = [{"sparsity": 0.55, "distribution": "er", "grow": "gradient", "drop_fraction_start": 0.7, "drop_fraction_end": 0.2, "schedule_start": 0.15,
                     "schedule_end": 0.65, "schedule_power": 3.0, "seed": 5, "update_interval": 7},
                    {"sparsity": 0.7, "distribution": "uniform", "grow": "random", "drop_fraction_start": 0.1, "drop_fraction_end": 0.6, "schedule_start": 0.3,
                     "schedule_end": 0.9, "schedule_power": 0.5, "seed": 6, "update_interval": 4}]


@pytest.mark.parametrize("arguments", SPARSE_ARGUMENTS, ids=["gradient", "random"])
@pytest.mark.parametrize("regime", ["dst", "s2d", "d2s"])
def test_every_argument_of_sparse_training_is_read(regime, arguments):
    """Masks over 40 steps, each from the one before by Eqs. (1) and (2) and Algorithm 1, written out here."""
    a, total = arguments, 40
    model = mlp(9, 20, 16, 2)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    sizes = [p.numel() for p in weights.values()]
    make = lambda m=model, **other: SparseTraining(m, torch.optim.SGD(m.parameters(), lr=0.1), regime, total_steps=total, **a | other)
    assert regime == "d2s" or any((x != y).any() for x, y in zip(make(seed=7).masks.values(), make(seed=8).masks.values()))
    sparse, twin, moved, drawn = make(), make(copy.deepcopy(model)), 0, 0
    first, last = a["schedule_start"] * total, a["schedule_end"] * total
    for step in range(1, total + 1):
        torch.manual_seed(step)
        for p, other in zip(model.parameters(), twin.module.parameters()):
            p.data, p.grad = torch.randn_like(p), torch.randn_like(p)
            other.data, other.grad = p.data.clone(), p.grad.clone()
        sparse.apply_masks(model)
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        magnitudes = {name: p.detach().clone() for name, p in weights.items()}
        changed = sparse.update_topology(step)
        assert changed == (step % a["update_interval"] == 0 or regime != "dst" and step == last), step
        assert twin.update_topology(step) == changed and all(torch.equal(twin.masks[n], mask) for n, mask in sparse.masks.items())
        if not changed:
            continue
        left = (1 - min(max((step - first) / (last - first), 0), 1)) ** a["schedule_power"]
        wanted = a["sparsity"] * {"dst": 1, "s2d": left, "d2s": 1 - left}[regime]
        zeta = a["drop_fraction_end"] + (a["drop_fraction_start"] - a["drop_fraction_end"]) * (1 + math.cos(math.pi * step / total)) / 2
        counts = {name: int(mask.sum()) for name, mask in sparse.masks.items()}
        if a["distribution"] == "er":
            assert list(counts.values()) == naive_counts([tuple(p.shape) for p in weights.values()], wanted)
        else:
            assert sum(counts.values()) == math.floor((1 - wanted) * sum(sizes) + 0.5)
            assert all(abs(count - (1 - wanted) * size) < 1 for count, size in zip(counts.values(), sizes))
        for name, mask in sparse.masks.items():
            by_gradient = naive_update_mask(magnitudes[name], weights[name].grad, before[name], zeta, counts[name])
            if a["grow"] == "gradient":
                assert torch.equal(mask, by_gradient)
            else:  # what is kept is known; what grows is drawn
                drawn += not torch.equal(mask, by_gradient)
                dropped = max(math.floor(zeta * before[name].sum().item()), before[name].sum().item() - counts[name])
                kept = magnitudes[name].abs().masked_fill(~before[name], -1).flatten().argsort(descending=True)[:before[name].sum().item() - dropped]
                assert mask.flatten()[kept].all()
                grown = (mask & ~before[name]).sum().item()
                free = mask.numel() - len(kept)  # each of these is as likely as any other
                expected = (counts[name] - len(kept)) * (mask.numel() - before[name].sum().item()) / free if free else 0
                assert abs(grown - expected) <= 5 * math.sqrt(expected + 1)
            moved += (mask != before[name]).sum().item()
    assert moved > 100 and (drawn > 5) == (a["grow"] == "random")


def test_updates_happen_when_a_boundary_is_crossed_and_never_at_step_0():
    model = mlp(10, 40, 1)
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", total_steps=1000, update_interval=100)
    backward(model, 10)
    assert [step for step in (0, 1, 99, 130, 180, 200, 201, 450, 451, 999) if sparse.update_topology(step)] == [
        130, 200, 450, 999]
    every = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", total_steps=1000, update_interval=1)
    assert [step for step in (0, 1, 2, 2, 3) if every.update_topology(step)] == [1, 2, 3]


def test_a_schedule_ends_where_it_says_even_between_two_boundaries():
    for regime, density in (("d2s", 0.4), ("s2d", 1.0)):
        model = mlp(10, 40, 40, 1)
        sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), regime, 0.6, total_steps=100,
                                update_interval=30)
        backward(model, 10)
        assert [step for step in range(1, 101) if sparse.update_topology(step)] == [30, 60, 80, 90]
        backward(model, 10)
        assert sparse.density() == pytest.approx(density, abs=0.5 / 2040)


@pytest.mark.parametrize("regime", ["dst", "s2d", "d2s"])
def test_sparsity_survives_copies_saving_and_new_parameters(regime):
    model = mlp(6, 30, 30, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make = lambda m, o, seed: SparseTraining(m, o, regime, 0.7, total_steps=60, update_interval=5, grow="random", seed=seed)
    sparse = make(model, optimizer, 3)

    def advance(model, optimizer, sparse, first, last):
        torch.manual_seed(first)
        for step in range(first, last):
            backward(model, 6)
            sparse.update_topology(step)
            sparse.mask_gradients()
            optimizer.step()

    advance(model, optimizer, sparse, 1, 18)  # between two boundaries, on the way from one density to another
    copied = copy.deepcopy(model)  # a hard target: sparse by itself
    assert all(not dict(copied.named_parameters())[n][~mask].any() for n, mask in sparse.masks.items())

    other = mlp(6, 30, 30, 1, seed=9)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other_sparse = make(other, other_optimizer, 4)
    for new, old in ((other, model), (other_optimizer, optimizer), (other_sparse, sparse)):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for step in range(18, 40):  # continues as if nothing had happened
        advance(model, optimizer, sparse, step, step + 1)
        advance(other, other_optimizer, other_sparse, step, step + 1)
        assert sparse.density() == other_sparse.density() and sparse.layer_densities() == other_sparse.layer_densities()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert all(torch.equal(sparse.masks[n], other_sparse.masks[n]) for n in sparse.masks)

    soft = copy.deepcopy(copied)  # a soft target keeps what the module dropped, until it is told
    assert any(dict(soft.named_parameters())[n][~mask].any() for n, mask in sparse.masks.items())
    sparse.apply_masks(soft)
    assert all(not dict(soft.named_parameters())[n][~mask].any() for n, mask in sparse.masks.items())

    model.double()  # parameters change under it, as `.to(device)` changes them
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True)
    sparse.apply_masks(model)
    assert sum(int(p.sum()) for p in model.parameters() if p.ndim == 2) == sum(sparse.active.values())
    with pytest.raises(ValueError, match="regime"):
        SparseTraining(model, torch.optim.SGD(model.parameters()), "sst", 0.7).load_state_dict(sparse.state_dict())


def test_a_loaded_state_is_checked_and_leaves_nothing_where_it_prunes():
    model = mlp(6, 30, 30, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = SparseTraining(model, optimizer, "d2s", 0.7, total_steps=40, update_interval=5)
    for step in range(1, 21):
        backward(model, 6)
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
    state = copy.deepcopy(sparse.state_dict())
    with torch.no_grad():  # weights and moments from elsewhere
        for weight in (model[2].weight, optimizer.state[model[2].weight]["exp_avg"]):
            weight.fill_(7.0)
    sparse.load_state_dict(state)
    for tensor in (model[2].weight, optimizer.state[model[2].weight]["exp_avg"]):
        assert int(tensor.count_nonzero()) == sparse.active["2.weight"] < tensor.numel()
    other = mlp(6, 30, 30, 1, seed=5)
    other_sparse = SparseTraining(other, torch.optim.AdamW(other.parameters()), "d2s", 0.7, total_steps=40, update_interval=5)
    other_sparse.load_state_dict(state)
    again = other_sparse.state_dict()
    assert {key: again[key] for key in again if key != "masks"} == {key: state[key] for key in state if key != "masks"}
    damaged = copy.deepcopy(state)
    damaged["masks"]["2.weight"][0] = True
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    for bad, distribution, sparsity in ((damaged, "er", 0.7), (state, "uniform", 0.7), (state, "er", 0.1)):
        sparse.distribution, sparse.final = distribution, sparsity
        with pytest.raises(ValueError, match="the saved masks keep"):
            sparse.load_state_dict(bad)
        assert all(torch.equal(masks[name], sparse.masks[name]) for name in masks)


def test_masks_reach_wrapped_copies():
    class Odd(nn.Module):  # it has a child called "module" itself, whose child has the name of another
        def __init__(self):
            super().__init__()
            self.module, self.norm = mlp(6, 20, 1), nn.LayerNorm(6)
            self.add_module("0", nn.Linear(6, 20))

    wraps = (lambda m: m, nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel,
             lambda m: torch.compile(nn.DataParallel(torch.compile(m))))
    for model, wrap_own, wrap_other in itertools.product((mlp(6, 20, 1), Odd()), wraps, wraps):
        own, other = wrap_own(copy.deepcopy(model)), wrap_other(copy.deepcopy(model))
        sparse = SparseTraining(own, torch.optim.SGD(own.parameters(), lr=0.1), "sst", 0.7)
        nn.utils.vector_to_parameters(torch.ones(count(model)), other.parameters())
        sparse.apply_masks(other)
        assert all(torch.equal(a != 0, b != 0) for a, b in zip(own.parameters(), other.parameters()) if a.ndim == 2)
    model = mlp(6, 20, 1)
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "sst", 0.7)
    for other in (mlp(6, 21, 1), nn.Linear(6, 20)):
        with pytest.raises(ValueError, match="has not the layout"):
            sparse.apply_masks(other)


class Everything(nn.Module):
    """A layer of every kind that has parameters."""

    def __init__(self):
        super().__init__()
        self.linear, self.bilinear, self.image, self.up = (nn.Linear(4, 6), nn.Bilinear(3, 4, 5), nn.Conv2d(2, 4, 3),
                                                           nn.ConvTranspose1d(4, 4, 2))
        self.embedding, self.bag, self.cell = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4), nn.GRUCell(3, 4)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.lstm = nn.LSTM(3, 4, bidirectional=True, proj_size=2)
        self.tied = nn.Linear(4, 9)
        self.tied.weight = self.embedding.weight
        self.norm, self.batch_norm, self.prelu = nn.LayerNorm([4, 8]), nn.BatchNorm2d(4), nn.PReLU(4)
        self.raw = nn.Parameter(torch.ones(4, 4))
        self.empty = nn.Linear(4, 0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_is_masked_is_a_matter_of_kind_and_choice():
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lstm = [f"lstm.weight_{part}_l0{end}" for end in ("", "_reverse") for part in ("ih", "hh", "hr")]
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"] + [
        f"cross.{part}" for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    single = [f"{name}.weight" for name in ("linear", "bilinear", "image", "up", "embedding", "bag")]
    expected = {*single, *attention, *lstm, "cell.weight_ih", "cell.weight_hh"}
    untouched = {name: p.clone() for name, p in model.named_parameters() if name not in expected}
    sparse = SparseTraining(model, optimizer, "sst", 0.5, seed=0)
    assert sparse.masks.keys() == expected
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in untouched.items())
    # By name: a layer with all that is in it, a single weight; a shared weight goes by either of its names.
    sparse = SparseTraining(model, optimizer, "sst", 0.5, exclude=["cross", "image.weight", "tied"])
    assert expected - sparse.masks.keys() == {"image.weight", "embedding.weight", *attention[2:]}
    assert SparseTraining(model, optimizer, "sst", 0.5, exclude="bag").masks.keys() == expected - {"bag.weight"}
    with pytest.raises(ValueError, match="no layer or weight 'lin'"):
        SparseTraining(model, optimizer, "sst", exclude="lin")
    with pytest.raises(ValueError, match="LayerNorm trains no weight"):
        SparseTraining(model.norm, torch.optim.SGD(model.norm.parameters()), "sst")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm,
                                  torch.nn.utils.parametrizations.orthogonal, torch.nn.utils.weight_norm,
                                  torch.nn.utils.spectral_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5),
                                  lambda layer: nn.Embedding(9, 4, sparse=True)])
def test_weights_that_masks_cannot_follow_are_refused_or_left_out(wrap):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), wrap(nn.Linear(8, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="masks cannot follow the .* of 2: build it without, or leave it out"):
        SparseTraining(model, optimizer, "dst")
    assert SparseTraining(model, optimizer, "dst", exclude="2").masks.keys() == {"0.weight"}
    model[2].requires_grad_(False)
    assert SparseTraining(model, optimizer, "dst").masks.keys() == {"0.weight"}


def test_a_change_that_lacks_a_gradient_changes_nothing_and_can_be_tried_again():
    model = mlp(6, 20, 20, 1)
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.7, update_interval=10)
    backward(model, 6)
    model[2].weight.grad = None
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    with pytest.raises(RuntimeError, match="2.weight has no gradient"):
        sparse.update_topology(10)
    assert all(torch.equal(masks[name], mask) for name, mask in sparse.masks.items())
    backward(model, 6)
    assert sparse.update_topology(10) and any(not torch.equal(masks[name], mask) for name, mask in sparse.masks.items())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights():
    for regime in ("sst", "dst", "s2d", "d2s"):  # now or at the end
        model = mlp(8, 32, 16, 1)
        with pytest.raises(ValueError, match="at sparsity 0.999 0.weight keeps no weight"):
            SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), regime, 0.999)
    assert layer_densities([(0, 4), (8, 8), (4, 0)], 0.5) == [1.0, 0.5, 1.0] and layer_densities([(0, 4)], 0.5) == [1.0]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 0))
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.5)
    assert sparse.layer_densities() == {"0.weight": 0.5} and sparse.density() == 0.5


def test_default_seeds_differ_between_modules_and_repeat_with_the_callers():
    def mask(model, **options):
        return SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "sst", 0.7, **options).masks["weight"]

    def pair():
        torch.manual_seed(0)
        return nn.Linear(6, 20), nn.Linear(6, 20)

    (one, two), (same, _) = pair(), pair()
    assert not torch.equal(mask(one), mask(two)) and torch.equal(mask(pair()[0]), mask(same))
    assert torch.equal(mask(pair()[0], seed=5), mask(pair()[1], seed=5))


def test_complex_weights_train_as_sparsely():
    torch.manual_seed(0)
    model = nn.Linear(12, 8, dtype=torch.complex128)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.1)
    sparse = SparseTraining(model, optimizer, "dst", 0.5, total_steps=40, update_interval=10)
    for step in range(1, 41):
        x = torch.randn(16, 12, dtype=torch.complex128)
        optimizer.zero_grad()
        model(x).abs().square().mean().backward()
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
        mask = sparse.masks["weight"]
        assert mask.sum() == 48 and not model.weight[~mask].any() and model.weight.isfinite().all()
    assert (optimizer.state[model.weight]["sum"][~mask] == 0.1 + 0.1j).all()


@pytest.mark.parametrize("zeta", [0.0, 0.5])
def test_d2s_is_magnitude_pruning_only_without_a_drop_fraction(zeta):
    model = mlp(10, 40, 40, 1)
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "d2s", 0.6, total_steps=100,
                            update_interval=2, drop_fraction_start=zeta)
    left, smallest = 0, 0  # weights that left, and how many of them magnitude alone would have taken
    for step in range(1, 101):
        backward(model, 10)
        before = {name: (mask.clone(), model.get_parameter(name).detach().abs()) for name, mask in sparse.masks.items()}
        sparse.update_topology(step)
        for name, (mask, magnitude) in before.items():
            leaves = mask & ~sparse.masks[name]
            left += int(leaves.sum())
            smallest += int((magnitude[leaves] <= magnitude[mask].sort().values[max(0, int(leaves.sum()) - 1)]).sum())
    assert left > 1000 and (smallest == left if zeta == 0 else smallest < 0.8 * left)


def test_convolutions_random_numbers_nan_and_refusals():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    state = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = SparseTraining(model, optimizer, "dst", 0.8, total_steps=10, update_interval=1)
    assert torch.equal(state, torch.get_rng_state())  # masks are drawn without touching the caller's randomness
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[0].weight.grad[~sparse.masks["0.weight"]] = float("nan")
    sparse.mask_gradients()
    assert model[0].weight.grad.isfinite().all()  # NaN × 0 would be NaN
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.float8_e4m3fn)
    for dtype, layout in itertools.product(dtypes, (lambda t: t, lambda t: t.t())):
        values, mask = layout(torch.randn(1100, 1000)), layout(torch.rand(1100, 1000) < 0.5)  # more than one piece
        expected = torch.where(mask, values.to(dtype).to(torch.complex128), 0)
        tensor = torch.where(mask, values, float("nan")).to(dtype)
        _zero_pruned(tensor, mask)
        assert torch.equal(tensor.to(torch.complex128), expected)
    assert set(sparse.layer_densities()) == {"0.weight", "3.weight"}
    assert sparse.density() == pytest.approx(0.2, abs=2 / (16 * 27 + 4 * 16 * 36))
    for options in ({"sparsity": 0.0}, {"schedule_start": 1, "schedule_end": 1}, {"schedule_start": 0, "schedule_end": 0},
                    {"drop_fraction_start": 1, "drop_fraction_end": 1}, {"drop_fraction_start": 0, "drop_fraction_end": 0}, {"total_steps": 1, "update_interval": 1}):
        SparseTraining(model, optimizer, "d2s", **options)  # the ends themselves are allowed
    at_once = SparseTraining(model, optimizer, "d2s", 0.5, total_steps=9, update_interval=1, schedule_start=0, schedule_end=0)
    sum(p.sum() for p in model.parameters()).backward()
    assert at_once.update_topology(1) and at_once.sparsity == 0.5  # a schedule without length is over after a step
    nan, base = float("nan"), ("s2d", 0.5, 9, 1, "er", "gradient")
    for arguments, message in ((("rigl",), "unknown regime"), (("dst", nan), "sparsity"), (("dst", 1.0), "sparsity"), (("dst", 0.5, 0), "total_steps"),
                               (("dst", 0.5, 9, 1, "er", "gradient", 1.5), "drop_fraction_start"),
                               (("dst", 0.5, nan), "total_steps"), (("dst", 0.5, 9, nan), "update_interval"),
                               (("dst", 0.5, 9, 1, "er", "gradient", 0.5, nan), "drop_fraction_end"),
                               *(((*base, 0.5, 0.0, 0.2, 0.8, power), "power") for power in (-1, 0, nan, float("inf"))),
                               *(((*base, 0.5, 0.0, *ends), "schedule_end <= 1")
                                 for ends in ((nan, 0.8), (0.2, nan), (-0.1, 0.8), (0.2, 1.5), (0.9, 0.5)))):
        with pytest.raises(ValueError, match=message):
            SparseTraining(model, optimizer, *arguments)
    for fraction in (-0.1, 1.5):
        with pytest.raises(ValueError, match="drop_fraction"):
            update_mask(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), fraction)
    kept = torch.tensor([True, True, False, False])
    for fraction in (0, 1):  # none dropped; all dropped, and as many grown where the gradient is largest
        grown = update_mask(torch.arange(4.0), torch.tensor([1.0, 2, 3, 4]), kept, fraction)
        assert grown.tolist() == (kept if fraction == 0 else ~kept).tolist()
    broken = torch.tensor([1.0, float("nan"), 3.0, 4.0])  # even then the count holds
    assert update_mask(broken, broken, torch.tensor([1, 1, 1, 0]).bool(), 0.4).sum() == 3
    with pytest.raises(ValueError, match="does not train"):
        SparseTraining(model, torch.optim.SGD(nn.Linear(2, 2).parameters()), "sst")


def test_a_new_weight_starts_as_its_own_parameter_group_says():
    model = mlp(6, 20, 20, 1)
    optimizer = torch.optim.Adagrad([
        {"params": model[0].parameters(), "initial_accumulator_value": 0.1},
        {"params": [*model[2].parameters(), *model[4].parameters()], "initial_accumulator_value": 0.3}], lr=0.1)
    for _ in range(3):
        backward(model, 6)
        optimizer.step()
    sparse = SparseTraining(model, optimizer, "dst", 0.5)
    for name, start in (("0.weight", 0.1), ("2.weight", 0.3)):
        assert (optimizer.state[model.get_parameter(name)]["sum"][~sparse.masks[name]] == torch.tensor(start)).all()


def test_random_growth_of_two_layers_is_not_the_same():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.6, 10**6, 1, grow="random", drop_fraction_start=1.0, seed=0)
    model(torch.randn(4, 30)).sum().backward()
    assert sparse.update_topology(1)
    one, two = sparse.masks.values()
    assert (one & two).sum() < 0.6 * one.sum()  # by chance, 0.4
