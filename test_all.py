"""The project's tests: `pytest test_all.py`. Each checks the code against a second computation, a hand-worked case or
values computed by other implementations, and each has been seen to fail when the line it guards is broken.
"""

import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import envs
import fast
import metrics
import networks
import train
from envs import Env, LockstepEvaluation, task_names
from agents import AGENTS
from mrq import MRQ, symexp, two_hot, two_hot_cross_entropy
from mrsac import MRSAC
from replay import Batch, ReplayBuffer, multi_step_return
from sac import DDPG, SAC, Temperature, reduce_q, tanh_gaussian
from settings import MR_DEFAULT, MR_MST, DDPGConfig, ModuleConfig, MRQConfig, SACConfig, module_configs, notes, parse, run_name
from sparsity import REGIMES, SparseTraining, _zero_pruned, drop_fraction, layer_densities, scheduled_sparsity, update_mask

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tiny networks: threads would only wait for one another
property_test = settings(max_examples=40, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------------------------ sparsity.py: densities

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


# ------------------------------------------------------------------------------------------------ sparsity.py: schedules

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
    assert scheduled_sparsity(1100, 0.6, 0.0, 100, 1100, 2) == 0.0
    assert scheduled_sparsity(5000, 0.0, 0.6, 100, 1100, 2) == 0.6  # exactly, not 0.5996
    assert scheduled_sparsity(7, 0.1, 0.6, 8, 8, 2) == 0.1 and scheduled_sparsity(8, 0.1, 0.6, 8, 8, 2) == 0.6


# --------------------------------------------------------------------------------------------- sparsity.py: Algorithm 1

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


def naive_update_mask(weight, grad, mask, zeta, wanted):
    """Algorithm 1 with Python's sort."""
    weight, grad, active = weight.flatten().tolist(), grad.flatten().tolist(), mask.flatten().tolist()
    on = [i for i, a in enumerate(active) if a]
    drop = max(math.floor(zeta * len(on)), len(on) - wanted)
    kept = sorted(on, key=lambda i: (-abs(weight[i]), i))[:len(on) - drop]
    rest = sorted(set(range(len(active))) - set(kept), key=lambda i: (-abs(grad[i]), i))
    chosen = set(kept) | set(rest[:wanted - len(kept)])
    return torch.tensor([i in chosen for i in range(len(active))]).view(mask.shape)


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


# ------------------------------------------------------------------------------------------ sparsity.py: SparseTraining

def mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = itertools.chain.from_iterable((nn.Linear(a, b), nn.ELU()) for a, b in itertools.pairwise(sizes))
    return nn.Sequential(*list(layers)[:-1])


def backward(model, width):
    x = torch.randn(32, width)
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    model.zero_grad()
    loss.backward()


@property_test
@given(st.sampled_from(REGIMES), st.floats(0, 0.95), st.sampled_from(["er", "uniform"]), st.sampled_from(["gradient", "random"]),
       st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)), st.integers(1, 60), st.integers(1, 12),
       st.lists(st.integers(1, 7), min_size=8, max_size=30))
def test_density_invariants(regime, sparsity, distribution, grow, sizes, total, interval, strides):
    model = mlp(*sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    sparse = SparseTraining(model, optimizer, regime, sparsity, total_steps=total, update_interval=interval,
                            distribution=distribution, grow=grow)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    size = sum(w.numel() for w in weights)
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
            assert not any(moment[~mask].any() for moment in sparse._moments(weight))
    assert abs(densities[-1] * size - (1 - final) * size) <= 0.5 + 1e-6  # exact: no weight too many, none too few
    ordered = {"d2s": sorted(densities, reverse=True), "s2d": sorted(densities)}.get(regime, [densities[0]] * len(densities))
    assert densities == ordered  # monotone, or constant
    if regime == "s2d":
        assert densities[-1] == 1.0


@pytest.mark.parametrize("optimizer_class, options", [
    (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}), (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (torch.optim.RMSprop, {"momentum": 0.5})])
def test_pruned_weights_stay_exactly_zero(optimizer_class, options):
    model = mlp(6, 32, 32, 1)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    steps = 3000 if optimizer_class is torch.optim.AdamW else 300
    sparse = SparseTraining(model, optimizer, "dst", 0.8, total_steps=steps, update_interval=100)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    for step in range(1, steps + 1):
        backward(model, 6)
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        assert not weight[~sparse.masks[name]].any()
        assert weight[sparse.masks[name]].count_nonzero() > 0.9 * sparse.active[name]
        for state in optimizer.state[weight].values():
            if state.shape == weight.shape:
                assert not state[~sparse.masks[name]].any()
    assert any((before[name] != mask).any() for name, mask in sparse.masks.items())  # the topology did move


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


def test_updates_happen_when_a_boundary_is_crossed_and_never_at_step_0():
    model = mlp(10, 40, 1)
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", total_steps=1000, update_interval=100)
    backward(model, 10)
    assert [step for step in (0, 1, 99, 130, 180, 200, 201, 450, 451, 999) if sparse.update_topology(step)] == [
        130, 200, 450, 999]


def test_a_schedule_ends_where_it_says_even_between_two_boundaries():
    for regime, density in (("d2s", 0.4), ("s2d", 1.0)):
        model = mlp(10, 40, 40, 1)
        sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), regime, 0.6, total_steps=100,
                                update_interval=30)
        backward(model, 10)
        assert [step for step in range(1, 101) if sparse.update_topology(step)] == [30, 60, 80, 90]
        backward(model, 10)
        assert sparse.density() == pytest.approx(density, abs=0.5 / 2040)


def test_sparsity_survives_copies_saving_and_new_parameters():
    model = mlp(6, 30, 30, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make = lambda m, o: SparseTraining(m, o, "dst", 0.7, total_steps=60, update_interval=5, grow="random", seed=3)
    sparse = make(model, optimizer)

    def advance(model, optimizer, sparse, first, last):
        torch.manual_seed(first)
        for step in range(first, last):
            backward(model, 6)
            sparse.update_topology(step)
            sparse.mask_gradients()
            optimizer.step()

    advance(model, optimizer, sparse, 1, 20)
    copied = copy.deepcopy(model)  # a hard target: sparse by itself
    assert all(not dict(copied.named_parameters())[n][~mask].any() for n, mask in sparse.masks.items())

    other = mlp(6, 30, 30, 1, seed=9)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other_sparse = make(other, other_optimizer)
    for new, old in ((other, model), (other_optimizer, optimizer), (other_sparse, sparse)):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    advance(model, optimizer, sparse, 20, 40)
    advance(other, other_optimizer, other_sparse, 20, 40)  # continues as if nothing had happened
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
    for dtype, layout in itertools.product((torch.float32, torch.float64, torch.bfloat16), (lambda t: t, lambda t: t.t())):
        tensor, mask = layout(torch.randn(1100, 1000).to(dtype)), layout(torch.rand(1100, 1000) < 0.5)  # more than one piece
        expected = tensor.masked_fill(~mask, 0.0)
        tensor[~mask] = float("nan")
        _zero_pruned(tensor, mask)
        assert torch.equal(tensor, expected)
    assert set(sparse.layer_densities()) == {"0.weight", "3.weight"}
    assert sparse.density() == pytest.approx(0.2, abs=2 / (16 * 27 + 4 * 16 * 36))
    for arguments, message in ((("rigl",), "unknown regime"), (("dst", 1.0), "sparsity"), (("dst", 0.5, 0), "total_steps"),
                               (("dst", 0.5, 9, 1, "er", "gradient", 1.5), "drop_initial")):
        with pytest.raises(ValueError, match=message):
            SparseTraining(model, optimizer, *arguments)
    with pytest.raises(ValueError, match="drop_fraction"):
        update_mask(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), 1.5)
    broken = torch.tensor([1.0, float("nan"), 3.0, 4.0])  # even then the count holds
    assert update_mask(broken, broken, torch.tensor([1, 1, 1, 0]).bool(), 0.4).sum() == 3
    with pytest.raises(ValueError, match="does not train"):
        SparseTraining(model, torch.optim.SGD(nn.Linear(2, 2).parameters()), "sst")


# ------------------------------------------------------------------------------------------------------- networks.py

def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("scale, encoder_humanoid, encoder_dog, head, critic, actor_humanoid, actor_dog", [
    (1, 2.01, 2.09, 0.30, 2.626, 1.323, 1.332), (3, 36.71, 36.97, 2.46, 33.055, 16.56, 16.58),
    (5, 154.27, 154.69, 6.73, 138.998, 69.55, 69.59)])
def test_sizes_match_the_paper(scale, encoder_humanoid, encoder_dog, head, critic, actor_humanoid, actor_dog):
    digits = lambda x: len(str(x).split(".")[1])
    same = lambda module_count, expected: round(module_count / 1e6, digits(expected)) == expected
    with torch.device("meta"):
        for arch_type in networks.ARCH_CONFIGS:  # all six types have the same counts
            for (obs, act), size, actor in (((67, 21), encoder_humanoid, actor_humanoid), ((223, 38), encoder_dog, actor_dog)):
                encoder = networks.Encoder(obs, act, arch_type, scale)
                assert same(count(encoder) - count(encoder.model), size) and same(count(encoder.model), head)
                assert same(count(networks.Actor(1536, act, arch_type, scale)), actor)
            assert same(count(networks.Critic(1536, arch_type, scale)), critic)


def test_the_whole_agent_at_scale_5_has_371_million_parameters():
    with torch.device("meta"):
        encoder = networks.Encoder(67, 21, 6, 5)
        total = count(encoder) - count(encoder.model) + count(networks.Critic(2560, 6, 5)) + count(networks.Actor(2560, 21, 5, 5))
        wide = networks.Critic(512, 6, 1, width_scale=2, depth_scale=3).q1
        narrow = networks.Encoder(10, 2, 6, 5, width_scale=0.25, depth_scale=1)
    assert round(total / 1e6, 1) == 370.7
    assert wide.projection.out_features == 1024 and len(wide.blocks) == 3
    assert narrow.zs_dim == 128 and narrow.za_linear.out_features == 64 and len(narrow.zsa_mlp.blocks) == 1


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def naive_block_mlp(model, x, config, residual):
    """Appendix C and Eqs. (3)-(6), written out."""
    act = {"relu": lambda v: v.clamp(min=0), "elu": lambda v: torch.where(v > 0, v, v.exp() - 1)}[config["activation"]]
    norm_act = lambda v: act(layer_norm(v)) if config["use_layer_norm"] else act(v)
    linear = lambda layer, v: v @ layer.weight.T + layer.bias
    x = linear(model.projection, x)
    for block in model.blocks:
        inner = norm_act(x)
        y = linear(block.linear2, norm_act(linear(block.linear1, inner)))
        if config["use_residual"]:
            y = y + (x if residual == "pre" else inner)
        x = y
    return linear(model.output, norm_act(x))


@pytest.mark.parametrize("arch_type", networks.ARCH_CONFIGS)
@pytest.mark.parametrize("residual", ["pre", "post"])
def test_block_mlp_against_its_equations(arch_type, residual):
    torch.manual_seed(arch_type)
    config = networks.ARCH_CONFIGS[arch_type]
    model = networks.BlockMLP(5, 3, 16, num_blocks=3, residual=residual, **config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(7, 5).double()
    torch.testing.assert_close(model(x), naive_block_mlp(model, x, config, residual))


def test_modules_against_their_definitions():
    torch.manual_seed(0)
    for arch_type, config in networks.ARCH_CONFIGS.items():
        encoder = networks.Encoder(5, 2, arch_type, width_scale=1 / 32, depth_scale=2)
        act = getattr(F, config["activation"])
        obs, action = torch.randn(9, 5), torch.rand(9, 2)
        zs = naive_block_mlp(encoder.zs_mlp, obs, config, "pre")
        zs = act(layer_norm(zs) if config["use_layer_norm"] else zs)  # no LayerNorm anywhere in types 1 and 2
        torch.testing.assert_close(encoder.zs(obs), zs)
        zsa = naive_block_mlp(encoder.zsa_mlp, torch.cat([zs, act(encoder.za_linear(action))], 1), config, "pre")
        torch.testing.assert_close(encoder(zs, action), zsa)
        done, next_zs, reward = encoder.predict(zsa)
        torch.testing.assert_close(torch.cat([done, next_zs, reward], 1), encoder.model(zsa))
        assert done.shape == (9, 1) and next_zs.shape == (9, 16) and reward.shape == (9, 65)
        has_norm = any(isinstance(layer, nn.LayerNorm) for layer in encoder.modules())
        assert has_norm == config["use_layer_norm"]
    critic, actor = networks.Critic(16, 4, width_scale=1 / 32), networks.Actor(16, 3, 3, width_scale=1 / 32)
    torch.testing.assert_close(critic(zsa), torch.cat([critic.q1(zsa), critic.q2(zsa)], 1))
    assert not {id(p) for p in critic.q1.parameters()} & {id(p) for p in critic.q2.parameters()}
    action, pre_activation = actor(zs)
    torch.testing.assert_close(action, pre_activation.tanh())


def test_initialisation_and_bad_arguments():
    layer = networks.Critic(512, 4).q1.blocks[0].linear1
    bound = math.sqrt(2) * math.sqrt(6 / 1024)  # Xavier uniform with ReLU's gain
    assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be above 0"):
            networks.Critic(8, 4, scale=bad)
    with pytest.raises(ValueError, match="architecture type"):
        networks.Actor(8, 2, 7)


def test_simba_networks_against_their_definition_and_sizes():
    torch.manual_seed(0)
    critic = networks.SimbaCritic(5, 2, 8, num_blocks=3, num_qs=2)
    for name, parameter in critic.named_parameters():
        nn.init.normal_(parameter, std=1e-3 if "projection" in name else 0.5)  # so small that the epsilon tells
    obs, action = torch.randn(7, 5), torch.randn(7, 2)

    def norm(layer, v):  # with parameters, and an epsilon of its own
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * layer.weight + layer.bias

    linear, columns = lambda layer, v: v @ layer.weight.T + layer.bias, []
    for q in (critic.q1, critic.q2):
        x = linear(q.projection, torch.cat([obs, action], 1))
        for block in q.blocks:
            x = x + linear(block.linear2, linear(block.linear1, norm(block.norm, x)).clamp(min=0))
        columns.append(linear(q.output, norm(q.norm, x)))
    torch.testing.assert_close(critic(obs, action), torch.cat(columns, 1))
    assert len(list(networks.SimbaCritic(5, 2, 8, 1).children())) == 1
    actor = networks.SimbaGaussian(5, 2, 8, 1)  # mean first, then log-std, each with a head of its own
    torch.testing.assert_close(actor(obs), torch.cat([linear(actor.output, actor.features(obs)),
                                                      linear(actor.log_std, actor.features(obs))], 1))

    def size(inputs, outputs, hidden, blocks):  # weights and biases, and two vectors a LayerNorm
        block = 2 * hidden + hidden * 4 * hidden + 4 * hidden + 4 * hidden * hidden + hidden
        return (inputs + 1) * hidden + blocks * block + 2 * hidden + (hidden + 1) * outputs

    for width, depth, millions in ((1, 1, 4.39), (2, 1, 17.44), (1, 4, 17.40), (4, 3, 207.96)):  # humanoid-run, one Q
        with torch.device("meta"):
            modules = {name: dataclasses.replace(m, width_scale=width, depth_scale=depth) for name, m in SAC.Config.presets["default"].items()}
            agent = SAC(67, 21, modules, device="meta")
        counts = {name: count(network) for name, network in agent.networks.items()}  # log-std and mean: 21 outputs each
        assert counts == {"critic": size(88, 1, 512 * width, 2 * depth), "actor": size(67, 42, 128 * width, depth)}
        assert round(sum(counts.values()) / 1e6, 2) == millions


def test_simba_initialisation():
    torch.manual_seed(0)
    q = networks.SimbaCritic(40, 10, 64, 2).q1
    torch.testing.assert_close(q.projection.weight.T @ q.projection.weight, torch.eye(50), atol=1e-5, rtol=0)
    assert q.output.weight.norm().item() == pytest.approx(1, abs=1e-5)  # orthogonal, gain 1
    for layer in (q.blocks[0].linear1, q.blocks[1].linear2):
        std = math.sqrt(2 / layer.in_features)  # He; the cut is at two standard deviations of the normal before it
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert 0.99 * 2 < layer.weight.abs().max().item() / (std / 0.8796257) <= 2
        assert not layer.bias.any()


def test_the_normalizer_against_numpy():
    rng = np.random.RandomState(0)
    seen = (rng.randn(500, 3) * [1, 10, 0] + [5, -300, 2]).astype(np.float32)
    normalizer = networks.RunningNormalizer(3)
    for obs in seen:
        normalizer.update(torch.from_numpy(obs))
    # Mean 0 and variance 1 with the weight of 1e-4 observations, then the rest.
    weights = np.concatenate([[1e-4], np.ones(500)])
    values = np.concatenate([np.zeros((1, 3)), seen.astype(np.float64)])
    mean = np.average(values, axis=0, weights=weights)
    var = np.average((values - mean) ** 2, axis=0, weights=weights) + 1e-4 / weights.sum()  # the first one's own variance
    np.testing.assert_allclose(normalizer.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, var, rtol=1e-9)
    assert normalizer.count.item() == pytest.approx(500.0001, abs=1e-9)
    normalized = normalizer(torch.from_numpy(seen))
    np.testing.assert_allclose(normalized, (seen - mean) / np.sqrt(var + 1e-8), rtol=2e-4, atol=2e-4)
    assert normalized.dtype == torch.float32 and normalized.shape == (500, 3) and normalizer(normalized[None]).shape == (1, 500, 3)


# --------------------------------------------------------------------------------------------------------- replay.py

def play(seed, capacity, horizon, steps, obs_dim=2, action_dim=1, prioritized=True, device="cpu"):
    """A buffer of random episodes, and the same episodes as plain lists, each step with the row it went to."""
    rng = np.random.RandomState(seed)
    buffer = ReplayBuffer(obs_dim, action_dim, capacity, horizon, prioritized, device=device)
    episodes, row, obs = [[]], 0, rng.randn(obs_dim)
    for t in range(steps):
        action, reward, next_obs = rng.randn(action_dim), rng.randn(), rng.randn(obs_dim)
        terminated, truncated = rng.rand() < 0.08, rng.rand() < 0.08
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        episodes[-1].append((row, obs, action, reward, next_obs, terminated))
        row, obs = row + 1, next_obs
        if terminated or truncated:
            episodes.append([])
            row, obs = row + 1, rng.randn(obs_dim)
    return buffer, episodes


@property_test
@given(st.integers(0, 10**6), st.integers(24, 90), st.integers(1, 5), st.integers(1, 250))
def test_every_subtrajectory_is_real_and_every_complete_one_is_offered(seed, capacity, horizon, steps):
    buffer, episodes = play(seed, capacity, horizon, steps)
    expected = {}
    for episode in episodes:
        for start in range(len(episode)):
            part = episode[start:start + horizon]
            complete = len(part) == horizon or part[-1][5]  # runs its full length, or ends in a terminal state
            if complete and part[0][0] > latest_row(episodes) - capacity:  # not yet overwritten
                expected[part[0][0] % capacity] = part
    assert set(buffer.priority.nonzero().flatten().tolist()) == set(expected)
    if not expected:
        return
    batch = buffer.gather(torch.tensor(sorted(expected)), horizon)
    for row, part in enumerate(expected[index] for index in sorted(expected)):
        n = len(part)
        for name, column in (("obs", 1), ("action", 2), ("reward", 3)):
            np.testing.assert_allclose(getattr(batch, name)[row, :n], np.array([step[column] for step in part]), rtol=1e-6)
        np.testing.assert_allclose(batch.obs[row, n], part[-1][4], rtol=1e-6)
        assert batch.terminated[row, :n].bool().tolist() == [step[5] for step in part]


@property_test
@given(st.integers(0, 10**6), st.integers(40, 90), st.integers(1, 250))
def test_mean_absolute_reward_and_termination_seen(seed, capacity, steps):
    buffer, episodes = play(seed, capacity, 3, steps)
    stored = [abs(step[3]) for episode in episodes for step in episode if step[0] > latest_row(episodes) - capacity]
    assert buffer.mean_absolute_reward().item() == pytest.approx(np.mean(stored), rel=1e-5)
    assert buffer.termination_seen.item() == any(step[5] for episode in episodes for step in episode)


def latest_row(episodes):
    """The row of the latest observation written, one past the latest step: what stood there before is gone."""
    return max(step[0] for episode in episodes for step in episode) + 1


@pytest.mark.parametrize("shape", [(1000,), (10, 100)])  # batch by batch, or a burst at once
def test_draws_follow_the_priorities(shape):
    buffer = ReplayBuffer(1, 1, 5000, horizon=1)
    rng = np.random.RandomState(0)
    for t in range(4000):
        buffer.add([t], [0], 0.0, [t + 1], False, (t + 1) % 100 == 0)
    weights = torch.zeros(len(buffer.priority)).double()
    rows = buffer.priority.nonzero().flatten()
    weights[rows] = torch.tensor(rng.choice([1.0, 2.0, 50.0], len(rows)))
    buffer.priority.copy_(weights)
    torch.manual_seed(0)
    counts = torch.bincount(torch.cat([buffer.draw(*shape).flatten() for _ in range(400)]), minlength=len(weights)).double()
    assert not counts[weights == 0].any()
    for value in (1.0, 2.0, 50.0):
        expected = value / weights.sum() * 400_000 * (weights == value).sum()
        assert abs(counts[weights == value].sum() - expected) < 5 * expected.sqrt()
    p = weights[rows] / weights.sum() * 400_000
    chi2 = ((counts[rows] - p) ** 2 / p).sum()
    assert abs(chi2 - len(rows)) < 6 * math.sqrt(2 * len(rows))


def test_a_draw_of_zero_or_one_never_takes_a_row_without_priority(monkeypatch):
    buffer, _ = play(1, 60, 3, 100)
    for value in (0.0, 1.0):  # the ends of the interval, and what rounding could make of it
        monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(tuple(shape), value, **kw))
        assert (buffer.priority[buffer.draw(8)] > 0).all() and (buffer.priority[buffer.draw(2, 8)] > 0).all()


def test_float32_sums_would_distort_a_million_priorities(monkeypatch):
    buffer = ReplayBuffer(1, 1, 2**20, horizon=1)
    buffer.priority.fill_(1.0)
    buffer.priority[0], buffer.sampleable = 2.0**36, 1  # a float32 sum that begins so cannot see the million ones after it
    for row in (1, 5000, 700_000, 2**20 - 1):
        share = (2.0**36 + row - 0.5) / (2.0**36 + 2**20 - 1)  # the draw that falls on this row's block
        monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(tuple(shape), share, **kw))
        assert buffer.draw(2)[0].item() // 1024 == row // 1024
        assert buffer.draw(1, 2)[0, 0].item() == row  # a single running sum knows the row itself


def test_priorities_after_an_update():
    buffer, _ = play(3, 60, 3, 50)
    rows = buffer.priority.nonzero().flatten()[:3]
    index = torch.stack([rows[0], rows[1], rows[0], rows[2]])
    buffer.update_priority(index, torch.tensor([7.0, 0.2, 9.0, -4.0]))
    expected = [9.0 ** 0.4, 1.0, 4.0 ** 0.4]  # the larger of two; at least 1; |δ|
    np.testing.assert_allclose(buffer.priority[rows], expected, rtol=1e-6)
    buffer.update_priority(rows[:1], torch.tensor([2.0]))
    assert buffer.priority[rows[0]].item() == pytest.approx(2.0 ** 0.4)  # it can fall as well
    assert buffer.max_priority.item() == pytest.approx(9.0 ** 0.4)  # the largest so far, not the largest now
    if buffer.episode_length:  # begin an episode of its own
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False, True)
    row = buffer.row
    for _ in range(3):
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False, False)
    assert buffer.priority[row % 60].item() == pytest.approx(9.0 ** 0.4)  # new transitions get it
    uniform, _ = play(3, 60, 3, 50, prioritized=False)
    before = uniform.priority.clone()
    uniform.update_priority(index, torch.tensor([7.0, 0.2, 9.0, -4.0]))
    assert torch.equal(before, uniform.priority) and set(before.tolist()) == {0.0, 1.0}


def test_multi_step_returns_by_hand():
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    terminated = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    returns, not_done = multi_step_return(reward, terminated, 0.5)
    assert returns.tolist() == [[3.0], [2.0], [3.0]]  # the terminating reward counts, later ones do not
    assert not_done.tolist() == [[1.0], [0.0], [0.0]]


def test_a_million_dog_run_transitions_fit_and_what_cannot_fit_is_refused():
    buffer = ReplayBuffer(223, 38, 1_002_000)  # with the 2,000 last observations of 500-step episodes
    size = sum(value.numel() * value.element_size() for value in vars(buffer).values() if torch.is_tensor(value))
    assert 1.0e9 < size <= 1.3e9
    with pytest.raises(MemoryError, match="GB"):
        ReplayBuffer(223, 38, 10**11)
    with pytest.raises(ValueError, match="nothing to draw"):
        ReplayBuffer(2, 1, 100).sample(4)
    buffer = ReplayBuffer(1, 1, 12, horizon=5)
    for t in range(5):
        buffer.add([0], [0], 0.0, [0], False, t == 4)
    buffer.sample(4)
    for t in range(30):  # episodes too short to offer anything, until the one that did is overwritten
        buffer.add([0], [0], 0.0, [0], False, t % 3 == 2)
    assert not buffer.priority.any()
    with pytest.raises(ValueError, match="nothing to draw"):
        buffer.sample(4)


# -------------------------------------------------------------------------------------------------------- metrics.py

def test_srank_against_published_values_and_a_naive_form():
    assert metrics.srank(torch.diag(torch.tensor([50, 30, 15, 4, 0.9, 0.1]))) == 4
    assert metrics.srank(torch.diag(torch.tensor([99.0, 1.0]))) == 1  # 99 % is reached exactly
    assert metrics.srank(torch.diag(0.5 ** torch.arange(10.0))) == 7
    torch.manual_seed(0)
    for rows, columns in ((16, 8), (8, 32), (40, 40)):
        matrix = torch.randn(rows, columns) @ torch.diag(0.8 ** torch.arange(columns).float())
        values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert metrics.srank(matrix) == next(k for k in range(1, 99) if values[:k].sum() >= 0.99 * values.sum())
    rank_one = torch.outer(torch.randn(12), torch.randn(6))
    assert metrics.srank(rank_one) == 1 and metrics.srank(torch.zeros(4, 3)) == 0
    assert math.isnan(metrics.srank(torch.full((4, 3), float("nan"))))


def test_dormant_ratio_against_published_values():
    layers = {"a": torch.tensor([[1.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.2, 0.0], [2.0, 0.0, 0.1, 2.0], [2.0, 0.0, 0.1, 2.0]]),
              "b": torch.tensor([[0.0, 1.0]] * 4)}
    for tau, pooled, a in ((0.0, 2 / 6, 0.25), (0.025, 2 / 6, 0.25), (0.1, 3 / 6, 0.5)):
        ratio, per_layer = metrics.dormant_ratio(layers, tau)
        assert ratio == pytest.approx(pooled) and per_layer == {"a": a, "b": 0.5}
    elu = torch.tensor([[-1.0, 0.5, -0.01, 2.0], [1.0, -0.5, 0.01, 2.0]])  # signs do not cancel
    assert metrics.dormant_ratio({"a": elu}) == (0.25, {"a": 0.25})
    assert metrics.dormant_ratio({"a": torch.zeros(3, 5)})[0] == 1.0
    assert math.isnan(metrics.dormant_ratio({})[0])


def test_activations_are_read_after_the_activation_in_every_layer():
    model = networks.BlockMLP(4, 2, 8, num_blocks=2, activation="elu")
    x = torch.randn(16, 4)
    with metrics.record_activations(model) as recorded:
        model(x)
    assert len(recorded) == 2 * 2 + 1 and all(value.shape == (16, 8) for value in recorded.values())
    torch.testing.assert_close(recorded["activation.1"], model.features(x))
    assert min(value.min() for value in recorded.values()) >= -1  # ELU's floor
    model(torch.zeros(2, 4))
    assert recorded["activation.1"].shape == (16, 8)  # the hooks are gone


def test_norms_and_interference_against_naive_forms():
    model = mlp(5, 7, 3)
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    losses = (model(x) - y).square().mean(1)
    gradients = []
    for i in range(6):
        model.zero_grad()
        (model(x[i:i + 1]) - y[i:i + 1]).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    gradients = torch.stack(gradients)
    assert metrics.gradient_norm(model) == pytest.approx(gradients[-1].norm().item(), rel=1e-5)
    assert metrics.parameter_norm(model) == pytest.approx(
        math.sqrt(sum(p.square().sum().item() for p in model.parameters())), rel=1e-5)
    cosine = F.cosine_similarity(gradients[:, None].double(), gradients[None].double(), dim=2)
    torch.testing.assert_close(metrics.gradient_interference(gradients), cosine, atol=1e-6, rtol=1e-5)
    for group_size in (1, 20, 10**6):  # however the layers are grouped
        gram = metrics.gradient_gram(losses, list(model.parameters()), group_size=group_size)
        torch.testing.assert_close(metrics.cosines(gram), cosine, atol=1e-5, rtol=1e-4)
    mean, negative = metrics.interference_summary(cosine)
    off = cosine[~torch.eye(6, dtype=torch.bool)]
    assert (mean, negative) == (pytest.approx(off.mean().item()), pytest.approx((off < 0).double().mean().item()))
    masks = [torch.rand(p.shape) < 0.5 for p in model.parameters()]
    masked = gradients * torch.cat([m.flatten() for m in masks])
    torch.testing.assert_close(metrics.gradient_gram(losses, list(model.parameters()), masks), (masked @ masked.T).double(),
                               atol=1e-6, rtol=1e-4)
    model.zero_grad()
    assert math.isnan(metrics.gradient_norm(model)) and math.isnan(metrics.parameter_norm(nn.ReLU()))
    assert all(math.isnan(value) for value in metrics.interference_summary(torch.full((3, 3), float("nan"))))


# ------------------------------------------------------------------------------------------------------------ mrq.py

TINY = MRQConfig(batch_size=16, target_update_freq=4)


def tiny(modules=MR_MST, config=TINY, width=1 / 32, seed=0, **options):
    torch.manual_seed(seed)
    modules = {name: ModuleConfig(m.arch_type, m.regime, width, 1, sparse_options={"update_interval": 3})
               for name, m in modules.items()}
    return MRQ(4, 2, modules, config, total_updates=40, seed=seed, **options)


def filled(seed=0, steps=300):
    return play(seed, 400, 5, steps, obs_dim=4, action_dim=2)[0]


def double(agent):
    """The same agent in float64, for finite differences, and moved away from its targets."""
    for network in agent.networks.values():
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for network in (*agent.networks.values(), *agent.targets.values()):
        network.double()
    agent.bins, agent.reward_scale, agent.target_reward_scale = (
        t.double() for t in (agent.bins, agent.reward_scale, agent.target_reward_scale))
    return agent


def batch_of(buffer, size=12):
    """A float64 batch with terminations in it, actions within ±1."""
    torch.manual_seed(5)
    batch = buffer.sample(size)
    assert 0 < batch.terminated.sum() and (batch.terminated.cumsum(1) > 0)[:, 0].any() and not batch.terminated.all()
    return Batch(batch.index, batch.obs.double(), batch.action.double().clamp(-1, 1), batch.reward.double(),
                 batch.terminated.double())


def dense_two_hot(x, bins):
    row = torch.zeros(len(bins), dtype=bins.dtype)
    upper = next((i for i, b in enumerate(bins) if b > x), None)
    if x < bins[0] or upper is None:
        row[0 if x < bins[0] else -1] = 1
        return row
    row[upper - 1], row[upper] = (bins[upper] - x) / (bins[upper] - bins[upper - 1]), (x - bins[upper - 1]) / (bins[upper] - bins[upper - 1])
    return row


def test_two_hot_against_a_spelt_out_row():
    bins = symexp(torch.linspace(-10, 10, 65).double())
    assert bins[-1].item() == pytest.approx(math.exp(10) - 1) and bins[32] == 0 and bins[0] == -bins[-1]
    x = torch.cat([torch.randn(50).double() * 10, bins[[0, 5, 32, 64]], torch.tensor([1e6, -1e6, 0.0]).double()])
    lower, weight = two_hot(x, bins)
    rows = torch.zeros(len(x), 65).double().scatter_(1, lower[:, None], (1 - weight)[:, None])
    rows.scatter_add_(1, lower[:, None] + 1, weight[:, None])
    torch.testing.assert_close(rows, torch.stack([dense_two_hot(v, bins) for v in x]))
    inside = x.abs() <= bins[-1]
    torch.testing.assert_close((rows * bins).sum(1)[inside], x[inside])  # the mean of the two bins is x again
    logits = torch.randn(len(x), 65).double()
    torch.testing.assert_close(two_hot_cross_entropy(logits, x, bins), -(rows * logits.log_softmax(1)).sum(1))


def test_encoder_loss_against_a_loop_over_samples():
    agent, buffer = double(tiny()), filled()
    batch = batch_of(buffer)
    for seen in (0.0, 1.0):
        expected = []
        for i in range(len(batch.index)):
            zs, total = agent.encoder.zs(batch.obs[i, 0]), 0.0
            for k in range(5):
                out = agent.encoder.model(agent.encoder.zsa_mlp(
                    torch.cat([zs, F.elu(agent.encoder.za_linear(batch.action[i, k]))])))
                done, zs, logits = out[0], out[1:17], out[17:]  # the raw linear prediction is fed back
                target = agent.targets["encoder"].zs(batch.obs[i, k + 1])
                total += 0.1 * -(dense_two_hot(batch.reward[i, k], agent.bins) * logits.log_softmax(0)).sum()
                total += ((zs - target) ** 2).mean() + 0.1 * seen * (done - batch.terminated[i, k]) ** 2
                if batch.terminated[i, k]:
                    break  # nothing counts after a termination
            expected.append(total)
        losses, _ = agent.encoder_loss(batch, torch.tensor(seen))
        torch.testing.assert_close(losses, torch.stack(expected))


def test_td_target_and_critic_loss_against_a_loop_over_samples():
    agent, buffer = double(tiny()), filled()
    agent.reward_scale.fill_(2.5), agent.target_reward_scale.fill_(0.7)
    batch = batch_of(buffer)
    target_encoder, target_actor, target_critic = (agent.targets[name] for name in ("encoder", "actor", "critic"))
    torch.manual_seed(11)
    noise = (torch.randn(12, 2, dtype=torch.float64) * 0.2).clamp(-0.3, 0.3)
    targets, losses, errors = [], [], []
    with torch.no_grad():
        for i in range(12):
            y, alive = 0.0, True
            for k in range(3):
                if alive:
                    y += 0.99 ** k * batch.reward[i, k]
                    alive = not batch.terminated[i, k]
            if alive:
                zs = target_encoder.zs(batch.obs[i, 3])
                action = (target_actor(zs)[0] + noise[i]).clamp(-1, 1)
                y += 0.99 ** 3 * 0.7 * target_critic(target_encoder(zs, action)).min()
            y = y / 2.5
            q = agent.critic(agent.encoder(agent.encoder.zs(batch.obs[i, 0]), batch.action[i, 0]))
            huber = [0.5 * d * d if d < 1 else d - 0.5 for d in (q - y).abs().tolist()]
            targets.append(y), losses.append(sum(huber) / 2), errors.append((q - y).abs().max())
    torch.manual_seed(11)
    torch.testing.assert_close(agent.td_target(batch)[:, 0], torch.stack(targets))
    torch.manual_seed(11)
    loss, td_error, _ = agent.critic_loss(batch, agent.encoder.zs(batch.obs[:, 0]))
    torch.testing.assert_close(loss, torch.tensor(losses).double())
    torch.testing.assert_close(td_error, torch.stack(errors))


def test_actor_loss_by_its_equation():
    agent, buffer = double(tiny(config=MRQConfig(batch_size=16, pre_activation_weight=0.3))), filled()
    zs = agent.encoder.zs(batch_of(buffer).obs[:, 0]).detach()
    pre = agent.actor.mlp(zs)
    zsa = agent.encoder(zs, pre.tanh())
    expected = -0.5 * (agent.critic.q1(zsa) + agent.critic.q2(zsa))[:, 0] + 0.3 * (pre ** 2).mean(1)
    torch.testing.assert_close(agent.actor_loss(zs)[0], expected)


@pytest.mark.parametrize("name", ["encoder", "critic", "actor"])
def test_gradients_against_finite_differences(name):
    agent, buffer = double(tiny()), filled()
    batch = batch_of(buffer)
    zs = agent.encoder.zs(batch.obs[:, 0]).detach()

    def loss():
        torch.manual_seed(2)  # the same target noise each time
        return {"encoder": lambda: agent.encoder_loss(batch, torch.ones(()))[0], "critic": lambda: agent.critic_loss(batch, zs)[0],
                "actor": lambda: agent.actor_loss(zs)[0]}[name]().mean()

    parameters = list(agent.networks[name].parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            below = loss()
            parameter += 1e-6 * direction
        assert ((above - below) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7)


def test_one_whole_update_against_adamw_by_hand():
    """Critic: masks, then clipping, then AdamW; from the gradient of the critic's own loss."""
    config = MRQConfig(batch_size=16, critic_grad_clip=0.05)  # low enough to bind
    agent, buffer = tiny(config=config), filled()
    agent.refresh_targets(buffer)
    for _ in range(5):  # crosses topology updates at 3; moments are not zero
        agent.update_critic_and_actor(buffer)
    before = copy.deepcopy(agent.critic)
    names = [name for name, _ in agent.critic.named_parameters()]
    moments = {n: {k: v.clone() for k, v in agent.optimizers["critic"].state[p].items()} for n, p in agent.critic.named_parameters()}
    torch.manual_seed(7)
    batch = buffer.sample(16, 3)
    loss, _, _ = agent.critic_loss(batch, agent.encoder.zs(batch.obs[:, 0]).detach())
    gradients = dict(zip(names, torch.autograd.grad(loss.mean(), list(agent.critic.parameters()))))
    masks = agent.sparse["critic"].masks
    for name in masks:  # the sixth update is a topology update: 6 is a multiple of 3
        zeta = drop_fraction(6, 40, 0.5, 0.0)
        masks[name] = masks[name].clone()
    new_masks = {n: update_mask(dict(before.named_parameters())[n], gradients[n], masks[n], zeta) for n in masks}
    torch.manual_seed(7)
    agent.update_critic_and_actor(buffer)
    for n in new_masks:
        assert torch.equal(agent.sparse["critic"].masks[n], new_masks[n])
        gradients[n] = gradients[n] * new_masks[n]
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 0.05 and agent.info["critic_grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for n, parameter in before.named_parameters():
        stays = masks_and(masks, new_masks, n, parameter)
        w, m, v = (t * stays for t in (parameter.detach(), moments[n]["exp_avg"], moments[n]["exp_avg_sq"]))
        g = gradients[n] * 0.05 / (norm + 1e-6)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 3e-4 * 1e-4 * w - 3e-4 * (m / (1 - 0.9 ** 6)) / ((v / (1 - 0.999 ** 6)).sqrt() + 1e-8)
        torch.testing.assert_close(dict(agent.critic.named_parameters())[n].detach(), w, atol=1e-7, rtol=1e-5)


def masks_and(old, new, name, parameter):
    return (old[name] & new[name]) if name in new else torch.ones_like(parameter, dtype=torch.bool)


def test_growth_is_ranked_by_the_modules_own_loss(monkeypatch):
    agent, buffer = tiny(), filled()
    agent.update(buffer)
    frozen, frozen_buffer, seen = copy.deepcopy(agent), copy.deepcopy(buffer), {}
    for name, sparse in agent.sparse.items():
        monkeypatch.setattr(sparse, "update_topology", lambda step, name=name: seen.update(
            {name: [p.grad.clone() for p in agent.networks[name].parameters()]}))
    torch.manual_seed(1)
    agent.update_critic_and_actor(buffer)
    torch.manual_seed(1)
    batch = frozen_buffer.sample(16, 3)
    zs = frozen.encoder.zs(batch.obs[:, 0]).detach()
    own = torch.autograd.grad(frozen.critic_loss(batch, zs)[0].mean(), list(frozen.critic.parameters()))
    torch.testing.assert_close(seen["critic"], list(own))  # nothing of the actor's loss in it, and not masked yet
    action, pre_activation = frozen.actor(zs)  # the actor follows the critic as just updated
    loss = -agent.critic(agent.encoder(zs, action)).mean() + 1e-5 * pre_activation.square().mean()
    torch.testing.assert_close(seen["actor"], list(torch.autograd.grad(loss, list(frozen.actor.parameters()))))


@pytest.mark.parametrize("algo, name", [("mrq", "encoder"), ("mrq", "critic"), ("mrq", "actor"), ("sac", "critic"), ("sac", "actor"),
                                        ("ddpg", "actor"), ("mrsac", "actor")])
def test_what_is_not_finite_stops_its_module_and_no_other(algo, name, monkeypatch):
    """One NaN loss: that module's weights stay, the others go on, and who broke, and when, is known at the end."""
    agent, buffer = tiny_of(algo, interval=100)
    original, calls = getattr(agent, f"{name}_loss"), itertools.count(1)
    bad = 6 if name == "encoder" else 3  # the encoder's sixth update belongs to the burst of step 4
    monkeypatch.setattr(agent, f"{name}_loss", lambda *arguments: (
        (lambda losses, *rest: (losses * (math.nan if next(calls) == bad else 1.0), *rest))(*original(*arguments))))
    weights = lambda: {n: torch.cat([p.detach().flatten() for p in network.parameters()]) for n, network in agent.networks.items()}
    while agent.fault() is None:
        agent.update(buffer)
    then = weights()
    for _ in range(5):  # another burst among them
        agent.update(buffer)
    assert {n: torch.equal(w, then[n]) for n, w in weights().items()} == {n: n == name for n in then}
    assert all(w.isfinite().all() for w in weights().values())
    assert agent.fault() == (f"the {name}'s loss or gradient (its update {bad})", 4 if name == "encoder" else (bad - 1) // agent.updates_per_step)
    assert [n for n, broken in agent.broken.items() if broken] == [name]
    if algo in ("sac", "mrsac"):
        assert agent.temperature.log.isfinite() and (agent.temperature.optimizer.state[agent.temperature.log]["step"] == 2) == (name == "actor")


def test_no_nan_enters_the_priorities():
    buffer = play(0, 400, 5, 300)[0]
    index = buffer.priority.nonzero().flatten()[:3]
    buffer.update_priority(index, torch.tensor([math.nan, math.inf, 32.0]))
    assert buffer.priority[index].tolist() == pytest.approx([1, 1, 4]) and buffer.max_priority == 4


def test_the_reward_scale_waits_for_a_reward():
    agent, buffer = tiny(), ReplayBuffer(4, 2, 400, 5)
    for step in range(60):
        buffer.add(np.ones(4), np.zeros(2), 0.0, np.ones(4), False, False)
    agent.refresh_targets(buffer)
    assert agent.reward_scale == agent.target_reward_scale == 1
    buffer.add(np.ones(4), np.zeros(2), -6.1, np.ones(4), False, False)
    agent.refresh_targets(buffer)
    assert agent.reward_scale.item() == pytest.approx(0.1) and agent.target_reward_scale == 1


def test_the_actors_loss_computes_nothing_for_critic_and_encoder():
    from torch.utils.flop_counter import FlopCounterMode
    agent, buffer = tiny(modules=MR_DEFAULT), filled()
    agent.refresh_targets(buffer)
    agent.update(buffer)
    before = {name: [p.clone() for p in network.parameters()] for name, network in agent.networks.items()}
    for network in agent.networks.values():
        network.zero_grad(set_to_none=True)
    zs = agent.encode(torch.randn(16, 4))
    with FlopCounterMode(display=False) as counter:
        agent.update_actor(zs)
    assert all(p.grad is None for name in ("encoder", "critic") for p in agent.networks[name].parameters())
    for name in ("encoder", "critic"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], agent.networks[name].parameters()))
    assert all(p.requires_grad for network in agent.networks.values() for p in network.parameters())
    # Forward, one product a weight. Backward, one for what flows on and, for the actor's weights, one more.
    products = lambda module: sum(2 * 16 * p.numel() for p in module.parameters() if p.ndim == 2)
    way = products(agent.critic) + products(agent.encoder.zsa_mlp) + products(agent.encoder.za_linear)
    first = 2 * 16 * agent.actor.mlp.projection.weight.numel()  # z_s needs no gradient
    assert counter.get_total_flops() <= 2 * way + 3 * products(agent.actor) - first


def test_order_of_an_update():
    agent, buffer = tiny(), filled()
    events = []
    for name in ("refresh_targets", "update_encoder", "update_critic_and_actor"):
        def spy(replay, name=name, original=getattr(agent, name)):
            events.append(name)
            return original(replay)
        setattr(agent, name, spy)
    for _ in range(9):
        agent.update(buffer)
    period = ["refresh_targets"] + ["update_encoder"] * 4 + ["update_critic_and_actor"] * 4
    assert events == (period * 3)[:len(period) * 2 + 6]
    assert agent.updates == {"encoder": 12, "critic": 9, "actor": 9}


def test_targets_and_reward_scales_follow_every_period():
    agent, buffer = tiny(), filled()
    same = lambda name: all(torch.equal(a, b) for a, b in zip(agent.networks[name].parameters(), agent.targets[name].parameters()))
    assert all(same(name) for name in agent.networks) and agent.reward_scale == agent.target_reward_scale == 1
    agent.update(buffer)
    mean = buffer.mean_absolute_reward()
    assert agent.reward_scale == mean and agent.target_reward_scale == 1  # the first target scale is 1
    assert not any(same(name) for name in agent.networks)
    for _ in range(3):
        agent.update(buffer)
    held = {name: [p.clone() for p in agent.networks[name].parameters()] for name in ("critic", "actor")}
    buffer.add(np.zeros(4), np.zeros(2), 500.0, np.zeros(4), False, True)
    agent.update(buffer)
    assert agent.target_reward_scale == mean and agent.reward_scale == buffer.mean_absolute_reward() > mean
    for name in ("critic", "actor"):  # copied before this update's step
        assert all(torch.equal(a, b) for a, b in zip(held[name], agent.targets[name].parameters()))


def test_a_burst_is_drawn_at_its_start_and_goes_on_from_its_state():
    agent, buffer = tiny(), filled()
    drawn, gather = [], buffer.gather
    buffer.gather = lambda index, horizon: drawn.append(index) or gather(index, horizon)
    agent.refresh_targets(buffer)
    burst = agent.burst.clone()
    assert burst.shape == (4, 16) and len(burst.unique()) > 30 and (buffer.priority[burst] > 0).all()
    agent.update_encoder(buffer)
    other = tiny(seed=9)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))  # stopped after one update of four
    torch.manual_seed(123)
    for one in (agent, other):
        for _ in range(3):
            one.update_encoder(buffer)
    assert torch.equal(torch.stack(drawn), torch.cat([burst, burst[1:]]))
    assert all(torch.equal(a, b) for a, b in zip(agent.encoder.parameters(), other.encoder.parameters()))
    agent.refresh_targets(buffer)
    assert not torch.equal(agent.burst, burst) and agent.burst_position == 0


@pytest.mark.parametrize("regimes", [("dense", "dst", "sst"), ("s2d", "d2s", "dst"), ("sst", "s2d", "d2s")])
def test_every_regime_on_every_module(regimes):
    modules = {name: ModuleConfig(preset.arch_type, regime) for (name, preset), regime in zip(MR_MST.items(), regimes)}
    agent, buffer = tiny(modules), filled()
    for _ in range(40):
        agent.update(buffer)
    for name, regime in zip(agent.networks, regimes):
        final = {"dense": 1.0, "s2d": 1.0}.get(regime, 0.4)
        weights = [p for p in agent.networks[name].parameters() if p.ndim == 2]
        size = sum(w.numel() for w in weights)
        assert abs(agent.sparse[name].density() - final) * size <= 0.5 + 1e-6
        for network in (agent.networks[name], ):
            for weight, mask in agent.sparse[name].masks.items():
                assert not dict(network.named_parameters())[weight][~mask].any()
        agent.refresh_targets(buffer)  # a hard copy is as sparse
        for weight, mask in agent.sparse[name].masks.items():
            assert not dict(agent.targets[name].named_parameters())[weight][~mask].any()
    assert all(math.isfinite(value) for value in agent.info.values())


def test_acting():
    agent = tiny()
    obs = np.random.RandomState(0).randn(3, 4).astype(np.float32)
    actions = agent.act(obs, explore=False)
    with torch.no_grad():
        expected = agent.actor(agent.encoder.zs(torch.from_numpy(obs)))[0].numpy()
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(agent.act(obs[1], explore=False), expected[1], rtol=1e-4, atol=1e-5)
    noisy = np.concatenate([agent.act(obs, explore=True) - expected for _ in range(700)])
    inside = noisy[(np.abs(noisy + np.tile(expected, (700, 1))) < 0.999)]
    assert np.abs(noisy + np.tile(expected, (700, 1))).max() <= 1 and 0.15 < inside.std() < 0.22


@pytest.mark.parametrize("algo", AGENTS)
def test_an_agent_continues_from_its_state_as_if_nothing_had_happened(algo):
    agent, buffer = tiny_of(algo)
    for _ in range(5):
        agent.update(buffer)
    other = tiny_of(algo, seed=9)[0]
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    buffers = [buffer, copy.deepcopy(buffer)]
    for one, replay in zip((agent, other), buffers):
        torch.manual_seed(1)
        for _ in range(6):
            one.update(replay)
    for kind in ("networks", "targets"):
        for name, network in getattr(agent, kind).items():
            for a, b in zip(network.parameters(), getattr(other, kind)[name].parameters()):
                assert torch.equal(a, b)
    assert {k: v.item() for k, v in agent.info.items()} == {k: v.item() for k, v in other.info.items()}
    obs = np.ones(4, np.float32)
    np.testing.assert_array_equal(agent.act(obs, explore=False), other.act(obs, explore=False))  # the normaliser too


def test_another_agents_state_is_refused_before_anything_changes():
    agent = tiny_of("sac", seed=2)[0]
    weights = [p.clone() for p in agent.critic.parameters()]
    dense = tiny_of("sac", regimes_dense("sac"))[0].state_dict()
    for state, message in ((dense, "regime 'dense'"), (tiny_of("mrsac")[0].state_dict(), "encoder, critic, actor, this agent has"),
                           (tiny_of("ddpg")[0].state_dict(), "the saved optimizers are critic, actor, this agent has")):
        with pytest.raises(ValueError, match=message):
            agent.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(weights, agent.critic.parameters()))
    other, buffer = tiny_of("sac", critic_lr=0.5)
    other.update(buffer)
    agent.load_state_dict(other.state_dict())
    assert agent.optimizers["critic"].param_groups[0]["lr"] == 1e-4 and agent.optimizers["critic"].state  # moments, not settings


# ------------------------------------------------------------------------------------------------------------ sac.py

def tiny_of(algo, modules=None, seed=0, device="cpu", interval=3, total_updates=40, **settings):
    """Any of the four agents, and a buffer for it."""
    agent_class = AGENTS[algo]
    torch.manual_seed(seed)
    modules = {name: dataclasses.replace(m, width_scale=1 / 16 if m.arch_type == "simba" else 1 / 32,
                                         sparse_options={"update_interval": interval})
               for name, m in (modules or agent_class.Config.presets["mst"]).items()}
    period = {"target_update_freq": 4} if issubclass(agent_class, MRQ) else {}
    agent = agent_class(4, 2, modules, agent_class.Config(**({"batch_size": 16} | period | settings)), total_updates, device, seed)
    buffer = play(seed, 400, agent.horizon, 300, obs_dim=4, action_dim=2, prioritized=agent.prioritized,
                  device="cpu" if device == "meta" else device)[0]
    if device != "meta":
        for obs in buffer.obs[:50].cpu().numpy():
            agent.observe(2 * obs + 1)  # a normaliser that does something
    return agent, buffer


def in_float64(agent):
    for network in (*agent.networks.values(), *agent.targets.values()):
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        network.double()
    if hasattr(agent, "temperature"):
        agent.temperature.log.data = agent.temperature.log.data.double() + 3.0
    return agent


def exact_log_prob(mean, raw, noise):
    """log π by PyTorch's own change of variables, in float64."""
    log_std = -10 + 6 * (1 + raw.tanh())
    base = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    squashed = torch.distributions.TransformedDistribution(base, torch.distributions.transforms.TanhTransform(cache_size=1))
    x = mean + log_std.exp() * noise
    action = squashed.transforms[0](x)  # the cache spares it the inverse
    return action, squashed.log_prob(action)


def test_log_probability_by_change_of_variables():
    torch.manual_seed(0)
    output = torch.cat([3 * torch.randn(200, 3), 2 * torch.randn(200, 3)], 1).double()
    torch.manual_seed(1)
    action, log_prob = tanh_gaussian(output)
    torch.manual_seed(1)
    expected_action, expected = exact_log_prob(*output.chunk(2, 1), torch.randn(200, 3, dtype=torch.float64))
    torch.testing.assert_close(action, expected_action)
    torch.testing.assert_close(log_prob, expected)


def test_log_probability_is_the_slope_of_the_distribution_function():
    """Numerically: P(action <= a) = Φ((atanh a - μ) / σ), and the density is its slope; all of them add up to 1."""
    mean, raw = 0.4, -0.2
    std = math.exp(-10 + 6 * (1 + math.tanh(raw)))
    below = lambda a: 0.5 * (1 + math.erf((math.atanh(a) - mean) / (std * math.sqrt(2))))
    torch.manual_seed(0)
    output = torch.tensor([[mean, raw]]).double().expand(400, 2)
    actions, log_prob = tanh_gaussian(output)
    for a, density in zip(actions[:, 0].tolist(), log_prob.exp().tolist()):
        assert (below(a + 1e-7) - below(a - 1e-7)) / 2e-7 == pytest.approx(density, rel=1e-5)
    order = actions[:, 0].argsort()
    assert torch.trapezoid(log_prob.exp()[order], actions[order, 0]).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mean", [0.0, 5.0, 9.5, 30.0, -30.0, 200.0])
def test_log_probability_at_the_edges_of_the_squashing(mean):
    """Where tanh rounds to ±1 in float32: against exact logarithms in float64."""
    output = torch.tensor([[mean, 0.0]]).expand(50, 2).clone().requires_grad_()
    torch.manual_seed(0)
    action, log_prob = tanh_gaussian(output)
    torch.manual_seed(0)
    noise, std = torch.randn(50, 1).double()[:, 0], math.exp(-4)
    x = mean + std * noise
    log_slope = math.log(4) - 2 * x.abs() - 2 * torch.log1p(torch.exp(-2 * x.abs()))  # of 1 - tanh², by symmetry
    expected = -0.5 * noise ** 2 + 4 - 0.5 * math.log(2 * math.pi) - log_slope
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-4)
    log_prob.sum().backward()
    assert output.grad.isfinite().all() and (action.abs() <= 1).all()
    assert output.grad[:, 0].sum().item() == pytest.approx((2 * torch.tanh(x)).sum().item(), rel=1e-3, abs=1e-2)


def test_the_log_std_stays_between_its_bounds():
    for raw, std in ((-50.0, math.exp(-10)), (50.0, math.exp(2)), (0.0, math.exp(-4))):
        torch.manual_seed(0)
        action, _ = tanh_gaussian(torch.tensor([[0.0, raw]]).double().expand(4000, 2))
        assert action.clamp(-1 + 1e-15, 1 - 1e-15).atanh().std().item() == pytest.approx(std, rel=0.05)


def sac_batch(agent, buffer, size=24):
    torch.manual_seed(5)
    batch = buffer.sample(size, 1)
    assert 0 < batch.terminated.sum() < size
    return Batch(batch.index, agent.normalizer(batch.obs.double()), batch.action.double(), batch.reward.double(), batch.terminated.double())


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
@pytest.mark.parametrize("twin, target_q, actor_q", [(False, "min", "min"), (True, "min", "mean"), (True, "mean", "min")])
def test_simba_losses_against_a_loop_over_samples(algo, twin, target_q, actor_q):
    agent, buffer = tiny_of(algo, twin_critics=twin, target_q=target_q, actor_q=actor_q)
    batch = sac_batch(in_float64(agent), buffer)
    alpha = agent.temperature.log.exp().item() if algo == "sac" else None
    pick = {"min": min, "mean": lambda q: sum(q) / len(q)}

    def policy(i, obs, noise):
        output = agent.actor(obs)
        if algo == "sac":
            action, log_prob = exact_log_prob(output[:2], output[2:], noise[i])
            return action, alpha * log_prob
        return (output.tanh() + 0.1 * noise[i]).clamp(-1, 1), 0.0

    torch.manual_seed(6)
    noise = torch.randn(24, 2, dtype=torch.float64)
    targets, critic_losses, actor_losses = [], [], []
    for i in range(24):
        action, cost = policy(i, batch.obs[i, 1], noise)
        x = torch.cat([batch.obs[i, 1], action])
        value = pick[target_q]([q(x)[0] for q in agent.targets["critic"].children()]) - cost
        y = batch.reward[i, 0] + (0 if batch.terminated[i, 0] else 0.99 * value)
        x = torch.cat([batch.obs[i, 0], batch.action[i, 0]])
        critic_losses.append(sum((q(x)[0] - y.detach()) ** 2 for q in agent.critic.children())), targets.append(y)
        action, cost = policy(i, batch.obs[i, 0], noise)
        x = torch.cat([batch.obs[i, 0], action])
        actor_losses.append(cost - pick[actor_q]([q(x)[0] for q in agent.critic.children()]))
    same = lambda value, expected: torch.testing.assert_close(value, torch.stack(expected).detach())
    torch.manual_seed(6)
    same(agent.td_target(batch).flatten(), targets)
    torch.manual_seed(6)
    loss, _ = agent.critic_loss(batch)
    same(loss.detach(), critic_losses)
    torch.manual_seed(6)
    actor_loss, info = agent.actor_loss(batch.obs[:, 0])
    same(actor_loss.detach(), actor_losses)
    for network, ours, theirs in ((agent.critic, loss, critic_losses), (agent.actor, actor_loss, actor_losses)):
        parameters = list(network.parameters())
        expected = torch.autograd.grad(torch.stack(theirs).mean(), parameters, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours.mean(), parameters, retain_graph=True), expected)
    if algo == "sac":
        torch.manual_seed(6)
        _, log_prob = exact_log_prob(*agent.actor(batch.obs[:, 0]).chunk(2, 1), torch.randn(24, 2, dtype=torch.float64))
        assert info["entropy"].item() == pytest.approx(-log_prob.mean().item())


@pytest.mark.parametrize("target_policy, target_q, actor_q", [("target", "min", "min"), ("online", "mean", "min"), ("target", "min", "mean")])
def test_mrsac_losses_against_a_loop_over_samples(target_policy, target_q, actor_q):
    agent, buffer = tiny_of("mrsac", target_policy=target_policy, target_q=target_q, actor_q=actor_q)
    in_float64(agent)
    agent.reward_scale, agent.target_reward_scale = torch.tensor(2.5).double(), torch.tensor(0.7).double()
    batch, alpha = batch_of(buffer), agent.temperature.log.exp().item()
    pick = {"min": torch.min, "mean": torch.mean}
    target_actor = agent.targets["actor"] if target_policy == "target" else agent.actor
    target_encoder, target_critic = agent.targets["encoder"], agent.targets["critic"]
    torch.manual_seed(6)
    noise = torch.randn(12, 2, dtype=torch.float64)
    zs = agent.encoder.zs(batch.obs[:, 0]).detach()
    targets, losses = [], []
    for i in range(12):
        y, alive = 0.0, True
        for k in range(3):
            if alive:
                y, alive = y + 0.99 ** k * batch.reward[i, k], not batch.terminated[i, k]
        if alive:
            next_zs = target_encoder.zs(batch.obs[i, 3])
            action, log_prob = exact_log_prob(*target_actor(next_zs).chunk(2), noise[i])
            value = pick[target_q](target_critic(target_encoder(next_zs, action))) - alpha * log_prob
            y = y + 0.99 ** 3 * 0.7 * value
        targets.append(y / 2.5)  # in units of the reward scale
        action, log_prob = exact_log_prob(*agent.actor(zs[i]).chunk(2), noise[i])
        losses.append(alpha * log_prob - pick[actor_q](agent.critic(agent.encoder(zs[i], action))))
    torch.manual_seed(6)
    torch.testing.assert_close(agent.td_target(batch)[:, 0], torch.stack(targets).detach())
    torch.manual_seed(6)
    torch.testing.assert_close(agent.actor_loss(zs)[0], torch.stack(losses))
    # One temperature update an actor update: Adam's first step is its learning rate, against the slope α·(H - H̄).
    agent, buffer = tiny_of("mrsac")
    log = agent.temperature.log.item()
    agent.update_critic_and_actor(buffer)
    slope = agent.info["entropy"].item() - -0.5 * 2
    assert agent.temperature.log.item() - log == pytest.approx(-3e-4 * np.sign(slope), rel=1e-2)
    # The rest is MR.Q's own, not a copy.
    assert all(getattr(MRSAC, name) is getattr(MRQ, name) for name in
               ("encoder_loss", "critic_loss", "td_target", "refresh_targets", "update_encoder", "update_critic_and_actor", "update"))


def test_the_temperature_against_adam_by_hand():
    temperature = Temperature(SACConfig(initial_temperature=0.2, temperature_lr=0.01, target_entropy=-0.5), 6, torch.device("cpu"))
    log, m, v = math.log(0.2), 0.0, 0.0
    for step, entropy in enumerate((-4.0, -5.0, 1.0, -3.0, -2.5), start=1):
        g = math.exp(log) * (entropy - -3.0)  # d/d(log α) of α·(H - H̄), H̄ = -0.5 · 6
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        log -= 0.01 * (m / (1 - 0.9 ** step)) / (math.sqrt(v / (1 - 0.999 ** step)) + 1e-8)
        before = temperature.value().item()
        temperature.update(torch.tensor(entropy))
        assert temperature.value().item() == pytest.approx(math.exp(log), rel=1e-5)
        if step <= 2:  # too little entropy: its price rises
            assert temperature.value().item() > before


def test_order_of_a_simba_update_and_its_soft_target():
    agent, buffer = tiny_of("sac", regimes_dense("sac"))
    events = []
    for owner, name in ((agent, "actor_loss"), (agent.temperature, "update"), (agent, "critic_loss"), (agent, "update_target")):
        def spy(*arguments, name=name, original=getattr(owner, name)):
            events.append(name)
            return original(*arguments)
        setattr(owner, name, spy)
    target = [p.clone() for p in agent.targets["critic"].parameters()]
    for _ in range(3):
        agent.update(buffer)
        target = [0.995 * t + 0.005 * p.detach() for t, p in zip(target, agent.critic.parameters())]
        torch.testing.assert_close(list(agent.targets["critic"].parameters()), target)
    assert events == ["actor_loss", "update", "critic_loss", "update_target"] * 3
    assert agent.updates == {"critic": 3, "actor": 3} and agent.updates_per_step == 2


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_the_simba_actors_loss_computes_nothing_for_the_critic(algo):
    agent, buffer = tiny_of(algo)
    spared = {}

    def spy(name, loss, clip=None, original=agent._step):
        result = original(name, loss, clip)
        spared[name] = all(parameter.grad is None for parameter in agent.critic.parameters())
        return result

    agent._step = spy
    agent.update(buffer)
    assert spared == {"actor": True, "critic": False}
    assert all(parameter.requires_grad for parameter in agent.critic.parameters())


def regimes_dense(algo, *regimes):
    presets = AGENTS[algo].Config.presets["default"]
    return {name: dataclasses.replace(m, regime=regime) for (name, m), regime in
            zip(presets.items(), regimes or ("dense",) * len(presets))}


def test_raw_observations_are_stored_and_normalised_when_drawn():
    agent, buffer = tiny_of("sac")
    seen = []
    agent.critic_loss = lambda batch, original=agent.critic_loss: (seen.append(batch.obs), original(batch))[1]
    torch.manual_seed(3)
    raw = buffer.sample(16, 1).obs
    torch.manual_seed(3)
    agent.update(buffer)
    torch.testing.assert_close(seen[0], (raw - agent.normalizer.mean.float()) / agent.normalizer.var.sqrt().float())
    obs = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
    expected = agent.actor.output(agent.actor.features(agent.normalizer(torch.from_numpy(obs)))).tanh()
    np.testing.assert_allclose(agent.act(obs, explore=False), expected.detach(), rtol=1e-5)
    before = agent.normalizer.mean.clone()
    agent.act(obs, explore=False), agent.act(obs, explore=True)
    assert torch.equal(before, agent.normalizer.mean)  # only `observe` teaches it
    agent.observe(obs)
    assert not torch.equal(before, agent.normalizer.mean)
    for algo in AGENTS:
        with pytest.raises(FloatingPointError, match="nan"):
            tiny_of(algo)[0].observe(np.array([1.0, float("nan"), 0, 0], np.float32))


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_metrics_look_at_normalised_observations(algo):
    agent, buffer = tiny_of(algo)
    batch = buffer.sample(8)
    obs = agent.normalizer(batch.obs)
    features = agent.probe(batch)
    torch.testing.assert_close(features["critic"]["q1"], agent.critic.q1.features(torch.cat([obs[:, 0], batch.action[:, 0]], 1)))
    torch.testing.assert_close(features["actor"]["pi"], agent.actor.features(obs[:, 0]))
    torch.manual_seed(0)
    losses = agent.probe_losses(batch, buffer)
    torch.manual_seed(0)
    torch.testing.assert_close(losses["critic"], agent.critic_loss(batch._replace(obs=obs))[0])
    torch.testing.assert_close(losses["actor"], agent.actor_loss(obs[:, 0])[0])


def test_soft_targets_stay_sparse_through_thousands_of_updates():
    for regime, updates in (("dst", 2500), ("d2s", 600), ("s2d", 600)):
        agent, buffer = tiny_of("sac", regimes_dense("sac", regime, "sst"), interval=updates // 50, total_updates=updates)
        masks, changed = agent.sparse["critic"].masks, 0
        for step in range(1, updates + 1):
            due = step % (updates // 50) == 0
            before = {name: mask.clone() for name, mask in masks.items()} if due else masks
            agent.update(buffer)
            if due:  # at once, in the same update
                changed += any(not torch.equal(before[name], mask) for name, mask in masks.items())
                for network in (agent.critic, agent.targets["critic"]):
                    weights = dict(network.named_parameters())
                    assert not any(weights[name][~mask].any() for name, mask in masks.items())
        assert changed > 20
        weights = dict(agent.targets["critic"].named_parameters())
        on = {name: weights[name][mask] for name, mask in masks.items()}
        assert all(w.count_nonzero() > 0.8 * w.numel() for w in on.values())  # and what is active is alive


@pytest.mark.parametrize("algo", ["sac", "ddpg", "mrsac"])
@pytest.mark.parametrize("regimes", [("dense", "dst", "sst"), ("s2d", "d2s", "dst"), ("sst", "s2d", "d2s"), ("dst", "sst", "s2d")])
def test_every_regime_on_every_module_of_every_algorithm(algo, regimes):
    regimes = regimes if algo == "mrsac" else regimes[1:]
    agent, buffer = tiny_of(algo, regimes_dense(algo, *regimes))
    sparsity = 0.6 if algo == "mrsac" else 0.8
    for _ in range(40):
        agent.update(buffer)
    for name, regime in zip(agent.networks, regimes):
        size = sum(w.numel() for w in agent.networks[name].parameters() if w.ndim >= 2)
        kept = size if regime in ("dense", "s2d") else (1 - sparsity) * size
        assert abs(agent.sparse[name].density() * size - kept) <= 0.5 + 1e-6
        for weight, mask in agent.sparse[name].masks.items():
            assert mask.sum() == agent.sparse[name].active[weight]
            assert not dict(agent.networks[name].named_parameters())[weight][~mask].any()
    assert all(math.isfinite(value) for value in agent.info.values())


def test_exploration():
    obs = np.random.RandomState(0).randn(3, 4).astype(np.float32)
    agent = tiny_of("ddpg")[0]
    best = agent.act(obs, explore=False)
    noise = np.concatenate([agent.act(obs, explore=True) - best for _ in range(500)])[np.tile(np.abs(best) < 0.6, (500, 1))]
    assert noise.std() == pytest.approx(0.1, rel=0.1) and abs(noise.mean()) < 0.02
    for algo in ("sac", "mrsac"):
        agent = tiny_of(algo)[0]
        torch.manual_seed(1)
        action = agent.act(obs, explore=True)
        assert action.shape == (3, 2) and np.abs(action).max() <= 1 and not np.allclose(action, agent.act(obs, explore=True))
        np.testing.assert_array_equal(agent.act(obs, explore=False), agent.act(obs, explore=False))
        np.testing.assert_allclose(agent.act(obs[0], explore=False), agent.act(obs, explore=False)[0], rtol=1e-4, atol=1e-6)


def test_reductions_and_wrong_choices_are_told():
    q = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    assert reduce_q(q, "min").tolist() == [1, 2] and reduce_q(q, "mean").tolist() == [2, 3.5]
    for algo, settings, message in (("sac", {"twin_critics": True, "target_q": "max"}, "choose min or mean"),
                                    ("mrsac", {"target_policy": "both"}, "choose target or online")):
        with pytest.raises(ValueError, match=message):
            tiny_of(algo, **settings)


# ---------------------------------------------------------------------------------------------------- learning, small

class Corridor:
    """A point on [-1, 1] that is pushed about, paid by how far right it stands, and that falls off at the right end."""

    def reset(self, rng):
        self.x, self.t = rng.uniform(-1, 0), 0
        return self.observe()

    def observe(self):
        return np.array([self.x, math.sin(3 * self.x)], np.float32)

    def step(self, action):
        self.x, self.t = max(-1.0, self.x + 0.3 * float(action[0])), self.t + 1
        fell = self.x > 1
        return self.observe(), -5.0 if fell else self.x, fell, not fell and self.t == 20


def train_on(env, agent, replay, rng):
    """500 random steps, then 800 of learning."""
    obs = env.reset(rng)
    for step in range(1300):
        agent.observe(obs)
        action = rng.uniform(-1, 1, 1) if step < 500 else agent.act(obs, explore=True)
        for _ in range(agent.updates_per_step if step >= 500 else 0):
            agent.update(replay)
        next_obs, reward, terminated, truncated = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset(rng) if terminated or truncated else next_obs


def play_corridor(env, agent, x, first_action=None):
    """The rewards of an episode from x."""
    env.x, env.t, rewards, done = x, 0, [], False
    while not done:
        action = agent.act(env.observe(), explore=False) if rewards or first_action is None else first_action
        _, reward, terminated, truncated = env.step(action)
        rewards.append(reward)
        done = terminated or truncated
    return rewards


def test_all_five_losses_are_needed_and_learn():
    """Learns a task where each loss has something of its own to show: what it predicts is held against the truth."""
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    modules = {name: ModuleConfig(m.arch_type, m.regime, 1 / 8, 1, sparse_options={"update_interval": 100})
               for name, m in MR_MST.items()}
    config = MRQConfig(batch_size=64, target_update_freq=50, encoder_lr=1e-3, critic_lr=1e-3, actor_lr=1e-3, discount=0.9)
    agent = MRQ(2, 1, modules, config, total_updates=800)
    replay, env = ReplayBuffer(2, 1, 5000, agent.horizon), Corridor()
    train_on(env, agent, replay, rng)
    play_out = functools.partial(play_corridor, env, agent)
    # Policy: from the left, go right and stop short of the edge. An agent that learns nothing gets -4 to -20.
    returns = [sum(play_out(x)) for x in np.linspace(-1, 0, 5)]
    assert np.mean(returns) > 1, f"actor: returns {returns}"

    batch = replay.sample(512)
    with torch.no_grad():
        zs = agent.encoder.zs(batch.obs[:, 0])
        zsa = agent.encoder(zs, batch.action[:, 0])
        done, next_zs, logits = agent.encoder.predict(zsa)
        q = agent.critic(zsa).mean(1)
    # Terminal loss: told apart from the rest.
    ended = batch.terminated[:, 0] > 0
    assert done[ended].mean() > 0.3 and done[~ended].mean() < 0.15, f"terminal: {done[ended].mean()}, {done[~ended].mean()}"
    # Dynamics loss: closer to the next z_s than the present z_s is, which is close already.
    truth = agent.targets["encoder"].zs(batch.obs[:, 1])
    error, still = ((a - truth)[~ended].square().mean() for a in (next_zs, zs))
    assert error < 0.4 * still, f"dynamics: {error} against {still}"
    # Reward loss: the expected bin is the reward.
    expected = (logits.softmax(1) * agent.bins).sum(1)
    assert (expected - batch.reward[:, 0]).abs().mean() < 0.8, "reward"
    # Critic loss: Q is the discounted return of a real rollout, in units of r̄, where no time limit cuts it short.
    predicted, real = [], []
    for x in np.linspace(-0.9, 0.6, 12):
        action = agent.act(np.array([x, math.sin(3 * x)], np.float32), explore=False)
        rewards = play_out(x, action)
        rewards += [rewards[-1]] * 40 if len(rewards) == 20 else []  # bootstrapped past the limit
        real.append(sum(r * 0.9 ** k for k, r in enumerate(rewards)))
        with torch.no_grad():
            z = agent.encoder.zs(torch.tensor([[x, math.sin(3 * x)]]).float())
            predicted.append((agent.critic(agent.encoder(z, torch.tensor(action)[None])).mean() * agent.reward_scale).item())
    assert np.corrcoef(predicted, real)[0, 1] > 0.9, f"critic: {predicted} against {real}"
    assert abs(np.mean(predicted) - np.mean(real)) < 4, f"critic: {np.mean(predicted)} against {np.mean(real)}"


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_simba_agents_learn_a_small_task(algo):
    torch.manual_seed(0)
    rng, agent_class = np.random.RandomState(0), AGENTS[algo]
    modules = {name: dataclasses.replace(m, width_scale=1 / 8, sparse_options={"update_interval": 200})
               for name, m in agent_class.Config.presets["mst"].items()}
    agent = agent_class(2, 1, modules, agent_class.Config(batch_size=64, discount=0.9, actor_lr=1e-3, critic_lr=1e-3, target_rate=0.02),
                        total_updates=1600)
    replay, env = ReplayBuffer(2, 1, 5000, agent.horizon, agent.prioritized), Corridor()
    train_on(env, agent, replay, rng)
    play_out = functools.partial(play_corridor, env, agent)
    returns = [sum(play_out(x)) for x in np.linspace(-1, 0, 5)]
    assert np.mean(returns) > 1, f"actor: returns {returns}"  # an agent that learns nothing gets -4 to -20
    predicted, real = [], []
    for x in np.linspace(-0.9, 0.6, 12):
        obs = np.array([x, math.sin(3 * x)], np.float32)
        action = agent.act(obs, explore=False)
        rewards = play_out(x, action)
        rewards += [rewards[-1]] * 40 if len(rewards) == 20 else []  # bootstrapped past the limit
        real.append(sum(r * 0.9 ** k for k, r in enumerate(rewards)))
        with torch.no_grad():
            predicted.append(agent.critic(agent.normalizer(torch.from_numpy(obs)), torch.from_numpy(action)).item())
    assert np.corrcoef(predicted, real)[0, 1] > 0.9 and abs(np.mean(predicted) - np.mean(real)) < 4, f"critic: {predicted}, {real}"


# ------------------------------------------------------------------------------------------------------------ fast.py

class NoSynchronisation(TorchDispatchMode):
    """Fails on every operation that makes the host wait for the device: reading a value, or a shape that depends on one, or
    a copy between the two that does not say that nobody waits for it."""
    FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
                 "aten::_unique2", "aten::bincount", "aten::repeat_interleave.Tensor"}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        by_mask = function.name().startswith("aten::index") and any(
            torch.is_tensor(i) and i.dtype == torch.bool for i in (arguments[1] if len(arguments) > 1 and
                                                                   isinstance(arguments[1], (list, tuple)) else ()))
        assert function.name() not in self.FORBIDDEN and not by_mask, f"{function.name()} synchronises"
        if function.name() in ("aten::copy_", "aten::_to_copy"):
            options = options or {}
            to = arguments[0].device if function.name() == "aten::copy_" else options.get("device") or arguments[0].device
            waits = not (options.get("non_blocking") or arguments[2:3] == (True,))
            assert not (waits and to != arguments[function.name() == "aten::copy_"].device), f"{function.name()} synchronises"
        return function(*arguments, **(options or {}))


class NoNumbers(NoSynchronisation):
    """... and on `tensor[row] = number`: on CUDA the number becomes a tensor of the host, whose copy is waited for."""
    FORBIDDEN = NoSynchronisation.FORBIDDEN | {"aten::scalar_tensor"}


@pytest.mark.parametrize("algo, growth", [("mrq", "gradient"), ("mrq", "random"), ("sac", "gradient"), ("ddpg", "random"),
                                          ("mrsac", "gradient")])
def test_an_update_never_reads_back_from_the_device(algo, growth, monkeypatch):
    modules = regimes_dense(algo, *(("s2d", "dst", "d2s") if algo in ("mrq", "mrsac") else ("dst", "d2s")))
    agent, buffer = tiny_of(algo, modules)
    for sparse in agent.sparse.values():
        sparse.grow = growth
    with NoSynchronisation():  # bursts, targets, scales, topology updates and the fused optimisers among them
        for _ in range(9):
            agent.update(buffer)
        with pytest.raises(AssertionError, match="synchronises"):
            agent.info["critic_loss"].item()
        with pytest.raises(AssertionError, match="synchronises"):
            buffer.priority[buffer.priority > 0]

    # Tensors on "meta" have no values at all: whoever asks for one, or mixes in a tensor of the host, fails.
    agent, _ = tiny_of(algo, modules, device="meta")
    buffer = ReplayBuffer(4, 2, 40, agent.horizon, agent.prioritized, device="meta")
    buffer.sampleable = 1
    for optimizer in agent.optimizers.values():  # the fused kernel has no meta form; it was under watch above
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with NoSynchronisation():  # the whole loop; the ring closes in it, and episodes end in both ways
        for step in range(60):
            with NoNumbers():
                agent.observe(np.ones(4, np.float32))
            with pytest.raises(AssertionError, match="_to_copy synchronises"):  # the action: all that is ever read
                agent.act(np.ones(4, np.float32), explore=True)
            if step < 9:
                agent.update(buffer)
            with NoNumbers():
                buffer.add(np.ones(4), np.ones(2), 0.5, np.ones(4), step % 50 == 19, step % 50 == 49)
        with NoNumbers(), pytest.raises(AssertionError, match="synchronises"):
            buffer.reward[3] = 1.0
    with pytest.raises(RuntimeError):
        agent.info["critic_loss"].item()
    assert agent.updates["critic"] == 9 and agent.info["critic_loss"].device.type == "meta"


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out; an optimiser's step counts as the one operation that moves the weights."""
    count, UNCOUNTED = 0, ("aten::_unsafe_view", "aten::_foreach_add_.Scalar", "aten::_foreach_sub_.List", "profiler::")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)
        self.count += not views and not function.name().startswith((*self.UNCOUNTED, "aten::detach"))
        return function(*arguments, **(options or {}))


def test_an_agent_step_stays_small():
    """Each operation costs the host some microseconds, and a GPU more than most of them take. The depth decides, not the width."""
    agent, buffer = tiny(), filled()
    agent.refresh_targets(buffer)
    agent.update(buffer)
    with Operations() as operations:
        agent.update_encoder(buffer)
        agent.update_critic_and_actor(buffer)
    assert 300 < operations.count <= 730


@pytest.mark.parametrize("algo", AGENTS)
def test_recorded_updates_equal_plain_ones(algo):
    """The host's side of graph capture, with a stand-in for the device's. Recording runs the function and then puts the
    device's state back; replaying runs it and puts the host's counts back, and writes where it was recorded."""
    (plain, *_), (agent, _), recordings = tiny_of(algo), tiny_of(algo), []
    buffers = [tiny_of(algo)[1], tiny_of(algo)[1]]

    def counts():
        return dict(agent.updates), {name: sparse.last_step for name, sparse in agent.sparse.items()}

    def set_counts(updates, last_steps):
        agent.updates.update(updates)
        for name, step in last_steps.items():
            agent.sparse[name].last_step = step

    def record(function):
        recordings.append(function)
        state, tensors = copy.deepcopy(agent.state_dict()), copy.deepcopy(vars(buffers[1]))
        rng = torch.get_rng_state()
        function()
        advanced, recorded = counts(), agent.info
        agent.load_state_dict(state)
        vars(buffers[1]).update(tensors)
        torch.set_rng_state(rng)
        set_counts(*advanced)

        def replay_graph():
            before, info = counts(), agent.info
            agent.info = {}
            function()
            set_counts(*before)
            for name, value in agent.info.items():
                recorded[name].copy_(value)
            agent.info = info
        return replay_graph

    for name, modules in agent.captures.items():
        setattr(agent, name, fast.CapturedUpdate(agent, getattr(agent, name), modules, record))
    for step in range(20):
        for one, replay in zip((plain, agent), buffers):
            torch.manual_seed(step)
            one.update(replay)
        assert plain.updates == agent.updates
        assert {n: s.last_step for n, s in plain.sparse.items()} == {n: s.last_step for n, s in agent.sparse.items()}
        assert {k: v.item() for k, v in plain.info.items()} == {k: v.item() for k, v in agent.info.items()}
    assert len(recordings) == len(agent.captures)  # once each: topology changes did not record anew
    for kind in ("networks", "targets"):
        for name, network in getattr(plain, kind).items():
            assert all(torch.equal(a, b) for a, b in zip(network.parameters(), getattr(agent, kind)[name].parameters()))
    assert all(torch.equal(value, agent.tensors()[name]) for name, value in plain.tensors().items())
    assert all(sparse.last_step > 3 * 3 for sparse in plain.sparse.values())  # several of them were topology updates


# On a GPU: `pytest test_all.py -k cuda`, some minutes. Whoever sees them pass may set fast.PROVEN_ON_CUDA.

GPU = "cuda"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(algo, precision="tf32", compile=False, captured=True):
    """An agent on the GPU whose topology moves every 60 updates, and its buffer."""
    agent, buffer = tiny_of(algo, device=GPU, interval=60, total_updates=3000)
    fast.speed_up(agent, precision, compile)
    if captured:
        fast.captured(agent)
    return agent, buffer


def weights_of(agent):
    return [p for network in (*agent.networks.values(), *agent.targets.values()) for p in network.parameters()]


def moved_by_updates(agent, buffer):
    """Every tensor that an update writes."""
    moments = [value for optimizer in agent.optimizers.values() for state in optimizer.state.values() for value in state.values()]
    masks = [mask for sparse in agent.sparse.values() for mask in sparse.masks.values()]
    return [*weights_of(agent), *moments, *masks, *agent.tensors().values(), buffer.priority, buffer.max_priority]


def distance(one, other):
    return torch.cat([(a.detach() - b.detach()).flatten() for a, b in zip(one, other, strict=True)]).norm().item()


@needs_cuda
@pytest.mark.parametrize("precision, compile", [("fp32", False), ("tf32", False), ("bf16", False), ("tf32", True), ("bf16", True)])
@pytest.mark.parametrize("algo", AGENTS)
def test_cuda_captured_updates_equal_eager_ones(algo, precision, compile):
    """1,000 updates, 16 topology changes among them, in rounds of 50 that begin alike, so that rounding does not add up. A
    number frozen in the graph (noise, a scale, a target) would send the two ways that differ as much as either is long."""
    (eager, one), (graphed, other) = on_gpu(algo, precision, captured=False), on_gpu(algo, precision, compile)
    for number in range(20):
        before = [weight.detach().clone() for weight in weights_of(eager)]
        for agent, buffer in ((eager, one), (graphed, other)):
            torch.manual_seed(number)
            for _ in range(50):
                agent.update(buffer)
        assert eager.updates == graphed.updates and eager.fault() is None is graphed.fault()
        way = distance(before, weights_of(eager))
        assert 0 < way and distance(weights_of(eager), weights_of(graphed)) <= (0.3 if compile else 1e-3) * way
        with torch.no_grad():
            for theirs, ours in zip(moved_by_updates(graphed, other), moved_by_updates(eager, one), strict=True):
                theirs.copy_(ours)


@needs_cuda
@pytest.mark.parametrize("algo", AGENTS)
def test_cuda_loop_waits_for_nothing_but_the_action(algo):
    agent, buffer = on_gpu(algo)
    obs = np.ones(4, np.float32)
    for _ in range(10):
        agent.update(buffer)  # warmed up and recorded
    agent.act(obs, explore=True)
    try:
        for step in range(130):  # topology changes, bursts, ends of both kinds
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                action = agent.act(obs, explore=True)
            assert sum("synchronizing" in str(wait.message) for wait in waits) == 1
            torch.cuda.set_sync_debug_mode("error")
            agent.observe(obs)
            agent.update(buffer)
            buffer.add(obs, action, 0.5, obs, step % 50 == 19, step % 50 == 49)
        with pytest.raises(RuntimeError, match="synchronizing"):
            agent.info["critic_loss"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("algo", AGENTS)
def test_cuda_memory_stands_still(algo):
    agent, buffer = on_gpu(algo)
    seen = []
    for _ in range(4):
        for _ in range(120):
            agent.update(buffer)
        torch.cuda.synchronize()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert seen[1] == seen[2] == seen[3]


@needs_cuda
@pytest.mark.parametrize("algo", AGENTS)
def test_cuda_resume_and_evaluation_between_replays_change_nothing(algo):
    (plain, one), (watched, other) = on_gpu(algo), on_gpu(algo)
    for step in range(70):
        for agent, buffer in ((plain, one), (watched, other)):
            torch.manual_seed(step)
            agent.update(buffer)
        watched.act(np.ones((10, 4), np.float32), explore=False)
        watched.probe(other.gather(torch.arange(8, device=GPU)))
    assert distance(weights_of(plain), weights_of(watched)) == 0
    resumed, third = on_gpu(algo, captured=False)[0], copy.deepcopy(one)
    resumed.load_state_dict(copy.deepcopy(plain.state_dict()))
    fast.captured(resumed)  # after loading, which replaces the optimisers' tensors
    before = [weight.detach().clone() for weight in weights_of(plain)]
    for agent, buffer in ((plain, one), (resumed, third)):
        torch.manual_seed(1)
        for _ in range(60):
            agent.update(buffer)
    assert distance(weights_of(plain), weights_of(resumed)) <= 1e-3 * distance(before, weights_of(plain))


@pytest.mark.skipif(not fast.onednn_available(), reason="this PyTorch or processor has no use for oneDNN's products")
def test_onednn_products_equal_pytorchs_own(monkeypatch):
    torch.manual_seed(0)
    calls, product = [], fast.product
    monkeypatch.setattr(fast, "product", lambda *arguments: (calls.append(1), product(*arguments))[1])
    for rows, inputs, outputs, bias in ((256, 128, 130, True), (3, 700, 40, False), (1, 200, 200, True)):
        layer, x = nn.Linear(inputs, outputs, bias), torch.randn(rows, 2 * inputs)[:, ::2].requires_grad_()  # with gaps
        expected, ours = layer(x), fast.linear(layer, x)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        for factor in (torch.randn(rows, outputs), torch.ones(()), torch.randn(rows, 2 * outputs)[:, ::2]):  # whatever comes back
            gradients = [torch.autograd.grad((y * factor).sum(), [x, *layer.parameters()], retain_graph=True) for y in (ours, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        calls.clear()
        fast.linear(layer, x.detach()).sum().backward()
        layer.requires_grad_(False)
        fast.linear(layer, x).sum().backward()
        assert x.grad is not None and len(calls) == 2 + 2  # no product for who asks no gradient
        assert torch.equal(fast.linear(layer, x[0]), F.linear(x[0], layer.weight, layer.bias))  # not a batch
        torch.testing.assert_close(fast.linear(layer.double(), x.double()), layer(x.double()))


@pytest.mark.skipif(not fast.onednn_available(), reason="this PyTorch or processor has no use for oneDNN's products")
@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_wide_layers_use_onednn_and_update_alike(algo, monkeypatch):
    calls, product = [], fast.product
    monkeypatch.setattr(fast, "onednn_pays", lambda: True)  # whatever the processor
    monkeypatch.setattr(fast, "product", lambda x, weight, bias=None: (calls.append(weight.shape), product(x, weight, bias))[1])
    monkeypatch.setattr(fast, "WIDE", 256)
    (plain, buffer), (agent, other) = tiny_of(algo), tiny_of(algo)
    fast.speed_up(agent, "fp32")
    for one, replay in ((plain, buffer), (agent, other)):
        torch.manual_seed(1)
        for _ in range(4):
            one.update(replay)
    assert calls and all(shape.numel() >= 256 or 16 in shape for shape in calls)  # products of gradients have the batch
    for name, network in plain.networks.items():
        torch.testing.assert_close(list(network.parameters()), list(agent.networks[name].parameters()), rtol=1e-3, atol=1e-5)
    calls.clear()
    for precision, available in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr(fast, "onednn_pays", lambda: available)
        agent, buffer = tiny_of(algo)
        fast.speed_up(agent, precision)
        agent.update(buffer)
        assert not calls


def test_bfloat16_keeps_weights_moments_losses_and_q_in_float32():
    agent, plain, buffer = tiny(MR_DEFAULT), tiny(MR_DEFAULT), filled()
    fast.speed_up(agent, "bf16")
    batch = buffer.sample(64)
    zs = plain.encode(batch.obs[:, 0])
    for name, arguments in (("encoder_loss", (batch, torch.ones(()))), ("critic_loss", (batch, zs)), ("actor_loss", (zs,))):
        torch.manual_seed(0)
        exact = getattr(plain, name)(*arguments)[0]
        torch.manual_seed(0)
        rounded = getattr(agent, name)(*arguments)[0]
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)  # something was rounded ...
        torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)  # ... and not too much
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agent.critic(torch.randn(3, 16)).dtype == torch.float32
    for _ in range(5):
        agent.update(buffer)
    for network, optimizer in zip(agent.networks.values(), agent.optimizers.values()):
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
        assert all(v.dtype == torch.float32 for state in optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_bfloat16_copies_follow_their_weights(algo):
    (agent, buffer), other = tiny_of(algo), tiny_of(algo, seed=9)[0]
    for one in (agent, other):
        fast.speed_up(one, "bf16")
    for _ in range(5):  # targets, a topology change
        agent.update(buffer)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    checked = 0
    for one in (agent, other):
        for network in (*one.networks.values(), *one.targets.values()):
            for layer in network.modules():
                if isinstance(layer, nn.Linear) and layer not in one.heads():
                    x = torch.randn(3, layer.in_features)
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        assert torch.equal(layer(x), F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))
                    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # acting is not rounded
                    checked += 1
    assert checked > 20


def test_gradients_of_a_weight_used_often_add_up_in_float32():
    """300 equal parts: a bfloat16 sum stops growing at 256 times one of them."""
    layer = nn.Linear(8, 8)
    x, copies = torch.ones(2, 8, requires_grad=True), (layer.weight.bfloat16(), layer.bias.bfloat16())
    sum(fast.BFloat16Linear.apply(x, layer.weight, layer.bias, *copies).float().sum() for _ in range(300)).backward()
    assert (layer.weight.grad == 600).all() and (layer.bias.grad == 600).all()
    torch.testing.assert_close(x.grad, 300 * copies[0].float().sum(0).expand(2, 8), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("algo", ["sac", "ddpg", "mrsac"])
def test_bfloat16_keeps_what_a_policy_and_a_q_need(algo):
    (agent, one_buffer), (plain, other_buffer) = tiny_of(algo, seed=1), tiny_of(algo, seed=1)
    fast.speed_up(agent, "bf16")
    for one, buffer in ((agent, one_buffer), (plain, other_buffer)):
        torch.manual_seed(0)
        one.update(buffer)
    for name in ("critic_loss", "actor_loss", "q"):
        value, exact = agent.info[name], plain.info[name]
        assert value.dtype == torch.float32 and value != exact and value.item() == pytest.approx(exact.item(), rel=0.1, abs=0.1)
    x = torch.randn(3, agent.networks["actor"].output.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agent.critic(torch.randn(3, 4), torch.randn(3, 2)).dtype == torch.float32 if algo != "mrsac" else True
        assert agent.actor.output(x).dtype == (torch.bfloat16 if algo == "ddpg" else torch.float32)
        assert algo != "sac" or agent.actor.log_std(x).dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for network in agent.networks.values() for p in network.parameters())


@pytest.mark.parametrize("algo", AGENTS)
def test_compiled_losses_equal_plain_ones(algo, monkeypatch):
    """Each loss traced whole, without a break, and differentiated ahead of time. The code generator, minutes on a CPU, is
    PyTorch's own affair and is left out."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, dynamic, options=None: compile(
        function, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic))
    (plain, one), (compiled, other) = tiny_of(algo), tiny_of(algo)
    monkeypatch.setattr(fast, "onednn_pays", fast.onednn_available)
    monkeypatch.setattr(fast, "WIDE", 256)  # with oneDNN's products among what is compiled
    fast.speed_up(compiled, "fp32", compile=True)
    assert compiled.mask_and_clip != getattr(type(compiled), "mask_and_clip").__get__(compiled)  # wrapped, like the losses
    buffers = [one, other]
    for step in range(7):  # across bursts and topology updates
        for agent, replay in zip((plain, compiled), buffers):
            torch.manual_seed(step)
            agent.update(replay)
    for name in plain.networks:
        for a, b in zip(plain.networks[name].parameters(), compiled.networks[name].parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(plain.sparse[name].masks[n], compiled.sparse[name].masks[n]) for n in plain.sparse[name].masks)


# ----------------------------------------------------------------------------------------------------------- envs.py

def test_action_repeat_rewards_observations_and_the_time_limit():
    from dm_control import suite
    env = Env("quadruped-walk", seed=4)  # its actions reach from -1 to 1.1 in places
    raw = suite.load("quadruped", "walk", task_kwargs={"random": 4})
    spec, rng = raw.action_spec(), np.random.RandomState(0)
    raw.reset()  # Env has reset once to learn its sizes
    obs, timestep = env.reset(), raw.reset()
    flat = lambda t: np.concatenate([np.ravel(v) for v in t.observation.values()]).astype(np.float32)
    np.testing.assert_array_equal(obs, flat(timestep))
    for _ in range(20):
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        rewards = [raw.step(spec.minimum + (action + 1.0) / 2 * (spec.maximum - spec.minimum)) for _ in range(2)]
        obs, reward, terminated, truncated = env.step(action)
        assert reward == pytest.approx(sum(t.reward for t in rewards)) and not terminated and not truncated
        np.testing.assert_array_equal(obs, flat(rewards[-1]))
    assert env.frames == 40 and obs.dtype == np.float32 and obs.shape == (env.obs_dim,)


@pytest.mark.parametrize("name, repeat, steps", [("cartpole-swingup", 2, 500), ("cartpole-swingup", 3, 334), ("lqr-lqr_2_1", 2, 500)])
def test_a_time_limit_truncates_and_an_episode_stops_where_it_ends(name, repeat, steps):
    env = Env(name, action_repeat=repeat)
    env.reset()
    ends = [env.step(np.ones(env.action_dim))[2:] for _ in range(steps)]
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (False, True)
    assert env.frames == 1000  # 333 times 3, and once 1


def test_a_termination_is_told_from_a_time_limit():
    env = Env("lqr-lqr_2_1")
    env.reset()
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0.0  # at rest at the origin: LQR's terminal state
        env._env.physics.data.qvel[:] = 0.0
    assert env.step(np.zeros(1))[2:] == (True, False) and env.frames == 1


def test_every_task_of_the_suite_starts_or_says_why_not():
    assert {"dog-run", "ball_in_cup-catch", "humanoid_CMU-stand", "lqr-lqr_6_2"} <= set(task_names())
    for name in task_names():
        try:
            env = Env(name)
            obs, reward, _, _ = env.step(env.random_action())
            assert np.isfinite(obs).all() and np.isfinite(reward)
        except ValueError as error:
            assert name == "quadruped-escape" and "OpenGL" in str(error) and "\n" not in str(error)
    with pytest.raises(ValueError, match="did you mean dog-run or"):
        Env("dog_run")


def test_discrete_actions_and_broken_observations_are_refused(monkeypatch, tmp_path):
    from dm_control import suite
    from dm_control.rl import control
    from dm_env import specs
    monkeypatch.setattr(control.Environment, "action_spec", lambda self: specs.DiscreteArray(3))
    with pytest.raises(ValueError, match="cartpole-swingup has discrete actions") as error:
        Env("cartpole-swingup")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    flat, calls = envs._flat, itertools.count()
    monkeypatch.setattr(envs, "_flat", lambda observation: flat(observation) * (math.nan if next(calls) == 30 else 1))
    env = Env("cartpole-swingup")
    with pytest.raises(FloatingPointError, match="observation of cartpole-swingup holds nan"):
        for _ in range(40):
            env.step(env.random_action())
    calls = itertools.count(-1100)  # past the first evaluation
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs", str(tmp_path), "--algo", "sac", *SHORT[:-2]])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert "holds nan" in str(stopped.value) and len(str(stopped.value).strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["walker-walk", "finger-turn_hard", "fish-swim", "lqr-lqr_6_2"])
def test_an_env_returns_exactly_to_a_saved_moment(name):
    env, other = Env(name, seed=1), Env(name, seed=1)
    env.reset(), env.reset()
    for _ in range(6):
        env.step(env.random_action())
    state = env.state()
    ahead = [env.step(env.random_action()) for _ in range(10)]
    other.restore(state)
    assert other.frames == 12
    for (obs, reward, *_), (obs2, reward2, *_) in zip(ahead, [other.step(other.random_action()) for _ in range(10)]):
        assert np.array_equal(obs, obs2) and reward == reward2


def test_evaluation_episodes_depend_on_their_seed_alone():
    act = lambda obs: np.sin(7 * obs[:, :1])
    five, two = LockstepEvaluation("cartpole-swingup", 5, seed=3), LockstepEvaluation("cartpole-swingup", 2, seed=3)
    returns = five(act, step=10)
    np.testing.assert_array_equal(five(act, step=10), returns)  # whatever was played before
    np.testing.assert_array_equal(two(act, step=10), returns[:2])
    np.testing.assert_array_equal(LockstepEvaluation("cartpole-swingup", 5, seed=3, workers=2)(act, step=10), returns)
    assert len(set(returns)) == 5 and not np.array_equal(five(act, step=20), returns)
    env, total, done = Env("cartpole-swingup"), 0.0, False
    obs = env.reset(int(np.random.SeedSequence([3, 10, 4]).generate_state(1)[0]))
    while not done:
        obs, reward, terminated, truncated = env.step(act(obs[None])[0])
        total, done = total + reward, terminated or truncated
    assert returns[4] == pytest.approx(total)


def test_a_worker_that_dies_is_told_in_one_line():
    evaluation = LockstepEvaluation("cartpole-swingup", 2, workers=1)

    def act(obs):
        evaluation.groups[0][1]._process.kill()
        return np.zeros((2, 1))
    with pytest.raises(ChildProcessError, match=r"an evaluation worker \(process \d+\) died with exit status -9; --eval-workers 0"):
        evaluation(act, step=0)


def test_a_worker_for_every_four_cores(monkeypatch):
    monkeypatch.setattr(envs, "_RemoteGroup", envs._Group)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [len(part) for part, _ in LockstepEvaluation("cartpole-swingup", 4, workers=None).groups] == [2, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert len(LockstepEvaluation("cartpole-swingup", 4, workers=None).groups) == 1


# ---------------------------------------------------------------------------------------------------------- train.py

def run_train(folder, *flags, timeout=300):
    return subprocess.run([sys.executable, str(HERE / "train.py"), "--runs", str(folder), "--device", "cpu", *flags],
                          capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


SHORT = ("--env", "cartpole-swingup", "--width-scale", "0.05", "--total-steps", "130", "--learning-starts", "60",
         "--eval-every", "50", "--eval-episodes", "2", "--log-every", "30", "--batch-size", "16", "--target-update-freq", "20")


def table(folder, name):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


def test_a_run_from_the_command_line(tmp_path):
    result = run_train(tmp_path, "--mst", *SHORT)
    assert result.returncode == 0, result.stderr
    for line in ("encoder  type 6  dense", "critic   type 6  dst", "actor    type 5  sst", "density 0.4", str(tmp_path)):
        assert line in result.stdout
    (folder,) = tmp_path.iterdir()
    rows = table(folder, "eval.csv")
    assert [int(row["agent_step"]) for row in rows] == [0, 50, 100, 130]
    assert [int(row["frames"]) for row in rows] == [0, 100, 200, 260]
    for module in ("encoder", "critic", "actor"):
        columns = [c for c in rows[0] if c.startswith(module)]
        assert all(any(key in c for c in columns) for key in ("srank", "dormant/", "interference", "parameter_norm", "gradient_norm"))
        assert math.isnan(float(rows[0][f"{module}/dormant"])) and math.isnan(float(rows[0][f"{module}/gradient_norm"]))
        assert all(float(rows[-1][c]) == float(rows[-1][c]) for c in columns)  # nothing is NaN by the end
    assert float(rows[-1]["critic/density"]) == pytest.approx(0.4, abs=1e-3) and float(rows[-1]["encoder/density"]) == 1
    training = table(folder, "train.csv")
    assert [(int(row["agent_step"]), int(row["frames"])) for row in training] == [(90, 180), (120, 240), (130, 260)]
    assert all(math.isfinite(float(row[c])) for row in training for c in row if c != "episode_return")
    config = json.load(open(folder / "config.json"))
    assert config["mst"] and config["modules"]["critic"]["regime"] == "dst" and config["versions"]["torch"] == torch.__version__

    again = run_train(tmp_path, "--mst", *SHORT)  # the folder is there already
    assert again.returncode != 0 and "exists" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    assert table(folder, "eval.csv") == rows
    # The same seed gives the same run; evaluating more often changes nothing of what is learnt.
    more = run_train(tmp_path / "more", "--mst", *SHORT, "--eval-every", "10")
    assert more.returncode == 0
    (folder2,) = (tmp_path / "more").iterdir()
    timeless = lambda rows: [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    assert timeless(table(folder2, "train.csv")) == timeless(training)
    assert timeless(table(folder2, "eval.csv"))[-1] == timeless(rows)[-1]


@pytest.mark.parametrize("algo", ["sac", "ddpg", "mrsac"])
def test_every_algorithm_runs_from_the_command_line(tmp_path, algo):
    own = ("--target-update-freq", "20") if algo == "mrsac" else ()
    result = run_train(tmp_path, "--algo", algo, "--mst", "--precision", "bf16", *SHORT[:-2], *own)
    assert result.returncode == 0, result.stderr
    names = ("encoder", "critic", "actor") if algo == "mrsac" else ("critic", "actor")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"cartpole-swingup__{algo}__") and f"{algo} on cartpole-swingup" in result.stdout
    for line in ("critic   type 6  dst", "actor    type 5  sst") if algo == "mrsac" else (
            "critic   type simba  dst", "actor    type simba  sst", "density 0.2"):
        assert line in result.stdout
    rows, training = table(folder, "eval.csv"), table(folder, "train.csv")
    assert [int(row["agent_step"]) for row in rows] == [0, 50, 100, 130]
    for module in names:
        columns = [c for c in rows[0] if c.startswith(module + "/")]
        assert all(any(key in c for c in columns) for key in ("srank", "dormant/", "interference", "parameter_norm", "gradient_norm"))
        assert all(math.isfinite(float(rows[-1][c])) for c in columns)
    assert any(c.startswith("encoder/") for c in rows[0]) == (algo == "mrsac")
    assert ("temperature" in training[0]) == (algo != "ddpg")
    assert all(math.isfinite(float(row[c])) for row in training for c in row if c != "episode_return")
    assert json.load(open(folder / "config.json"))["learning_starts"] == 60


BAD_FLAGS = [
    (("--env", "walker-wlk"), "did you mean walker-walk"),
    (("--algo", "sac", "--encoder-regime", "dst"), "--encoder-regime: sac has no encoder, only critic and actor"),
    (("--algo=ddpg", "--encoder-scale", "2"), "--encoder-scale: ddpg has no encoder"),
    (("--algo", "sac", "--critic-type", "6"), "--critic-type: sac runs on SimBa networks"),
    (("--algo", "ddpg", "--residual", "post"), "--residual: ddpg runs on SimBa networks"),
    (("--algo", "sac", "--target-q", "mean"), "--target-q mean chooses between two Q networks, and there is one: add --twin-critics"),
    (("--algo", "ddpg", "--actor-q", "mean"), "--actor-q mean chooses between two Q networks"),
    (("--algo", "ddpg", "--sparsity", "1"), "--sparsity must lie in [0, 1), not 1.0"),
    (("--actor-regime", "sst", "--actor-sparsity", "1.0"), "--actor-sparsity must lie in [0, 1), not 1.0"),
    (("--sparsity", "-0.1"), "--sparsity must lie in [0, 1)"),  # a dense run refuses it as well
    (("--scale", "0"), "--scale must lie in (0, 1e4], not 0.0"),
    (("--depth-scale", "1e9"), "--depth-scale must lie in (0, 1e4]"),
    (("--encoder-scale", "3", "--width-scale", "1", "--depth-scale", "2"), "--encoder-scale does nothing beside both"),
    (("--scale", "3", "--width-scale", "1", "--depth-scale", "2"), "--scale does nothing beside both"),
    (("--residual", "post"), "--residual post does nothing: no module has residual connections"),
    (("--schedule-power", "-1"), "--schedule-power must lie in (0, inf), not -1.0"),
    (("--schedule-power", "nan", "--critic-regime", "s2d"), "--schedule-power must lie in (0, inf), not nan"),
    (("--schedule-start", "0.9"), "--schedule-start 0.9 lies behind --schedule-end 0.8"),
    (("--drop-initial", "1.5"), "--drop-initial must lie in [0, 1]"),
    (("--q-horizon", "600"), "--q-horizon must lie in [1, 500], not 600"),
    (("--encoder-horizon", "501"), "--encoder-horizon must lie in [1, 500], not 501"),
    (("--seed", "-1"), "--seed must lie in [0, 4294967295], not -1"),
    (("--total-steps", "1" + 29 * "0"), "--total-steps must lie in [1, 1e12]"),
    (("--total-steps", "50"), "--total-steps 50 trains nothing: it must be above --learning-starts 50"),
    (("--name", "../../x"), "--name '../../x' must be the name of one folder"),
    (("--name", ".."), "--name '..' must be the name of one folder"),
    (("--name", ""), "--name '' must be the name of one folder"),
    (("--buffer-size", "100000000000", "--total-steps", "100000000000"), "GB"),
    (("--device", "cuda"), "--device cpu"),
    (("--device", "gpu"), "--device"),
    (("--device", "mps"), "choose auto, cpu, cuda or cuda:N"),
    (("--device", "meta"), "choose auto, cpu, cuda or cuda:N"),
    (("--scale", "3000"), "choose a smaller --scale"),
    (("--algo", "sac", "--scale", "3000"), "choose a smaller --scale"),
    (("--discount", "1.1"), "--discount must lie in (0, 1], not 1.1"),
    (("--critic-lr", "-1"), "--critic-lr must lie in [0, inf), not -1.0"),
    (("--algo", "sac", "--initial-temperature", "0"), "--initial-temperature must lie in (0, inf), not 0.0"),
    (("--algo", "sac", "--target-entropy", "nan"), "--target-entropy must lie in (-inf, inf)"),
    (("--algo", "ddpg", "--target-rate", "-3"), "--target-rate must lie in (0, 1]"),
    (("--algo", "ddpg", "--exploration-noise", "inf"), "--exploration-noise must lie in [0, inf)"),
    (("--learning-starts", "2"), "--learning-starts must be at least 6, not 2"),
    (("--target-update-freq", "0"), "--target-update-freq must lie in [1, 1e12]"),
    (("--precision", "tf32", "--device", "cpu"), "choose fp32 or bf16"),
    (("--cuda-graphs", "on", "--device", "cpu"), "--cuda-graphs needs a CUDA device"),
    (("--compile", "on", "--precision", "bf16", "--device", "cpu"), "leave one of them away"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, flags, message):
    if flags == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train.py", "--env", "cartpole-swingup", "--total-steps", "100", "--learning-starts", "50",
                                      "--runs", str(tmp_path / "runs"), *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert isinstance(stopped.value.code, str) and message in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag, wrong, choices", [
    ("--algo", "ppo", "mrq sac ddpg mrsac"), ("--critic-regime", "rigl", "dense sst dst s2d d2s"), ("--critic-type", "7", "1 2 3 4 5 6"),
    ("--growth", "momentum", "gradient random"), ("--distribution", "erk", "er uniform"), ("--residual", "none", "pre post"),
    ("--precision", "fp16", "auto fp32 tf32 bf16")])
def test_a_wrong_choice_is_answered_with_the_choices(capsys, flag, wrong, choices):
    with pytest.raises(SystemExit) as stopped:
        flags_to_args(flag, wrong)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in said and all(f"'{choice}'" in said for choice in choices.split())


def test_a_loss_that_turns_nan_stops_the_run(tmp_path):
    result = run_train(tmp_path, *SHORT, "--critic-lr", "1e30")
    assert result.returncode != 0 and re.search(r"(critic|actor)'s loss or gradient \(its update [12]\).* was not finite at agent step 6[01]; stopped", result.stderr)
    assert "Traceback" not in result.stderr
    (folder,) = tmp_path.iterdir()
    assert len(table(folder, "eval.csv")) == 2 and len(table(folder, "train.csv")) == 1  # nothing is lost


@pytest.mark.parametrize("flags, package", [(("--tensorboard",), "tensorboard"), (("--wandb-project", "x"), "wandb")])
def test_a_tracker_is_imported_only_if_asked_for(tmp_path, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)  # not there
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs", str(tmp_path / "runs"), *SHORT, *flags])
    with pytest.raises(SystemExit, match=f"{package} is not installed"):
        train.main()
    assert not (tmp_path / "runs").exists()


def flags_to_args(*flags):
    return parse(list(flags))


def test_presets_and_flags_reach_the_modules():
    types = lambda *flags: [(m.arch_type, m.regime, m.width_scale, m.depth_scale, m.sparsity)
                            for m in module_configs(flags_to_args(*flags)).values()]
    assert types() == [(4, "dense", 1, 1, 0.6), (4, "dense", 1, 1, 0.6), (3, "dense", 1, 1, 0.6)]  # Table 2
    assert types("--mst", "--scale", "5") == [(6, "dense", 5, 5, 0.6), (6, "dst", 5, 5, 0.6), (5, "sst", 5, 5, 0.6)]
    assert types("--mst", "--critic-regime", "s2d", "--actor-type", "6", "--sparsity", "0.8", "--critic-sparsity", "0.5",
                 "--scale", "3", "--encoder-scale", "1", "--depth-scale", "2") == [
        (6, "dense", 1, 2, 0.8), (6, "s2d", 3, 2, 0.5), (6, "sst", 3, 2, 0.8)]
    assert types("--critic-regime", "dst", "--scale", "5")[1] == (4, "dst", 5, 5, 0.6)
    options = module_configs(flags_to_args("--mst", "--distribution", "uniform", "--growth", "random",
                                                 "--update-interval", "7"))["critic"].sparse_options
    assert (options["distribution"], options["grow"], options["update_interval"]) == ("uniform", "random", 7)


def test_every_algorithm_has_its_own_defaults():
    sac, mrsac = flags_to_args("--algo", "sac"), flags_to_args("--mst", "--algo=mrsac")
    assert (sac.learning_starts, sac.sparse.sparsity, sac.agent) == (5000, 0.8, SACConfig())
    assert (mrsac.learning_starts, mrsac.sparse.sparsity, mrsac.agent.temperature_lr) == (10_000, 0.6, 3e-4)
    assert isinstance(flags_to_args("--algo", "ddpg").agent, DDPGConfig) and isinstance(flags_to_args().agent, MRQConfig)
    regimes = lambda *flags: {name: (m.regime, m.sparsity, m.width_scale, m.depth_scale)
                              for name, m in module_configs(flags_to_args(*flags)).items()}
    assert regimes("--algo", "sac", "--mst", "--width-scale", "4", "--depth-scale", "3") == {
        "critic": ("dst", 0.8, 4, 3), "actor": ("sst", 0.8, 4, 3)}
    assert regimes("--algo", "ddpg", "--actor-regime", "dst", "--critic-sparsity", "0.5", "--scale", "2") == {
        "critic": ("dense", 0.5, 2, 2), "actor": ("dst", 0.8, 2, 2)}  # Fig. 14 swaps the regimes
    assert regimes("--algo", "mrsac", "--mst")["encoder"][0] == "dense"


@pytest.mark.parametrize("algo, updates", [("mrq", 60), ("sac", 120)])
def test_schedules_span_all_updates_of_a_run(algo, updates, tmp_path):
    _, _, agent, *_, log = train.build(flags_to_args("--algo", algo, "--mst", *SHORT[:-2], "--total-steps", "100",
                                                     "--learning-starts", "40", "--runs", str(tmp_path)))
    log.close()
    assert {sparse.total_steps for sparse in agent.sparse.values()} == {updates}


def test_run_names_tell_runs_apart():
    names = {run_name(flags_to_args(*flags)) for flags in (
        (), ("--mst",), ("--seed", "1"), ("--scale", "5"), ("--critic-scale", "5"), ("--critic-lr", "1e-3"), ("--env", "walker-run"),
        ("--mst", "--sparsity", "0.5"), ("--discount", "0.9"), ("--total-steps", "7"), ("--algo", "sac"), ("--algo", "ddpg"),
        ("--algo", "mrsac"), ("--algo", "sac", "--twin-critics"), ("--algo", "sac", "--mst", "--sparsity", "0.6"))}
    assert len(names) == 15 and {"dog-run__seed=0", "dog-run__sac__seed=0", "dog-run__sac__twin-critics__seed=0",
                                 "dog-run__scale=5__seed=0", "dog-run__sac__mst__sparsity=0.6__seed=0"} <= names


@pytest.mark.parametrize("flags, name", [
    (("--encoder-type", "4", "--actor-regime", "dense", "--critic-scale", "1"), "dog-run__seed=0"),  # defaults restated
    (("--sparsity", "0.9", "--growth", "random", "--schedule-start", "0.1"), "dog-run__seed=0"),  # nothing is sparse
    (("--critic-sparsity", "0.9",), "dog-run__seed=0"),
    (("--critic-regime", "sst", "--sparsity", "0.9", "--growth", "random"), "dog-run__critic-regime=sst__sparsity=0.9__seed=0"),
    (("--critic-regime", "dst", "--schedule-end", "0.9", "--growth", "random"), "dog-run__critic-regime=dst__growth=random__seed=0"),
    (("--scale", "3", "--encoder-scale", "3", "--width-scale", "3"), "dog-run__scale=3__seed=0"),
    (("--mst", "--residual", "post", "--critic-regime", "dst"), "dog-run__mst__residual=post__seed=0")])
def test_what_changes_nothing_is_no_part_of_the_name(flags, name):
    assert run_name(flags_to_args(*flags)) == name


def test_the_name_grows_by_what_is_needed_and_no_more():
    """Against the definition: two command lines share a name if and only if they build and train the same."""
    rng = np.random.RandomState(0)
    choices = {"--mst": None, "--scale": (1, 3), "--critic-scale": (1, 3), "--width-scale": (1, 3), "--critic-type": (4, 6),
               "--critic-regime": ("dense", "sst", "dst", "d2s"), "--sparsity": (0.6, 0.8), "--critic-sparsity": (0.6, 0.8),
               "--growth": ("gradient", "random"), "--schedule-power": (2, 3), "--residual": ("pre", "post"), "--discount": (0.99, 0.9)}
    seen = {}
    for _ in range(300):
        flags = [part for flag, values in choices.items() if rng.rand() < 0.5
                 for part in ([flag] if values is None else [flag, str(values[rng.randint(len(values))])])]
        args = flags_to_args(*flags)
        modules = {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale, m.residual if m.arch_type > 4 else 0,
                          m.sparsity if m.regime != "dense" else 0, m.sparse_options["grow"] if m.regime in ("dst", "d2s") else 0,
                          m.sparse_options["power"] if m.regime == "d2s" else 0) for name, m in module_configs(args).items()}
        seen.setdefault(run_name(args), set()).add(str((modules, args.agent.discount)))
    assert len(seen) > 100 and all(len(meanings) == 1 for meanings in seen.values())
    assert len(set().union(*seen.values())) >= 0.97 * len(seen)  # scale=3 and width, depth by module may say the same twice


def test_flags_that_change_nothing_are_told():
    told = lambda *flags: " ".join(notes(flags_to_args(*flags)))
    assert told() == told("--mst", "--sparsity", "0.8") == told("--encoder-type", "4") == ""
    assert "--sparsity, --growth changes nothing" in told("--sparsity", "0.9", "--growth", "random")
    assert "--critic-sparsity changes nothing" in told("--critic-sparsity", "0.9")
    assert "--schedule-end changes nothing" in told("--critic-regime", "dst", "--schedule-end", "0.9")
    assert "--scale changes nothing" in told("--scale", "3", "--encoder-scale", "1", "--critic-scale", "1", "--actor-scale", "1")


def test_a_long_name_is_shortened_and_stays_its_own():
    numbers = [flag for name in ("critic_lr", "actor_lr", "encoder_lr", "weight_decay", "reward_weight", "terminal_weight",
                                 "dynamics_weight", "exploration_noise", "target_noise", "target_noise_clip", "reward_range")
               for flag in ("--" + name.replace("_", "-"), "0.0123456")]
    names = {run_name(flags_to_args(*numbers, "--discount", discount, "--seed", seed)) for discount in ("0.9", "0.91") for seed in "01"}
    assert len(names) == 4 and all(len(name) == 200 and name.startswith("dog-run__") for name in names)
    assert sum(name.endswith("__seed=1") for name in names) == 2


def test_large_networks_without_residuals_are_named(tmp_path):
    agent = tiny()
    modules = {name: ModuleConfig(m.arch_type, width_scale=5, depth_scale=5) for name, m in MR_DEFAULT.items()}
    assert "--mst" in train.describe(agent, modules, flags_to_args(), "cpu", "x")
    assert "--mst" not in train.describe(agent, MR_MST, flags_to_args(), "cpu", "x")


# ----------------------------------------------------------------------------------------------------------- bench.py

@pytest.mark.parametrize("algo", ["mrq", "ddpg"])
def test_the_benchmark_counts_what_it_says(algo, capsys):
    args = bench.Args(algo=algo, variants=["dense", "mst"], env="cartpole-swingup", steps=1)
    dense, mst = rows = bench.bench_scale(0.05, args, torch.device("cpu"))
    bench.show(rows)
    bench.show_sizes(rows)
    table = capsys.readouterr().out
    assert all(f" {phase} " in table for phase in bench.PHASES) and "16.0 bytes a weight" in table
    assert mst["weights"] == dense["weights"] and mst["gflop"] == dense["gflop"] > 0  # masks spare no arithmetic
    assert dense["mb_weights"] == pytest.approx(4e-6 * dense["weights"]) == dense["mb_gradients"]
    assert 0.9 * dense["mb_weights"] < dense["mb_targets"] <= dense["mb_weights"]  # DDPG's actor has none
    assert dense["mb_masks"] == 0 < mst["mb_masks"] <= 1e-6 * mst["weights"]  # a byte a weight at most
    assert all(row[phase] > 0 for row in rows for phase in ("update", "sample", "critic", "actor", "optimiser"))
    assert (dense["encoder"] == "") == (dense["refresh"] == "") == (algo == "ddpg")
    assert all(row[phase] > 0 for row in rows for phase in ("act", "observe", "add"))
    traffic = 28 * dense["weights"] if algo == "mrq" else 2 * (28 * dense["weights"] + 12 * dense["mb_targets"] / 4e-6)  # soft target
    assert dense["floor"] == pytest.approx(1e3 * (dense["gflop"] / dense["tflop_per_s"] / 1e3 + traffic / dense["gb_per_s"] / 1e9))


@pytest.mark.parametrize("algo, phases", [("mrq", bench.mrq_phases), ("sac", bench.simba_phases)])
def test_a_timed_phase_adds_to_no_earlier_gradient(algo, phases):
    agent, buffer = tiny_of(algo)
    for name, phase in phases(agent, buffer).items():
        if name in agent.networks:
            seen = []
            for _ in range(2):
                torch.manual_seed(0)
                phase()
                seen.append([p.grad.clone() for p in agent.networks[name].parameters()])
            torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize("flags, message", [
    (("--variants", "sparse"), "unknown variant 'sparse'"), (("--variants", "dense+bf16+tf32"), "at most one of +fp32"),
    (("--variants", "mst+graphs", "--device", "cpu"), "needs a CUDA device"), (("--device", "foo"), "unknown --device"),
    (("--variants", "mst", "mst"), "names mst twice"), (("--variants", "mst+bf16+bf16"), "each once"),
    (("--variants", "mst+bf16+compile", "--device", "cpu"), "leave one of them away"),
    (("--scales", "1", "-1"), "scale must be above 0"), (("--scales", "1", "5000"), "choose a smaller --scale"),
    (("--csv", "nowhere/x.csv"), "No such file"),
    (("--steps", "0"), "--steps must be at least 1"), (("--csv", __file__), "exists"),
    (("--env", "dog_run"), "did you mean dog-run")])
def test_the_benchmark_refuses_in_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--scales", "0.05", *flags])
    if "dog_run" not in flags:
        monkeypatch.setattr(bench, "bench_scale", lambda *_: pytest.fail("timed before it was told"))
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert message in stopped.value.code and "\n" not in stopped.value.code


# ------------------------------------------------------------------------------------------------------------- copies

@pytest.mark.parametrize("name", ["sparsity", "networks", "replay", "metrics"])
def test_a_file_runs_alone(name, tmp_path):
    """Its docstring's example, in an empty folder, with everything but torch and numpy out of reach."""
    source = (HERE / f"{name}.py").read_text()
    (tmp_path / f"{name}.py").write_text(source)
    docstring = source.split('"""')[1]
    example = "\n".join(line[4:] for line in docstring.splitlines() if line.startswith("    ") or not line)
    example = example[example.index("import"):]
    blocked = "import sys\nfor name in ('dm_control', 'mujoco', 'tyro', 'tqdm', 'pytest', 'hypothesis', 'scipy'): sys.modules[name] = None\n"
    (tmp_path / "example.py").write_text(blocked + example)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert result.returncode == 0 and result.stdout, result.stderr
