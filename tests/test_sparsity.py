"""Densities, schedules, Algorithm 1, and how masks move: sparsity.py."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity import REGIMES, SparseTraining, drop_fraction, layer_densities, scheduled_sparsity, update_mask
from tests.helpers import backward, mlp, naive_counts, naive_update_mask, property_test


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


matrices = st.tuples(st.integers(1, 60), st.integers(1, 60))
kernels = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
shape_lists = st.lists(st.one_of(matrices, kernels), min_size=1, max_size=6)


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
    assert scheduled_sparsity(600, 0.6, 0.0, 100, 1100, 2) == pytest.approx(0.15)
    assert scheduled_sparsity(600, 0.6, 0.0, 100, 1100) == scheduled_sparsity(600, 0.6, 0.0, 100, 1100, 2)
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


def test_random_growth_ignores_gradients_and_keeps_the_count():
    weight, grad = torch.rand(40, 40), torch.arange(1600.0).view(40, 40)
    mask = torch.rand(40, 40) < 0.4
    one, same, other = (update_mask(weight, grad, mask, 0.5, grow="random", generator=torch.Generator().manual_seed(s))
                        for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.sum() == other.sum() == mask.sum()
    grown = (one & ~mask).nonzero()[:, 0].double()  # rows of new weights: RigL would take the last rows alone
    assert 14 < grown.mean() < 25


def test_a_mask_update_refuses_what_does_not_fit_and_keeps_its_count_with_nan():
    weight, kept = torch.arange(4.0), torch.tensor([True, True, False, False])
    for fraction in (0, 1):  # none dropped; all dropped, and as many grown where the gradient is largest
        grown = update_mask(weight, torch.tensor([1.0, 2, 3, 4]), kept, fraction)
        assert grown.tolist() == (kept if fraction == 0 else ~kept).tolist()
    broken = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    assert update_mask(broken, broken, torch.tensor([1, 1, 1, 0]).bool(), 0.4).sum() == 3
    for arguments, message in (((weight, weight, kept, -0.1), "drop_fraction"),
                               ((weight, weight, kept, 1.5), "drop_fraction"),
                               ((weight, weight[:2], kept, 0.5), "shapes differ"),
                               ((weight, weight, kept, 0.5, 5), "num_active"),
                               ((weight, weight, kept, 0.5, None, "momentum"), "grow")):
        with pytest.raises(ValueError, match=message):
            update_mask(*arguments)


def test_random_growth_is_drawn_where_the_weights_are():
    class Drawn(TorchDispatchMode):
        devices = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            self.devices += [result.device.type] if function.name().startswith("aten::rand") else []
            return result

    model = nn.Linear(30, 30, device="meta")
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters()), "dst", 0.6, 10, 1, grow="random", seed=0)
    with Drawn() as drawn:
        assert sparse.update_topology(1)
    assert drawn.devices == ["meta"]
    draw = lambda *place: torch.rand(4, generator=sparse._generator(*place, torch.device("cpu"))).tolist()
    assert draw(1, 0) == draw(1, 0) and len({*map(tuple, (draw(1, 0), draw(1, 1), draw(2, 0), draw(0, 1)))}) == 4
    one, sparse.seed = draw(1, 0), 1
    assert one != draw(1, 0)


def test_random_growth_of_two_layers_is_not_the_same():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.6, 10**6, 1, grow="random",
                            drop_fraction_start=1.0, seed=0)
    model(torch.randn(4, 30)).sum().backward()
    assert sparse.update_topology(1)
    one, two = sparse.masks.values()
    assert (one & two).sum() < 0.6 * one.sum()  # by chance, 0.4


@pytest.mark.filterwarnings("ignore:the topology never changes")
@property_test
@given(st.sampled_from(REGIMES), st.floats(0, 0.95), st.sampled_from(["er", "uniform"]),
       st.sampled_from(["gradient", "random"]), st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
       st.integers(1, 60), st.integers(1, 12), st.lists(st.integers(1, 7), min_size=8, max_size=30))
def test_density_invariants(regime, sparsity, distribution, grow, sizes, total, interval, strides):
    model = mlp(*sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    size = sum(w.numel() for w in weights)
    densities = layer_densities([tuple(w.shape) for w in weights], sparsity, distribution)
    try:
        sparse = SparseTraining(model, optimizer, regime, sparsity, total_steps=total, update_interval=interval,
                                distribution=distribution, grow=grow)
    except ValueError as refusal:  # only where a layer's share is less than one weight
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
    constant = densities[:1] * len(densities)
    ordered = {"d2s": sorted(densities, reverse=True), "s2d": sorted(densities)}.get(regime, constant)
    assert densities == ordered  # monotone, or constant
    if regime == "s2d":
        assert densities[-1] == 1.0


SPARSE_ARGUMENTS = [
    {"sparsity": 0.55, "distribution": "er", "grow": "gradient", "drop_fraction_start": 0.7, "drop_fraction_end": 0.2,
     "schedule_start": 0.15, "schedule_end": 0.65, "schedule_power": 3.0, "seed": 5, "update_interval": 7},
    {"sparsity": 0.7, "distribution": "uniform", "grow": "random", "drop_fraction_start": 0.1, "drop_fraction_end": 0.6,
     "schedule_start": 0.3, "schedule_end": 0.9, "schedule_power": 0.5, "seed": 6, "update_interval": 4}]


@pytest.mark.parametrize("arguments", SPARSE_ARGUMENTS, ids=["gradient", "random"])
@pytest.mark.parametrize("regime", ["dst", "s2d", "d2s"])
def test_every_argument_of_sparse_training_is_read(regime, arguments):
    """Masks over 40 steps, each from the one before by Eqs. (1) and (2) and Algorithm 1, written out here."""
    a, total = arguments, 40
    model = mlp(9, 20, 16, 2)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    sizes = [p.numel() for p in weights.values()]

    def make(m=model, **other):
        return SparseTraining(m, torch.optim.SGD(m.parameters(), lr=0.1), regime, total_steps=total, **a | other)
    seven, eight = (make(seed=seed).masks.values() for seed in (7, 8))
    assert regime == "d2s" or any((x != y).any() for x, y in zip(seven, eight))
    sparse, twin, moved, drawn = make(), make(copy.deepcopy(model)), 0, 0
    first, last = a["schedule_start"] * total, a["schedule_end"] * total
    for step in range(1, total + 1):
        torch.manual_seed(step)
        for p, other in zip(model.parameters(), twin.module.parameters()):
            p.data, p.grad = torch.randn_like(p), torch.randn_like(p)
            other.data, other.grad = p.data.clone(), p.grad.clone()
        sparse.apply_masks(), twin.apply_masks()
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        magnitudes = {name: p.detach().clone() for name, p in weights.items()}
        changed = sparse.update_topology(step)
        assert changed == (step % a["update_interval"] == 0 or regime != "dst" and step == last), step
        assert twin.update_topology(step) == changed
        assert all(torch.equal(twin.masks[n], mask) for n, mask in sparse.masks.items())
        if not changed:
            continue
        left = (1 - min(max((step - first) / (last - first), 0), 1)) ** a["schedule_power"]
        wanted = a["sparsity"] * {"dst": 1, "s2d": left, "d2s": 1 - left}[regime]
        start, end = a["drop_fraction_start"], a["drop_fraction_end"]
        zeta = end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2
        counts = {name: int(mask.sum()) for name, mask in sparse.masks.items()}
        if a["distribution"] == "er":
            assert list(counts.values()) == naive_counts([tuple(p.shape) for p in weights.values()], wanted)
        else:
            assert sum(counts.values()) == math.floor((1 - wanted) * sum(sizes) + 0.5)
            assert all(abs(count - (1 - wanted) * size) < 1 for count, size in zip(counts.values(), sizes))
        for name, mask in sparse.masks.items():
            active, by_gradient = before[name].sum().item(), naive_update_mask(
                magnitudes[name], weights[name].grad, before[name], zeta, counts[name])
            if a["grow"] == "gradient":
                assert torch.equal(mask, by_gradient)
            else:  # what is kept is known; what grows is drawn
                drawn += not torch.equal(mask, by_gradient)
                dropped = max(math.floor(zeta * active), active - counts[name])
                ranked = magnitudes[name].abs().masked_fill(~before[name], -1).flatten().argsort(descending=True)
                kept = ranked[:active - dropped]
                assert mask.flatten()[kept].all()
                grown = (mask & ~before[name]).sum().item()
                free = mask.numel() - len(kept)  # each of these is as likely as any other
                expected = (counts[name] - len(kept)) * (mask.numel() - active) / free if free else 0
                assert abs(grown - expected) <= 5 * math.sqrt(expected + 1)
            moved += (mask != before[name]).sum().item()
    assert moved > 100 and (drawn > 5) == (a["grow"] == "random")


def test_updates_happen_when_a_boundary_is_crossed_and_never_at_step_0():
    model = mlp(10, 40, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = SparseTraining(model, optimizer, "dst", total_steps=1000, update_interval=100)
    backward(model, 10)
    assert [step for step in (0, 1, 99, 130, 180, 200, 201, 450, 451, 999) if sparse.update_topology(step)] == [
        130, 200, 450, 999]
    every = SparseTraining(model, optimizer, "dst", total_steps=1000, update_interval=1)
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
