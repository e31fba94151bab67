"""The project's tests: `pytest test_all.py`. Each checks the code against a second computation, a hand-worked case or
values computed by other implementations, and each has been seen to fail when the line it guards is broken.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import getpass
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path
from random import Random
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.text import Text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import agents
import aggregate
import bench
import checkpoint
import claims
import envs
import estimate
import fast
import figures
import metrics
import networks
import plot
import replay
import runlog
import sparsity
import survive
import train
import watch
from envs import Env, LockstepEvaluation, task_names
from agents import AGENTS, build_agent
from mrq import MRQ, symexp, two_hot, two_hot_cross_entropy
from replay import Batch, ReplayBuffer, multi_step_return
from runlog import Busy, Finished, RunLog
from sac import SAC, reduce_q, tanh_gaussian
from settings import (CONFIGS, DDPGConfig, MRQConfig, MR_DEFAULT, MR_MST, ModuleConfig, NOT_IN_NAME, SACConfig, check, defaults,
                      differences, effective, flag_names, from_config, module_configs, notes, parse, run_name)
from sparsity import REGIMES, SparseTraining, _zero_pruned, drop_fraction, layer_densities, scheduled_sparsity, update_mask
from survive import SavedRun

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
    assert scheduled_sparsity(600, 0.6, 0.0, 100, 1100, 2) == scheduled_sparsity(600, 0.6, 0.0, 100, 1100) == pytest.approx(0.15)
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


SPARSE_ARGUMENTS = [{"sparsity": 0.55, "distribution": "er", "grow": "gradient", "drop_initial": 0.7, "drop_final": 0.2, "schedule_start": 0.15,
                     "schedule_end": 0.65, "power": 3.0, "seed": 5, "update_interval": 7},
                    {"sparsity": 0.7, "distribution": "uniform", "grow": "random", "drop_initial": 0.1, "drop_final": 0.6, "schedule_start": 0.3,
                     "schedule_end": 0.9, "power": 0.5, "seed": 6, "update_interval": 4}]


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
        left = (1 - min(max((step - first) / (last - first), 0), 1)) ** a["power"]
        wanted = a["sparsity"] * {"dst": 1, "s2d": left, "d2s": 1 - left}[regime]
        zeta = a["drop_final"] + (a["drop_initial"] - a["drop_final"]) * (1 + math.cos(math.pi * step / total)) / 2
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
    sparse = SparseTraining(model, optimizer, "sst", 0.5, leave_out=["cross", "image.weight", "tied"])
    assert expected - sparse.masks.keys() == {"image.weight", "embedding.weight", *attention[2:]}
    assert SparseTraining(model, optimizer, "sst", 0.5, leave_out="bag").masks.keys() == expected - {"bag.weight"}
    with pytest.raises(ValueError, match="no layer or weight 'lin'"):
        SparseTraining(model, optimizer, "sst", leave_out="lin")
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
    assert SparseTraining(model, optimizer, "dst", leave_out="2").masks.keys() == {"0.weight"}
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
                            update_interval=2, drop_initial=zeta)
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
                    {"drop_initial": 1, "drop_final": 1}, {"drop_initial": 0, "drop_final": 0}, {"total_steps": 1, "update_interval": 1}):
        SparseTraining(model, optimizer, "d2s", **options)  # the ends themselves are allowed
    at_once = SparseTraining(model, optimizer, "d2s", 0.5, total_steps=9, update_interval=1, schedule_start=0, schedule_end=0)
    sum(p.sum() for p in model.parameters()).backward()
    assert at_once.update_topology(1) and at_once.sparsity == 0.5  # a schedule without length is over after a step
    nan, base = float("nan"), ("s2d", 0.5, 9, 1, "er", "gradient")
    for arguments, message in ((("rigl",), "unknown regime"), (("dst", nan), "sparsity"), (("dst", 1.0), "sparsity"), (("dst", 0.5, 0), "total_steps"),
                               (("dst", 0.5, 9, 1, "er", "gradient", 1.5), "drop_initial"),
                               (("dst", 0.5, nan), "total_steps"), (("dst", 0.5, 9, nan), "update_interval"),
                               (("dst", 0.5, 9, 1, "er", "gradient", 0.5, nan), "drop_final"),
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
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.6, 10**6, 1, grow="random", drop_initial=1.0, seed=0)
    model(torch.randn(4, 30)).sum().backward()
    assert sparse.update_topology(1)
    one, two = sparse.masks.values()
    assert (one & two).sum() < 0.6 * one.sum()  # by chance, 0.4


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


def test_networks_without_further_words_are_the_papers_at_scale_1():
    """Table 2's types 4, 4 and 3, one block of 512; a scale multiplies both."""
    shapes = lambda network: {name: tuple(p.shape) for name, p in network.named_parameters()}
    for network, arguments, arch_type in ((networks.Encoder, (5, 2), 4), (networks.Critic, (512,), 4), (networks.Actor, (512, 2), 3),
                                          (networks.GaussianActor, (512, 2), 3)):
        plain, said = network(*arguments), network(*arguments, arch_type=arch_type, width_scale=1, depth_scale=1, residual="pre")
        assert shapes(plain) == shapes(said) and str(plain) == str(said)
    assert shapes(networks.BlockMLP(3, 2, 8)) == shapes(networks.BlockMLP(3, 2, 8, True, "elu", 1))
    assert networks.scaled_size(1) == (512, 1) and networks.scaled_size(3) == (1536, 3) and networks.scaled_size(3, 0.5, 2) == (256, 2)


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


def naive_activation(config):
    return {"relu": lambda v: v.clamp(min=0), "elu": lambda v: torch.where(v > 0, v, v.exp() - 1)}[config["activation"]]


def naive_block_mlp(model, x, config, residual, seen=None):
    """Appendix C and Eqs. (3)-(6), written out. seen: a list that takes what leaves each activation."""
    def norm_act(v):
        v = naive_activation(config)(layer_norm(v) if config["use_layer_norm"] else v)
        if seen is not None:
            seen.append(v)
        return v

    linear = lambda layer, v: v @ layer.weight.T + layer.bias
    x = linear(model.projection, x)
    for block in model.blocks:
        inner = norm_act(x)
        y = linear(block.linear2, norm_act(linear(block.linear1, inner)))
        if config["use_residual"]:
            y = y + (x if residual == "pre" else inner)
        x = y
    return linear(model.output, norm_act(x))


def test_the_six_types_are_the_papers():
    """Appendix C's table: what the other tests take from the code is pinned here, and in the README."""
    relu, elu = {"activation": "relu"}, {"activation": "elu"}
    plain, norm, both = ({"use_layer_norm": n, "use_residual": r} for n, r in ((False, False), (True, False), (True, True)))
    assert networks.ARCH_CONFIGS == {1: relu | plain, 2: elu | plain, 3: relu | norm, 4: elu | norm, 5: relu | both, 6: elu | both}
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (
        line.split("|") for line in (HERE / "README.md").read_text().splitlines()) if len(cells) == 9}
    for number, config in networks.ARCH_CONFIGS.items():
        assert [rows[row][number - 1] for row in ("activation", "LayerNorm", "residual")] == [
            {"relu": "ReLU", "elu": "ELU"}[config["activation"]], "yes" * config["use_layer_norm"], "yes" * config["use_residual"]]
        said = figures.TYPE_LABELS[number]
        assert (("LN" in said), ("residual" in said), "ELU" in said.replace("ReLU", "")) == (
            config["use_layer_norm"], config["use_residual"], config["activation"] == "elu")


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
    torch.manual_seed(0)
    for module in (networks.Encoder(40, 30, 4), networks.Critic(512, 4), networks.Actor(512, 30), networks.GaussianActor(512, 30)):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                bound = math.sqrt(2) * math.sqrt(6 / sum(layer.weight.shape))  # Xavier uniform with ReLU's gain
                assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any(), name
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be above 0"):
            networks.Critic(8, 4, scale=bad)
    with pytest.raises(ValueError, match="architecture type"):
        networks.Actor(8, 2, 7)


def naive_simba(q, x, seen):
    """SimBa's definition, written out: features and output. seen: a list that takes what leaves each activation."""
    def norm(layer, v):  # with parameters, and an epsilon of its own
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * layer.weight + layer.bias

    linear = lambda layer, v: v @ layer.weight.T + layer.bias
    x = linear(q.projection, x)
    for block in q.blocks:
        seen.append(linear(block.linear1, norm(block.norm, x)).clamp(min=0))
        x = x + linear(block.linear2, seen[-1])
    x = norm(q.norm, x)
    return x, linear(q.output, x)


def test_simba_networks_against_their_definition_and_sizes():
    torch.manual_seed(0)
    critic = networks.SimbaCritic(5, 2, 8, num_blocks=3, num_qs=2)
    for name, parameter in critic.named_parameters():
        nn.init.normal_(parameter, std=1e-3 if "projection" in name else 0.5)  # so small that the epsilon tells
    obs, action = torch.randn(7, 5), torch.randn(7, 2)
    x = torch.cat([obs, action], 1)
    torch.testing.assert_close(critic(obs, action), torch.cat([naive_simba(q, x, [])[1] for q in (critic.q1, critic.q2)], 1))
    assert len(list(networks.SimbaCritic(5, 2, 8, 1).children())) == 1
    actor = networks.SimbaGaussian(5, 2, 8, 1)  # mean first, then log-std, each with a head of its own
    features, mean = naive_simba(actor, obs, [])
    torch.testing.assert_close(actor(obs), torch.cat([mean, features @ actor.log_std.weight.T + actor.log_std.bias], 1))

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
    q, actor = networks.SimbaCritic(40, 10, 64, 2).q1, networks.SimbaGaussian(50, 10, 64, 2)
    for layer in (q.projection, actor.projection):
        torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(50), atol=1e-5, rtol=0)
    assert q.output.weight.norm().item() == pytest.approx(1, abs=1e-5)  # orthogonal, gain 1
    for layer in (actor.output, actor.log_std):
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(10), atol=1e-5, rtol=0)
    for layer in (q.blocks[0].linear1, q.blocks[1].linear2):
        std = math.sqrt(2 / layer.in_features)  # He; the cut is at two standard deviations of the normal before it
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert 0.99 * 2 < layer.weight.abs().max().item() / (std / 0.8796257) <= 2
    assert not any(layer.bias.any() for module in (q, actor) for layer in module.modules() if isinstance(layer, nn.Linear))


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


def test_post_residuals_are_in_all_of_the_encoder():
    for arch_type in (5, 6):
        config, (obs, action) = networks.ARCH_CONFIGS[arch_type], (torch.randn(9, 5), torch.rand(9, 2))
        encoder = networks.Encoder(5, 2, arch_type, width_scale=1 / 32, depth_scale=2, residual="post")
        zs = encoder.zs(obs)
        torch.testing.assert_close(zs, encoder.zs_activation(naive_block_mlp(encoder.zs_mlp, obs, config, "post")))
        torch.testing.assert_close(encoder(zs, action), naive_block_mlp(encoder.zsa_mlp, torch.cat([zs, encoder.za(action)], 1), config, "post"))


def test_scaled_sizes_are_rounded():
    assert networks.scaled_size(1, 0.3, 1.6) == (154, 2) and networks.scaled_size(1, 0.3, 0.8, 128, 2) == (38, 2)
    assert networks.scaled_size(0.0005) == (1, 1)


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
@pytest.mark.slow
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
    returns, bootstrap = multi_step_return(reward, terminated, 0.5)
    assert returns.tolist() == [[3.0], [2.0], [3.0]]  # the terminating reward counts, later ones do not
    assert bootstrap.tolist() == [[0.125], [0.0], [0.0]]  # γ³ where nothing terminated


def test_a_million_dog_run_transitions_fit_and_what_cannot_fit_is_refused(monkeypatch):
    buffer = ReplayBuffer(223, 38, 1_002_000, device="meta")  # with the 2,000 last observations of 500-step episodes
    size = sum(value.numel() * value.element_size() for value in vars(buffer).values() if torch.is_tensor(value))
    assert 1.0e9 < size <= 1.3e9
    with pytest.raises(MemoryError, match="GB"):
        ReplayBuffer(223, 38, 10**11)
    monkeypatch.setattr(replay, "free_memory", lambda device: size)
    ReplayBuffer(223, 38, 1_002_000, device="meta")  # what is there is enough
    monkeypatch.setattr(replay, "free_memory", lambda device: 0.999 * size)
    with pytest.raises(MemoryError, match=r"1,002,000 rows takes 1.\d\d GB, but cpu has 1.\d\d GB"):
        ReplayBuffer(223, 38, 1_002_000)
    monkeypatch.undo()
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


def test_free_memory_is_what_can_be_had(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *of: io.StringIO("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable: 70 kB\n"))
    free = replay.free_memory(torch.device("cpu"))
    monkeypatch.undo()
    assert free == 70 * 1024


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
    for shape in ((0, 3), (4, 0)):
        assert math.isnan(metrics.srank(torch.zeros(shape)))
    for scale in (1e38, 1e-40, 1e300):  # sums, or singular values themselves, beyond float32
        matrix = torch.diag(0.5 ** torch.arange(10.0)).double() * scale
        assert metrics.srank(matrix if scale > 1e38 else matrix.float()) == 7


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
    pooled, per_layer = metrics.dormant_ratio({"none": torch.zeros(3, 0), "some": torch.tensor([[0.0, 1.0, 1.0, 2.0]])})
    assert pooled == per_layer["some"] == 0.25 and math.isnan(per_layer["none"])
    pooled, per_layer = metrics.dormant_ratio({"unseen": torch.zeros(0, 3)})
    assert math.isnan(pooled) and math.isnan(per_layer["unseen"])


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


class Channels(nn.Module):
    """Convolutions whose channels 1 and 3 of 4 are dead, and then layers that count units otherwise."""

    def __init__(self, dims):
        super().__init__()
        self.conv = getattr(nn, f"Conv{dims}d")(2, 4, 3, padding=1)
        self.act, self.pool, self.act2 = nn.ReLU(), getattr(nn, f"MaxPool{dims}d")(2), nn.ReLU()
        self.gate, self.sigmoid, self.act3 = nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU()
        self.last, self.gelu = nn.Linear(4, 6), nn.GELU()
        with torch.no_grad():
            self.conv.bias[[1, 3]] = -1e3

    def forward(self, x):  # (batch, 2, 8, ...)
        x = self.act2(self.pool(self.act(self.conv(x))))
        gate = self.sigmoid(self.gate(x.flatten(2).mean(2)))  # (batch, 4): units last, in between
        x = self.act3(x * gate.view(*gate.shape, *[1] * (x.ndim - 2)))
        return self.gelu(self.last(x.movedim(1, -1)))  # (batch, 4, ..., 6): as many dimensions, units last


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_are_the_neurons_of_a_convolution(dims):
    torch.manual_seed(0)
    model, x = Channels(dims), torch.randn(3, 2, *[8] * dims)
    with metrics.record_activations(model) as recorded:
        model(x)
    assert {name: tuple(value.shape) for name, value in recorded.items()} == {
        "act": (3 * 8 ** dims, 4), "act2": (3 * 4 ** dims, 4), "sigmoid": (3, 4), "gelu": (3 * 4 ** dims, 6),
        "act3": (3 * 4 ** dims, 4)}
    per_layer = metrics.dormant_ratio(recorded)[1]
    assert [per_layer[name] for name in ("act", "act2", "sigmoid", "gelu")] == [0.5, 0.5, 0, 0]
    torch.testing.assert_close(recorded["act"][:, 2], F.relu(model.conv(x))[:, 2].flatten())
    assert per_layer["act3"] == 0.5
    with metrics.record_activations(model) as recorded:  # one sample, not in a batch
        model.act(model.conv(x[0]))
    assert metrics.dormant_ratio(recorded)[1] == {"act": 0.5} and recorded["act"].shape == (8 ** dims, 4)
    with metrics.record_activations(model.act) as recorded:  # no layer that says: channels first in images, not in sequences
        model.act(x)
    assert recorded[""].shape[1] == (8 if dims == 1 else 2)
    model = nn.ModuleList([nn.Conv1d(2, 4, 3), nn.GRU(2, 5, batch_first=True), nn.ReLU()])
    with metrics.record_activations(model) as recorded:
        model[2](model[0](torch.randn(3, 2, 8)))
        model[2](model[1](torch.randn(3, 8, 2))[0])
    assert recorded["2"].shape == (3 * 8, 5)


def test_every_kind_of_activation_is_seen_and_what_follows_leaves_the_record_alone():
    others = {"MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
    for name in set(nn.modules.activation.__all__) - others:
        layer = getattr(nn, name)(*{"Threshold": (0.1, 0.0)}.get(name, ()))
        x = torch.randn(5, 4)
        for shape in ((5, 4), (1, 5, 4), (4,)):
            with metrics.record_activations(layer) as recorded:
                out = layer(x[0] if shape == (4,) else x.view(shape))
                expected = torch.atleast_2d(out.detach().clone().squeeze(0))
                out.data.mul_(0)  # as nn.ReLU(inplace=True) or x += y would
            if name != "RReLU":
                torch.testing.assert_close(recorded[""], expected)
            assert recorded[""].shape == expected.shape


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
    assert [len(group) for group in metrics._groups([(torch.zeros(5), None)] * 5, 10)] == [2, 2, 1]  # as many as fit
    assert metrics.interference_summary(torch.tensor([[1, 0, -1], [0, 1, 0], [-1, 0, 1.0]])) == (pytest.approx(-1 / 3), pytest.approx(1 / 3))
    masks = [torch.rand(p.shape) < 0.5 for p in model.parameters()]
    masked = gradients * torch.cat([m.flatten() for m in masks])
    torch.testing.assert_close(metrics.gradient_gram(losses, list(model.parameters()), masks), (masked @ masked.T).double(),
                               atol=1e-6, rtol=1e-4)
    weight, data = torch.ones(3000, requires_grad=True), torch.randn(4, 3000)
    with torch.autocast("cpu", torch.bfloat16):  # whatever precision products have, as tf32 on a GPU
        gram = metrics.gradient_gram((data * weight).sum(1), [weight])
    torch.testing.assert_close(gram, data.double() @ data.double().T, atol=1e-9, rtol=0)
    tiny = metrics.gradient_gram(losses * 1e-24, list(model.parameters()))  # whose squares float32 does not have
    torch.testing.assert_close(metrics.cosines(tiny), cosine, atol=1e-5, rtol=1e-4)
    model[0].requires_grad_(False)  # a frozen parameter adds nothing
    losses = (model(x) - y).square().mean(1)
    trained = gradients[:, 5 * 7 + 7:].double()
    torch.testing.assert_close(metrics.gradient_gram(losses, list(model.parameters())), trained @ trained.T, atol=1e-6, rtol=1e-4)
    model.zero_grad()
    assert math.isnan(metrics.gradient_norm(model)) and math.isnan(metrics.parameter_norm(nn.ReLU()))
    assert all(math.isnan(value) for value in metrics.interference_summary(torch.full((3, 3), float("nan"))))
    for nothing in (model.requires_grad_(False), nn.ReLU(), mlp(5, 7, 3)):  # frozen; without parameters; not in the graph
        row = metrics.module_metrics(nothing, {"z": torch.zeros(0, 4)}, {}, losses)
        assert all(math.isnan(row[key]) for key in ("srank_z", "dormant", "interference", "gradient_norm"))
        assert math.isnan(row["parameter_norm"]) == (nothing.__class__ is nn.ReLU)


def test_an_srank_is_capped_by_samples_and_by_features():
    row = metrics.module_metrics(nn.ReLU(), {"wide": torch.randn(5, 8), "tall": torch.randn(8, 5)}, {}, torch.ones(2))
    assert row["srank_wide_cap"] == row["srank_tall_cap"] == 5


def test_dormant_scores_of_bfloat16_activations_are_means_in_float32():
    layer = torch.tensor([[1.0, 1.0], [1.0078125, 1.0]]).bfloat16()  # the mean between two neighbours is neither
    assert metrics.dormant_ratio({"a": layer}, tau=1.0)[0] == 0.5


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
    index, weight = two_hot(x, bins)
    rows = torch.zeros(len(x), 65).double().scatter_(1, index, weight)
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


@pytest.mark.parametrize("algo, name", [("mrq", "encoder"), ("mrq", "critic"), ("mrq", "actor"), ("sac", "critic"), ("sac", "actor"),
                                        ("ddpg", "actor"), ("mrsac", "actor")])
def test_what_is_not_finite_stops_its_module_and_no_other(algo, name, monkeypatch):
    """One loss that is NaN or infinite: that module's weights stay, the others go on, and who broke, and when, is known at the end."""
    agent, buffer = tiny_of(algo, interval=100)
    original, calls = getattr(agent, f"{name}_loss"), itertools.count(1)
    bad = 6 if name == "encoder" else 3  # the encoder's sixth update belongs to the burst of step 4
    wrong = math.inf if algo == "mrq" and name == "critic" else math.nan
    monkeypatch.setattr(agent, f"{name}_loss", lambda *arguments: (
        (lambda losses, *rest: (losses + (wrong if next(calls) == bad else 0.0), *rest))(*original(*arguments))))
    weights = lambda: {n: torch.cat([p.detach().flatten() for p in network.parameters()]) for n, network in agent.networks.items()}
    for _ in itertools.takewhile(lambda _: agent.fault() is None, range(20)):
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


def test_the_done_loss_waits_for_a_termination():
    agent, buffer = tiny(), ReplayBuffer(4, 2, 400, 5)
    for _ in range(60):
        buffer.add(np.ones(4), np.zeros(2), 1.0, np.ones(4), False, False)
    agent.update(buffer)
    done = agent.encoder.model.weight.grad  # its first row
    assert not agent.info["terminal_loss"].any() and not done[0].any() and done[1:].any()
    buffer.add(np.ones(4), np.zeros(2), 1.0, np.ones(4), True, False)
    agent.update_encoder(buffer)
    assert agent.info["terminal_loss"].any() and agent.encoder.model.weight.grad[0].any()


def test_the_actors_loss_computes_nothing_for_critic_and_encoder():
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
    assert all(value.isfinite().all() for value in agent.info.values())


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
    assert {k: v.tolist() for k, v in agent.info.items()} == {k: v.tolist() for k, v in other.info.items()}
    obs = np.ones(4, np.float32)
    np.testing.assert_array_equal(agent.act(obs, explore=False), other.act(obs, explore=False))  # the normaliser too


def test_another_agents_state_is_refused_before_anything_changes():
    agent = tiny_of("sac", seed=2)[0]
    weights = [p.clone() for p in agent.critic.parameters()]
    dense = tiny_of("sac", regimes_dense("sac"))[0].state_dict()
    second = copy.deepcopy(tiny_of("sac", seed=3)[0].state_dict())  # the first module's masks fit, but are not this agent's
    second["sparse"]["actor"]["regime"] = "s2d"
    for state, message in ((dense, "regime 'dense'"), (second, "regime 's2d'"), (tiny_of("mrsac")[0].state_dict(), "encoder, critic, actor, this agent has"),
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


@pytest.mark.slow
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
    assert all(value.isfinite().all() for value in agent.info.values())


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


# ------------------------------------------------------------------------------- the agents' whole updates, a second time

class Noise:
    """Stands in for torch.randn_like: numbers that depend on the order of the calls alone, the same for both sides."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(torch, "randn_like", self)

    def __call__(self, like):
        self.calls += 1
        return 1.7 * torch.sin(12.9898 * torch.arange(like.numel()) + 78.233 * self.calls).to(like).view(like.shape)


def naive_counts(sizes, sparsity):
    """ER by bisection of ε, then whole numbers by largest remainders. sizes: (out, in) of each layer."""
    numbers, low, high = [a * b for a, b in sizes], 0.0, 1e6
    wanted = (1 - sparsity) * sum(numbers)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(n, middle * (a + b)) for n, (a, b) in zip(numbers, sizes)) < wanted else (low, middle)
    shares = [min(n, low * (a + b)) for n, (a, b) in zip(numbers, sizes)]
    counts = [math.floor(share + 1e-6) for share in shares]
    for layer in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])[:math.floor(wanted + 0.5) - sum(counts)]:
        counts[layer] += 1
    return counts


def naive_adam(p, g, m, v, t, lr, decay=0.0):
    """AdamW as its paper writes it: new (p, m, v)."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - lr * decay * p - lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)) ** 0.5 + 1e-8), m, v


class Naive:
    """An agent a second time: forward passes, losses, topology, AdamW, targets and temperature written out, in float64.

    It starts from the first one's weights and masks, and shares nothing with it afterwards.
    """

    def __init__(self, agent, modules, total_updates):
        self.config, self.modules, self.total = agent.config, modules, total_updates
        self.networks, self.targets = copy.deepcopy((agent.networks, agent.targets))
        self.normalizer = getattr(agent, "normalizer", None)
        for network in (*self.networks.values(), *self.targets.values()):
            network.double().requires_grad_(True)
        self.masks = {name: {n: mask.clone() for n, mask in sparse.masks.items()} for name, sparse in agent.sparse.items()}
        self.moments = {name: {n: [torch.zeros_like(p)] * 2 for n, p in network.named_parameters()} for name, network in self.networks.items()}
        self.updates, self.scale, self.target_scale, self.info = dict.fromkeys(self.networks, 0), 1.0, 1.0, {}
        self.gaussian = hasattr(self.config, "initial_temperature")
        if self.gaussian:
            self.log_alpha, self.alpha_moments = math.log(self.config.initial_temperature), (0.0, 0.0)
            self.target_entropy = self.config.target_entropy * self.networks["actor"].output.out_features

    # ---- networks: `seen` takes what leaves each activation

    def mlp(self, name, model, x, seen):
        """The model's features and its output."""
        if self.modules[name].arch_type == "simba":
            return naive_simba(model, x, seen)
        y = naive_block_mlp(model, x, networks.ARCH_CONFIGS[self.modules[name].arch_type], self.modules[name].residual, seen)
        return seen[-1], y

    def zs(self, encoder, obs, seen=None):
        seen = [] if seen is None else seen
        config = networks.ARCH_CONFIGS[self.modules["encoder"].arch_type]
        x = self.mlp("encoder", encoder.zs_mlp, obs, seen)[1]
        seen.append(naive_activation(config)(layer_norm(x) if config["use_layer_norm"] else x))
        return seen[-1]

    def zsa(self, encoder, zs, action, seen=None):
        seen = [] if seen is None else seen
        act = naive_activation(networks.ARCH_CONFIGS[self.modules["encoder"].arch_type])
        seen.append(act(action @ encoder.za_linear.weight.T + encoder.za_linear.bias))
        return self.mlp("encoder", encoder.zsa_mlp, torch.cat([zs, seen[-1]], -1), seen)[1]

    def q(self, critic, x, seen=None):
        return torch.cat([self.mlp("critic", q, x, [] if seen is None else seen)[1] for q in critic.children()], -1)

    def policy(self, actor, x, noise=None, clip=math.inf):
        """An action, its log-probability (0 where there is none) and what went into tanh. noise: its std; None for no noise."""
        features, mean = self.mlp("actor", actor, x, []) if not hasattr(actor, "mlp") else self.mlp("actor", actor.mlp, x, [])
        if not self.gaussian:
            action = mean.tanh()
            action = action if noise is None else (action + (noise * torch.randn_like(action)).clamp(-clip, clip)).clamp(-1, 1)
            return action, torch.zeros(len(x), dtype=x.dtype), mean
        log_std = -10 + 6 * (1 + (features @ actor.log_std.weight.T + actor.log_std.bias).tanh())
        draw = torch.randn_like(mean)
        x = mean + log_std.exp() * draw
        log_slope = 2 * (math.log(2) - torch.logaddexp(x, -x))  # log(1 - tanh²) = -2 log cosh
        return x.tanh(), (-draw ** 2 / 2 - log_std - math.log(2 * math.pi) / 2 - log_slope).sum(-1), mean

    def act(self, obs, explore):
        x = self.normalized(obs) if self.normalizer else self.zs(self.networks["encoder"], obs)
        action, _, mean = self.policy(self.networks["actor"], x, getattr(self.config, "exploration_noise", None) if explore else None)
        return action if explore or not self.gaussian else mean.tanh()

    def normalized(self, obs):
        return (obs - self.normalizer.mean) / (self.normalizer.var + 1e-8).sqrt()

    # ---- losses, one value a sample

    def encoder_loss(self, batch, seen):
        c, encoder = self.config, self.networks["encoder"]
        bins = [math.copysign(math.expm1(abs(x)), x) for x in np.linspace(-c.reward_range, c.reward_range, c.reward_bins)]
        bins = torch.tensor(bins, dtype=torch.float64)
        zs, alive = self.zs(encoder, batch.obs[:, 0]), torch.ones(len(batch.obs), dtype=torch.float64)
        parts = dict.fromkeys(("reward_loss", "dynamics_loss", "terminal_loss"), 0.0)
        for k in range(c.encoder_horizon):
            out = self.zsa(encoder, zs, batch.action[:, k]) @ encoder.model.weight.T + encoder.model.bias
            done, zs, logits = out[:, 0], out[:, 1:-c.reward_bins], out[:, -c.reward_bins:]
            two_hot = torch.stack([dense_two_hot(r, bins) for r in batch.reward[:, k]])
            parts["reward_loss"] += alive * -(two_hot * logits.log_softmax(-1)).sum(-1)
            with torch.no_grad():
                target = self.zs(self.targets["encoder"], batch.obs[:, k + 1])
            parts["dynamics_loss"] += alive * ((zs - target) ** 2).mean(-1)
            parts["terminal_loss"] += alive * seen * (done - batch.terminated[:, k]) ** 2
            alive = alive * (batch.terminated[:, k] == 0)
        loss = c.reward_weight * parts["reward_loss"] + c.dynamics_weight * parts["dynamics_loss"] + c.terminal_weight * parts["terminal_loss"]
        return loss, {"encoder_loss": loss} | parts

    def td_target(self, batch):
        """y: MR.Q's by Eq. (11), MR.SAC's and the one-step targets, of shape (batch,)."""
        c, steps = self.config, getattr(self.config, "q_horizon", 1)
        y, discount = torch.zeros(len(batch.obs), dtype=torch.float64), torch.ones(len(batch.obs), dtype=torch.float64)
        for k in range(steps):
            y, discount = y + discount * batch.reward[:, k], discount * c.discount * (batch.terminated[:, k] == 0)
        if self.normalizer:
            x = batch.obs[:, 1]
            action, log_prob, _ = self.policy(self.networks["actor"], x, getattr(c, "exploration_noise", None))
            x = torch.cat([x, action], -1)
        else:
            actor = self.networks["actor"] if getattr(c, "target_policy", "target") == "online" else self.targets["actor"]
            zs = self.zs(self.targets["encoder"], batch.obs[:, steps])
            action, log_prob, _ = self.policy(actor, zs, getattr(c, "target_noise", None), getattr(c, "target_noise_clip", math.inf))
            x = self.zsa(self.targets["encoder"], zs, action)
        value = self.reduced(self.q(self.targets["critic"], x), getattr(c, "target_q", "min"))
        value = value - math.exp(self.log_alpha) * log_prob if self.gaussian else value
        return (y + discount * self.target_scale * value) / self.scale

    def reduced(self, q, how):
        return q.min(1).values if how == "min" else q.mean(1)

    def critic_loss(self, batch):
        with torch.no_grad():
            y = self.td_target(batch)[:, None]
            x = torch.cat([batch.obs[:, 0], batch.action[:, 0]], -1) if self.normalizer else self.zsa(
                self.networks["encoder"], self.zs(self.networks["encoder"], batch.obs[:, 0]), batch.action[:, 0])
        q = self.q(self.networks["critic"], x)
        error = (q - y).abs()
        loss = (error ** 2).sum(1) if self.normalizer else torch.where(error < 1, error ** 2 / 2, error - 0.5).mean(1)
        info = {"critic_loss": loss, "q": q, "td_target": y} | ({} if self.normalizer else {"td_error": error.max(1).values})
        return loss, info

    def actor_loss(self, obs):
        c, actor = self.config, self.networks["actor"]
        if self.normalizer:
            action, log_prob, pre = self.policy(actor, obs, getattr(c, "exploration_noise", None))
            x = torch.cat([obs, action], -1)
        else:
            zs = self.zs(self.networks["encoder"], obs).detach()
            action, log_prob, pre = self.policy(actor, zs)
            x = self.zsa(self.networks["encoder"], zs, action)
        loss = -self.reduced(self.q(self.networks["critic"], x), getattr(c, "actor_q", "mean"))
        info = {}
        if self.gaussian:
            loss = loss + math.exp(self.log_alpha) * log_prob
            info = {"entropy": -log_prob}
        elif not self.normalizer:
            loss = loss + c.pre_activation_weight * (pre ** 2).mean(1)
            info = {"pre_activation": pre.abs()}
        return loss, {"actor_loss": loss} | info | ({"action_size": action.abs()} if self.gaussian or self.normalizer else {})

    # ---- updates

    def step(self, name, loss, info, clip=math.inf):
        parameters = dict(self.networks[name].named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss.mean(), list(parameters.values()))))
        self.updates[name] += 1
        self.move(name, parameters, gradients, self.updates[name])
        for n, mask in self.masks[name].items():
            gradients[n] = gradients[n] * mask
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
        for n, p in parameters.items():
            p.data, *self.moments[name][n] = naive_adam(p.data, gradients[n] * min(1.0, clip / (norm + 1e-6)), *self.moments[name][n], self.updates[name],
                                                        getattr(self.config, f"{name}_lr"), self.config.weight_decay)
        self.info |= {key: value.mean().item() for key, value in info.items()} | {f"{name}_grad_norm": norm}

    def move(self, name, parameters, gradients, t):
        """Algorithm 1 with Eqs. (1) and (2), where the regime moves and a boundary, or the schedule's end, has come."""
        regime, sparsity, o = self.modules[name].regime, self.modules[name].sparsity, self.modules[name].sparse_options
        first, last = round(o["schedule_start"] * self.total), round(o["schedule_end"] * self.total)
        moving = regime in ("s2d", "d2s")
        if regime in ("dense", "sst") or not (t % o["update_interval"] == 0 or moving and t == last):
            return
        share = min(max((t - first) / (last - first), 0.0), 1.0)
        left = (1 - share) ** o["power"]
        wanted = {"dst": sparsity, "s2d": sparsity * left, "d2s": sparsity * (1 - left)}[regime]
        zeta = o["drop_final"] + (o["drop_initial"] - o["drop_final"]) / 2 * (1 + math.cos(math.pi * min(t, self.total) / self.total))
        masks = self.masks[name]
        for (n, mask), count in zip(masks.items(), naive_counts([tuple(parameters[n].shape) for n in masks], wanted)):
            masks[n] = naive_update_mask(parameters[n].detach(), gradients[n], mask, zeta, count)
            stays = mask & masks[n]
            parameters[n].data = parameters[n].data * stays
            self.moments[name][n] = [moment * stays for moment in self.moments[name][n]]

    def temper(self, entropy):
        gradient = math.exp(self.log_alpha) * (entropy - self.target_entropy)
        self.log_alpha, *self.alpha_moments = naive_adam(self.log_alpha, gradient, *self.alpha_moments, self.updates["actor"], self.config.temperature_lr)
        self.info["temperature"] = math.exp(self.log_alpha)

    def update(self, batches, rewards, seen):
        """One agent update. batches: drawn for it, in order. Returns |δ| of each sample of the last batch, or None."""
        batches = iter(batches)
        if self.normalizer:
            batch = next(batches)
            batch = batch._replace(obs=self.normalized(batch.obs))
            self.step("actor", *self.actor_loss(batch.obs[:, 0]))
            if self.gaussian:
                self.temper(self.info["entropy"])
            self.step("critic", *self.critic_loss(batch))
            for (n, target), source in zip(self.targets["critic"].named_parameters(), self.networks["critic"].parameters()):
                target.data = (1 - self.config.target_rate) * target.data + self.config.target_rate * source.data
                target.data = target.data * self.masks["critic"].get(n, 1)
            return None
        if self.updates["critic"] % self.config.target_update_freq == 0:
            self.targets = copy.deepcopy(self.networks)
            self.target_scale, self.scale = self.scale, float(np.mean(np.abs(rewards)))
            self.info["reward_scale"] = self.scale
            for _ in range(self.config.target_update_freq):
                self.step("encoder", *self.encoder_loss(next(batches), seen))
        batch = next(batches)
        loss, info = self.critic_loss(batch)
        self.step("critic", loss, info, self.config.critic_grad_clip)
        self.step("actor", *self.actor_loss(batch.obs[:, 0]))
        if self.gaussian:
            self.temper(self.info["entropy"])
        return info["td_error"]


UNEQUAL = {  # no two alike that could be mistaken for one another
    "batch_size": 12, "discount": 0.9, "target_update_freq": 4, "dynamics_weight": 0.7, "reward_weight": 0.3, "terminal_weight": 0.5,
    "encoder_lr": 1e-3, "critic_lr": 2e-3, "actor_lr": 3e-3, "weight_decay": 0.05, "critic_grad_clip": 0.3, "reward_bins": 31,
    "reward_range": 3.0, "exploration_noise": 0.15, "target_noise": 0.35, "target_noise_clip": 0.25, "pre_activation_weight": 0.2,
    "target_rate": 0.1, "initial_temperature": 0.3, "temperature_lr": 4e-3, "target_entropy": -0.8}
MOVING = {"update_interval": 3, "drop_initial": 0.4, "drop_final": 0.15, "schedule_start": 0.1, "schedule_end": 0.75, "power": 3.0}


def unequal_agent(algo, regimes, **settings):
    """An agent with unequal settings, moved away from its targets, its modules, T, and a buffer."""
    agent_class = AGENTS[algo]
    presets = agent_class.Config.presets["mst"]
    modules = {name: dataclasses.replace(m, regime=regime, width_scale=width / (16 if m.arch_type == "simba" else 64), depth_scale=depth,
                                         residual="post" if name == "critic" else "pre", sparsity=sparsity, sparse_options=MOVING)
               for (name, m), regime, width, depth, sparsity in zip(presets.items(), regimes, (1, 1.5, 2), (1, 2, 1), (0.5, 0.6, 0.7))}
    fields = {spec.name for spec in dataclasses.fields(agent_class.Config)}
    config = agent_class.Config(**{name: value for name, value in UNEQUAL.items() if name in fields} | settings)
    torch.manual_seed(3)
    agent = agent_class(4, 2, modules, config, 14, seed=3)
    for network in agent.networks.values():  # biases and LayerNorms that matter
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter) * (parameter != 0 if parameter.ndim > 1 else 1)
    buffer, episodes = play(3, 400, agent.horizon, 300, obs_dim=4, action_dim=2, prioritized=agent.prioritized)
    for obs in buffer.obs[:50].numpy():
        agent.observe(2 * obs + 1)
    return agent, modules, buffer, episodes


WHOLE_UPDATES = [  # algorithm, regimes, settings
    ("mrq", ("s2d", "dst", "d2s"), {"encoder_horizon": 2, "q_horizon": 3}),
    ("sac", ("d2s", "dst"), {"twin_critics": True, "actor_q": "mean"}), ("sac", ("dst", "s2d"), {"twin_critics": True, "target_q": "mean"}),
    ("ddpg", ("dst", "d2s"), {}),
    ("mrsac", ("dst", "s2d", "d2s"), {"encoder_horizon": 3, "q_horizon": 2, "target_policy": "online", "target_q": "mean"}),
    ("mrsac", ("d2s", "dst", "s2d"), {"encoder_horizon": 3, "q_horizon": 2, "actor_q": "mean"})]


@pytest.mark.parametrize("algo, regimes, settings", WHOLE_UPDATES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_agent_follows_a_second_implementation_of_its_whole_update(algo, regimes, settings, monkeypatch):
    """Weights, targets, masks, moments' effect, temperature, priorities and everything logged, over fourteen updates."""
    agent, modules, buffer, episodes = unequal_agent(algo, regimes, **settings)
    stored = [step[3] for episode in episodes for step in episode]
    for network in (*agent.networks.values(), *agent.targets.values()):
        network.double()
    if hasattr(agent, "bins"):
        agent.bins = agent.bins.double()
    naive, noise, drawn = Naive(agent, modules, 14), Noise(monkeypatch), []
    gather, update_priority, horizons = buffer.gather, buffer.update_priority, []

    def double_gather(index, horizon=None):
        batch = gather(index, horizon)
        assert len(batch.index) == 12
        horizons.append(batch.reward.shape[1])
        drawn.append(Batch(batch.index, *(part.double() for part in batch[1:])))
        return drawn[-1]

    buffer.gather, buffer.update_priority = double_gather, lambda index, error: update_priority(index, error.float())
    first_masks = {name: {n: mask.clone() for n, mask in sparse.masks.items()} for name, sparse in agent.sparse.items()}
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7, check_dtype=False)
    for step in range(14):
        buffer.add(np.ones(4), np.ones(2), 3.0 * step, np.ones(4), False, True)  # the reward scale moves
        stored.append(3.0 * step)
        drawn.clear()
        noise.calls, before = 0, buffer.priority.clone()
        agent.update(buffer)
        noise.calls = 0
        error = naive.update(drawn, stored, float(any(step[5] for episode in episodes for step in episode)))
        assert {key: value.mean().item() for key, value in agent.info.items()} == pytest.approx(naive.info, rel=1e-5, abs=1e-7)
        assert agent.updates == naive.updates
        if error is not None:  # LAP: at least 1, to the power 0.4; of a row drawn twice the larger one
            for row, delta in sorted(zip(drawn[-1].index.tolist(), error.tolist()), key=lambda pair: pair[1]):
                before[row] = max(delta, 1.0) ** 0.4
            close(buffer.priority, before)
        for name, network in naive.networks.items():
            close(list(agent.networks[name].parameters()), list(network.parameters()))
            assert all(torch.equal(mask, naive.masks[name][n]) for n, mask in agent.sparse[name].masks.items())
        for name, network in naive.targets.items():
            close(list(agent.targets[name].parameters()), list(network.parameters()))
    for name, network in naive.networks.items():  # it was not in vain: topologies moved
        assert modules[name].regime == "s2d" or any((first_masks[name][n] != mask).any() for n, mask in agent.sparse[name].masks.items())
    own = getattr(agent.config, "encoder_horizon", 1), getattr(agent.config, "q_horizon", 1)
    assert set(horizons) == set(own) and agent.horizon == max(own)
    # Acting, in float32 as always.
    for network in agent.networks.values():
        network.float()
    obs = torch.randn(5, 4)
    for explore in (True, False):
        noise.calls = 0
        action = agent.act(obs.numpy(), explore)
        noise.calls = 0
        np.testing.assert_allclose(action, naive.act(obs.double(), explore).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algo, regimes, settings", [WHOLE_UPDATES[0], WHOLE_UPDATES[1], WHOLE_UPDATES[3], WHOLE_UPDATES[5]], ids=AGENTS)
def test_every_column_of_measure_against_a_naive_computation(algo, regimes, settings, monkeypatch):
    """On the second implementation's networks: its activations, its losses, and gradients of one sample after the other."""
    agent, modules, buffer, _ = unequal_agent(algo, regimes, **settings)
    for _ in range(6):
        agent.update(buffer)
    naive, noise, drawn, sample = Naive(agent, modules, 14), Noise(monkeypatch), [], buffer.sample
    if hasattr(agent, "reward_scale"):
        naive.scale, naive.target_scale = agent.reward_scale.item(), agent.target_reward_scale.item()
    if naive.gaussian:
        naive.log_alpha = math.log(agent.info["temperature"].item())
    buffer.sample = lambda *arguments: drawn.append((arguments, sample(*arguments))) or drawn[-1][1]
    row = train.measure(agent, buffer)
    ((arguments, batch),) = drawn
    assert arguments == (2048,)
    batch = Batch(batch.index, *(part.double() for part in batch[1:]))
    batch = batch._replace(obs=naive.normalized(batch.obs)) if naive.normalizer else batch
    few = Batch(*(part[:32] for part in batch))
    seen, features, losses, expected = {name: [] for name in naive.networks}, {}, {}, {}
    with torch.no_grad():
        x = batch.obs[:, 0]
        z = torch.cat([x, batch.action[:, 0]], -1)
        if not naive.normalizer:
            x = naive.zs(naive.networks["encoder"], batch.obs[:, 0], seen["encoder"])
            features["encoder"] = {"zsa": (z := naive.zsa(naive.networks["encoder"], x, batch.action[:, 0], seen["encoder"]))}
        features["critic"] = {name: naive.mlp("critic", q, z, seen["critic"])[0] for name, q in naive.networks["critic"].named_children()}
        features["actor"] = {"pi": naive.mlp("actor", getattr(naive.networks["actor"], "mlp", naive.networks["actor"]), x, seen["actor"])[0]}
    noise.calls = 0
    if "encoder" in naive.networks:
        losses["encoder"] = naive.encoder_loss(few, float(buffer.terminated.any()))[0]
    losses["critic"], losses["actor"] = naive.critic_loss(few)[0], naive.actor_loss(few.obs[:, 0])[0]
    for name, network in naive.networks.items():
        columns, parameters = {}, dict(network.named_parameters())
        for key, values in features[name].items():
            singular = np.linalg.svd(values.numpy(), compute_uv=False)
            columns[f"srank_{key}"] = 1 + sum(singular[:k].sum() < 0.99 * singular.sum() for k in range(1, len(singular)))
            columns[f"srank_{key}_cap"] = min(2048, values.shape[1])
        dormant = [[score <= 0.025 * np.mean(scores) for score in scores] for scores in (v.abs().mean(0).numpy() for v in seen[name])]
        columns["dormant"] = np.mean(np.concatenate(dormant))
        gradients = [torch.cat([(g * naive.masks[name].get(n, 1)).flatten() for n, g in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))]) for loss in losses[name]]
        cosines = [(a @ b / (a.norm() * b.norm())).item() for i, a in enumerate(gradients) for j, b in enumerate(gradients) if i != j]
        cosines = [cosine for cosine in cosines if cosine == cosine]  # a gradient of zeros has no direction
        columns["interference"], columns["interference_negative"] = np.mean(cosines), np.mean(np.array(cosines) < 0)
        columns["parameter_norm"] = math.sqrt(sum((p ** 2).sum().item() for p in parameters.values()))
        columns["gradient_norm"] = (sum(gradients) / 32).norm().item()
        masks = torch.cat([m.flatten() for m in naive.masks[name].values()])
        columns["density"] = masks.double().mean().item()
        layers = [column for column in row if column.startswith(f"{name}/dormant/")]
        assert [row.pop(layer) for layer in layers] == pytest.approx([np.mean(layer) for layer in dormant])
        expected |= {f"{name}/{key}": value for key, value in columns.items()}
    assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("algo", AGENTS)
def test_no_loss_computes_a_gradient_for_another_modules_weights(algo):
    """Between two optimiser steps, gradients arrive at the weights of the module that steps next, and at no other's."""
    agent, buffer = tiny_of(algo)
    arrived, seen = set(), []
    for kind, parts in (("", agent.networks), ("target ", agent.targets)):
        for name, network in parts.items():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda _, name=kind + name: arrived.add(name))
    for name in agent.networks:
        def step(*arguments, name=name, original=agent.optimizers[name].step):
            seen.append((name, set(arrived)))
            arrived.clear()
            return original(*arguments)
        agent.optimizers[name].step = step
    for _ in range(2):
        agent.update(buffer)
    assert len(seen) >= 4 and all(gradients == {name} for name, gradients in seen)
    assert all(parameter.requires_grad for network in agent.networks.values() for parameter in network.parameters())


@pytest.mark.parametrize("algo", AGENTS)
def test_what_a_captured_graph_reads_changes_in_place(algo):
    """Every tensor of agent, buffer, optimisers, masks and targets lies where it lay, whatever happens; and most have changed."""
    agent, buffer = tiny_of(algo)
    for _ in range(2):
        agent.update(buffer)

    def tensors(owner, path, depth=7):
        if torch.is_tensor(owner):
            yield path, owner
        elif isinstance(owner, nn.Module):
            yield from ((f"{path}.{name}", value) for name, value in owner.state_dict(keep_vars=True).items())
        elif depth and path.split(".")[-1] not in ("info", "module", "generator"):
            parts = owner if isinstance(owner, dict) else vars(owner) if hasattr(owner, "__dict__") else {}
            for key, value in parts.items():
                yield from tensors(value, f"{path}.{key if isinstance(key, str) else id(key)}", depth - 1)

    before = {path: (tensor, tensor.data_ptr(), tensor.detach().clone()) for path, tensor in (*tensors(agent, "agent"), *tensors(buffer, "buffer"))}
    watched = " ".join(before)
    assert all(name in watched for name in ("max_priority", "termination_seen", "broken", "masks", "exp_avg", "projection.weight"))
    assert ("reward_scale" in watched and "target_reward_scale" in watched) == ("encoder" in agent.networks)
    reward = 5.0
    for step in range(12):  # bursts, topology changes and new targets among them
        agent.observe(np.full(4, step, np.float32))
        buffer.add(np.ones(4), np.ones(2), reward, np.ones(4), step == 5, step == 11)
        agent.update(buffer)
    after = dict([*tensors(agent, "agent"), *tensors(buffer, "buffer")])
    for path, (tensor, address, value) in before.items():
        assert after[path] is tensor and tensor.data_ptr() == address, f"{path} was bound anew"
    changed = {path for path, (tensor, _, value) in before.items() if not torch.equal(tensor.detach(), value)}
    assert len(changed) > len(before) / 2


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


@pytest.mark.slow
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
@pytest.mark.slow
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
                 "aten::_unique2", "aten::bincount", "aten::repeat_interleave.Tensor",
                 "aten::kthvalue"}  # waits for nothing, but has one thread block a call: 0.7 s for 100 M elements

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
@pytest.mark.slow
def test_an_update_never_reads_back_from_the_device(algo, growth, monkeypatch):
    modules = regimes_dense(algo, *(("s2d", "dst", "d2s") if algo in ("mrq", "mrsac") else ("dst", "d2s")))
    agent, buffer = tiny_of(algo, modules)
    for sparse in agent.sparse.values():
        sparse.grow = growth
    with NoSynchronisation():  # bursts, targets, scales, topology updates and the fused optimisers among them
        for _ in range(9):
            agent.update(buffer)
        with pytest.raises(AssertionError, match="synchronises"):
            agent.info["critic_loss"].mean().item()
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
        agent.info["critic_loss"].mean().item()
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
    assert 300 < operations.count <= 700


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
        assert {k: v.tolist() for k, v in plain.info.items()} == {k: v.tolist() for k, v in agent.info.items()}
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
    """1,000 updates, 16 topology changes among them, in rounds of 50 that begin alike, so that rounding does not add up. The
    same noise and draws at every update, what a frozen generator would give, end 0.5 to 2 times that way apart."""
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
            agent.info["critic_loss"].mean().item()
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


def test_onednn_pays_on_amds_processors_with_avx512_alone(monkeypatch):
    monkeypatch.setattr(fast, "onednn_available", lambda: True)
    said = {}
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(fast, "open", lambda path: io.StringIO(f"processor\t: 0\nvendor_id\t: {vendor}\n"), raising=False)
        for capability in ("AVX512", "AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            said[vendor, capability] = fast.onednn_pays.__wrapped__()
    assert [which for which, pays in said.items() if pays] == [("AuthenticAMD", "AVX512")]


@pytest.mark.skipif(not fast.onednn_available(), reason="this PyTorch or processor has no use for oneDNN's products")
@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_wide_layers_use_onednn_and_update_alike(algo, monkeypatch):
    calls, product = [], fast.product
    monkeypatch.setattr(fast, "onednn_pays", lambda: True)  # whatever the processor
    monkeypatch.setattr(fast, "product", lambda x, weight, bias=None: (calls.append(weight.shape), product(x, weight, bias))[1])
    monkeypatch.setattr(fast, "WIDE", 256)
    (plain, buffer), (agent, other) = tiny_of(algo), tiny_of(algo)
    layers = [layer for network in (*agent.networks.values(), *agent.targets.values()) for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert any(layer.weight.numel() == fast.WIDE for layer in layers)
    fast.speed_up(agent, "fp32")
    assert all(("forward" in vars(layer)) == (layer.weight.numel() >= fast.WIDE) for layer in layers)
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


def test_devices_and_precisions_by_name(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast.pick_device("auto") == fast.pick_device("cpu") == cpu
    assert [fast.pick_precision("auto", device) for device in (cpu, cuda)] == ["fp32", "tf32"]
    assert [fast.pick_precision(name, cuda) for name in fast.PRECISIONS] == ["fp32", "tf32", "bf16"]
    with pytest.raises(ValueError, match="unknown precision"):
        fast.pick_precision("fp16", cuda)
    chosen = []
    for name, answer in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, answer)
    assert fast.pick_device("auto") == torch.device("cuda") and fast.pick_device("cuda:1") == cuda and chosen == [cuda]
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices"):
        fast.pick_device("cuda:2")
    for precision, setting in (("tf32", "high"), ("bf16", "highest"), ("fp32", "highest")):
        fast.set_precision(precision)
        assert torch.get_float32_matmul_precision() == setting


def test_the_compiler_is_tried_on_the_device_itself(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: tried.append((x.device.type, function(x))))
    assert fast.compiler_trouble(torch.device("meta")) is None and [device for device, _ in tried] == ["meta"]
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    for device, needed in (("cpu", r"C\+\+ compiler .* ZeroDivisionError"), ("cuda", "Triton")):
        assert re.search(needed, fast.compiler_trouble(torch.device(device)))


def test_auto_compiles_long_runs_on_the_cpu_where_that_pays_and_works(monkeypatch):
    cpu, trouble = torch.device("cpu"), [None]
    monkeypatch.setattr(fast, "compiler_trouble", lambda device: trouble[0])
    chosen = lambda *flags, begun=None: train.pick_compile(parse([*flags]), cpu, begun)
    long, short = ("--total-steps", "11000", "--learning-starts", "1000"), ("--total-steps", "10999", "--learning-starts", "1000")
    for algo, pays in (("mrq", True), ("mrsac", True), ("sac", False), ("ddpg", False)):
        assert chosen("--algo", algo, *long)[0] == pays and not chosen("--algo", algo, *short)[0]
        assert chosen("--algo", algo, *short, "--compile", "on")[0] and not chosen("--algo", algo, *long, "--compile", "off")[0]
    assert "--compile off" in "".join(chosen(*long)[1]) and chosen(*short)[1] == []
    # A run goes on as it was begun, whatever "auto" would say now; older ones do not say, and were not compiled.
    for begun, goes_on in (({"compiled": True}, True), ({"compiled": False}, False), ({"seed": 0}, False),
                           ({"compile": "auto"}, False), ({"compile": "on"}, True), ({"compile": "on", "compiled": False}, False)):
        assert all(chosen(*flags, begun=begun)[0] == goes_on for flags in (long, short))
    assert chosen(*short, "--compile", "on", begun={"compiled": False})[0]
    trouble[0] = "no compiler"
    assert not chosen(*long)[0] and "not compiled" in "".join(chosen(*long)[1]) and chosen(*short)[1] == []
    with pytest.raises(ValueError, match="no compiler"):
        chosen(*short, "--compile", "on")


@pytest.mark.slow
def test_a_run_is_compiled_as_auto_says_and_goes_on_so(tmp_path, monkeypatch):
    """From the flag to the agent, the config and the run that is continued."""
    built, build_agent = [], train.build_agent
    monkeypatch.setattr(train, "build_agent", lambda args, *rest: built.append(args.compile) or build_agent(args, *rest))
    monkeypatch.setattr(fast, "compiler_trouble", lambda device: None)
    args = parse(["--env", "cartpole-swingup", "--total-steps", "10100", "--learning-starts", "100", "--width-scale", "0.05",
                  "--runs", str(tmp_path), "--resume", "--device", "cpu"])
    folder = tmp_path / run_name(args)
    for compiled in (True, False):
        monkeypatch.setattr(train, "compiling_pays", lambda args: compiled)
        train.build(args)[-2].close()
        assert json.loads((folder / "config.json").read_text())["compiled"] is True
    assert built == ["on", "on"]


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_targets_are_masked_anew_when_topology_changes_and_not_otherwise(algo):
    agent, buffer = tiny_of(algo, interval=3, seed=2)
    assert sorted(sparse.seed for sparse in agent.sparse.values()) == [2000, 2001]  # the same masks in every version
    masked, apply_masks = [], agent.sparse["critic"].apply_masks
    agent.sparse["critic"].apply_masks = lambda module: masked.append(agent.updates["critic"]) or apply_masks(module)
    for _ in range(10):
        agent.update(buffer)
    assert masked == [3, 6, 9]


@pytest.mark.parametrize("proven", [False, True])
def test_auto_compiles_and_captures_on_cuda_once_that_is_proven(proven, monkeypatch):
    monkeypatch.setattr(fast, "PROVEN_ON_CUDA", proven)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for flags, device, chosen, named in ((("auto", "auto"), cpu, [False, False], []), (("on", "off"), cuda, [True, False], []),
                                         (("auto", "auto"), cuda, [proven, proven], [] if proven else ["--compile", "--cuda-graphs"]),
                                         (("on", "auto"), cuda, [True, proven], [] if proven else ["--cuda-graphs"])):
        *told, notes = fast.pick_speed(*flags, device)
        assert told == chosen and len(notes) == bool(named) and all((flag in "".join(notes)) == (flag in named) for flag in ("--compile", "--cuda-graphs"))


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
        assert value.dtype == torch.float32 and (value != exact).any() and value.mean().item() == pytest.approx(exact.mean().item(), rel=0.1, abs=0.1)
    x = torch.randn(3, agent.networks["actor"].output.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agent.critic(torch.randn(3, 4), torch.randn(3, 2)).dtype == torch.float32 if algo != "mrsac" else True
        assert agent.actor.output(x).dtype == (torch.bfloat16 if algo == "ddpg" else torch.float32)
        assert algo != "sac" or agent.actor.log_std(x).dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for network in agent.networks.values() for p in network.parameters())


@pytest.mark.parametrize("algo", AGENTS)
def test_every_head_is_computed_in_float32(algo):
    """Every Q, of targets too, and a Gaussian policy's mean and spread; MR.Q's and DDPG's action has no such head."""
    agent, _ = tiny_of(algo)
    fast.speed_up(agent, "bf16")
    kinds = (agent.networks, agent.targets)
    heads = [q.output for networks in kinds for q in networks["critic"].children()]
    if algo in ("sac", "mrsac"):
        heads += [getattr(networks["actor"], head) for networks in kinds if "actor" in networks for head in ("output", "log_std")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(head(torch.randn(3, head.in_features)).dtype == torch.float32 for head in heads)


def test_a_compiled_product_reads_nothing_beside_its_rows():
    """Of a matrix that is part of a wider one, as the compiler lays them out; on AMX PyTorch's own product gives NaN here."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 77).bfloat16(), torch.randn(48).bfloat16()
    wide = torch.full((256, 115), float("nan"), dtype=torch.bfloat16)
    x = wide[:, :77].copy_(torch.randn(256, 77))
    exact = x.double() @ weight.double().t()
    for given, b in ((x, bias), (x, None), (x.t().contiguous().t(), bias), (x.unflatten(0, (64, 4)), bias)):
        out = torch.ops.module_specific.product(given, weight, b)
        expected = exact + (0.0 if b is None else b.double())
        assert out.dtype == torch.bfloat16 and out.shape == (*given.shape[:-1], 48)
        torch.testing.assert_close(out.flatten(0, -2).double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.slow
def test_compiled_bfloat16_losses_take_that_product_and_equal_plain_ones(algo, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, dynamic, options=None: compile(
        function, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic))
    (plain, one), (compiled, other) = tiny_of(algo), tiny_of(algo)
    fast.speed_up(plain, "bf16")
    fast.speed_up(compiled, "bf16", compile=True)
    heads = []  # every call of a last layer, which stays in float32 and PyTorch's own
    for layer in plain.heads():
        layer.register_forward_hook(lambda *_: heads.append(1))
    for step in range(3):  # the last one's calls are counted: tracing makes some of its own
        calls = {}
        heads.clear()
        for agent, replay in ((plain, one), (compiled, other)):
            torch.manual_seed(step)
            with torch.profiler.profile() as profile:
                agent.update(replay)
            calls[agent] = {event.key: event.count for event in profile.key_averages()}
    # All products of the compiled losses, forward and backward, but the heads': three a call at most. `encode` is not compiled.
    count = lambda *names: sum(calls[compiled].get(name, 0) for name in names)
    products = count("module_specific::product")
    assert 0 <= count("aten::mm", "aten::addmm") - products - count("BFloat16Linear") <= 3 * len(heads) < products
    assert "module_specific::product" not in calls[plain]
    for name in plain.networks:  # rounding may choose another weight to grow: as a whole
        for a, b in zip(plain.networks[name].parameters(), compiled.networks[name].parameters()):
            assert (a - b).norm() <= 0.02 * b.norm() + 1e-3


@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.slow
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
    assert compiled.mask_and_clip == type(compiled).mask_and_clip.__get__(compiled)  # plain on a CPU ...
    compiled.mask_and_clip = torch.compile(compiled.mask_and_clip, fullgraph=True, dynamic=False)  # ... not so on CUDA
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

@pytest.mark.slow
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
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("width, low", [(9.9e5, -5e5), (1e6, -1.0)])
def test_actions_without_true_bounds_stay_units(width, low, monkeypatch):
    suite = envs._suite()
    load = suite.load

    def with_bounds(*of, **named):
        env = load(*of, **named)
        spec = env.action_spec().replace(minimum=-5e5, maximum=width - 5e5)
        env.action_spec = lambda: spec
        return env

    monkeypatch.setattr(suite, "load", with_bounds)
    env = Env("cartpole-swingup")
    assert (env._low, env._high) == (low, 1.0 if low == -1 else width - 5e5)


def test_a_broken_dm_control_is_told_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r"dm_control does not import \(ModuleNotFoundError: .*pip install -r requirements.txt$"):
        task_names()


@pytest.mark.slow
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
@pytest.mark.slow
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


@pytest.mark.slow
def test_evaluation_episodes_depend_on_their_seed_alone():
    act = lambda obs: np.sin(7 * obs[:, :1])
    five, two = LockstepEvaluation("cartpole-swingup", 5, seed=3), LockstepEvaluation("cartpole-swingup", 2, seed=3)
    returns = five(act, step=10)
    np.testing.assert_array_equal(five(act, step=10), returns)  # whatever was played before
    np.testing.assert_array_equal(two(act, step=10), returns[:2])
    np.testing.assert_array_equal(LockstepEvaluation("cartpole-swingup", 5, seed=3, workers=2)(act, step=10), returns)
    assert np.array_equal(*(LockstepEvaluation("cartpole-swingup", 2, **own)(act, step=10) for own in ({}, {"seed": 0, "workers": 0})))
    assert len(set(returns)) == 5 and not np.array_equal(five(act, step=20), returns)
    env, total, done = Env("cartpole-swingup"), 0.0, False
    obs = env.reset(int(np.random.SeedSequence([3, 10, 4]).generate_state(1)[0]))
    while not done:
        obs, reward, terminated, truncated = env.step(act(obs[None])[0])
        total, done = total + reward, terminated or truncated
    assert returns[4] == pytest.approx(total)


class ScriptedEnv:
    """Stands in for Env: from each seed an episode of another length, and a reward for each action taken."""
    made = []

    def __init__(self, name, seed, action_repeat):
        self.made.append((name, seed, action_repeat))

    def reset(self, seed):
        self.left, self.total = 3 + seed % 5, 0
        return np.array([self.left, 0], np.float32)

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        return np.array([self.left, float(action[0])], np.float32), float(action[0]), self.left == 0 and action[0] > 2, self.left == 0 and action[0] <= 2


def test_episodes_of_an_evaluation_end_each_at_its_own_time(monkeypatch):
    monkeypatch.setattr(envs, "Env", ScriptedEnv)
    evaluation, seen = LockstepEvaluation("task", 4, seed=2, action_repeat=3), []

    def act(obs):
        seen.append(obs.copy())
        return np.full((4, 1), len(seen), np.float32)

    returns = evaluation(act, step=9)
    assert ScriptedEnv.made == [("task", 2, 3)] * 4
    lengths = [3 + int(np.random.SeedSequence([2, 9, episode]).generate_state(1)[0]) % 5 for episode in range(4)]
    assert len(set(lengths)) > 1 and returns.tolist() == [sum(range(1, n + 1)) for n in lengths]  # the k-th action pays k
    assert len(seen) == max(lengths)
    for k, obs in enumerate(seen):  # who has ended stays where it ended
        assert obs.tolist() == [[n - min(k, n), min(k, n)] for n in lengths]


@pytest.mark.slow
def test_lqr_takes_unit_actions_and_random_actions_are_uniform():
    from dm_control import suite
    env, raw = Env("lqr-lqr_2_1", seed=3), suite.load("lqr", "lqr_2_1", task_kwargs={"random": 3})  # its bounds are ±1e10
    raw.reset()
    env.reset(), raw.reset()
    reward = env.step(np.array([0.75]))[1]
    assert reward == pytest.approx(raw.step(np.array([0.75])).reward + raw.step(np.array([0.75])).reward)
    actions = np.array([env.random_action() for _ in range(2000)])
    assert actions.dtype == np.float32 and actions.min() < -0.99 and actions.max() > 0.99 and abs(actions.mean()) < 0.05
    assert Env("lqr-lqr_2_1").random_action() != Env("lqr-lqr_2_1", seed=1).random_action()


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_one_line():
    evaluation = LockstepEvaluation("cartpole-swingup", 2, workers=1)

    def act(obs):
        evaluation.groups[0][1]._process.kill()
        return np.zeros((2, 1))
    with pytest.raises(ChildProcessError, match=r"an evaluation worker \(process \d+\) died with exit status -9; --eval-workers 0"):
        evaluation(act, step=0)


@pytest.mark.slow
def test_a_worker_for_every_four_cores(monkeypatch):
    monkeypatch.setattr(envs, "_RemoteGroup", envs._Group)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [len(part) for part, _ in LockstepEvaluation("cartpole-swingup", 4, workers=None).groups] == [2, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert len(LockstepEvaluation("cartpole-swingup", 4, workers=None).groups) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))  # and none without an episode
    assert [len(part) for part, _ in LockstepEvaluation("cartpole-swingup", 4, workers=None).groups] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_step_lasts_as_long_as_its_frames():
    assert [Env("cartpole-swingup", action_repeat=repeat).step_seconds for repeat in (2, 3)] == pytest.approx([0.02, 0.03])


@pytest.mark.slow
def test_actions_beyond_their_bounds_are_clipped():
    beyond, bound = Env("lqr-lqr_2_1", seed=1), Env("lqr-lqr_2_1", seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(beyond.step(np.array([3.0])), bound.step(np.array([1.0]))))


# ----------------------------------------------------------------------------------------------------- checkpoint.py

def some_state():
    generator = torch.Generator().manual_seed(0)
    return {"weights": {"a": torch.randn(20, 10, generator=generator), "b": torch.ones(3, dtype=torch.bool)},
            "step": 7, "nan": math.nan, "name": "x", "nothing": None, "scalar": torch.tensor(2.5), "pairs": [(0.9, 0.999)]}


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def damaged(path, whole, random):
    """Writes a damaged copy of the file, in one of five ways."""
    kind = random.choice(["cut", "flip", "zeros", "pickle", "type"])
    data = bytearray(whole)
    if kind == "cut":
        data = data[:random.randrange(len(data))]
    elif kind == "flip":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "zeros":
        start = random.randrange(len(data))
        data[start:start + random.randrange(1, 5000)] = bytes(len(data[start:start + random.randrange(1, 5000)]))
    if kind not in ("pickle", "type"):
        return path.write_bytes(data)
    content = torch.load(io.BytesIO(whole), weights_only=True)
    key = random.choice(list(content))
    wrong = [Evil(), {key: Evil()}] if kind == "pickle" else [3, None, "x", [], torch.zeros(2), {}, math.inf, {1: 2}]
    torch.save(content | {key: random.choice(wrong)} if random.random() < 0.8 else random.choice(wrong), path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_in_it_runs(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, content, random = tmp_path / "a.pt", some_state(), Random(0)
    check = checkpoint.write(str(path), content)
    whole, refused = path.read_bytes(), 0
    assert checkpoint.read(str(path))[1] == check == checkpoint.digest(content)
    for _ in range(count):
        damaged(path, whole, random)
        try:
            # What is accepted is what was written: a byte of zip's padding may be anything.
            assert checkpoint.read(str(path))[1] == check
        except checkpoint.Damaged as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 0.8 * count and os.listdir(tmp_path) == ["a.pt"]  # no code has run, nothing was written
    path.write_bytes(whole.replace(b"format", b"farmat"))
    with pytest.raises(checkpoint.Damaged, match="no checkpoint"):
        checkpoint.read(str(path))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path.write_bytes(whole)
    with pytest.raises(checkpoint.Damaged, match="format 1, and this code reads format 2"):
        checkpoint.read(str(path))
    with pytest.raises(TypeError, match="not a Generator"):
        checkpoint.digest({"a": torch.Generator()})


def fill(buffer, count, rng):
    for _ in range(count):
        end = rng.random()
        start = rng.normal(size=2) if buffer.episode_length == 0 else fill.last
        fill.last = rng.normal(size=2)
        buffer.add(start, rng.normal(size=1), rng.normal(), fill.last, end < 0.05, 0.05 < end < 0.1)
        if buffer.sampleable and rng.random() < 0.2:
            batch = buffer.sample(4)
            buffer.update_priority(batch.index, torch.as_tensor(rng.normal(size=4) * 9, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [40, 1000])
def test_a_replay_buffer_comes_back_from_parts_as_it_was(capacity, tmp_path):
    rng = np.random.default_rng(0)
    buffer, checkpoints = ReplayBuffer(2, 1, capacity, horizon=3), checkpoint.Checkpoints(str(tmp_path))
    for step in range(1, 25):
        fill(buffer, int(rng.integers(0, 25)), rng)
        first, rows = buffer.rows_since(max(0, checkpoints.next_row - 1))
        assert len(rows["rows"]) <= min(capacity, 1 + buffer.position + 1 - checkpoints.next_row + 1)  # only what is new
        checkpoints.save(step, {"replay": buffer.state_dict()}, first, rows, buffer.position + 1 - capacity, wait=True)
        found, other = checkpoint.Checkpoints(str(tmp_path)), ReplayBuffer(2, 1, capacity, horizon=3)
        state = found.load()
        for start, part in found.rows():
            other.load_rows(start, part)
        other.load_state_dict(state["replay"])
        for name in ("rows", "priority", "max_priority", "termination_seen"):
            assert torch.equal(getattr(buffer, name), getattr(other, name)), (step, name)
        for name in ("row", "episode_length", "sampleable", "_offered"):
            assert getattr(buffer, name) == getattr(other, name), (step, name)
        assert found.step == step
    names = os.listdir(tmp_path)
    assert sum(name.startswith("checkpoint") for name in names) == 2
    assert sum(name.startswith("rows") for name in names) <= (8 if capacity == 40 else 24)  # what has been overwritten is gone


@pytest.mark.slow
def test_what_is_said_of_the_last_save_waits_for_it(tmp_path, monkeypatch):
    write, slow = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *of: (slow.wait(10), write(*of))[1])
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    assert checkpoints.last() == "none"
    checkpoints.save(7000, {"a": torch.ones(3)})
    assert checkpoints.step is None  # it is being written
    threading.Timer(0.1, slow.set).start()
    assert checkpoints.last() == "of step 7,000"


@pytest.mark.slow
def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    """At each of the calls by which it touches the disk: full, or killed. Then the newest that reads whole is used."""
    rows = {"x": torch.arange(100.0)}

    def begin(folder):
        checkpoints = checkpoint.Checkpoints(str(folder))
        folder.mkdir()
        checkpoints.save(1, {"a": torch.ones(3)}, 0, rows, wait=True)
        return checkpoints

    def load(folder):
        found = checkpoint.Checkpoints(str(folder))
        state = found.load()
        return found.step, state["a"].sum().item(), sum(len(part["x"]) for _, part in found.rows())

    old, new = (1, 3.0, 100), (2, 6.0, 150)
    for name, calls in (("torch.save", 2), ("os.fsync", 4), ("os.replace", 2)):
        for broken in range(calls):
            for error, killed in ((OSError(28, "No space left on device"), False), (SystemError("killed"), True)):
                folder, count = tmp_path / f"{name}{broken}{killed}", itertools.count()
                checkpoints = begin(folder)
                module, function = name.split(".")
                plain = getattr({"os": os, "torch": torch}[module], function)

                def breaks(*arguments):
                    if next(count) == broken:
                        raise error
                    return plain(*arguments)
                with monkeypatch.context() as patch:
                    patch.setattr(f"{name}", breaks)
                    patch.setattr("threading.excepthook", lambda _: None)
                    checkpoints.save(2, {"a": 2 * torch.ones(3)}, 100, {"x": torch.arange(50.0)}, wait=True)
                landed = (name, broken) == ("os.fsync", 3)  # everything is in place, and only the folder not synchronised
                assert load(folder) == (new if landed else old), (name, broken, killed)
                if not killed:
                    assert "No space left" in checkpoints.failure and "step 2" in checkpoints.failure
                    assert not any(part.endswith(".part") for part in os.listdir(folder))
                    checkpoints.save(2, {"a": 2 * torch.ones(3)}, checkpoints.next_row, {"x": torch.arange(50.0)}, wait=True)
                    assert load(folder) == new and checkpoints.failure is None  # when there is room again
    newest = next(tmp_path.glob("os.fsync3*/checkpoint-*2.pt"))
    newest.write_bytes(newest.read_bytes()[:-9])
    found = checkpoint.Checkpoints(str(newest.parent))
    assert load(newest.parent) == old and found.load() and "is damaged" in found.skipped[0]
    for path in newest.parent.glob("rows-*"):
        path.unlink()
    with pytest.raises(checkpoint.Damaged, match="no other checkpoint of this run is left whole"):
        found.load()


def test_what_is_saved_is_as_it_was_when_asked(tmp_path, monkeypatch):
    write, begin = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *of: (begin.wait(10), write(*of))[1])
    checkpoints, weights, rows = checkpoint.Checkpoints(str(tmp_path)), torch.ones(3), torch.ones(4)
    checkpoints.save(1, {"a": weights}, 0, {"x": rows})
    weights.fill_(7), rows.fill_(7)  # training goes on while the file is written
    begin.set(), checkpoints.wait()
    found = checkpoint.Checkpoints(str(tmp_path))
    assert found.load()["a"].tolist() == [1] * 3 and [part["x"].tolist() for _, part in found.rows()] == [[1] * 4]


def test_a_resumed_run_keeps_two_checkpoints(tmp_path):
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    for step in (1, 2):
        checkpoints.save(step, {"a": torch.ones(3)}, wait=True)
    found = checkpoint.Checkpoints(str(tmp_path))
    found.load()
    found.save(3, {"a": torch.ones(3)}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000000000002.pt", "checkpoint-000000000003.pt"]


# ------------------------------------------------------------------------------------------------------- settings.py

READ_ELSEWHERE = {"eval_every", "eval_episodes", "metrics_every", "log_every", "buffer_size"}  # by the loop and what is built around it
IN_PLACES_OF_THEIR_OWN = {"mst", "reward_bins", "twin_critics", "precision"}  # everything else that shows in one module shows in all


def other_values(kind, value):
    """Values of the type that no setting has by default."""
    if type(None) in get_args(kind):
        return [other for part in get_args(kind) if part is not type(None) for other in other_values(part, value)]
    return {float: [0.0731, 2.731], int: [7, 1007], bool: [not value]}.get(kind) or [v for v in get_args(kind) if v != value]


def with_setting(args, group, name, value):
    return dataclasses.replace(args, **{group: dataclasses.replace(getattr(args, group), **{name: value})} if group else {name: value})


def what_it_builds(agent):
    """By module: its layers' widths and what they compute, its optimiser's options, its sparse training's settings."""
    built = {name: {"optimizer": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]}
             for name, optimizer in agent.optimizers.items()}
    for name, network in agent.networks.items():
        network = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.3 * torch.sin(1.0 + torch.arange(parameter.numel())).view_as(parameter))
            if name == "encoder":
                output = network(network.zs(torch.zeros(1, 4)), torch.zeros(1, 2))
            elif "encoder" in agent.networks:  # zeros: how wide another module is must not show here
                output = network(torch.zeros(1, agent.encoder.zs_dim))
            else:
                output = network(torch.zeros(1, 4), torch.zeros(1, 2)) if name == "critic" else network(torch.zeros(1, 4))
        output = output[1] if isinstance(output, tuple) else output
        built[name] |= {"widths": [(n, len(p)) for n, p in network.named_parameters()], "output": output.tolist(),
                        "sparse": {k: v for k, v in vars(agent.sparse[name]).items() if isinstance(v, (bool, int, float, str))}}
    return built


def what_it_does(agent):
    """What an update leaves in each module's moments, in the order of the updates; and what acting and two updates leave."""
    buffer = play(0, 400, agent.horizon, 120, obs_dim=4, action_dim=2, prioritized=agent.prioritized)[0]
    obs = np.random.RandomState(0).randn(5, 4).astype(np.float32)
    for row in obs:
        agent.observe(row)
    torch.manual_seed(0)
    actions = [agent.act(obs, explore=explore).tolist() for explore in (True, False)]
    agent.update(buffer)
    order = ("encoder", "critic", "actor", "temperature") if "encoder" in agent.networks else ("actor", "temperature", "critic")
    moments = {name: [value.sum().item() for state in agent.optimizers[name].state.values() for value in state.values()]
               for name in order if name in agent.optimizers}
    agent.update(buffer)  # by now the targets are not the networks themselves
    tensors = [value.sum().item() for network in agent.targets.values() for value in network.parameters()]
    rest = [value.tolist() for value in (*agent.tensors().values(), *agent.info.values())]
    return moments, (actions, tensors, rest, agent.updates, agent.updates_per_step, buffer.priority.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("algo", AGENTS)
def test_every_setting_does_something_and_does_it_in_its_own_place(algo):
    """Changed alone, by its type alone, it shows in what is built or in what an update does; and in the run's name."""
    own = ("--twin-critics",) if algo in ("sac", "ddpg") else ("--encoder-regime", "s2d", "--target-update-freq", "4")
    base = flags_to_args("--algo", algo, "--mst", "--critic-regime", "d2s", "--scale", "0.05", "--total-steps", "60", "--learning-starts",
                         "20", "--batch-size", "12", "--update-interval", "3", "--schedule-start", "0.02", *own)
    build = lambda args: (torch.manual_seed(0), build_agent(args, 4, 2, torch.device("cpu")))[1]
    base_built, (base_moments, base_rest) = what_it_builds(build(base)), what_it_does(build(base))
    modules = list(module_configs(base))
    assert {sparse.total_steps for sparse in build(base).sparse.values()} == {(60 - 20) * base.agent.updates_per_step}
    for group, name in flag_names(base):
        if name == "algo":  # comes with settings of its own
            continue
        holder = getattr(base, group) if group else base
        spec = next(spec for spec in dataclasses.fields(holder) if spec.name == name)
        place, refusal, shown = name.split("_")[0], "", False
        for value in other_values(spec.type, getattr(holder, name)):
            args = with_setting(base, group, name, value)
            try:
                check(args)
                agent = None if name in READ_ELSEWHERE else build(args)
            except ValueError as error:
                refusal = str(error)
                continue
            assert run_name(args) != run_name(base), f"{name} is no part of the name {run_name(args)}"
            if agent is None:
                shown = True
                break
            built = what_it_builds(agent)
            places = [part for part in built if built[part] != base_built[part]]
            if places and place in built:
                assert places == [place], f"{name} shows in {places}"
            elif places:
                assert set(modules) <= set(places) or name in IN_PLACES_OF_THEIR_OWN, f"{name} shows in {places} alone"
            else:
                moments, rest = what_it_does(agent)
                places = [part for part in moments if moments[part] != base_moments[part]] + ["rest"] * (rest != base_rest)
                assert not places or place not in modules or places[0] == place, f"{name} shows first in {places}"
            shown = shown or bool(places)
            if shown:
                break
        # Else it must be one that this algorithm refuses, by name.
        assert shown or f"--{name.replace('_', '-')}" in refusal, f"{name} does nothing"


def test_a_schedule_may_be_a_single_step():
    check(flags_to_args("--schedule-start", "0.5", "--schedule-end", "0.5"))


def test_defaults_are_those_of_the_papers():
    tables = {  # Tables 1 and 2 of the paper, and what the published SimBa uses for DeepMind Control
        "mrq": {"batch_size": 256, "discount": 0.99, "encoder_horizon": 5, "q_horizon": 3, "target_update_freq": 250, "dynamics_weight": 1,
                "reward_weight": 0.1, "terminal_weight": 0.1, "encoder_lr": 1e-4, "critic_lr": 3e-4, "actor_lr": 3e-4, "weight_decay": 1e-4,
                "critic_grad_clip": 20, "reward_bins": 65, "reward_range": 10, "exploration_noise": 0.2, "target_noise": 0.2,
                "target_noise_clip": 0.3, "pre_activation_weight": 1e-5},
        "ddpg": {"batch_size": 256, "discount": 0.99, "target_rate": 0.005, "actor_lr": 1e-4, "critic_lr": 1e-4, "weight_decay": 0.01,
                 "twin_critics": False, "target_q": "min", "actor_q": "min", "exploration_noise": 0.1}}
    temperature = {"initial_temperature": 0.01, "temperature_lr": 1e-4, "target_entropy": -0.5}
    policy = ("exploration_noise", "target_noise", "target_noise_clip", "pre_activation_weight")
    without = lambda algo: {name: value for name, value in tables[algo].items() if name not in policy}
    tables["sac"] = without("ddpg") | temperature
    tables["mrsac"] = without("mrq") | temperature | {"temperature_lr": 3e-4, "target_policy": "target", "target_q": "min", "actor_q": "min"}
    for algo, table in tables.items():
        args = defaults(algo)
        assert dataclasses.asdict(args.agent) == table
        with torch.device("meta"):
            agent = AGENTS[algo](4, 2, device="meta")  # built by hand, it has the schedule of a default run
        assert {sparse.total_steps for sparse in agent.sparse.values()} == {
            (args.total_steps - args.learning_starts) * agent.updates_per_step}
        assert (args.learning_starts, args.agent.updates_per_step, args.agent.horizon) == (
            (5000, 2, 1) if algo in ("sac", "ddpg") else (10_000, 1, 5))
        sparse = {"sparsity": 0.8 if algo in ("sac", "ddpg") else 0.6, "distribution": "er", "growth": "gradient", "update_interval": 1000,
                  "drop_initial": 0.5, "drop_final": 0.0, "schedule_start": 0.2, "schedule_end": 0.8, "schedule_power": 2.0}
        assert dataclasses.asdict(args.sparse) == sparse
        # SparseTraining by itself has the same.
        own = {name: p.default for name, p in inspect.signature(SparseTraining).parameters.items() if p.default is not p.empty}
        renamed = {"growth": "grow", "schedule_power": "power"}
        assert {renamed.get(name, name): value for name, value in sparse.items()} | {"sparsity": 0.6, "seed": None, "leave_out": ()} == {
            name: value for name, value in own.items() if name != "total_steps"}
    assert (args.total_steps, args.eval_every, args.eval_episodes, args.buffer_size, args.log_every, args.scale, args.seed, args.mst) == (
        500_000, 5000, 10, 1_000_000, 500, 1.0, 0, False)


def test_what_is_not_in_the_name_is_a_matter_of_the_machine_alone():
    args, own = defaults("mrq"), {name for _, name in flag_names(defaults("mrq"))}
    outside = {"env", "seed", "device", "threads", "compile", "cuda_graphs", "eval_workers", "runs", "name", "tensorboard", "wandb_project",
               "resume", "save_every", "eval_only", "checkpoint", "video"}
    for spec in dataclasses.fields(args):
        assert dataclasses.is_dataclass(getattr(args, spec.name)) or (spec.name in own) != (spec.name in outside), spec.name
    assert differences(flags_to_args(), flags_to_args("--metrics-every", "2")) == "--metrics-every 1, not 2"


def test_numbers_that_differ_in_the_ninth_digit_have_two_names():
    assert len({run_name(flags_to_args("--critic-lr", rate)) for rate in ("0.00012345678", "0.00012345679", "0.000123457")}) == 3


def test_the_residual_is_read_where_a_type_has_one():
    for number, config in networks.ARCH_CONFIGS.items():
        assert (ModuleConfig(number, residual="post").effective().residual == "post") == config["use_residual"]
        flags = flags_to_args("--actor-type", str(number), "--residual", "post")
        if config["use_residual"]:
            check(flags)
        else:
            with pytest.raises(ValueError, match="--residual post does nothing"):
                check(flags)


# --------------------------------------------------------------------------------------------------------- runlog.py

def test_a_full_disk_leaves_whole_rows_and_loses_none(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    row = lambda step: {"agent_step": step, "value": step / 3}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write("train", row(1))
    size = os.path.getsize(tmp_path / "run" / "train.csv")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limit[1]))  # the next row is cut after five bytes
        log.write("train", row(2))
        log.write("train", row(3))
        assert os.path.getsize(tmp_path / "run" / "train.csv") == size and "takes no more rows" in log.failure
        where = log.positions()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.write("train", row(4))
    log.close()
    steps = lambda: [int(line["agent_step"]) for line in table(tmp_path / "run", "train.csv")]
    assert steps() == [1, 2, 3, 4] and log.failure is None
    log._lock.close()
    log = RunLog(str(tmp_path / "run"), {}, resume=True)
    log.start(where)  # back to where two rows were waiting
    log.write("train", row(5))
    assert steps() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="must have the columns agent_step, value"):
        log.write("train", {"agent_step": 1})
    with pytest.raises(ValueError, match="rows are missing"):
        log.start({"eval": {"end": 10, "waiting": ""}})


def test_a_full_disk_is_told_once(monkeypatch, capsys):
    run = RecordedRun()
    run.failure = "eval.csv takes no more rows"
    recorded_run(monkeypatch, run)
    assert capsys.readouterr().out.count("note: eval.csv takes no more rows; the run goes on") == 1


def test_two_processes_never_train_one_run(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    with pytest.raises(Busy, match="another process"):
        RunLog(str(tmp_path / "run"), {}, resume=True)
    with pytest.raises(FileExistsError, match="continue it by --resume"):
        RunLog(str(tmp_path / "run"), {})
    log._lock.close()
    (tmp_path / "run" / "final.pt").touch()
    with pytest.raises(Finished):
        RunLog(str(tmp_path / "run"), {}, resume=True)


def test_rows_are_on_disk_at_once_with_six_digits(tmp_path, monkeypatch):
    told = []
    fake = lambda **methods: type("Fake", (), {name: staticmethod(method) for name, method in methods.items()})
    tell = lambda what: lambda *arguments, **named: told.append((what, *arguments, *sorted(named.items())))
    monkeypatch.setitem(sys.modules, "wandb", fake(init=tell("init"), log=tell("log"), finish=tell("finish")))
    writer = fake(add_scalar=tell("scalar"), close=tell("close"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake(SummaryWriter=lambda folder, purge_step: (told.append(folder), writer)[1]))
    folder = str(tmp_path / "run")
    log = RunLog(folder, {"seed": 1, "scale": 0.5}, tensorboard=True, wandb_project="project")
    log.start()
    log.write("eval", {"agent_step": 1234567, "return": 1 / 3, "text": "a"})
    assert open(tmp_path / "run" / "eval.csv").read().split() == ["agent_step,return,text", "1234567,0.333333,a"]
    log.write("train", {"agent_step": 2, "loss": 123456.789})
    log.write("eval", {"agent_step": 3, "return": math.nan, "text": "b"})
    assert [row["return"] for row in table(tmp_path / "run", "eval.csv")] == ["0.333333", "nan"]
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "2", "loss": "123457"}]
    assert json.load(open(tmp_path / "run" / "config.json")) == {"seed": 1, "scale": 0.5}
    with pytest.raises(ValueError):
        log.write("train", {"agent_step": 3, "other": 1.0})  # another column than the first row's
    log.close()
    assert ("scalar", "train/loss", 123456.789, 2) in told and ("log", {"train/agent_step": 2, "train/loss": 123456.789}) in told
    assert ("init", ("config", {"seed": 1, "scale": 0.5}), ("dir", folder), ("name", "run"), ("project", "project")) in told
    assert folder in told and ("close",) in told and ("finish",) in told
    with pytest.raises(FileExistsError, match="a run never overwrites another"):
        RunLog(folder, {})


def test_a_table_that_was_begun_after_the_checkpoint_begins_anew(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    log.write("eval", {"agent_step": 0, "return": 1.0})
    positions = log.positions()
    log.write("eval", {"agent_step": 5, "return": 2.0})
    log.write("train", {"agent_step": 7, "loss": 1.0})
    log._lock.close()
    again = RunLog(str(tmp_path / "run"), {}, resume=True)
    again.start(positions)
    assert not (tmp_path / "run" / "train.csv").exists() and len(table(tmp_path / "run", "eval.csv")) == 1
    again.write("train", {"agent_step": 6, "loss": 3.0})
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "6", "loss": "3"}]


def test_a_resumed_run_goes_on_in_the_run_that_wandb_has(tmp_path, monkeypatch):
    told = []
    wandb = types.SimpleNamespace(init=lambda **named: told.append(named), log=told.append, finish=lambda: None, run=types.SimpleNamespace(id="x7"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = RunLog(str(tmp_path / "run"), {}, wandb_project="project")
    log.start()
    positions = log.positions(step=5)
    log._lock.close()
    RunLog(str(tmp_path / "run"), {}, resume=True, wandb_project="project").start(positions)
    assert told[1] == told[0] | {"id": "x7", "resume": "allow"} and positions["step"] == 5 and "id" not in told[0]


def test_a_long_name_is_cut_between_characters():
    for start in ("", "a"):
        name = run_name(dataclasses.replace(flags_to_args("--seed", "7"), env=start + "ü" * 300))
        assert len(name.encode()) <= 255 and name.startswith(start + "ü" * 50)
        whole = f"{start}{'ü' * 300}__seed=7"  # the same in every version, or --resume would not find the run
        assert name.endswith(f"__{hashlib.sha256(whole.encode()).hexdigest()[:12]}__seed=7")


@pytest.mark.slow
def test_help_shows_the_flags_of_the_algorithm_that_is_asked_for(capsys):
    for algo, flag, other in (("sac", "--twin-critics", "--encoder-horizon"), ("mrq", "--encoder-horizon", "--twin-critics")):
        with pytest.raises(SystemExit) as stopped:
            parse(["--algo", algo, "--help"])
        said = capsys.readouterr().out
        assert not stopped.value.code and flag in said and other not in said


@pytest.mark.slow
def test_a_run_of_another_process_is_left_alone_with_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_run("sac"), "--runs", str(tmp_path), "--resume"])
    log = RunLog(str(tmp_path / "run"), dataclasses.asdict(parse(sys.argv[1:])))
    with pytest.raises(SystemExit) as stopped:
        train.main()
    log._lock.close()
    captured = capsys.readouterr()
    assert stopped.value.code == 76 and not captured.out and captured.err.endswith("run is being trained by another process\n")  # sweep.sh reads it


def test_a_run_notes_its_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--mst", "--seed", "3"])
    assert runlog.circumstances()["command"] == ["train.py", "--mst", "--seed", "3"]


def test_the_commit_that_a_run_notes_is_that_of_the_code(tmp_path, monkeypatch):
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert (runlog.circumstances()["commit"] or "").removesuffix("+changes") == head


def test_a_row_goes_by_its_columns_names(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    log.write("eval", {"agent_step": 1, "return": 2.0})
    log.write("eval", {"return": 4.0, "agent_step": 3})
    assert table(tmp_path / "run", "eval.csv") == [{"agent_step": "1", "return": "2"}, {"agent_step": "3", "return": "4"}]


def test_a_resumed_run_purges_what_tensorboard_has_beyond_its_checkpoint(tmp_path, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: told.append(purge_step)))
    RunLog(str(tmp_path / "a"), {}, tensorboard=True).start()
    RunLog(str(tmp_path / "b"), {}, tensorboard=True).start({"step": 5})
    assert told == [None, 5]


# ---------------------------------------------------------------------------------------------------------- train.py

@pytest.mark.slow
@pytest.mark.parametrize("own, spins", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_do_not_spin_for_ever_beside_a_busy_neighbour(own, spins):
    """What the OpenMP library itself says that it was told, by us or by the user, when PyTorch loaded it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run([sys.executable, HERE / "train.py", "--help"], env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | own,
                          capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("PyTorch is built on another OpenMP library here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


def run_train(folder, *flags, timeout=300):
    return subprocess.run([sys.executable, str(HERE / "train.py"), "--runs", str(folder), "--device", "cpu", *flags],
                          capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


SHORT = ("--env", "cartpole-swingup", "--width-scale", "0.05", "--total-steps", "130", "--learning-starts", "60",
         "--eval-every", "50", "--eval-episodes", "2", "--log-every", "30", "--batch-size", "16", "--target-update-freq", "20")


def table(folder, name):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
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
@pytest.mark.slow
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
    (("--save-every", "0"), "--save-every must lie in [1, 1e12], not 0"),
    (("--critic-grad-clip", "0"), "--critic-grad-clip must lie in (0, inf)"),
    (("--reward-range", "81"), "--reward-range must lie in (0, 80]"),
    (("--reward-bins", "1"), "--reward-bins must lie in [2, "),
    (("--threads", "-1"), "--threads must lie"),
    (("--eval-workers", "-1"), "--eval-workers must lie"),
    (("--eval-episodes", "0"), "--eval-episodes must lie"),
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
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
@pytest.mark.slow
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
@pytest.mark.slow
def test_a_wrong_choice_is_answered_with_the_choices(capsys, flag, wrong, choices):
    with pytest.raises(SystemExit) as stopped:
        flags_to_args(flag, wrong)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in said and all(f"'{choice}'" in said for choice in choices.split())


class RecordedRun:
    """Environment, agent, replay, evaluation, checkpoints and log in one, which note everything they are told. Each observation is a number."""
    episodes = [(3, "terminated"), (2, "truncated"), (3, "truncated"), (1, "terminated"), (9, "truncated")]
    obs_dim, action_dim, horizon, updates_per_step, prioritized, folder = 1, 1, 1, 2, False, "here"
    device, networks, sparse, updates, failure = torch.device("cpu"), {}, {}, {}, None

    def __init__(self):
        self.events, self.rows, self.time, self.episode, self.length, self.frames, self.actions = [], [], 0, -1, 0, 0, 0
        self.info = {}

    def note(self, *event):
        self.events.append(event)

    def observation(self):
        self.time += 1
        return np.array([self.time], np.float32)

    # the environment
    def reset(self):
        self.episode, self.length = self.episode + 1, 0
        obs = self.observation()
        self.note("reset", obs[0])
        return obs

    def random_action(self):
        self.actions += 1
        self.note("random action")
        return np.array([-self.actions], np.float32)

    def step(self, action):
        self.note("step", action[0])
        self.length, self.frames = self.length + 1, self.frames + 2
        ended = self.episodes[self.episode][1] if self.length == self.episodes[self.episode][0] else ""
        return self.observation(), 10.0 ** self.length, ended == "terminated", ended == "truncated"

    # the agent
    def observe(self, obs):
        self.note("observe", obs[0])

    def act(self, obs, explore):
        self.actions += 1
        self.note("act", obs.ravel().tolist(), explore, torch.rand(()).item())
        return np.full((*obs.shape[:-1], 1), self.actions, np.float32)

    def update(self, replay):
        assert replay is self
        self.note("update")
        self.info = {"loss": torch.tensor(float(len(self.events)))}

    def fault(self):
        return None

    # checkpoints, replay, evaluation and log
    def load(self):
        return None

    def start(self):
        self.note("start")

    def close(self):
        self.note("close")

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        self.note("add", obs[0], action[0], reward, next_obs[0], terminated, truncated)

    def __call__(self, act, step):
        self.note("evaluate", step)
        before = self.actions
        act(np.array([[-1.0], [-2.0]]))
        self.actions = before
        return np.array([1.0, 4.0])

    def write(self, table, row):
        self.note("write", table)
        self.rows.append((table, row))

    between_updates = lambda self, doing: None


def recorded_run(monkeypatch, run, **settings):
    """The loop on a recorded run: all events without the random numbers in them, and those of acting in training."""
    monkeypatch.setattr(train, "measure", lambda agent, replay, wanted: run.note("measure", wanted) or {"metric": 0.5})
    monkeypatch.setattr(train, "StopSignals", lambda: argparse.Namespace(check=lambda: None))
    monkeypatch.setattr(SavedRun, "save", lambda self: run.note("save", self.progress.step))
    monkeypatch.setattr(SavedRun, "finish", lambda self: run.note("finish", self.progress.step))
    args = dataclasses.replace(parse([]), **({"total_steps": 11, "learning_starts": 4, "eval_every": 5, "log_every": 3, "seed": 6,
                                              "save_every": 2, "metrics_every": 2} | settings))
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    train.train(args, device, run, run, run, run, run,
                SavedRun(argparse.Namespace(load=lambda: None, step=None, failure=None), args, device, run, run, run, run))
    return [event[:3] if event[0] == "act" else event for event in run.events], [e[3] for e in run.events if e[0] == "act" and e[2]]


def test_the_bar_says_what_goes_on_and_how_long_it_takes(monkeypatch):
    drawn, now, agent = [], [0.0], types.SimpleNamespace(updates={"encoder": 0, "critic": 0}, updates_per_step=1)
    monkeypatch.setattr(train, "tqdm", type("Bar", (train.tqdm,), {
        "__init__": lambda bar, **settings: None, "set_postfix_str": lambda bar, text: drawn.append((bar.n, text))}))
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train.sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    bar = train.Bar(flags_to_args("--total-steps", "1000", "--learning-starts", "200"), agent, 0)
    for now[0], step, updates, more in ((59, 1, 0, {}), (60, 5, 0, {}), (100, 300, 100, {"return": "2.5"}), (200, 400, 300, {}), (259, 450, 350, {})):
        agent.updates["critic"] = updates
        bar.show(step, "learning", **more)
    # A minute between two lines; 200 updates in the 100 seconds since the first that it saw, and 1,300 of 2 × 800 to come.
    assert drawn == [(5, "? left, learning"), (400, "10:50 left, return 2.5, learning")]


def test_the_order_of_events_in_a_run(monkeypatch, capsys):
    """Against a plain list of what must happen, step by step."""
    run, shown = RecordedRun(), []
    monkeypatch.setattr(train.Bar, "show", lambda bar, step, doing, **more: shown.append((step, doing, more)))
    events, draws = recorded_run(monkeypatch, run)
    assert [line for line in shown if line[1] == "evaluating" or line[2]] == [
        line for t in (0, 5, 10, 11) for line in ((t, "evaluating", {}), (t, "learning", {"return": "2.5"}))]
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if "return" in line] == [
        f"step {t:>9}  return     2.5 ± 1.5" for t in (0, 5, 10, 11)]
    expected, obs, action = [("start",), ("reset", 1.0)], 1.0, 0
    evaluation = lambda step: [("evaluate", step), ("act", [-1.0, -2.0], False),
                               ("measure", step in (0, 10, 11)), ("write", "eval")]
    ends = {2: "terminated", 4: "truncated", 7: "truncated", 8: "terminated"}  # after these steps
    length = 0
    for t in range(11):
        length, action = length + 1, action + 1
        expected += [("save", t)] if t in (2, 4, 6, 8, 10) else []
        expected += evaluation(t) if t in (0, 5, 10) else []
        expected += [("observe", obs), ("act", [obs], True) if t >= 4 else ("random action",)]
        expected += [("update",)] * 2 if t >= 4 else []
        chosen = action if t >= 4 else -action
        expected += [("step", chosen), ("add", obs, chosen, 10.0 ** length, obs + 1, ends.get(t) == "terminated", ends.get(t) == "truncated")]
        obs += 1
        if t in ends:
            obs, length = obs + 1, 0
            expected += [("reset", obs)]
        expected += [("write", "train")] if t in (5, 8, 10) else []
    assert events == expected + evaluation(11) + [("close",), ("finish", 11)]
    rows = {table: [row for name, row in run.rows if name == table] for table in ("eval", "train")}
    timeless = lambda row: {key: value for key, value in row.items() if "second" not in key}
    assert [timeless(row) for row in rows["eval"]] == [
        {"agent_step": t, "frames": 2 * t, "return": 2.5, "return_std": 1.5, "returns": "1 4", "metric": 0.5} for t in (0, 5, 10, 11)]
    assert [(row["agent_step"], row["frames"], row["episode_return"]) for row in rows["train"]] == [
        (6, 12, 110.0), (9, 18, 10.0), (11, 22, 10.0)]  # of the last episode that has ended
    assert all(row["loss"] == 1 + max(i for i, event in enumerate(run.events[:mark]) if event == ("update",))  # of the last update
               for row, mark in zip(rows["train"], [i for i, event in enumerate(run.events) if event == ("write", "train")]))
    assert all(row["seconds"] >= 0 and row["steps_per_second"] > 0 for row in rows["train"])
    assert all(row["steps_per_second"] == pytest.approx((row["agent_step"] - last["agent_step"]) / (row["seconds"] - last["seconds"]))
               for last, row in itertools.pairwise(rows["train"]))
    # Evaluations draw random numbers of their own, the same whenever they come, and leave the training's alone.
    evaluated = [(event[1], run.events[i + 1][3]) for i, event in enumerate(run.events) if event[0] == "evaluate"]
    assert all(draw == (torch.manual_seed(6 + step), torch.rand(()).item())[1] for step, draw in evaluated)
    assert recorded_run(monkeypatch, RecordedRun(), eval_every=1000)[1] == draws
    torch.manual_seed(6)
    assert draws == [torch.rand(()).item() for _ in draws]


def test_a_fault_stops_a_run_after_its_row_is_written(monkeypatch):
    run = RecordedRun()
    run.fault = lambda: ("the actor's loss", 1) if run.time > 8 else None
    with pytest.raises(FloatingPointError, match="the actor's loss was not finite at agent step 5; stopped.*here"):
        recorded_run(monkeypatch, run)
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6, 9][:1 + (run.rows[-1][1]["agent_step"] == 9)]
    run = RecordedRun()
    act = run.act
    run.act = lambda obs, explore: act(obs, explore) * (math.nan if run.time > 8 else 1)
    with pytest.raises(FloatingPointError, match=r"the action is \[nan\] at agent step 6"):
        recorded_run(monkeypatch, run)
    assert not any(event[0] == "step" and event[1] != event[1] for event in run.events)
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6]  # once, though it was written just before


def test_a_signal_to_a_broken_run_is_answered_in_a_line(monkeypatch):
    agent, log = types.SimpleNamespace(fault=lambda: ("the critic's loss", 3)), types.SimpleNamespace(folder="here")
    saved = SavedRun(types.SimpleNamespace(last=lambda: "none"), flags_to_args(), torch.device("cpu"), agent, None, None, log)

    def stopped(*_):
        raise survive.Stopped("SIGTERM")

    monkeypatch.setattr(train, "build", lambda args: (None, log, saved))
    monkeypatch.setattr(train, "train", stopped)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="the critic's loss was not finite at agent step 10,003.*the last checkpoint is none"):
        train.main()


@pytest.mark.slow
def test_what_a_run_is_built_from(tmp_path):
    """Seeds, sizes and numbers of the settings reach environment, evaluation, buffer, networks and masks."""
    build = lambda *flags: train.build(flags_to_args("--mst", *SHORT[:-2], "--runs", str(tmp_path / "_".join(flags)), *flags))
    device, env, agent, replay, evaluation, *_ = build("--seed", "7", "--eval-episodes", "3")
    same = Env("cartpole-swingup", seed=7)
    assert np.array_equal(env.random_action(), same.random_action()) and np.array_equal(env.reset(), same.reset())
    hold = lambda obs: np.sin(7 * obs[:, :1])
    np.testing.assert_array_equal(evaluation(hold, 20), LockstepEvaluation("cartpole-swingup", 3, seed=7)(hold, 20))
    assert (replay.capacity, replay.horizon, replay.prioritized, replay.obs.shape[1], replay.action.shape[1]) == (272, 5, True, 5, 1)
    torch.manual_seed(7)
    alike = build_agent(flags_to_args("--mst", *SHORT, "--seed", "7"), 5, 1, device)
    masks = lambda one: [mask for sparse in one.sparse.values() for mask in sparse.masks.values()]
    for a, b in zip([*agent.critic.parameters(), *masks(agent)], [*alike.critic.parameters(), *masks(alike)]):
        assert torch.equal(a, b)
    _, _, agent_of_sac, small, *_ = build("--algo", "sac", "--buffer-size", "90")
    assert (small.capacity, small.horizon, small.prioritized, agent_of_sac.sparse["critic"].total_steps) == (90, 1, False, 140)
    other = build_agent(flags_to_args("--mst", *SHORT, "--seed", "8"), 5, 1, device)
    assert not any(torch.equal(a, b) for a, b in zip(masks(agent), masks(other)) if not b.all())


@pytest.mark.slow
def test_workers_and_threads_reach_what_uses_them(tmp_path, monkeypatch):
    asked, threads = [], []
    monkeypatch.setattr(train, "LockstepEvaluation", lambda *of, **named: asked.append((of, named)))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train.build(flags_to_args("--mst", *SHORT, "--runs", str(tmp_path), "--eval-workers", "3", "--threads", "5", "--seed", "4"))
    assert asked == [(("cartpole-swingup", 2, 4), {"workers": 3})] and threads == [5]


def test_metrics_that_are_not_wanted_are_not_computed():
    agent, buffer = tiny_of("mrq")
    agent.update(buffer)
    full = train.measure(agent, buffer)
    buffer.sample = lambda *_: pytest.fail("drawn though nothing is wanted")
    row = train.measure(agent, buffer, wanted=False)
    assert row.keys() == full.keys()
    for column, value in row.items():  # what needs no batch is there all the same
        assert value == full[column] if column.endswith(("/density", "/parameter_norm")) else math.isnan(value), column


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_before_training_is_told_in_a_line(number, status, tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--runs", str(tmp_path)], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text()).group(1), 16)
    while not caught() >> (signal.SIGUSR1 - 1) & 1:  # the last of them that train.py takes
        time.sleep(0.005)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].split("\n") == ["", "train.py: stopped before training began", ""]
    assert process.returncode == status and not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_loss_that_turns_nan_stops_the_run(tmp_path):
    result = run_train(tmp_path, *SHORT, "--critic-lr", "1e30")
    assert result.returncode != 0 and re.search(r"(critic|actor)'s loss or gradient \(its update [12]\).* was not finite at agent step 6[01]; stopped", result.stderr)
    assert "Traceback" not in result.stderr
    (folder,) = tmp_path.iterdir()
    assert len(table(folder, "eval.csv")) == 2 and len(table(folder, "train.csv")) == 1  # nothing is lost


@pytest.mark.parametrize("flags, package", [(("--tensorboard",), "tensorboard"), (("--wandb-project", "x"), "wandb")])
@pytest.mark.slow
def test_a_tracker_is_imported_only_if_asked_for(tmp_path, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)  # not there
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs", str(tmp_path / "runs"), *SHORT, *flags])
    with pytest.raises(SystemExit, match=f"{package} is not installed"):
        train.main()
    assert not (tmp_path / "runs").exists()


def flags_to_args(*flags):
    return parse(list(flags))


VALUES = ["0", "1", "-1", "0.5", "5", "1e9", "1e-3", "nan", "inf", "-inf", "9" * 30, "", " ", "x", "None", "True", "../..", "a/b",
          "é", "\0", "dog-run", "walker-wlk", "cpu", "cuda", "mst", "dst", "dense", "er", "6", "7", "1e400", "0x10", "min", "a.mp4"]


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.slow])])
@pytest.mark.slow
def test_any_flags_are_accepted_or_refused_in_a_line(count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random, outcomes = Random(0), {"accepted": 0, "refused by tyro": 0, "refused in one line": 0}
    flags = {algo: sorted({"--" + name.replace("_", "-") for _, name in flag_names(defaults(algo))}
                          | {"--" + name.replace("_", "-") for name in NOT_IN_NAME}) for algo in CONFIGS}
    for _ in range(count):
        algo = random.choice(list(CONFIGS))
        line = ["--algo", algo] if random.random() < 0.9 else []
        for flag in random.sample(flags[algo], random.randrange(1, 5)):
            usual = {"--mst", "--resume", "--compile", "--cuda-graphs", "--eval-only", "--tensorboard", "--twin-critics"}
            line += [flag] if flag in usual or random.random() < 0.05 else [flag, random.choice(VALUES)]
        try:
            args = parse(line)
            check(args)
        except SystemExit as stop:
            assert stop.code in (0, 2), line
            outcomes["refused by tyro"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error), (line, error)
            outcomes["refused in one line"] += 1
        else:
            outcomes["accepted"] += 1
            name = run_name(args)
            assert len(name.encode()) <= 200 and "/" not in name and "\0" not in name, line
            again = from_config(json.loads(json.dumps(dataclasses.asdict(args))))  # as config.json keeps it
            assert again == args and differences(again, args) == "", line
        assert "Traceback" not in capsys.readouterr().err, line
    assert min(outcomes.values()) >= count / 100 and not os.listdir(tmp_path), outcomes


def test_a_config_of_another_version_is_read_or_refused():
    config = json.loads(json.dumps(dataclasses.asdict(flags_to_args("--mst", "--critic-lr", "0.01", "--metrics-every", "3"))))
    del config["metrics_every"], config["agent"]["q_horizon"]  # flags that are newer than the run
    again = from_config(config | {"command": ["train.py"]})
    assert (again.metrics_every, again.agent.q_horizon, again.agent.critic_lr, again.mst) == (1, 3, 0.01, True)
    for broken, message in ((config | {"sparse": {"density": 0.5}}, "this code has no density"), (config | {"agent": 3}, "no agent"),
                            ([], "names no algorithm"), ({"algo": "ppo"}, "names no algorithm")):
        with pytest.raises(ValueError, match=message):
            from_config(broken)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_run_names_tell_runs_apart():
    names = {run_name(flags_to_args(*flags)) for flags in (
        (), ("--mst",), ("--seed", "1"), ("--scale", "5"), ("--critic-scale", "5"), ("--critic-lr", "1e-3"), ("--env", "walker-run"),
        ("--mst", "--sparsity", "0.5"), ("--discount", "0.9"), ("--total-steps", "7"), ("--algo", "sac"), ("--algo", "ddpg"),
        ("--algo", "mrsac"), ("--algo", "sac", "--twin-critics"), ("--algo", "sac", "--mst", "--sparsity", "0.6"))}
    assert len(names) == 15 and {"dog-run__seed=0", "dog-run__sac__seed=0", "dog-run__sac__twin-critics__seed=0",
                                 "dog-run__scale=5__seed=0", "dog-run__sac__mst__sparsity=0.6__seed=0"} <= names


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_flags_that_change_nothing_are_told():
    told = lambda *flags: " ".join(notes(flags_to_args(*flags)))
    assert told() == told("--mst", "--sparsity", "0.8") == told("--encoder-type", "4") == ""
    assert "--sparsity, --growth changes nothing" in told("--sparsity", "0.9", "--growth", "random")
    assert "--critic-sparsity changes nothing" in told("--critic-sparsity", "0.9")
    assert "--schedule-end changes nothing" in told("--critic-regime", "dst", "--schedule-end", "0.9")
    assert "--scale changes nothing" in told("--scale", "3", "--encoder-scale", "1", "--critic-scale", "1", "--actor-scale", "1")


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_a_sparse_flag_is_in_the_name_if_and_only_if_it_moves_a_mask(regime):
    """Each regime is run with the flag and without: what the name leaves out must change nothing, and the other way round."""
    def masks(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.ELU(), nn.Linear(20, 4))
        sparse = SparseTraining(model, torch.optim.AdamW(model.parameters(), lr=0.01), regime, **({"sparsity": 0.6, "update_interval": 3,
                                "seed": 1} | options), total_steps=30)
        seen = []
        for step in range(1, 31):
            backward(model, 6)
            sparse.update_topology(step)
            sparse.mask_gradients()
            sparse.optimizer.step()
            seen.append(torch.cat([torch.ones(1), *(mask.flatten() for mask in sparse.masks.values())]))
        return torch.stack(seen)

    base, plain = ("--critic-regime", regime, "--update-interval", "3"), masks()
    for flag, argument, value in (
            ("--sparsity", "sparsity", 0.7), ("--distribution", "distribution", "uniform"), ("--growth", "grow", "random"),
            ("--update-interval", "update_interval", 5), ("--drop-initial", "drop_initial", 0.8), ("--drop-final", "drop_final", 0.4),
            ("--schedule-start", "schedule_start", 0.4), ("--schedule-end", "schedule_end", 0.6), ("--schedule-power", "power", 4.0)):
        moved = not torch.equal(masks(**{argument: value}), plain)
        named = run_name(flags_to_args(*base, flag, str(value))) != run_name(flags_to_args(*base))
        assert named == moved, f"{flag} with {regime}: named {named}, moves masks {moved}"


@pytest.mark.slow
def test_a_long_name_is_shortened_and_stays_its_own():
    numbers = [flag for name in ("critic_lr", "actor_lr", "encoder_lr", "weight_decay", "reward_weight", "terminal_weight",
                                 "dynamics_weight", "exploration_noise", "target_noise", "target_noise_clip", "reward_range")
               for flag in ("--" + name.replace("_", "-"), "0.0123456")]
    names = {run_name(flags_to_args(*numbers, "--discount", discount, "--seed", seed)) for discount in ("0.9", "0.91") for seed in "01"}
    assert len(names) == 4 and all(len(name) == 200 and name.startswith("dog-run__") for name in names)
    assert sum(name.endswith("__seed=1") for name in names) == 2


@pytest.mark.parametrize("algo, blocks", [("mrq", (2, 3, 1)), ("sac", (6, 1))])
def test_memory_is_checked_against_the_hidden_layers_themselves(algo, blocks, monkeypatch):
    """Sixteen bytes for each weight of the blocks, counted in the networks."""
    presets = AGENTS[algo].Config.presets["mst"]
    modules = {name: dataclasses.replace(m, width_scale=0.1 * (k + 1), depth_scale=depth) for k, ((name, m), depth) in enumerate(zip(presets.items(), blocks))}
    with torch.device("meta"):
        agent = AGENTS[algo](4, 2, modules, device="meta")
    weights = sum(p.numel() for network in agent.networks.values() for n, p in network.named_parameters() if ".linear" in n and p.ndim == 2)
    monkeypatch.setattr(agents, "free_memory", lambda device: 16 * weights)
    agents.check_memory(modules, torch.device("cpu"))
    monkeypatch.setattr(agents, "free_memory", lambda device: 16 * weights - 1)
    with pytest.raises(MemoryError, match=f"{16 * weights / 1e9:.3g} GB to train, but cpu has .* choose a smaller --scale"):
        agents.check_memory(modules, torch.device("cpu"))


def test_a_disk_that_is_too_small_is_told_of(monkeypatch):
    log = types.SimpleNamespace(folder="here")
    saved = types.SimpleNamespace(size=lambda: (2e9, 3e9), log=log, args=flags_to_args("--save-every", "5000"))
    for free, told in ((9e9 + 1, False), (9e9, True)):  # two checkpoints, a third while it is written, and the buffer
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
        said = train.describe_saving(saved)
        assert "every 5,000 steps: up to 9.00 GB" in said and ("saving will fail, training not" in said) == told


def test_a_second_ctrl_c_stops_at_once_and_another_signal_does_not(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append), monkeypatch.setattr(os, "write", lambda *of: None)
    monkeypatch.setattr(signal, "signal", lambda *of: None)
    for numbers, status in (("TERM", []), ("TERM TERM USR1", []), ("INT", []), ("INT TERM", []), ("INT INT", [1]), ("TERM INT", [1])):
        ended.clear()
        stop = survive.StopSignals()
        for number in numbers.split():
            stop._note(getattr(signal, f"SIG{number}"), None)
        assert ended == status
        with pytest.raises(survive.Stopped, match=f"SIG{numbers.split()[0]}"):
            stop.check()


def test_what_is_said_of_a_run_is_true_of_its_networks():
    agent, modules = tiny(), {name: dataclasses.replace(m, width_scale=1 / 32) for name, m in MR_MST.items()}
    said = train.describe(agent, modules, flags_to_args("--seed", "4", "--total-steps", "12345"), "cpu", "folder").splitlines()
    assert said[0] == "mrq on dog-run, seed 4, 12,345 agent steps on cpu" and said[-1].split() == ["writes", "folder"] and len(said) == 5
    head = count(agent.encoder.model)
    for line, (name, network), millions in zip(said[1:], agent.networks.items(), (count(agent.encoder) - head, count(agent.critic), count(agent.actor))):
        density = np.mean(np.concatenate([mask.flatten() for mask in agent.sparse[name].masks.values()] or [[1]]))
        assert line.split() == [name, "type", str(modules[name].arch_type), modules[name].regime, "width", "×0.03125,", "depth", "×1", f"{millions / 1e6:.3f}",
                                "M", *(["+", f"{head / 1e6:.2f}", "M", "head"] if name == "encoder" else []), "density", f"{density:.3f}"]


@pytest.mark.slow
def test_large_networks_without_residuals_are_named(tmp_path):
    agent = tiny()
    modules = {name: ModuleConfig(m.arch_type, width_scale=5, depth_scale=5) for name, m in MR_DEFAULT.items()}
    assert "--mst" in train.describe(agent, modules, flags_to_args(), "cpu", "x")
    for arch_type, width, depth in itertools.product(range(1, 7), (1, 3), (2.9, 3)):
        one = MR_MST | {"critic": ModuleConfig(arch_type, width_scale=width, depth_scale=depth)}
        assert ("(critic)" in train.describe(agent, one, flags_to_args(), "cpu", "x")) == (arch_type < 5 and 3 in (width, depth))
    assert "--mst" not in train.describe(agent, MR_MST, flags_to_args(), "cpu", "x")


def test_the_last_evaluation_measures_whatever_its_number(monkeypatch):
    run = RecordedRun()
    recorded_run(monkeypatch, run, metrics_every=4)  # 0, 5, 10, and the end at 11: the third, as 10 is
    assert [event[1] for event in run.events if event[0] == "measure"] == [True, False, False, True]


def test_densities_and_the_first_speed_of_a_run_are_those_of_its_learning(monkeypatch):
    run = RecordedRun()
    run.sparse = {"net": types.SimpleNamespace(density=lambda: 0.25, sparsity=0.75)}
    monkeypatch.setattr(SavedRun, "seconds", lambda saved: float(len(run.events)))  # a clock that events alone move
    recorded_run(monkeypatch, run)
    rows = [row for name, row in run.rows if name == "train"]
    assert [row["net_density"] for row in rows] == [0.25] * 3
    began = [i for i, event in enumerate(run.events) if event[0] == "observe"][4]  # the first step that learns
    assert rows[0]["steps_per_second"] == (6 - 4) / (rows[0]["seconds"] - began)


def test_the_bar_counts_all_updates_of_a_step(monkeypatch):
    drawn, now, agent = [], [0.0], types.SimpleNamespace(updates={"critic": 0, "actor": 0}, updates_per_step=2)
    monkeypatch.setattr(train, "tqdm", type("Bar", (train.tqdm,), {
        "__init__": lambda bar, **settings: None, "set_postfix_str": lambda bar, text: drawn.append(text)}))
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train.sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    bar = train.Bar(flags_to_args("--total-steps", "1000", "--learning-starts", "200"), agent, 0)
    for now[0], updates in ((100, 100), (200, 300)):
        agent.updates["critic"] = updates
        bar.show(400, "learning")
    assert drawn[-1] == "24:10 left, learning"  # 2,900 of 2 × 2 × 800 are to come, two a second


def test_an_action_is_broken_by_any_of_its_numbers(monkeypatch):
    run = RecordedRun()
    act = run.act
    run.act = lambda obs, explore: np.append(act(obs, explore), math.nan if explore and run.time > 8 else 0.0)
    with pytest.raises(FloatingPointError, match="at agent step 6: the actor has diverged"):
        recorded_run(monkeypatch, run)


def test_modules_draw_masks_of_their_own():
    seeds = [sparse.seed for seed in (0, 1) for sparse in tiny_of("mrq", regimes_dense("mrq", "sst", "dst", "sst"), seed=seed)[0].sparse.values()]
    assert len(set(seeds)) == 6


def test_of_two_faults_the_first_is_told():
    agent, buffer = tiny_of("mrq", interval=100)
    for broken in ("critic", "actor"):  # the critic from its fourth update on, the actor from its seventh
        for _ in range(3):
            agent.update(buffer)
        agent.broken[broken].fill_(1.0)
    assert agent.fault() == ("the critic's loss or gradient (its update 4)", 3)


# -------------------------------------------------------------------------------------------------------- survive.py

# Where a process is killed: at an entry of one of these, or a moment later.
MOMENTS = {"a save": (checkpoint, "write"), "an evaluation": (LockstepEvaluation, "__call__"), "a step": (Env, "step"),
           "an encoder burst": (MRQ, "update_encoder"), "a topology update": (sparsity, "_drop_and_grow"),
           "a log row": (RunLog, "write"), "the way back": (ReplayBuffer, "load_rows")}


def in_process(arguments, output, kill=None, record=None):
    """`train.py` in a process of its own, forked because importing PyTorch anew takes seconds. kill: (moment, which entry of
    it, delay, signal). record: [the step where it was killed, the step it was resumed at]. Returns the exit status."""
    def body():
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would its children
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), ["train.py", *arguments]
        show, restore = train.Bar.show, SavedRun.restore

        def note_step(bar, step, *rest, **more):
            record[0] = step
            show(bar, step, *rest, **more)

        def note_start(saved):
            obs = restore(saved)
            record[1] = saved.progress.step
            return obs
        if record is not None:
            train.Bar.show, SavedRun.restore = note_step, note_start
        if kill:
            (owner, name), which, delay, number = MOMENTS[kill[0]], *kill[1:]
            plain, entries = getattr(owner, name), itertools.count()

            def dies(*arguments, **options):
                if next(entries) == which:
                    if delay:
                        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
                    else:
                        os.kill(os.getpid(), number)
                return plain(*arguments, **options)
            setattr(owner, name, dies)
        status = 0
        try:
            train.main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) else stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(timeout=300)
    return process.exitcode


def tiny_run(algo, regimes=()):
    modules = ("encoder", "critic", "actor") if algo.startswith("mr") else ("critic", "actor")
    own = ("--target-update-freq", "20") if algo.startswith("mr") else ()
    said = [word for module, regime in zip(modules, regimes) for word in (f"--{module}-regime", regime)]
    return ["--algo", algo, "--env", "cartpole-swingup", "--width-scale", "0.05", "--total-steps", "130", "--learning-starts",
            "45", "--eval-every", "60", "--eval-episodes", "1", "--log-every", "15", "--batch-size", "16", "--save-every", "20",
            "--update-interval", "15", "--buffer-size", "100", "--device", "cpu", "--threads", "1", "--name", "run",
            *own, *(said or ["--mst"])]


def timeless(folder):
    """Both tables without their clocks."""
    return {name: [{k: v for k, v in row.items() if "second" not in k} for row in table(folder, name)]
            for name in ("eval.csv", "train.csv")}


def killed_again_and_again(algo, regimes, kills, folder, random, moments=MOMENTS):
    """Trains undisturbed, then with kills, each resumed. Returns [(moment, steps lost)], after comparing the tables."""
    folder.mkdir(exist_ok=True)
    flags, log = tiny_run(algo, regimes), str(folder / "output")
    assert in_process([*flags, "--runs", str(folder / "whole")], log) == 0, open(log).read()
    record = multiprocessing.get_context("fork").Array("i", 2, lock=False)
    entries = {"a save": 9, "an evaluation": 2, "a step": 900, "an encoder burst": 60, "a topology update": 20, "a log row": 6,
               "the way back": 2}
    lost, reached = [], 0
    for number in range(kills + 1):
        moment = random.choice([name for name in moments if algo.startswith("mr") or name != "an encoder burst"])
        kill = (moment, random.randrange(entries[moment]), random.choice([0, 0, random.random() * 0.05]), signal.SIGKILL)
        more, kill = ([], kill) if number < kills else (["--eval-workers", "1"], None)  # which changes no result
        record[0], record[1] = 0, -1
        status = in_process([*flags, "--runs", str(folder / "killed"), "--resume", *more], log, kill, record)
        assert status == 0 or (kill and status == -signal.SIGKILL), open(log).read()
        if record[1] >= 0 and lost:  # the way back was found: what the kills before have cost is known
            lost[-1] = lost[-1][0], lost[-1][1] + max(0, reached - record[1])
            reached = 0
        if status == 0:
            break
        lost.append((moment, 0))
        reached = max(reached, record[0])
    whole, killed = folder / "whole" / "run", folder / "killed" / "run"
    assert timeless(whole) == timeless(killed)
    assert len(timeless(whole)["eval.csv"]) == 4 and len(timeless(whole)["train.csv"]) == 6
    weights = [checkpoint.read(str(run / "final.pt"))[0]["networks"] for run in (whole, killed)]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
    assert sorted(os.listdir(killed)) == ["config.json", "eval.csv", "final.pt", "lock", "train.csv"]
    return lost


@pytest.mark.parametrize("algo, regimes", [("mrq", ("d2s", "dst", "s2d")), ("sac", ())])
@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_was(algo, regimes, tmp_path):
    assert len(killed_again_and_again(algo, regimes, 3, tmp_path, Random(3))) >= 2


@pytest.mark.soak
@pytest.mark.slow
def test_a_hundred_kills_over_all_algorithms_and_regimes(tmp_path, capsys):
    random, all_lost = Random(0), []
    for algo, turn in itertools.product(AGENTS, range(5)):
        regimes, lost = [REGIMES[(turn + shift) % 5] for shift in range(3)], []
        while len(lost) < 6:  # a run may end before its kill
            lost += killed_again_and_again(algo, regimes, 8, tmp_path / f"{algo}{turn}-{len(lost)}-{random.random()}", random)
        all_lost += lost
        with capsys.disabled():
            print(f"\n{algo:6} {' '.join(regimes):16} {len(lost)} kills, steps lost: {[steps for _, steps in lost]}", end="")
    with capsys.disabled():
        counts = {name: sum(moment == name for moment, _ in all_lost) for name in MOMENTS}
        print(f"\n{len(all_lost)} kills {counts}, {sum(steps for _, steps in all_lost)} steps lost, 0 differences")
    assert len(all_lost) >= 100


@pytest.mark.slow
def test_a_signal_saves_at_the_next_safe_point_and_stops(tmp_path):
    flags, log = tiny_run("mrq", ("dense", "dst", "sst")), str(tmp_path / "output")
    assert in_process([*flags, "--runs", str(tmp_path / "whole")], log) == 0
    stopped = [*flags, "--runs", str(tmp_path / "stopped"), "--save-every", "1000", "--resume"]
    run, said = tmp_path / "stopped" / "run", lambda: open(log).read().strip().splitlines()[-1]
    for moment, which, number in (("an encoder burst", 33, signal.SIGTERM), ("an evaluation", 0, signal.SIGINT),
                                  ("a step", 560, signal.SIGUSR1)):
        assert in_process(stopped, log, (moment, which, 0, number)) == 75, open(log).read()
        assert f"stopped by {signal.Signals(number).name}" in said() and "--resume goes on" in said()
        state = checkpoint.Checkpoints(str(run)).load()
        if moment == "an encoder burst":  # within it, with the action chosen whose step the burst delays
            assert state["agent"]["updates"]["encoder"] == 34 and state["agent"]["updates"]["critic"] == 20
            assert state["progress"]["step"] == 65 and len(state["progress"]["action"]) == 1
        if moment == "an evaluation":  # within it: the step behind it is not begun
            assert state["progress"]["step"] == 120 and state["progress"]["action"] is None
        assert not (run / "final.pt").exists()
    files = sorted(os.listdir(run))
    for change, message in ((("--critic-lr", "0.1"), "begun with --critic-lr 0.0003, not 0.1"), (("--seed", "1"), "--seed 0, not 1"),
                            (("--env", "walker-walk"), "--env cartpole-swingup, not walker-walk"), (("--algo", "mrsac"), "--algo mrq, not mrsac")):
        assert in_process([*stopped, *change], log) == 1 and message in said()
    assert sorted(os.listdir(run)) == files
    assert in_process(stopped, log) == 0, open(log).read()
    assert timeless(tmp_path / "whole" / "run") == timeless(run) and "Traceback" not in open(log).read()
    assert in_process(stopped, log) == 0 and said().startswith("finished already")


def test_what_is_said_to_be_saved():
    """A save's arguments: the rows since the last save and the one before them, whose next observation came later; the oldest
    row still needed; and how far the logs, the clock and the episode are."""
    buffer, told = play(0, 60, 3, 90)[0], []
    log = types.SimpleNamespace(positions=lambda step=None: {"step": step}, folder="here")
    agent = types.SimpleNamespace(state_dict=dict, info={}, fault=lambda: None)
    checkpoints = types.SimpleNamespace(next_row=80, step=None, save=lambda *of, **named: told.append((of, named)))
    saved = SavedRun(checkpoints, flags_to_args(), torch.device("cpu"), agent, buffer, types.SimpleNamespace(state=dict), log)
    progress = saved.progress
    progress.step, progress.seconds, progress.episode_return, progress.last_return = 7, 100.0, 2.5, 4.5
    saved.save(wait=True)
    ((step, state, first, rows, oldest, wait), named), = told
    end = buffer.position + 1
    assert (step, first, len(rows["rows"]), oldest, wait, named) == (7, 79, end - 79, end - 60, True, {})
    assert state["log"] == {"step": 7} and 100 <= state["progress"]["seconds"] < 101
    assert (state["progress"]["episode_return"], state["progress"]["last_return"]) == (2.5, 4.5)


def test_which_signals_stop_a_run(monkeypatch):
    taken = set()
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.add(number.name))
    for ignored in (None, signal.SIGHUP):  # nohup ignores it, and is believed
        taken.clear()
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        survive.StopSignals()
        assert taken == {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"} - ({"SIGHUP"} if ignored else set())


def test_a_broken_run_is_not_saved():
    agent, told = types.SimpleNamespace(fault=lambda: ("the critic's loss", 3)), []
    checkpoints = types.SimpleNamespace(next_row=0, step=None, save=lambda *of: told.append(of))
    log = types.SimpleNamespace(folder="here", positions=lambda step: {})
    agent.state_dict, agent.info = dict, {}
    saved = SavedRun(checkpoints, flags_to_args(), torch.device("cpu"), agent, play(0, 60, 3, 90)[0], types.SimpleNamespace(state=dict), log)
    with pytest.raises(FloatingPointError, match="the critic's loss was not finite at agent step 10,003"):
        saved.save(wait=True)
    assert not told


def test_a_checkpoint_is_as_large_as_is_said():
    def size(part):
        if torch.is_tensor(part):
            return part.numel() * part.element_size()
        return sum(map(size, part.values() if isinstance(part, dict) else part)) if isinstance(part, (dict, list, tuple)) else 0

    agent, buffer = tiny_of("mrq")
    agent.update(buffer)
    saved = SavedRun(None, None, torch.device("cpu"), agent, buffer, None, None)
    one, rows = saved.size()
    assert one == pytest.approx(size(agent.state_dict()) + size(buffer.state_dict()), rel=0.02) and rows == size(buffer.rows)


def test_what_a_run_was_resumed_from_is_not_saved_again(monkeypatch):
    told = []
    monkeypatch.setattr(SavedRun, "save", lambda self: told.append(self.progress.step))
    saved = SavedRun(types.SimpleNamespace(step=20), flags_to_args("--save-every", "10"), torch.device("cpu"), None, None, None, None)
    for saved.progress.step in (0, 20, 25, 30):
        saved.save_if_due()
    assert told == [30]


# ---------------------------------------------------------------------------------------------------------- watch.py

@pytest.mark.slow
def test_a_finished_run_is_evaluated_as_it_was(tmp_path, monkeypatch, capsys):
    log = str(tmp_path / "output")
    assert in_process([*tiny_run("sac"), "--runs", str(tmp_path)], log) == 0, open(log).read()
    run = tmp_path / "run"
    flags = ["--eval-only", "--checkpoint", str(run), "--eval-episodes", "1", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    assert f"step 130: return {float(table(run, 'eval.csv')[-1]['return']):.1f}" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(watch, "LockstepEvaluation", lambda *of, **named: asked.append((of, named)) or (lambda act, step: np.zeros(1)))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--eval-workers", "3"])
    train.main()
    assert asked == [(("cartpole-swingup", 1, 0), {"workers": 3})]
    monkeypatch.setitem(sys.modules, "imageio", None)
    for more, message in ((["--video", str(tmp_path / "a.mp4")], "pip install imageio"), (["--resume"], "leave one away"),
                          (["--video", "a.gif"], "must be an .mp4 file"), (["--checkpoint", str(tmp_path)], "config.json")):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more])
        with pytest.raises(SystemExit, match=message):
            train.main()
    (run / "final.pt").write_bytes((run / "final.pt").read_bytes()[:-100])
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit, match="final.pt is damaged"):
        train.main()


def test_a_film_is_one_episode_at_the_speed_of_the_task():
    frames, told, actions = [], [], iter([[0.5], [0.25], [1.0]])
    writer = types.SimpleNamespace(append_data=frames.append)
    imageio = types.SimpleNamespace(get_writer=lambda *of, **named: contextlib.nullcontext(told.append((of, named)) or writer))
    steps = iter([(np.array([1.0]), 2.0, False, False), (np.array([2.0]), 3.0, False, False), (np.array([3.0]), 4.0, False, True)])
    env = types.SimpleNamespace(reset=lambda seed: told.append(seed) or np.array([0.0]), step_seconds=0.05, render=lambda *size: (len(frames), size),
                                step=lambda action: told.append(action.tolist()) or next(steps))
    act = lambda obs: told.append(obs.tolist()) or np.array([next(actions)])
    assert watch.film(imageio, env, act, 7, "a.mp4", height=4, width=6) == 9
    assert told == [7, (("a.mp4",), {"fps": 20}), [[0.0]], [0.5], [[1.0]], [0.25], [[2.0]], [1.0]] and frames == [(n, (4, 6)) for n in range(3)]


def test_a_run_is_evaluated_on_its_own_seeds_and_as_far_as_it_came(tmp_path, monkeypatch, capsys):
    args, told = flags_to_args("--algo", "sac", "--env", "cartpole-swingup", "--seed", "3"), []
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    checkpoint.Checkpoints(str(tmp_path)).save(7000, {"agent": {"networks": {}}}, wait=True)
    assert watch.load(str(tmp_path))[1]["step"] == 7000  # not ended: where it stands
    for name in ("import_imageio", "check_drawing", "build_agent", "restore"):
        monkeypatch.setattr(watch, name, lambda *of: None)
    monkeypatch.setattr(watch, "Env", lambda *of: told.append(of) or types.SimpleNamespace(obs_dim=5, action_dim=1))
    monkeypatch.setattr(watch, "LockstepEvaluation", lambda *of, **named: told.append(of) or (lambda act, step: np.array([step])))
    monkeypatch.setattr(watch, "film", lambda imageio, env, act, seed, path: told.append(seed) or 1.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    watch.main(flags_to_args("--eval-only", "--checkpoint", str(tmp_path), "--eval-episodes", "2", "--device", "cpu", "--video", "a.mp4"))
    assert told == [("cartpole-swingup", 3), ("cartpole-swingup", 2, 3), envs.episode_seed(3, 7000, 0)]
    assert "return 7000.0" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bench.py

@pytest.mark.parametrize("algo", ["mrq", "ddpg"])
@pytest.mark.slow
def test_the_benchmark_counts_what_it_says(algo, capsys):
    args = bench.Args(algo=algo, variants=["dense", "mst"], env="cartpole-swingup", steps=1)
    dense, mst = rows = bench.bench_scale(0.05, args, torch.device("cpu"))
    assert not capsys.readouterr().out  # PyTorch's own table of operations does not stand before ours
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


@pytest.mark.parametrize("algo", ["mrq", "sac"])
@pytest.mark.slow
def test_the_benchmarks_own_factors(algo, monkeypatch):
    """With a clock to which everything takes a millisecond, each phase shows how often an agent step has it."""
    class Clock:
        def __init__(self, device):
            pass

        def __call__(self, function):
            function()
            return 1.0

    monkeypatch.setattr(bench, "Clock", Clock)
    monkeypatch.setattr(torch, "mm", lambda a, b: a), monkeypatch.setattr(fast, "product", lambda a, b: a)
    (row,) = bench.bench_scale(0.05, bench.Args(algo=algo, variants=["mst"], env="cartpole-swingup", steps=3), torch.device("cpu"))
    often = {"mrq": 1, "sac": 2}[algo]
    refresh, encoder = (1 / 250, 1) if algo == "mrq" else ("", "")
    assert row["update"] == 2 + (refresh or 0)  # two captures a step and a burst's beginning, or two updates
    assert [row[phase] for phase in bench.PHASES] == [refresh, often, encoder, often, often, often, often, often / 1000, 1, 1, 1, 1]
    agent, env = bench.plain_agent("mst", 0.05, Env("cartpole-swingup"), torch.device("cpu"), bench.Args(algo=algo)), Env("cartpole-swingup")
    with FlopCounterMode(display=False) as counter:
        for update in [agent.update] * 2 if algo == "sac" else [agent.update_encoder, agent.update_critic_and_actor]:  # an agent step has
            update(bench.filled_replay(env, agent, 20))
    assert row["gflop"] == counter.get_total_flops() / 1e9
    assert row["tflop_per_s"] == pytest.approx(2 * 2048 ** 3 / 1e-3 / 1e12) and row["gb_per_s"] == pytest.approx(8 * 2 ** 25 / 1e-3 / 1e9)


@pytest.mark.slow
def test_the_benchmark_shows_and_writes_what_it_timed(tmp_path, monkeypatch, capsys):
    """Without a flag, dense and mst at scale 1; one table and one CSV file over all scales; a clock in milliseconds."""
    asked = []

    def rows_of(scale, args, device):
        asked.append((scale, args.variants))
        return [{"scale": scale, "variant": name, "update": 2.0 + scale * number, "floor": 1.0, "gflop": 1.0, "weights": 1e6, "mb_weights": 4.0,
                 "mb_gradients": 4.0, "mb_moments": 8.0, "mb_peak": ""} | dict.fromkeys(bench.PHASES, 0.5) for number, name in enumerate(args.variants)]

    monkeypatch.setattr(bench, "bench_scale", rows_of)
    bench.run(bench.Args(), torch.device("cpu"))
    bench.run(bench.Args(scales=[1, 3], csv=str(tmp_path / "rows.csv")), torch.device("cpu"))
    assert asked == [(1, ["dense", "mst"])] * 2 + [(3, ["dense", "mst"])]
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 * 2 + 6  # two headings of two lines, rows of 2, then of 4
    assert table[-3].endswith("| 1.500 |") and table[-1].endswith("| 2.500 |")  # beside the first row of its scale
    with open(tmp_path / "rows.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["scale"], row["variant"], row["update"]) for row in written] == [
        ("1", "dense", "2.0"), ("1", "mst", "3.0"), ("3", "dense", "2.0"), ("3", "mst", "5.0")]

    flushed = []
    monkeypatch.setattr(sys, "stdout", type("Out", (io.StringIO,), {"flush": lambda out: flushed.append(out.getvalue().count("\n"))})())
    bench.show(rows_of(1, bench.Args(), None), heading=False)
    assert flushed == [1, 2]  # a row is seen at once, in a pipe too

    seconds, called = iter([2.0, 2.5]), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(seconds))
    assert bench.Clock(torch.device("cpu"))(lambda: called.append(1)) == 500.0 and called


def test_a_clock_on_cuda_waits_for_the_device_before_and_after(monkeypatch):
    told, events = [], iter("ab")

    class Event:
        def __init__(self, enable_timing):
            self.name = next(events)

        def record(self):
            told.append(f"{self.name} recorded")

        def synchronize(self):
            told.append(f"{self.name} waited for")

        def elapsed_time(self, other):
            return f"from {self.name} to {other.name}"

    monkeypatch.setattr(torch.cuda, "Event", Event), monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("idle"))
    assert bench.Clock(torch.device("cuda"))(lambda: told.append("run")) == "from a to b"
    assert told == ["idle", "a recorded", "run", "b recorded", "b waited for"]


@pytest.mark.slow
@pytest.mark.parametrize("precision, pays, taken", [("fp32", True, "onednn"), ("fp32", False, "mm"), ("bf16", True, "mm")])
def test_a_floor_is_measured_with_the_product_that_an_agent_takes(precision, pays, taken, monkeypatch):
    used = set()
    monkeypatch.setattr(torch, "mm", lambda a, b: used.add("mm")), monkeypatch.setattr(fast, "product", lambda a, b: used.add("onednn"))
    monkeypatch.setattr(fast, "onednn_pays", lambda: pays)
    bench.rates(torch.device("cpu"), precision)
    assert used == {taken}


def test_the_rates_of_a_gpu_are_those_of_large_aligned_products(monkeypatch):
    shapes = []
    monkeypatch.setattr(bench, "Clock", lambda device: lambda function: 1.0)
    monkeypatch.setattr(torch, "randn", lambda *size, **settings: shapes.append(size) or torch.zeros(2))
    bench.rates(torch.device("cuda"), "tf32")
    (n, m), (copied,) = shapes
    assert n == m and n % 8 == 0 and 4096 <= n <= 16384 and 2 ** 27 <= copied <= 2 ** 30  # odd sizes leave tensor cores idle


@pytest.mark.parametrize("flags, message", [
    (("--variants", "sparse"), "unknown variant 'sparse'"), (("--variants", "dense+bf16+tf32"), "at most one of +fp32"),
    (("--variants", "mst+graphs", "--device", "cpu"), "needs a CUDA device"), (("--device", "foo"), "unknown --device"),
    (("--variants", "mst", "mst"), "names mst twice"), (("--variants", "mst+bf16+bf16"), "each once"),
    (("--scales", "1", "-1"), "scale must be above 0"), (("--scales", "1", "5000"), "choose a smaller --scale"),
    (("--csv", "nowhere/x.csv"), "No such file"),
    (("--steps", "0"), "--steps must be at least 1"), (("--csv", __file__), "exists"),
    (("--env", "dog_run"), "did you mean dog-run")])
@pytest.mark.slow
def test_the_benchmark_refuses_in_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--scales", "0.05", *flags])
    if "dog_run" not in flags:
        monkeypatch.setattr(bench, "bench_scale", lambda *_: pytest.fail("timed before it was told"))
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert message in stopped.value.code and "\n" not in stopped.value.code


def test_the_benchmarks_scales_are_width_and_depth():
    for own, expected in (({"width_scale": 4, "depth_scale": 3}, (4, 3)), ({"depth_scale": 3}, (2, 3)), ({}, (2, 2))):
        assert {(m.width_scale, m.depth_scale) for m in bench.module_configs("mst", 2, bench.Args(**own)).values()} == {expected}


# ---------------------------------------------------------------------------------------------------------- sweep.sh

FAKE_TRAIN = '''
import fcntl, os, pathlib, signal, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
runs, name = pathlib.Path(flag("--runs")), flag("--name")
folder = runs / name
folder.mkdir(exist_ok=True)
lock, stop, saved = open(folder / "lock", "w"), [], folder / "saved"
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(76)
if (folder / "final.pt").exists():
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(number))
def note(*words):
    with open(runs / "record", "a") as file:
        print(name, *words, sep="|", file=file)
step = int(saved.read_text()) if saved.exists() else 0
note("from", step, *[os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")], *sys.argv[1:])
if os.environ.get("FAIL") == name:
    sys.exit("\\rstep 1\\rtrain.py: the actor has diverged\\n")
end = 10_000 if os.environ.get("LONG") == name and step == 0 else step + 10
while step < end and not stop:
    time.sleep(0.01)
    step += 1
if stop:
    saved.write_text(str(step))
    note("saved", step, *stop)
    sys.exit(75)
(folder / "final.pt").touch()
note("finished", step)
'''
GRID = ("fig11", "--smoke", "--seeds", "2")


class Sweeps:
    """A folder with sweep.sh, the real grids, and a train.py that only takes note of what it is told."""

    def __init__(self, folder):
        self.folder, self.runs, self.processes = folder, folder / "runs", []
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "CUDA_", "SLURM_"))}
        self.env |= {"PYTHON": sys.executable}
        for file in [HERE / "sweep.sh", *HERE.glob("*.py")]:
            shutil.copy(file, folder)
        (folder / "train.py").write_text(FAKE_TRAIN)
        self.names, self.commands = (subprocess.run([sys.executable, "figures.py", what, *GRID], cwd=folder, text=True,
                                                    capture_output=True).stdout.splitlines() for what in ("names", "commands"))
        assert len(self.names) == len(self.commands) == 6

    def start(self, *flags, **env):
        self.processes.append(subprocess.Popen(
            ["./sweep.sh", *flags], cwd=self.folder, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)))
        return self.processes[-1]

    def __call__(self, *flags, **env):
        """Exit status and output of one sweep, run to its end."""
        process = self.start(*flags, **env)
        output = process.communicate(timeout=120)[0]
        return process.returncode, output

    def record(self, word):
        """What the runs noted: (name, what follows the word) in order."""
        lines = (self.runs / "record").read_text().splitlines() if (self.runs / "record").exists() else []
        return [(line.split("|")[0], line.split("|")[2:]) for line in lines if line.split("|")[1] == word]

    def wait_for(self, condition, seconds=60):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end, (self.runs / "record").read_text()
            time.sleep(0.05)

    def check_continuous(self):
        """All runs are finished, each once, and each start went on where the last one of that run had saved."""
        assert sorted(name for name, _ in self.record("finished")) == sorted(self.names)
        for run in self.names:
            assert ([rest[0] for name, rest in self.record("from") if name == run]
                    == ["0"] + [rest[0] for name, rest in self.record("saved") if name == run])


@pytest.fixture
def sweep(tmp_path):
    if sys.platform != "linux":
        pytest.skip("sweep.sh is tested on Linux alone")
    sweeps = Sweeps(tmp_path)
    yield sweeps
    for process in sweeps.processes:
        if process.poll() is None:
            process.kill()


@pytest.mark.slow
def test_a_sweep_runs_each_run_once_and_a_failure_neither_stops_nor_hides_the_rest(sweep, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho 'GPU 1: H100 (UUID: GPU-b)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    sweep.env["PATH"] = f"{tmp_path}:{sweep.env['PATH']}"
    bad = sweep.names[1]
    status, output = sweep(*GRID, FAIL=bad)
    assert status == 1 and f"failed: {bad}: status 1, train.py: the actor has diverged" in output and "5 of 6" in output
    assert "2 at a time on 2 GPU(s)" in output  # the default: one run a GPU
    starts = sweep.record("from")
    assert sorted(name for name, _ in starts) == sorted(sweep.names)
    cores = len(os.sched_getaffinity(0))
    assert {tuple(rest[1:4]) for _, rest in starts} == {(str(max(1, cores // 2)), "passive", gpu) for gpu in ("GPU-a", "GPU-b")}
    given = {name: rest[4:] for name, rest in starts}
    for name, command in zip(sweep.names, sweep.commands):
        assert given[name] == shlex.split(command) + ["--runs", "runs", "--name", name, "--resume"]

    status, output = sweep(*GRID, "--jobs", "9", "--", "--wandb-project", "two words")  # the failed one again, and only that
    assert status == 0 and "6 of 6" in output and [name for name, _ in sweep.record("from")[6:]] == [bad]
    rest = sweep.record("from")[-1][1]
    assert rest[1] == "1" and rest[rest.index("--wandb-project") + 1] == "two words"
    assert sweep(*GRID) == (0, "all 6 runs are finished, in runs\n")
    assert sorted(name for name, _ in sweep.record("finished")) == sorted(sweep.names)


@pytest.mark.slow
def test_killed_sweeps_are_continued(sweep):
    first = sweep.start(*GRID, "--jobs", "2", LONG=sweep.names[0])
    sweep.wait_for(lambda: sweep.record("finished"))
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 75 and "save" in output and "failed:" not in output
    saved = sweep.record("saved")
    assert sweep.names[0] in dict(saved) and all(rest[1:] == [str(int(signal.SIGTERM))] for _, rest in saved)  # told once

    second = sweep.start(*GRID, "--jobs", "2", LONG=sweep.names[-1])
    sweep.wait_for(lambda: sweep.names[-1] in dict(sweep.record("from")))
    status, output = sweep(*GRID)  # a second sweep beside it
    assert status == 76 and "5 of 6 runs are finished, 0 failed, 1 run elsewhere" in output
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    sweep.wait_for(lambda: sweep.names[-1] in dict(sweep.record("saved")))  # Linux told it
    assert sweep(*GRID)[0] == 0
    sweep.check_continuous()


@pytest.mark.slow
def test_two_sweeps_started_together_run_nothing_twice(sweep):
    together = [sweep.start(*GRID, "--jobs", "2") for _ in range(2)]
    assert {process.wait(60) for process in together} <= {0, 76}
    sweep.check_continuous()


@pytest.mark.parametrize("flags, message", [
    (("fig99",), "fig99"), (("fig11", "--foo"), "unknown option --foo"), (("fig11", "--jobs", "0"), "--jobs must be"),
    (("--jobs",), "--jobs wants a value"), (("--print",), "which figure?"), (("fig11", "--seeds", "x"), "--seeds x"),
    (("fig11", "--slurm"), "no sbatch here"), (("fig11", "--", "--sparsity", "7"), "--sparsity must lie in")])
@pytest.mark.slow
def test_sweeps_refuse_in_one_line(flags, message, sweep, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "paste", "mkdir", "sed", "nproc"):  # and no sbatch
        (tools / name).symlink_to(shutil.which(name))
    status, output = sweep(*flags, PATH=str(tools))
    assert status == 2 and message in output and len(output.splitlines()) == 1, output


@pytest.mark.slow
def test_a_sweep_without_the_packages_says_so(sweep):
    assert sweep("list", PYTHON="false") == (2, "sweep.sh: false lacks this project's packages: activate its environment, or set PYTHON\n")


@pytest.mark.slow
def test_a_sweep_prints_plain_commands(sweep):
    for flags, more in (((), ""), (("--runs", "some where"), r" --runs some\ where")):
        assert sweep(*GRID, "--print", *flags)[1].splitlines() == [f"python train.py {command}{more}" for command in sweep.commands]
    assert not sweep.runs.exists()


@pytest.mark.slow
def test_a_sweep_takes_the_gpus_that_it_is_given(sweep):
    status, output = sweep(*GRID, "--seeds", "1", CUDA_VISIBLE_DEVICES="3,5")
    assert status == 0 and "2 at a time on 2 GPU(s)" in output and {rest[3] for _, rest in sweep.record("from")} == {"3", "5"}


# SLURM itself: authentication, a controller and one node of two cores on the loopback address, in a folder of their own.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
MaxArraySize=4
KillWait=5
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP
"""


@pytest.fixture
def slurm():
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # munged wants its socket within everybody's reach
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for port in sockets:
            port.bind(("127.0.0.1", 0))
        ports = [port.getsockname()[1] for port in sockets]
        for port in sockets:
            port.close()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, user=getpass.getuser(), controller_port=ports[0],
                                                             node_port=ports[1]))
        env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

        def ask(*command):
            return subprocess.run(command, env=os.environ | env, capture_output=True, text=True).stdout

        def daemon(*command):
            with open(folder / "log", "a") as log:
                process = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        daemon("munged", "--foreground", f"--socket={folder}/munge.socket", *(f"--{what}-file={folder}/munge.{what}"
                                                                               for what in ("key", "pid", "log", "seed")))
        daemon("slurmctld", "-D")
        daemon("slurmd", "-D", "-N", "localhost")
        def cancel():
            ask("scancel", "--user", getpass.getuser())
            for _ in range(100):  # slurmd leaves a job's processes behind when it goes first
                if not ask("squeue", "--noheader"):
                    break
                time.sleep(0.2)

        stack.callback(cancel)
        end = time.time() + 30
        while "idle" not in ask("sinfo", "--noheader", "--format", "%T"):
            assert time.time() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield env, ask


@pytest.mark.slow
def test_a_sweep_as_slurm_arrays(slurm, sweep):
    env, ask = slurm
    sweep.env |= env
    long, *_, bad = sweep.names
    flags = (*GRID, "--slurm", "--jobs", "2", "--time", "1", "--mem=1")  # a minute, which is to be warned of at once: within 30 s
    status, output = sweep(*flags, LONG=long, FAIL=bad)
    assert status == 0 and "6 are submitted now" in output and [int(n) for n in re.findall(r": (\d) runs of", output)] == [4, 2]
    assert "0 are submitted now" in sweep(*flags)[1]  # nothing is queued twice
    first, second = re.findall(r"job (\d+)", output)
    assert f"afterany:{first}_*" in ask("scontrol", "show", "job", second)  # the throttle holds over both arrays

    sweep.wait_for(lambda: len(sweep.record("finished")) == 3)  # the rest of the first array passes the long one
    status, output = sweep(*GRID, "--seeds", "1")
    assert status == 76 and "1 run elsewhere" in output  # a sweep here, beside the cluster's
    sweep.wait_for(lambda: sweep.record("saved"))
    assert sweep.record("saved")[0][0] == long and sweep.record("saved")[0][1][1:] == [str(int(signal.SIGUSR1))]
    sweep.wait_for(lambda: "BeginTime" in ask("squeue", "--noheader", "--format", "%r"))
    ask("scontrol", "update", f"JobId={first}_0", "StartTime=now")  # or SLURM waits two minutes before it starts it again
    # Both: on a machine that is busy squeue may get no answer in time, and what it prints is empty, too.
    sweep.wait_for(lambda: len(sweep.record("finished")) == 5 and not ask("squeue", "--noheader"))
    assert max(len([1 for n, _ in sweep.record("from") if n == name]) for name in sweep.names[1:]) == 1
    assert "status 1" in "".join(file.read_text() for file in (sweep.runs / "slurm").glob("*.log"))

    status, output = sweep(*flags)
    assert "5 of 6 runs are finished, 0 are queued or running, 1 are submitted now" in output
    sweep.wait_for(lambda: (sweep.runs / bad / "final.pt").exists())
    assert sweep(*flags) == (0, "all 6 runs are finished, in runs\n")


@pytest.mark.slow
@pytest.mark.parametrize("early, end, requeued", [
    ("", "exit 75", True), ("", "kill -USR1 $$", True), ("", "exit 1", False), ("", "kill -TERM $$", False), ("", "exit 0", False),
    ("kill -USR1 $PPID", "exit 0", True)])
def test_a_task_is_requeued_if_it_was_warned(early, end, requeued, tmp_path):
    """Warned while Python starts, it dies of the warning, and before that it does not begin: it must not be lost."""
    for name, lines in (("scontrol", f'echo "$@" >> {tmp_path}/asked'), ("python", end), ("hostname", early)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    for folder in ("slurm", "logs"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    (tmp_path / "runs/slurm/sweep.tsv").write_text("other\t--env x\nrun\t--env dog-run\n")
    env = os.environ | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", HERE / "sweep.sh", "--task", tmp_path / "runs/slurm/sweep.tsv", HERE, tmp_path / "python"], env=env)
    assert (tmp_path / "runs/logs/run.log").exists() != bool(early)
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "") == "requeue 7_1\n" * requeued


@pytest.mark.slow
def test_a_sweep_says_how_long_it_takes():
    show = (HERE / "sweep.sh").read_text().partition("\nshow() {")[2].partition("\n}\n")[0]
    begin = "set -euo pipefail; show() {" + show + "\n}; done=2 ended=2 spent=7200 elsewhere=0 stopping= shown= jobs=2 failed=(); "
    ten, last = "total=10 next=4 list=({1..10}) pid=(1 2)", "total=3 next=3 list=(1 2 3) pid=([1]=7)"  # `last` runs in the second slot
    for state, running, left in ((f"{ten} since=(0 0) SECONDS=0", "2 of 10 done, 2 running", "4 h 0"),  # eight of an hour each, two at a time
                                 (f"{ten} since=(0 600) SECONDS=1800", "2 of 10 done, 2 running", "3 h 35"),  # 50 minutes of them are done
                                 (f"{last} since=(9 0) SECONDS=3000", "2 of 3 done, 1 running", "0 h 10"),
                                 (f"{last} since=(9 0) SECONDS=9000", "2 of 3 done, 1 running", "0 h 0")):  # it takes longer than they did
        said = subprocess.run(["bash", "-c", f"{begin}{state}; show"], capture_output=True, text=True).stdout
        assert said == f"{running}, 0 failed, 0 run elsewhere; about {left} min left\n"


# --------------------------------------------------------------------------------------------------------- figures.py

def modules_of(cell):
    """module -> (type, regime, width, depth), of a figure's cell."""
    return {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale)
            for name, m in module_configs(figures.to_args(cell.flags, "dog-run", 0)).items()}


@pytest.mark.parametrize("name, varies, types, scales, still", [  # Section 3; Table 2 for what stands still
    ("fig2", "encoder", {1, 2, 3, 4, 5, 6}, {1}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig3", "encoder", {2, 4}, {1}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig4", "encoder", {2, 4, 6}, {1, 3, 5}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig5", "critic", {1, 2, 3, 4, 5, 6}, {1}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig6", "critic", {1, 2, 3, 4, 5, 6}, {1, 3, 5}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig7", "critic", {4, 6}, {5}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig8", "actor", {1, 2, 3, 4, 5, 6}, {1}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)}),
    ("fig9", "actor", {1, 3, 5}, {1, 3, 5}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)}),
    ("fig10", "actor", {3, 5}, {5}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)})])
def test_studies_of_one_module_hold_the_others_still(name, varies, types, scales, still):
    cells = figures.FIGURES[name].cells
    regimes = {"dense", "sst", "dst", "s2d", "d2s"}
    assert {modules_of(cell)[varies] for cell in cells} == {(t, r, s, s) for t in types for r in regimes for s in scales}
    for cell in cells:
        modules = modules_of(cell)
        arch_type, regime, scale, _ = modules.pop(varies)
        assert modules == still and cell.series == regime
        assert f"Type {arch_type}" in cell.panel + cell.x and (cell.x == f"×{scale:g}" or cell.panel == "" or len(scales) == 1)
        assert all(m.sparsity == 0.6 for m in module_configs(figures.to_args(cell.flags, "dog-run", 0)).values())


MST5 = {"encoder": (6, "dense", 5, 5), "critic": (6, "dst", 5, 5), "actor": (5, "sst", 5, 5)}
RES5 = {"encoder": (6, "dense", 5, 5), "critic": (6, "dense", 5, 5), "actor": (5, "dense", 5, 5)}


def simba(critic, actor, width, depth):
    return {"critic": ("simba", critic, width, depth), "actor": ("simba", actor, width, depth)}


@pytest.mark.parametrize("name, panel, series, x, algo, modules, rest", [  # Section 4, Appendices B.2.2 and E
    ("fig11", "", "MR.Q", "", "mrq", {"encoder": (4, "dense", 5, 5), "critic": (4, "dense", 5, 5), "actor": (3, "dense", 5, 5)}, {}),
    ("fig11", "", "MR.Q + Res", "", "mrq", RES5, {}),
    ("fig11", "", "MR.Q + Res + MST", "", "mrq", MST5, {"distribution": "er", "growth": "gradient", "sparsity": 0.6}),
    ("fig12", "distribution", "uniform", "", "mrq", MST5, {"distribution": "uniform", "growth": "gradient"}),
    ("fig12", "growth (critic)", "SET", "", "mrq", MST5, {"distribution": "er", "growth": "random"}),
    ("fig12", "sparsity", "sparsity 0.9", "", "mrq", MST5, {"sparsity": 0.9}),
    ("fig12", "sparsity", "sparsity 0 (dense)", "", "mrq", RES5, {}),
    ("fig13", "SAC, width", "plain", "×4", "sac", simba("dense", "dense", 4, 1), {}),
    ("fig13", "SAC, depth", "MST", "×4", "sac", simba("dst", "sst", 1, 4), {"sparsity": 0.8}),
    ("fig13", "DDPG, width and depth", "MST", "×3", "ddpg", simba("dst", "sst", 3, 3), {"sparsity": 0.8}),
    ("fig13", "DDPG, depth", "plain", "×1", "ddpg", simba("dense", "dense", 1, 1), {}),
    ("fig14", "", "critic DST, actor SST (MST)", "", "sac", simba("dst", "sst", 4, 3), {"sparsity": 0.8}),
    ("fig14", "", "critic SST, actor DST", "", "sac", simba("sst", "dst", 4, 3), {}),
    ("fig14", "", "critic DST, actor DST", "", "sac", simba("dst", "dst", 4, 3), {}),
    ("fig14", "", "critic SST, actor SST", "", "sac", simba("sst", "sst", 4, 3), {}),
    ("fig17", "", "post-layer", "×3", "mrq", {"encoder": (6, "dense", 3, 3), "critic": (6, "dense", 3, 3), "actor": (5, "dense", 3, 3)},
     {"residual": "post"}),
    ("fig17", "", "pre-layer", "×1", "mrq", {"encoder": (6, "dense", 1, 1), "critic": (6, "dense", 1, 1), "actor": (5, "dense", 1, 1)},
     {"residual": "pre"}),
    ("fig26", "MR.SAC, width", "plain", "×5", "mrsac", {"encoder": (6, "dense", 5, 1), "critic": (6, "dense", 5, 1), "actor": (5, "dense", 5, 1)}, {}),
    ("fig26", "MR.SAC, width and depth", "MST", "×5", "mrsac", MST5, {"sparsity": 0.6})])
def test_arms_are_what_they_are_called(name, panel, series, x, algo, modules, rest):
    cell, = [c for c in figures.FIGURES[name].cells if (c.panel, c.series, c.x) == (panel, series, x)]
    args = figures.to_args(cell.flags, "dog-run", 0)
    assert args.algo == algo and modules_of(cell) == modules
    assert {**vars(args), **vars(args.sparse)}.items() >= rest.items()


@pytest.mark.parametrize("name, types, scales", [
    ("fig2", (1, 2, 3, 4, 5, 6), (1,)), ("fig3", (2, 4), (1,)), ("fig4", (2, 4, 6), (1, 3, 5)), ("fig5", (1, 2, 3, 4, 5, 6), (1,)),
    ("fig6", (1, 2, 3, 4, 5, 6), (1, 3, 5)), ("fig7", (4, 6), (5,)), ("fig8", (1, 2, 3, 4, 5, 6), (1,)), ("fig9", (1, 3, 5), (1, 3, 5)),
    ("fig10", (3, 5), (5,))])
def test_a_study_of_one_module_varies_that_module_alone(name, types, scales):
    figure, regimes = figures.FIGURES[name], ("dense", "sst", "dst", "s2d", "d2s")
    flags = [f"{figure.sized}_{part}" for part in ("type", "regime", "scale")]
    assert sorted(tuple(cell.flags[flag] for flag in flags) for cell in figure.cells) == sorted(itertools.product(types, regimes, scales))
    strong = {} if figure.sized == "encoder" else {"encoder_type": 6, "encoder_scale": 3}  # Section 3.2, and 3.3 after it
    assert all({flag: value for flag, value in cell.flags.items() if flag not in flags} == strong for cell in figure.cells)
    by_type = len({cell.panel for cell in figure.cells}) > 1
    assert all(f"Type {cell.flags[flags[0]]}" in (cell.panel if by_type else cell.x) for cell in figure.cells)
    assert by_type == (name not in ("fig2", "fig5", "fig8")) and all(cell.series == cell.flags[flags[1]] for cell in figure.cells)


@pytest.mark.parametrize("name, varied", [  # what the cells of a laptop study differ in
    ("first", {"mst": {True}, "encoder_type": {6}, "critic_type": {6}, "actor_type": {5}, "learning_starts": {1000, 10000},
               "total_steps": {18000, 24000, 27000, 30000}, "eval_every": {3000}}),
    ("cup", {"algo": {"sac", "ddpg"}, "mst": {True}, "learning_starts": {1000}, "total_steps": {20000}, "eval_every": {4000}}),
    ("fig2", {"encoder_type": {1, 2, 3, 4, 6}}), ("fig3", {"encoder_type": {1, 2, 3, 4, 6}}),
    ("fig8", {"encoder_type": {6}, "actor_type": {3, 4, 5, 6}, "actor_scale": {5}}),
    ("fig9", {"encoder_type": {6}, "actor_type": {5}, "actor_scale": {5}, "actor_regime": {"dense", "sst", "dst", "s2d", "d2s"}}),
    ("fig12", {"mst": {True}, "depth_scale": {5}, "distribution": {"uniform"}, "growth": {"random"}}),
    ("fig13", {"algo": {"sac", "ddpg"}, "width_scale": {0.125, 0.5}, "depth_scale": {4}, "mst": {True}})])
def test_a_laptop_study_varies_what_it_says(name, varied):
    figure = figures.LAPTOP[name]
    short = {"width_scale": {0.25}, "learning_starts": {2000}, "total_steps": {12000}, "eval_every": {1000}}
    assert {flag: {cell.flags[flag] for cell in figure.cells if flag in cell.flags} for cell in figure.cells for flag in cell.flags} == short | varied
    deep = "five times as deep" in figure.shows
    assert deep == any("_scale" in flag and 5 in values for flag, values in varied.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        figure.cells[0].x = "×9"  # cells are shared between figures
    for part, whole in (("fig3", "fig2"), ("fig7", "fig6"), ("fig10", "fig9")):  # drawn from the same runs
        assert list(figures.runs(figures.LAPTOP[part])) == list(figures.runs(figures.LAPTOP[whole]))
    assert "five times as deep" in figures.LAPTOP["fig10"].shows


@pytest.mark.slow
def test_figures_have_as_many_runs_as_the_text_says():
    eight, five = 8 * 2, 5 * 2  # seeds × tasks
    wanted = {"fig2": 6 * 5 * eight, "fig3": 2 * 5 * eight, "fig4": 3 * 5 * 3 * eight, "fig5": 480, "fig6": 6 * 5 * 3 * eight,
              "fig7": 2 * 5 * eight, "fig8": 480, "fig9": 3 * 5 * 3 * eight, "fig10": 2 * 5 * eight, "fig11": 3 * eight,
              "fig12": 7 * 8, "fig13": 2 * 2 * 7 * eight, "fig14": 4 * 8, "fig17": 4 * eight, "fig26": 2 * 7 * five}
    names = {name: [run.name for run in figures.runs(figure)] for name, figure in figures.FIGURES.items()}
    assert {name: len(set(of)) for name, of in names.items()} == wanted
    assert figures.FIGURES["fig12"].tasks == ("dog-run",) and figures.FIGURES["fig14"].tasks == ("humanoid-run",)
    distinct = set().union(*names.values())
    shared = (wanted["fig3"] + wanted["fig7"] + wanted["fig10"]  # parts of Figs. 2, 6 and 9
              + 15 * eight + 30 * eight + 15 * eight  # scale 1 of Figs. 4, 6 and 9: Figs. 2, 5 and 8
              + 2 * eight  # the default critic and actor on the Type 6 encoder at scale 3: Figs. 4, 5 and 8
              + 2 * 8)  # MST and + Res at scale 5 on dog-run: Figs. 11 and 12
    assert len(distinct) == sum(wanted.values()) - shared


@pytest.mark.parametrize("size", ["", "--smoke", "--laptop"])
@pytest.mark.slow
def test_a_run_of_several_figures_has_one_name(size):
    options = figures.options(argparse.ArgumentParser()).parse_args([size] if size else [])
    meant = {}
    for name, figure in figures.chosen(options).items():
        for run in figures.runs(figure, tasks=figure.tasks[:1], seeds=[0]):
            meant.setdefault(repr((run.task, effective(run.args))), set()).add(run.name)
            assert run.name == run_name(run.args)
    assert all(len(names) == 1 for names in meant.values())
    assert len(set().union(*meant.values())) == len(meant)  # ... and no two runs share one
    for cell in [cell for figure in figures.chosen(options).values() for cell in figure.cells][::17]:
        args = figures.to_args(cell.flags, "dog-run", 3)
        assert run_name(parse(figures.arguments(args))) == run_name(args)


def test_small_forms_keep_what_a_cell_is_about():
    for smoke, laptop in ((False, False), (True, False), (False, True)):
        chosen = figures.chosen(argparse.Namespace(smoke=smoke, laptop=laptop))
        assert all(figure.kind in ("curves", "points") and len(figure.shows) > 20 for figure in chosen.values())
    assert figures.hours("fig2", [None] * 480, argparse.Namespace(smoke=True)) == 480 * 6 / 2 / 3600  # six seconds a run, two at a time
    for name, figure in figures.FIGURES.items():
        small = figures.smoke(figure)
        for cell, tiny in zip(figure.cells, small.cells, strict=True):
            own, shrunk = (module_configs(figures.to_args(c.flags, "dog-run", 0)) for c in (cell, tiny))
            for module in own:
                assert [getattr(own[module], part) == getattr(shrunk[module], part)
                        for part in ("arch_type", "regime", "depth_scale", "residual", "sparsity")] == [True] * 5
                assert shrunk[module].width_scale <= own[module].width_scale / 3
    mst, = [c for c in figures.LAPTOP["fig11"].cells if c.series == "MR.Q + Res + MST"]
    assert modules_of(mst) == {"encoder": (6, "dense", 0.25, 5), "critic": (6, "dst", 0.25, 5), "actor": (5, "sst", 0.25, 5)}
    critics = [modules_of(c) for c in figures.LAPTOP["fig7"].cells]
    assert [c["critic"] for c in critics] == [(6, regime, 0.25, 5) for regime in ("dense", "sst", "dst", "s2d", "d2s")]
    assert all(c["encoder"] == (6, "dense", 0.25, 3) and c["actor"] == (3, "dense", 0.25, 1) for c in critics)
    assert all(figure.tasks == (("walker-walk",) if name.startswith("fig") else figure.tasks) and figure.seeds >= (3 if name in claims.PUBLISHED else 5)
               for name, figure in figures.LAPTOP.items())


def run_main(module, monkeypatch, capsys, *argv):
    """(status or message, stdout lines, stderr lines) of a command line of figures.py or plot.py."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    try:
        status = module.main()
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.slow
def test_figures_print_commands_and_names_in_one_order(monkeypatch, capsys):
    narrowed = ("fig11", "fig12", "--tasks", "dog-run", "--seeds", "4,6", "--steps", "20000")
    _, commands, _ = run_main(figures, monkeypatch, capsys, "commands", *narrowed)
    _, names, _ = run_main(figures, monkeypatch, capsys, "names", *narrowed)
    assert "--env dog-run --total-steps 20000 --mst --scale 5 --seed 6" in commands
    assert len(set(commands)) == len(commands) == 2 * (3 + 5)  # three arms, and of Fig. 12's seven cells five more
    assert [run_name(parse(command.split())) for command in commands] == names
    _, commands, _ = run_main(figures, monkeypatch, capsys, "commands", "fig11", "--seeds", "1", "--more", "--precision bf16 --scale 3")
    assert "--env dog-run --precision bf16 --mst --scale 3 --seed 0" in commands and len(commands) == 6
    for apart in (("fish-swim,dog-trot",), ("fish-swim", "dog-trot")):
        _, names, _ = run_main(figures, monkeypatch, capsys, "names", "fig11", "--seeds", "1", "--tasks", *apart)
        assert [name.split("__")[0] for name in names] == ["fish-swim", "dog-trot"] * 3
    _, rows, _ = run_main(figures, monkeypatch, capsys, "list")
    assert all(any(row.split()[0] == name for row in rows[1:-2]) for name in figures.FIGURES) and "4,100 distinct" in rows[-1]
    assert any("1,440" in row and "critic 2.6 M / 33 M / 139 M" in row for row in rows)


@pytest.mark.parametrize("module", [figures, plot])
def test_every_option_says_what_it_is_for(module, monkeypatch):
    def looked_at(parser):
        assert all(action.help or action.choices for action in parser._actions)
        assert {action.dest: action.nargs for action in parser._actions if action.dest in ("smoke", "laptop", "figures", "paths")}.items() >= {
            ("smoke", 0), ("laptop", 0), ("figures", "*") if module is figures else ("paths", "*")}
        raise SystemExit("looked at")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", looked_at)
    with pytest.raises(SystemExit, match="looked at"):
        module.main()


@pytest.mark.parametrize("argv, message", [
    (("commands", "fig1"), "unknown figure 'fig1': choose one of fig2"), (("names", "fig14", "--laptop"), "no laptop study"),
    (("commands",), "name a figure"), (("commands", "fig2", "--seeds", "a"), "--seeds a"), (("names", "fig2", "--seeds", "0"), "--seeds 0"),
    (("commands", "fig2", "--steps", "50"), "--total-steps 50 trains nothing"), (("names", "fig2", "--more", "--seed 3"), "--more cannot hold"),
    (("names", "fig2", "--tasks", "dog-run,dog-rum"), "'dog-rum': did you mean dog-run"), (("names", "fig2", "--tasks", ","), "--tasks names no task")])
def test_figures_refuse_in_one_line(argv, message, monkeypatch, capsys):
    status, out, _ = run_main(figures, monkeypatch, capsys, *argv)
    assert message in status and "\n" not in status and not out


@pytest.mark.slow
def test_figures_and_plots_need_no_torch():
    subprocess.run([sys.executable, "-c", "import figures, plot, sys; sys.exit('torch' in sys.modules)"], cwd=HERE, check=True)


def test_the_laptop_arms_of_fig13_are_what_they_are_called():
    sizes = {("width", "×1"): (0.125, 1), ("width", "×4"): (0.5, 1), ("depth", "×1"): (0.125, 1), ("depth", "×4"): (0.125, 4)}
    for cell in figures.LAPTOP["fig13"].cells:
        algo, dimension = cell.panel.split(", ")
        regimes = {"MST": ("dst", "sst"), "plain": ("dense", "dense")}[cell.series]
        assert cell.flags["algo"] == algo.lower() and modules_of(cell) == simba(*regimes, *sizes[dimension, cell.x])


# -------------------------------------------------------------------------------------------------------- estimate.py

@pytest.mark.slow
def test_sizes_are_those_of_the_networks():
    flags = {repr(cell.flags): cell.flags for figure in figures.FIGURES.values() for cell in figure.cells}
    counted = {}
    for task, cell in itertools.product(("dog-run", "humanoid-run"), flags.values()):
        args = figures.to_args(cell, task, 0)
        counted[repr((args.algo, task, [(m.width_scale, m.depth_scale) for m in module_configs(args).values()]))] = args
    for args in counted.values():
        (obs, action), modules = estimate.SHAPES[args.env], module_configs(args)
        with torch.device("meta"):
            if args.algo in ("sac", "ddpg"):
                sizes = {name: networks.scaled_size(1, m.width_scale, m.depth_scale, *networks.SIMBA_SIZES[name]) for name, m in modules.items()}
                actor = networks.SimbaGaussian if args.algo == "sac" else networks.SimbaMLP
                built = {"critic": networks.SimbaCritic(obs, action, *sizes["critic"]), "actor": actor(obs, action, *sizes["actor"])}
            else:
                encoder = networks.Encoder(obs, action, **modules["encoder"].size())
                actor = networks.GaussianActor if args.algo == "mrsac" else networks.Actor
                built = {"encoder": encoder, "critic": networks.Critic(encoder.zsa_dim, **modules["critic"].size()),
                         "actor": actor(encoder.zs_dim, action, **modules["actor"].size())}
                del encoder.model  # the prediction head is counted apart
        assert estimate.sizes(args) == {name: sum(p.numel() for p in network.parameters()) for name, network in built.items()}
    assert [estimate.millions(x) for x in (154.27, 16.56, 1.323, 0.2, 0.045)] == ["154 M", "17 M", "1.3 M", "0.2 M", "45 k"]


@pytest.mark.slow
def test_what_was_timed_is_what_the_readme_says():
    """TIMED: the README's milliseconds, at the sizes that they were timed with."""
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in (HERE / "README.md").read_text().splitlines()}
    for number, scale in enumerate((1, 3, 5)):
        sizes = estimate.sizes(parse(["--mst", "--scale", str(scale), "--env", "dog-run"]))  # bench.py's dense is MST's architecture
        for name, column in (("encoder", 2), ("critic", 3), ("actor", 4)):
            timed = sizes[name] / 1e6, float(rows[f"MR.Q, scale {scale}, dense"][column])
            assert estimate.TIMED[name][number] == pytest.approx(timed, rel=0, abs=0.006)
    for number, (label, flags) in enumerate((("SAC, 4.4 M, dense", ()), ("SAC, 208 M, dense", ("--width-scale", "4", "--depth-scale", "3")))):
        sizes = estimate.sizes(parse(["--algo", "sac", "--env", "humanoid-run", *flags]))
        assert estimate.TIMED["agent"][number] == pytest.approx((sum(sizes.values()) / 1e6, float(rows[label][0])), rel=0, abs=0.006)


@pytest.mark.slow
def test_estimates_pass_through_what_was_timed():
    assert estimate.step_ms(parse(["--scale", "3"])) == pytest.approx(595 + 267 + 191, rel=0.01)  # README, Speed
    assert estimate.step_ms(parse(["--algo", "sac", "--env", "humanoid-run"])) == pytest.approx(85, rel=0.01)
    assert 595 < estimate.step_ms(parse(["--encoder-scale", "4"])) < 2420 < estimate.step_ms(parse(["--encoder-scale", "6"]))


# ------------------------------------------------------------------------------------------------------- aggregate.py

def strata(*tasks):
    """Tasks of one value a seed -> (1 point, seeds, 1 episode) each."""
    return [np.array(values, float).reshape(1, -1, 1) for values in tasks]


def test_interquartile_means_by_hand():
    assert aggregate.iqm(strata([9, 1, 2, 3, 4, 5, 6, 100]))[0] == [4.5]  # (3 + 4 + 5 + 6) / 4
    assert aggregate.iqm(strata([0, 3, 4, 8, 99]))[0] == [5.0]  # a quarter of five: one at each end
    assert aggregate.iqm(strata([0, 10, 20, 30], [1, 11, 21, 31]))[0] == [15.5]  # (10 + 11 + 20 + 21) / 4, all runs together
    episodes = [np.array([[[0, 50, 60, 70], [61, 62, 63, 1000]]], float)]
    assert aggregate.iqm(episodes)[0] == [61.5]  # (60 + 61 + 62 + 63) / 4: two seeds of four episodes, pooled
    centre, low, high = aggregate.mean_sd(strata([1, 3], [10, 18]))
    assert centre == [8] and [high[0] - 8, 8 - low[0]] == [pytest.approx(math.sqrt((2 + 32) / 2))] * 2  # variances within a task
    assert np.isnan(aggregate.iqm(strata([7]))[1:]).all() and np.isnan(aggregate.mean_sd(strata([7]))[1:]).all()  # one seed
    for few in (strata([7, 9]), strata([7, 9], [1, 2])):
        assert not np.isnan(aggregate.iqm(few)).any() and not np.isnan(aggregate.mean_sd(few)).any()  # two have an interval


def test_intervals_are_those_of_scipy_at_the_widened_level():
    values = np.random.default_rng(3).normal(100, 10, 8)
    centre, low, high = (part[0] for part in aggregate.iqm(strata(values)))
    beyond = aggregate.tail([8])
    assert beyond == pytest.approx(scipy.stats.norm.sf(math.sqrt(8 / 7) * 2.364624), rel=1e-5)  # Student's t, 7 degrees
    theirs = scipy.stats.bootstrap((values,), lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis), method="percentile",
                                   n_resamples=20000, confidence_level=1 - 2 * beyond, rng=np.random.default_rng(0))
    assert centre == pytest.approx(scipy.stats.trim_mean(values, 0.25))
    assert [low, high] == pytest.approx(list(theirs.confidence_interval), abs=0.8) and high - low > 10


@pytest.mark.parametrize("seeds, tasks", [(5, 1), (8, 1), (8, 2)])
def test_95_percent_intervals_cover_about_95_percent(seeds, tasks, monkeypatch):
    monkeypatch.setattr(aggregate, "RESAMPLES", 2000)
    rng = np.random.default_rng(seeds + tasks)
    points = 800
    _, low, high = aggregate.iqm([rng.normal(0, 1, (points, seeds, 1)) for _ in range(tasks)])  # every true IQM is 0
    assert 0.925 < ((low <= 0) & (0 <= high)).mean() < 0.985


def test_seeds_are_resampled_within_their_task():
    _, low, high = aggregate.iqm(strata([0, 1] * 4, [100, 101] * 4))
    assert high[0] - low[0] < 60  # pooled resampling would draw 12 of 16 from one task now and then: wider than 90
    clustered = np.repeat(np.random.default_rng(0).normal(0, 1, (1, 8, 1)), 50, 2)
    once, many = aggregate.iqm([clustered[:, :, :1]]), aggregate.iqm([clustered])
    assert many[2] - many[1] == pytest.approx(once[2] - once[1], rel=0.25)  # 50 equal episodes are no 400 seeds
    clustered[:, :, 0] = -9
    assert np.concatenate(aggregate.iqm([clustered])[1:]) == pytest.approx(np.concatenate(many[1:]), abs=0.1)  # ... and one odd episode does not matter


def write_run(folder, args, rows, columns=("return",), tail="", config=None):
    """A run's folder as train.py writes it: rows of (agent_step, values...)."""
    folder = Path(folder) / run_name(args)
    folder.mkdir(parents=True)
    lines = [",".join(["agent_step", "frames", *columns])] + [",".join(map(str, (row[0], 2 * row[0], *row[1:]))) for row in rows]
    (folder / "eval.csv").write_text("\n".join(lines) + "\n" + tail)
    (folder / "config.json").write_text(json.dumps(config or dataclasses.asdict(args)))
    return folder


def test_cut_and_repeated_rows(tmp_path):
    folder = write_run(tmp_path, flags_to_args(), [(5000, 20), (0, 1.5), (5000, 30), (10000, "x")], tail="15000,30000,4")
    run = aggregate.read_run(folder, ["return"])
    assert run.table["agent_step"].tolist() == [0, 5000] and run.table["return"].tolist() == [1.5, 30]
    assert run.last_step == 5000 and "2 rows cut short or broken" in run.notes[0]  # "4" may have been "432"
    (folder / "eval.csv").write_text("")
    with pytest.raises(ValueError, match="no columns agent_step"):
        aggregate.read_run(folder, ["return"])


@pytest.mark.slow
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_not_lost(tmp_path):
    wanted = {run_name(args): args for args in (flags_to_args("--seed", str(seed), "--total-steps", "20000") for seed in range(3))}
    broken, whole, _ = wanted
    write_run(tmp_path, wanted[whole], [(0, 1), (20000, 2)])
    write_run(tmp_path, wanted[broken], [])
    (tmp_path / broken / "eval.csv").write_text("step,value\n1,2\n")
    runs, wrong, told = aggregate.gather(wanted, [str(tmp_path)], ["return"])
    assert list(runs) == [whole] and wrong == {broken: "not readable", max(wanted): "missing"} and len(told) == 1
    assert broken in told[0] and "no columns agent_step" in told[0] and told[0].endswith("left out")


def test_curves_count_the_seeds_that_are_there():
    def run(steps, values):
        return aggregate.Run("", {"agent_step": np.array(steps), "frames": 2.0 * np.array(steps), "m": np.array(values, float)})

    one, two, three = run([0, 10, 20], [math.nan, 3, 5]), run([0, 10], [math.nan, 5]), run([0, 10, 20], [math.nan, 100, 7])
    frames, centre, low, high = aggregate.curve([[one, two, three]], ("m",), aggregate.mean_sd, False)
    assert frames.tolist() == [20, 40] and centre.tolist() == [36, 6]  # NaN at step 0: nothing to measure; then 3, then 2 seeds
    assert high - centre == pytest.approx([np.std([3, 5, 100], ddof=1), math.sqrt(2)])
    assert aggregate.curve([[one], [run([0, 10], [math.nan] * 2)]], ("m",), aggregate.iqm, False) is None
    assert aggregate.curve([[one]], ("other",), aggregate.iqm, False) is None
    assert aggregate.final([[one, two, three]], ("m",), 20, aggregate.mean_sd, False)[0] == 6  # two is not finished


@pytest.mark.slow
def test_ten_thousand_runs_aggregate_within_a_minute(tmp_path):
    columns = ["return", *(f"m{number}" for number in range(60))]
    rows = [(step, *np.random.default_rng(step).normal(size=61).round(4)) for step in range(0, 505000, 5000)]
    wanted = {}
    default = flags_to_args()
    source = write_run(tmp_path, default, rows, columns)
    for seed in range(200):  # a fiftieth
        args = dataclasses.replace(default, seed=1 + seed)
        wanted[run_name(args)] = args
        folder = tmp_path / run_name(args)
        folder.mkdir()
        os.link(source / "eval.csv", folder / "eval.csv")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    began = time.process_time()
    runs, wrong, told = aggregate.gather(wanted, [str(tmp_path)], ["return"])
    for group in range(25):
        assert len(aggregate.curve([list(runs.values())[8 * group:8 * group + 8]], ("return",), aggregate.iqm, False)[0]) == 101
    assert time.process_time() - began < 60 / 50 * 4 and len(runs) == 200 and not wrong and not told  # four times the room: CI


def test_the_interval_over_tasks_is_widened_for_the_seeds_of_one():
    assert aggregate.tail([8, 8]) == pytest.approx(scipy.stats.norm.sf(math.sqrt(8 / 7) * scipy.stats.t.ppf(0.975, 14)))


# ------------------------------------------------------------------------------------------------------------ plot.py

@pytest.mark.slow
def test_a_figure_shows_its_runs_and_names_the_rest(tmp_path, monkeypatch, capsys):
    options = ("fig11", tmp_path / "runs", "--laptop", "--out", tmp_path, "--seeds", "3")
    columns = ["return", "critic/srank_q1", "critic/srank_q2", "critic/dormant", "actor/dormant"]
    kept = {}
    for run in figures.runs(figures.LAPTOP["fig11"], seeds=range(3)):
        cell, seed, args = run.cell, run.seed, run.args
        rows = [(step, step / 100 + 10 * seed + len(cell.series), 50, 60 + seed, 0.1, 0.2) for step in (0, 6000, 12000)]
        if (cell.series, seed) == ("MR.Q + Res", 2):
            rows = rows[:2]  # unfinished
        if (cell.series, seed) != ("MR.Q", 1):  # missing
            kept[cell.series, seed] = write_run(tmp_path / "runs", args, rows, columns)
    config = json.loads((kept["MR.Q", 2] / "config.json").read_text())
    config["critic"]["critic_regime"] = "dst"
    (kept["MR.Q", 2] / "config.json").write_text(json.dumps(config))
    with open(kept["MR.Q + Res + MST", 0] / "eval.csv", "a") as file:
        file.write("13000,26")

    pages = []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    status, out, told = run_main(plot, monkeypatch, capsys, *options, "--save", tmp_path / "fig11.csv")
    assert not status and (tmp_path / "fig11-laptop.png").stat().st_size > 10_000 and (tmp_path / "fig11-laptop.pdf").exists()
    page, = pages
    first = page.axes[0]
    (x, y), = [line.get_data() for line in first.get_lines() if line.get_color() == plot.STYLES["MR.Q + Res + MST"][0]]
    assert list(x) == [0, 12000, 24000] and list(y) == [26, 86, 146]  # the IQM of three is their mean: 16 + 10 + step / 100
    (x, y), = [line.get_data() for line in page.axes[1].get_lines() if line.get_color() == plot.STYLES["MR.Q"][0]]
    assert list(y) == [55.0, 55.0, 55.0]  # both Q's SRank, of seed 0 alone
    assert first.get_ylim()[0] < 0 and first.get_ylim()[1] > 150  # no marker is cut
    assert first.get_xlabel() == "environment frames" and "return" in first.get_ylabel()
    assert [text.get_text() for text in page.legends[0].get_texts()] == ["MR.Q", "MR.Q + Res", "MR.Q + Res + MST"]
    said = page.texts[-1].get_text().replace("\n", " ")
    assert all(part in said for part in ("δ = 0.01", "τ = 0.025", "batch of 2,048", "interval, up to 3 seeds a task", "3 of 9 runs",
                                         "missing: MR.Q, walker-walk, seed 1", "of other settings: MR.Q, walker-walk, seed 2", "unfinished: MR.Q + Res, walker-walk, seed 2"))
    assert any("config.json says --critic-regime dst" in line for line in told) and any("1 row cut short" in line for line in told)

    *_, again = run_main(plot, monkeypatch, capsys, options[0], tmp_path / "fig11.csv", *options[2:], "--statistic", "mean-sd")[2], pages[1]
    assert [list(line.get_ydata()) for line in again.axes[0].get_lines()] == [list(line.get_ydata()) for line in first.get_lines()]


def check_layout(page, blank=0.4):
    """No text leaves the page, none lies on another; the blanks between the parts are small, the panels large enough."""
    page.canvas.draw()
    inch = page.dpi
    beyond = {label for axes in page.axes for axis in (axes.xaxis, axes.yaxis)  # ticks that are not drawn
              for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs())
              if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())}
    texts = [text for text in page.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond]
    boxes = [text.get_window_extent() for text in texts]
    outside = [t.get_text() for t, b in zip(texts, boxes) if b.x0 < 0 or b.y0 < 0 or b.x1 > page.bbox.x1 or b.y1 > page.bbox.y1]
    crossing = [(s.get_text(), t.get_text()) for (s, a), (t, b) in itertools.combinations(zip(texts, boxes), 2) if a.overlaps(b)]
    over = [t.get_text() for t, b in zip(texts, boxes) for axes in page.axes if axes is not t.axes and b.overlaps(axes.get_window_extent())]
    assert not outside and not crossing and not over
    assert all(text.get_fontsize() < 10 for text in texts)  # points, on a page of 7 to 14 inches
    legend, caption = page.legends[0].get_window_extent(), page.texts[-1].get_window_extent()
    assert abs(legend.x0 + legend.x1 - page.bbox.x1) < 0.1 * inch and caption.x0 < 0.2 * inch  # in the middle; at the left
    tight = [axes.get_tightbbox() for axes in page.axes]
    assert min(box.y0 for box in tight) - caption.y1 < blank * inch and legend.y0 - max(box.y1 for box in tight) < 0.3 * inch
    assert all(1.5 < axes.get_window_extent().width / inch < 7 and 1.5 < axes.get_window_extent().height / inch < 4 for axes in page.axes)
    assert page.bbox.x1 - max(box.x1 for box in tight) < 0.3 * inch


def check_drawing(page):
    """What is drawn looks as the legend says, lies within its axes and fills them."""
    def look(line):
        return line.get_color(), line.get_marker(), line.get_linestyle(), line._unscaled_dash_pattern  # a style of one's own is "--" to all

    told = {look(handle) for handle in page.legends[0].legend_handles}
    across, scales = all(axes.get_title() for axes in page.axes), {}
    for axes in page.axes:
        spec = axes.get_subplotspec()
        ours = [container.lines[0] for container in axes.containers] or list(axes.get_lines())
        assert ours and {look(line) for line in ours} <= told and len(told) == len(page.legends[0].legend_handles)
        assert all(1 <= line.get_linewidth() <= 2 and 4 <= line.get_markersize() <= 5 for line in ours if line.get_color() != "black")
        for band in axes.collections:
            if isinstance(band, PolyCollection):
                assert band.get_alpha() <= 0.2 and set(band.get_linewidth()) == {0}  # a curve stays visible under another's band
        for container in axes.containers:
            (whiskers,), caps = container.lines[2], container.lines[1]
            assert whiskers.get_linewidth()[0] < container.lines[0].get_linewidth() and caps
        low, high = axes.dataLim.y0, axes.dataLim.y1
        assert axes.get_ylim()[0] < low and axes.get_ylim()[1] > high > axes.get_ylim()[0] + 0.6 * np.ptp(axes.get_ylim())
        (left, right), ticks = axes.get_xlim(), axes.get_xticks()
        if axes.containers:
            assert [left, right] == [-0.5, len(ticks) - 0.5]
        else:
            last = max(line.get_xdata()[-1] for line in ours)
            assert -0.1 * last < left < 0 and last < right < 1.1 * last
        under = [other for other in map(Axes.get_subplotspec, page.axes)
                 if other.colspan.start == spec.colspan.start and other.rowspan.start > spec.rowspan.start]
        assert bool(axes.get_xlabel()) == (not under)
        assert axes.xaxis.get_tick_params()["labelbottom"] == (across or not under)
        place = (spec.rowspan.start, axes.get_title()) if across else spec.rowspan.start  # a task each, with its own
        label = axes.get_ylabel().split("\n")[-1] or label  # without one, the panel before has it
        scales.setdefault((place, label), set()).add(axes.get_ylim())
    assert all(len(limits) == 1 for limits in scales.values())


@pytest.mark.parametrize("name, seeds, more", [
    ("fig2", 1, ()), ("fig4", 1, ()), ("fig7", 1, ()), ("fig11", 2, ()), ("fig12", 1, ()), ("fig14", 2, ()),
    ("fig2", 1, ("dog-walk", "dog-trot")), ("fig14", 2, ("dog-walk", "dog-trot")), ("fig14", 2, ("dog-walk", "dog-trot", "dog-run"))])
@pytest.mark.slow
def test_every_layout_fits_its_page(name, seeds, more, monkeypatch, tmp_path):
    """Figures of every kind, drawn from made-up runs of which three are missing."""
    def made_up(wanted, paths, columns):
        steps = np.arange(0, 500001, 50000)
        draw = np.random.default_rng(0).uniform
        return {run: aggregate.Run(run, {"agent_step": steps, "frames": 2.0 * steps} | {
            column: (1e-6 if "dormant" in column else 1e-3) * steps * draw(0.9, 1.0) for column in columns}) for run in list(wanted)[:-3]}, \
            dict.fromkeys(list(wanted)[-3:], "missing"), []

    monkeypatch.setattr(plot, "gather", made_up), monkeypatch.setattr(aggregate, "RESAMPLES", 50)
    figure = figures.FIGURES[name]
    names = [*figure.tasks, *more]
    page, _ = plot.draw_figure(name, plot.command_line().parse_args(
        [name, "runs", "--seeds", str(seeds), "--tasks", *names, "--out", str(tmp_path)]))
    check_layout(page)
    check_drawing(page)
    panels, tasks = len({cell.panel for cell in figure.cells}) * len(figure.measures), len(names) + (len(names) > 1)
    across = panels == 1
    assert len(page.axes) == panels * tasks
    shape = [len({getattr(axes.get_subplotspec(), span).start for axes in page.axes}) for span in ("rowspan", "colspan")]
    assert shape == ({1: [1, 1], 3: [1, 3], 4: [2, 2], 5: [2, 3]}[tasks] if across else [tasks, panels])
    for axes in page.axes:
        column = axes.get_subplotspec().colspan.start
        if axes.get_title() and not across:  # the measure, where there are several
            assert axes.get_title().endswith(figure.measures[column % len(figure.measures)].label) == (len(figure.measures) > 1)
        if axes.get_ylabel():
            assert ("\n" in axes.get_ylabel()) == (column == 0 and not across)  # the task, once a row
        if axes.containers:  # points: a line through sizes, none through types
            sizes = figure.cells[0].x.startswith("×")
            assert all((container.lines[0].get_linestyle() == "None") != sizes for container in axes.containers)
            assert axes.get_xlabel() in ("", f"scale, and parameters of the {figure.sized}" if sizes else f"architecture of the {figure.sized}")
        lines = [container.lines[0].get_xdata() for container in axes.containers]
        for place in axes.get_xticks() if lines else ():  # the points of a place stand around its tick, apart from one another
            beside = np.sort(np.concatenate(lines)[np.abs(np.concatenate(lines) - place) < 0.5])
            assert np.ptp(beside) < 0.7 and (np.diff(beside) > 0.05).all()
            assert beside.mean() == pytest.approx(place) or len(beside) < len(axes.containers)  # some are missing
            assert axes.get_xlim()[0] < beside[0] - 0.1 and beside[-1] + 0.1 < axes.get_xlim()[1]
    plot.plt.close(page)


@pytest.mark.slow
def test_a_study_beside_published_curves_has_no_panel_of_all_tasks(tmp_path, monkeypatch, capsys):
    """Nothing is published of all tasks together; a file of other tasks changes nothing."""
    pages, warned = [], []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    for theirs in ({"cheetah-run": 20000}, {"walker-walk": 20000, "cartpole-swingup": 2000}):
        (tmp_path / "theirs.csv").write_text("env,agent_step,seed,return\n" + "".join(
            f"{task},{step},0,7\n" for task, every in theirs.items() for step in range(0, 20001, every)))
        status, _, told = run_main(plot, monkeypatch, capsys, "mrq", HERE / "results/mrq-laptop.csv", "--laptop", "--tasks", "cartpole-swingup",
                                   "walker-walk", "--reference", tmp_path / "theirs.csv", "--out", tmp_path)
        warned.append(any("left out" in line for line in told))
        assert not status
        check_layout(pages[-1], blank=0.25)
    assert [[axes.get_title() for axes in page.axes] for page in pages] == [["all tasks", "cartpole-swingup", "walker-walk"], ["cartpole-swingup", "walker-walk"]]
    assert [[[text.get_text() for text in legend.get_texts()] for legend in page.legends] for page in pages] == [[["this code"]], [["this code", "published"]]]
    assert ["all tasks" in "".join(text.get_text() for text in page.texts) for page in pages] == warned == [True, False]
    theirs = [[tuple(line.get_ydata()) for line in axes.get_lines() if line.get_color() == "black"] for axes in pages[1].axes]
    assert theirs == [[(7,) * 11], [(7, 7)]]
    dots = [[dots.get_offsets().tolist() for dots in axes.collections if isinstance(dots, PathCollection)] for axes in pages[1].axes]
    assert dots == [[], [[[0, 7], [40000, 7]]]]  # few points are told from a curve


@pytest.mark.slow
def test_any_runs_compared_with_published_ones(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        for flags in ((), ("--critic-regime", "dst")):
            write_run(tmp_path / "runs", flags_to_args(*flags, "--seed", str(seed)), [(0, 1), (5000, 3 + seed)])
    points = [(task, step, seed, step / 1000 + seed) for task in ("dog-run", "dog-trot") for step in (0, 5000, 9000) for seed in (0, 2)]
    (tmp_path / "reference.csv").write_text("env,agent_step,seed,return\n" + "".join("{},{},{},{}\n".format(*point) for point in points))
    (tmp_path / "two.csv").write_text("env,algo,env_step,seed,return\n" + "".join(  # a frame a step, and of two algorithms
        f"{task},{algo},{2 * step},{seed},{value + plus}\n" for algo, plus in (("A", 0), ("B", 1)) for task, step, seed, value in points))
    pages = []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    status, _, told = run_main(plot, monkeypatch, capsys, "curves", *(tmp_path / "runs").iterdir(), tmp_path / "none", "--out", tmp_path,
                               "--reference", tmp_path / "reference.csv")
    page, = pages
    curves = {tuple(line.get_ydata()) for line in page.axes[0].get_lines()}
    assert not status and curves == {(1, 6), (1, 3.5)} and "none" in told[0]  # the reference no further than our 10,000 frames
    assert {text.get_text() for text in page.legends[0].get_texts()} == {"default", "critic-regime=dst", "published"}
    check_layout(page, blank=0.25)
    assert not run_main(plot, monkeypatch, capsys, "curves", *(tmp_path / "runs").iterdir(), "--out", tmp_path, "--reference", tmp_path / "two.csv")[0]
    check_layout(pages[1])
    check_drawing(pages[1])
    published = [tuple(line.get_ydata()) for line in pages[1].axes[0].get_lines() if line.get_color() == "black"]
    assert sorted(published) == [(1, 6), (2, 7)]
    assert [text.get_text() for text in pages[1].legends[0].get_texts()][2:] == ["published A", "published B"]


@pytest.mark.slow
@pytest.mark.parametrize("argv, message", [
    (("fig1", "."), "unknown figure 'fig1'"), (("fig6", "empty"), "none of the 1440 runs of fig6 is there"), (("fig6", "no"), "no: no such folder"),
    (("fig6", __file__), "is no file that --save wrote"), (("curves", "no"), "no/eval.csv: No such file")])
def test_plots_refuse_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, out, told = run_main(plot, monkeypatch, capsys, *argv)
    assert status == 1 and not out and len(told) == 1 and message in told[0]


def test_intervals_are_drawn_from_low_to_high():
    _, (left, right) = plot.plt.subplots(1, 2)
    x = np.arange(3.0)
    plot.draw_curves(left, [("MST", 0, 0, x, x + 50, x + 10, x + 70)], [])
    assert set(left.collections[0].get_paths()[0].vertices[:, 1]) == {10, 11, 12, 70, 71, 72}
    plot.draw_points(right, [("MST", 0, 0, 50.0, 10.0, 70.0)], ["a"], False, 1)
    whisker, = right.containers[0].lines[2][0].get_segments()
    assert whisker[:, 1].tolist() == [10, 70]


@pytest.mark.slow
def test_the_statistic_and_the_episodes_that_were_asked_for_are_drawn(tmp_path):
    def heights(*flags):
        options = plot.command_line().parse_args(list(flags))
        page, _ = plot.draw_runs(options) if flags[0] == "curves" else plot.draw_figure("fig11", options)
        return {tuple(line.get_ydata()) for line in page.axes[0].get_lines()}

    for run in figures.runs(figures.LAPTOP["fig11"], seeds=range(4)):  # over four seeds, an iqm is no mean
        first = [1, 2, 3, 100][run.seed]
        folder = write_run(tmp_path, run.args, [(0, first, f"1 2 3 {4 * first - 6}"), (12000, 5, "2 3 4 11")], ("return", "returns"))
    of_four = ("fig11", str(tmp_path), "--laptop", "--seeds", "4")
    assert heights(*of_four) == {(2.5, 5)} and heights(*of_four, "--statistic", "mean-sd") == {(26.5, 5)}
    assert heights(*of_four[:-1], "3,2", "--episodes") == {(2.5, 3.5)}  # the middle half of eight episodes
    assert heights("curves", str(folder)) == {(100, 5)} and heights("curves", str(folder), "--episodes") == {(2.5, 3.5)}


# ---------------------------------------------------------------------------------------------------------- README.md

@pytest.mark.slow
def test_the_readme_has_the_table_of_figures_as_it_is(monkeypatch, capsys):
    told = run_main(figures, monkeypatch, capsys, "list", "--markdown")[1]
    readme = (HERE / "README.md").read_text()
    assert len(told) > 15 and all(line in readme for line in told)


# ---------------------------------------------------------------------------------------------------------- claims.py

def test_a_verdict_says_what_its_interval_says():
    """Welch's interval from its textbook formula, and the four ways in which it may lie."""
    this, that = np.array([3.0, 5, 4, 6, 4.5]), np.array([1.0, 2, 1.5])
    a, b = this.var(ddof=1) / 5, that.var(ddof=1) / 3
    half = scipy.stats.t.ppf(0.975, (a + b) ** 2 / (a ** 2 / 4 + b ** 2 / 2)) * math.sqrt(a + b)
    difference, low, high, said = claims.verdict(this, that, less=False)
    assert (difference, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half)) and said == "seen"
    same, none = np.full(5, 2.0), np.array([1.0, math.nan, 2])
    assert [claims.verdict(scale * one, scale * other, less)[3] for scale in (1, 0.01, 100) for one, other, less in (
        (this, that, False), (this, that, True), (that, this, False), (that, this, True), (this, this[::-1], False), (same, same, True), (same, same + 1, True),
        (none, this, False), (this, that[:1], False), (same, this, False), (same, this, True))] == [
        "seen", "reversed", "reversed", "seen", "not seen", *["cannot tell"] * 4, "reversed", "seen"] * 3


def test_a_number_in_a_table_keeps_what_tells_it_from_0():
    assert [claims.number(value) for value in (168.4, -57.21, 5.94, 0.1, 0.0076, -0.00071, 4e-4, 0)] == [
        "168", "-57.2", "5.9", "0.10", "0.0076", "-0.00071", "0.00", "0.00"]


@pytest.mark.slow
def test_claims_are_read_from_the_last_evaluations_of_their_own_arms(tmp_path, monkeypatch, capsys):
    """Every run of the laptop study has its own number, and nine that must not count before the last three evaluations."""
    expected, written = {}, {}
    for run in figures.runs(figures.LAPTOP["fig11"]):
        centre = {"MR.Q": 10, "MR.Q + Res": 10.5, "MR.Q + Res + MST": 50}[run.cell.series] + 2 * run.seed
        expected.setdefault(run.cell.series, []).append(centre)
        steps = np.arange(0.0, 12001, 1000)
        values = np.where(steps > 9000, centre + (steps - 11000) / 1000, 9e9)
        written[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": values,
                                                     "critic/srank_q1": values, "critic/srank_q2": values + 2, "critic/dormant": values})
    (tmp_path / "results").mkdir()
    columns = ["return", "critic/srank_q1", "critic/srank_q2", "critic/dormant"]
    aggregate.save(tmp_path / "results" / "fig11-laptop.csv", written.values(), columns)

    def tables():
        told = run_main(claims, monkeypatch, capsys, tmp_path / "results")[1]
        return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]] for table in "\n".join(told).strip().split("\n\n")[:3]]

    brief, rows, waiting = tables()
    by_claim = {tuple(row[1:3]): row[3:] for row in rows}
    res, mrq, mst = (np.mean(expected[series]) for series in ("MR.Q + Res", "MR.Q", "MR.Q + Res + MST"))
    assert len(rows) == 9 and all(row[0] == "fig11" and row[3] == "5" for row in rows)
    _, with_it, without, _, said = by_claim["deep networks need residual connections", "return"]
    assert (with_it, without, said) == (f"{res:.1f}", f"{mrq:.1f}", "not seen")
    _, with_it, without, difference, said = by_claim["MST beats residual connections alone", "SRank, critic"]
    assert (with_it, without, said) == (f"{mst + 1:.1f}", f"{res + 1:.1f}", "seen") and difference.startswith("39.5 [")
    assert by_claim["MST beats residual connections alone", "dormant ratio, critic"][-1] == "reversed"
    assert {row[0].split()[1] for row in waiting} == {claim.figure for claim in claims.CLAIMS} - {"fig11"}
    assert ["`./sweep.sh fig12 --laptop`", "ER beats uniform; RigL beats SET", "5 of 15", claims.hours("fig12")] in waiting  # Fig. 11's MST
    full = {row["figure"]: row["hours"] for row in figures.table(argparse.Namespace(
        smoke=False, laptop=False, tasks=None, seeds=None, steps=None, more=""), ["fig11", "fig3", "fig9", "fig6"])}
    for line in (["deep networks need residual connections", "not seen", *[by_claim["deep networks need residual connections", label][-1]
                  for label in ("SRank, critic", "dormant ratio, critic")], "`./sweep.sh fig11`", full["fig11"]],
                 ["MST beats residual connections alone", "seen", "seen", "reversed", "`./sweep.sh fig11`", full["fig11"]],
                 ["SRank of an encoder without LayerNorm collapses in the course of training", "", "no study", "", "`./sweep.sh fig3`", full["fig3"]],
                 ["actor: SST beats dense", "not run", "", "not run", "`./sweep.sh fig9`", full["fig9"]],
                 ["critic: DST beats SST", "not run", "not run", "not run", "`./sweep.sh fig6`", full["fig6"]]):
        assert line in brief
    assert len(brief) == len(claims.WHOLE) + sum(claim.figure != "first" for claim in claims.CLAIMS)

    written.pop(max(name for name in written if "mst" in name))  # seed 4: not there
    aggregate.save(tmp_path / "results" / "fig11-laptop.csv", written.values(), columns)
    _, rows, waiting = tables()
    assert {row[1] for row in rows} == {"deep networks need residual connections"}
    assert ["`./sweep.sh fig11 --laptop`", "MST beats residual connections alone; MST beats MR.Q", "14 of 15", claims.hours("fig11")] in waiting


@pytest.mark.slow
def test_the_readmes_first_command_is_the_study_that_tells_of_it(tmp_path, monkeypatch, capsys):
    readme = (HERE / "README.md").read_text()
    command = shlex.split(readme.partition("```bash\n")[2].partition("\n")[0])
    run, *_ = figures.runs(figures.LAPTOP["first"])
    assert run_name(parse(command[command.index("train.py") + 1:])) == run.name and run.cell.series == "MST"
    ends = {}
    for run in figures.runs(figures.LAPTOP["first"], seeds=[2, 0, 1]):
        steps = np.arange(0.0, run.args.total_steps + 1, 3000)
        returns = np.where(steps < 18000, steps / 1000, 100 + run.seed)
        ends[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": returns})
    aggregate.save(tmp_path / "first-laptop.csv", ends.values(), ["return"])
    (tmp_path / "random-policy.csv").write_text("env,episode,return\ncartpole-swingup,0,3\ncartpole-swingup,1,4.5\nwalker-walk,0,99\n")
    lines = []
    for arm, last in (("MST", 24000), ("MST, 30,000 steps", 30000), ("MST, 18,000 steps", 18000), ("dense, 18,000 steps", 18000),
                      ("MST, 10,000 random steps", 27000)):
        lines += [f"{arm}, at {step:,} steps, 3 seeds: {'0, 0, 0' if step == 0 else '9, 9, 9' if step == 9000 else '100, 101, 102'}"
                  for step in (0, 9000, 18000, 24000, 27000, 30000) if step <= last]
    lines += ["a random policy, 2 episodes: 4 on average"]
    command, *_ = ends.items()  # the same command on another processor: runs of the same names, told beside these
    steps = np.arange(0.0, 24001, 3000)
    elsewhere = [aggregate.Run(command[0], {"agent_step": steps, "frames": 2 * steps, "return": 1000 + steps / 1000})]
    aggregate.save(tmp_path / "first-amd.csv", elsewhere, ["return"])
    lines += [f"MST, on an AMD EPYC, at {1000 * thousands:,} steps, 1 seeds: {1000 + thousands}" for thousands in (0, 9, 18, 24)]
    assert run_main(claims, monkeypatch, capsys, tmp_path)[1][-len(lines):] == [f"- cartpole-swingup, {line}" for line in lines]


@pytest.mark.slow
def test_runs_stand_beside_the_published_ones_of_their_task_and_step(tmp_path, monkeypatch, capsys):
    written, published = {}, ["env,agent_step,seed,return"]
    for run in figures.runs(figures.LAPTOP["mrq"], tasks=("cartpole-swingup", "walker-walk")):
        steps = np.arange(0.0, 20001, 5000)
        written[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": np.where(
            steps == 20000, {"cartpole-swingup": 500, "walker-walk": 300}[run.task] + 10 * run.seed, 9e9)})
    for task, centre in (("cartpole-swingup", 510), ("walker-walk", 250)):
        published += [f"{task},{step},{seed},{centre + seed - 2 if step == 20000 else 9e9}" for step in (15000, 20000) for seed in range(5)]
    aggregate.save(tmp_path / "mrq-laptop.csv", written.values(), ["return"])
    (tmp_path / "published-mrq.csv").write_text("\n".join(published))
    (tmp_path / "published-simba.csv").write_text("env,agent_step,seed,return\nwalker-walk,20000,0,9e9\nwalker-walk,25000,0,700\nwalker-walk,25000,1,800\n")
    simba = {run.name: aggregate.Run(run.name, {"agent_step": np.array([25000.0]), "frames": np.array([50000.0]), "return": np.array([700.0 + run.seed])})
             for run in figures.runs(figures.LAPTOP["simba"])}
    aggregate.save(tmp_path / "simba-laptop.csv", simba.values(), ["return"])
    beside = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if line.startswith("| SAC on SimBa")]
    assert len(beside) == 1 and "| walker-walk | 25,000 | 700, 701, 702, 703, 704 | 750 (2 runs, 700 to 800) | -48.0 [" in beside[0]
    told = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if line.startswith("| MR.Q |")]
    _, low, high, _ = claims.verdict(np.arange(300, 350, 10), np.arange(248, 253), less=False)
    assert told == [told[0], f"| MR.Q | walker-walk | 20,000 | 300, 310, 320, 330, 340 | 250 (5 runs, 248 to 252) | 70.0 [{low:.1f}, {high:.1f}] | higher |"]
    assert "| MR.Q | cartpole-swingup | 20,000 | 500, 510, 520, 530, 540 | 510 (5 runs, 508 to 512) | 10.0 [" in told[0] and told[0].endswith("| no difference seen |")
    (tmp_path / "published-mrq.csv").write_text("env,agent_step,seed,return\nwalker-walk,20000,0,999\n")
    assert any(line.endswith("|  | cannot tell |") for line in run_main(claims, monkeypatch, capsys, tmp_path)[1])  # by one run
    for seeds in ("300, 310, 320, 330", "300, 310, 320", None):  # every finished seed is told, of three at least
        written.pop(max(written))
        aggregate.save(tmp_path / "mrq-laptop.csv", written.values(), ["return"])
        told = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if "| MR.Q | walker" in line]
        assert bool(told) == bool(seeds) and all(f"| {seeds} | 999 (1 runs" in line for line in told)


def test_the_published_studies_run_as_the_published_ones_did():
    """The defaults, which Table 2 and SimBa's settings pin; and steps at which the published curves were evaluated."""
    for study in claims.PUBLISHED:
        cell, = figures.LAPTOP[study].cells
        assert set(cell.flags) <= {"algo", "total_steps"}
        with open(HERE / f"results/published-{study}.csv", newline="") as file:
            ends = {row["env"] for row in csv.DictReader(file) if int(row["agent_step"]) == cell.flags["total_steps"]}
        assert ends == set(figures.LAPTOP[study].tasks)


@pytest.mark.slow
def test_the_readme_has_the_table_of_claims_as_the_results_have_it(monkeypatch, capsys):
    told = run_main(claims, monkeypatch, capsys, HERE / "results")[1]
    brief, *tables, lines = "\n".join(told).split("\n\n")
    readme, details = ((HERE / name).read_text() for name in ("README.md", "results/README.md"))
    assert brief in readme and len(tables) >= 1 and all(table in details for table in tables)
    assert len(lines.splitlines()) > 15 and all(line in readme + details for line in lines.splitlines())
    # And nothing that is no longer so: every row of the details, and every list of returns.
    assert all(line in told for line in details.splitlines() if line.startswith(("| ", "- ")))
    assert all(line in told for line in readme.splitlines() if " seeds: " in line)
    # And the README's one sentence of numbers about the published runs: how far the intervals reach.
    reach = {"dog": [], "humanoid": [], "other": []}
    for task, low, high in re.findall(r"\| ([a-z-]+) \| [\d,]+ \|[^|]+\|[^|]+\| \S+ \[(\S+), (\S+)\] \| no difference seen", details):
        kind = task.split("-")[0]
        reach[kind if kind in reach else "other"].append(max(-float(low), float(high)))
    others, dogs, humanoids = (" to ".join(f"{float(f'{bound(reach[kind]):.2g}'):g}" for bound in (min, max)) for kind in ("other", "dog", "humanoid"))
    assert (f"the intervals reach {others}, on the dogs {dogs}, and on the humanoids, where little is learnt yet by either, {humanoids}."
            in readme.replace("\n", " "))
    # Those that would differ are named there too, by how much.
    readme = readme.replace("\n", " ")
    differ = re.findall(r"\| (\S+)[^|]*\| ([a-z-]+) \| [\d,]+ \|[^|]+\|[^|]+\| \S+ \[(\S+), (\S+)\] \| (lower|higher)", details)
    assert ("Three tasks differed by their first three seeds, and none by five." in readme) == (not differ)
    for algo, task, low, high, said in differ:
        reaches = " to ".join(sorted(bound.lstrip("-") for bound in (low, high)))
        assert f"{algo}'s seeds on {task} ended {said}, by an interval of {reaches} of 1,000" in readme
    below = [float(less) for less in re.findall(r"\| humanoid-[a-z]+ \| [\d,]+ \|[^|]+\|[^|]+\| (\S+) \[", details)]
    assert ("All four humanoid means lie below the published ones." in readme) == (len(below) == 4 and max(below) < 0)


@pytest.mark.slow
def test_what_is_said_of_a_second_look_at_humanoid_walk_is_so():
    """Five policies evaluated again, and what the published fifteen are."""
    with open(HERE / "results/simba-again.csv", newline="") as again:
        fresh = [(row["seed"], float(row["return"])) for row in csv.DictReader(again) if int(row["episode"]) >= 10]
    with open(HERE / "results/published-simba.csv", newline="") as published:
        runs = {}  # env -> first return to three places -> last returns
        for row in csv.DictReader(published):
            if row["agent_step"] == "0":
                last = runs.setdefault(row["env"], {}).setdefault(f"{float(row['return']):.3f}", [])
            else:  # it follows its first
                last.append(float(row["return"]))
    assert all(sorted(map(len, runs[f"humanoid-{task}"].values())) == 5 * [1] + 5 * [2] for task in ("run", "walk"))
    theirs = np.concatenate(list(runs["humanoid-walk"].values()))
    once = np.array([np.mean(pair) for pair in runs["humanoid-walk"].values()])
    ours = np.array([np.mean([value for seed, value in fresh if seed == one]) for one in "01234"])
    assert len(fresh) == 5 * 140 and len(theirs) == 15
    cell, = figures.LAPTOP["simba"].cells
    first = claims.values("simba", cell, figures.RETURN, [str(HERE / "results/simba-laptop.csv")], "humanoid-walk", last=1)
    assert len(first) == 5
    details = (HERE / "results/README.md").read_text().replace("\n", " ")
    difference, low, high, _ = claims.verdict(ours, theirs, less=False)
    assert ("return {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} over 140 more episodes each (`simba-again.csv`, by `train.py --eval-only "
            "--eval-episodes 150`), {:.2f} below the published mean, by an interval of {:.2f} to {:.2f}.".format(*ours, -difference, low, high)) in details
    assert ("the difference on humanoid-walk is {:.2f}, by an interval of {:.2f} to {:.2f}.".format(
        *claims.verdict(first, once, less=False)[:3])) in details
    three = claims.verdict(first[:3], theirs, less=False)
    assert ("three seeds had ended lower, by an interval of {:.2f} to {:.2f}; two more were set before they were run and ended at "
            "{:.2f} and {:.2f}.".format(-three[2], -three[1], *first[3:])) in details


def test_an_unfinished_run_is_in_no_claim(tmp_path):
    steps = np.arange(0.0, 12001, 1000)
    written = {run.name: aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": steps})
               for run in figures.runs(figures.LAPTOP["fig11"])}
    last = written[max(written)]
    last.table = {name: values[:-1] for name, values in last.table.items()}
    aggregate.save(tmp_path / "runs.csv", written.values(), ["return"])
    claim, paths = next(claim for claim in claims.CLAIMS if claim.says == "MST beats MR.Q"), [str(tmp_path / "runs.csv")]
    arms = [claims.arm("fig11", words) for words in (claim.this, claim.that)]
    assert sorted(len(claims.finished("fig11", arm, figures.RETURN, paths)) for arm in arms) == [4, 5]
    assert claims.tried(dataclasses.replace(claim, measures=(figures.RETURN,)), paths) == {}


def test_a_claim_compares_what_it_says():
    for claim in claims.CLAIMS:
        this, that = (claims.arm(claim.figure, words) for words in (claim.this, claim.that))
        better, _, worse = claim.says.partition(" beats ")
        if claim.figure == "fig13" and "×" in worse:  # one kind at two sizes
            assert this.x in better and that.x in worse and this.x != that.x and this.series == that.series and this.series in better
        elif claim.figure == "fig13":
            assert (this.series, this.x, that.series, that.x) == ("MST", "×4", "plain", "×4")
        elif this.series in figures.REGIMES:
            assert this.series in better.lower() and that.series in worse.lower()
        assert this.panel == that.panel


def test_a_claim_measures_the_module_that_its_figure_is_about():
    for claim in claims.CLAIMS:
        about = figures.LAPTOP[claim.figure].sized
        assert all(column == "return" or about in ("agent", column.split("/")[0]) for m in claim.measures for column in m.columns), claim.says


def test_the_better_arm_of_a_claim_is_the_one_that_it_names():
    for claim in claims.CLAIMS:
        this, that = (claims.arm(claim.figure, words).series for words in (claim.this, claim.that))
        better, _, worse = claim.says.partition(" beats ")
        word = better.split()[-1]
        if claim.figure == "fig12":
            assert (this, that) == ("MST (ER, RigL, 0.6)", worse)
        elif "needs LayerNorm" in better:
            assert "LN" in this and "LN" not in that and claim.says.split("(")[1][:-1] in this and claim.says.split("(")[1][:-1] in that
        elif claim.figure in ("fig2", "fig8"):
            assert word in this and word not in that and worse.split()[0] in that and ("LN" in this) == ("LN" in that) == ("LN" in worse)
        elif claim.figure in ("first", "fig11"):
            assert (word if word == "MST" else "Res") in this and (word if word == "MST" else "Res") not in that


# ------------------------------------------------------------------------------------------------------------- copies

@pytest.mark.parametrize("name", ["sparsity", "networks", "replay", "metrics", "checkpoint"])
@pytest.mark.slow
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
