"""SparseTraining in training: optimizers, saving, copies, what is masked, and refused settings."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune as prune

from sparsity import REGIMES, SparseTraining, _zero_pruned, layer_densities, drop_fraction, update_mask
from tests.helpers import backward, count, mlp
from tests.test_sparse_guards import build, train


OPTIMIZERS = sorted(name for name, value in vars(torch.optim).items()
                    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer")


@pytest.mark.parametrize("name, options", [(name, {}) for name in OPTIMIZERS] + [
    ("AdamW", {"weight_decay": 0.1, "fused": True}), ("Adam", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True}), ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("Adagrad", {"initial_accumulator_value": 0.1})])
@pytest.mark.slow
def test_pruned_weights_stay_exactly_zero_with_every_optimizer_of_torch_or_it_is_refused(name, options):
    assert re.search(rf"\b{name}\b", SparseTraining.__doc__)
    model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.ELU(), nn.Linear(32, 32, bias=False), nn.ELU(),
                          nn.Linear(32, 1, bias=False))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    steps = 3000 if "fused" in options else 200
    if name in ("LBFGS", "Muon", "SparseAdam"):
        with pytest.raises(ValueError, match=f"{name} cannot follow masks"):
            SparseTraining(model, optimizer, "dst", total_steps=4000)
        return
    for _ in range(3 if len(options) < 2 else 0):  # the optimizer may have run before
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
            states = [state for state in optimizer.state[weight].values() if state.shape == mask.shape]
            assert not any(state[~mask].any() for state in states)


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
        assert all(p.isfinite().all() for p in model.parameters())
        assert not model[0].weight[~sparse.masks["0.weight"]].any()


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
    with torch.no_grad():  # whatever an optimizer state loaded from elsewhere may hold there
        for tensor in (weight, optimizer.state[weight]["exp_avg"]):
            tensor[~old_mask] = 7.0
    assert sparse.update_topology(10)
    new_mask = sparse.masks["0.weight"]
    assert new_mask is held and torch.equal(new_mask, expected) and not torch.equal(new_mask, old_mask)
    stays, fresh = old_mask & new_mask, ~(old_mask & new_mask)
    assert torch.equal(weight[stays], old_weight[stays]) and not weight[fresh].any()
    assert torch.equal(optimizer.state[weight]["exp_avg"][stays], old_moment[stays])
    assert not any(optimizer.state[weight][moment][fresh].any() for moment in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("regime", ["dst", "s2d", "d2s"])
def test_sparsity_survives_copies_saving_and_new_parameters(regime):
    model = mlp(6, 30, 30, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"total_steps": 60, "update_interval": 5, "grow": "random"}
    make = lambda m, o, seed: SparseTraining(m, o, regime, 0.7, **options, seed=seed)
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
    for step in range(18, 40):  # continues exactly
        advance(model, optimizer, sparse, step, step + 1)
        advance(other, other_optimizer, other_sparse, step, step + 1)
        assert sparse.density() == other_sparse.density() and sparse.layer_densities() == other_sparse.layer_densities()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert all(torch.equal(sparse.masks[n], other_sparse.masks[n]) for n in sparse.masks)

    soft = copy.deepcopy(copied)  # a soft target keeps what the module dropped, until it is masked
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
    other_optimizer = torch.optim.AdamW(other.parameters())
    other_sparse = SparseTraining(other, other_optimizer, "d2s", 0.7, total_steps=40, update_interval=5)
    other_sparse.load_state_dict(state)
    again = other_sparse.state_dict()
    tensors = ("masks", "first_masks")
    values, expected = ({key: s[key] for key in s if key not in tensors} for s in (again, state))
    assert values == expected
    assert all(torch.equal(again[key][name], state[key][name]) for key in tensors for name in state[key])
    damaged = copy.deepcopy(state)
    damaged["masks"]["2.weight"][0] = True
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    bare = {key: value for key, value in state.items() if key != "schedule"}
    for bad, distribution, sparsity in ((damaged, "er", 0.7), (bare, "uniform", 0.7), (bare, "er", 0.1)):
        sparse.distribution, sparse.final = distribution, sparsity
        with pytest.raises(ValueError, match="do not match this sparsity"):
            sparse.load_state_dict(bad)
        assert all(torch.equal(masks[name], sparse.masks[name]) for name in masks)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_state_of_the_first_version_loads_and_goes_on_exactly(regime):
    model, optimizer, sparse = build(regime, total_steps=100)
    train(model, [optimizer], sparse, range(1, 26))
    names = ("regime", "last_step", "sparsity", "seed", "masks")
    old = {name: copy.deepcopy(sparse.state_dict()[name]) for name in names}
    other, other_optimizer, resumed = build(regime, total_steps=100, seed=2)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(old)
    for step in range(26, 60):
        for each in ((model, optimizer, sparse), (other, other_optimizer, resumed)):
            torch.manual_seed(step)
            assert not train(each[0], [each[1]], each[2], [step])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    if regime not in ("dense", "sst"):
        assert resumed.movement() == sparse.movement()  # the first masks follow from the seed


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
        with pytest.raises(ValueError, match="differ from the masked module"):
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
@pytest.mark.filterwarnings("ignore:left dense")
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
    with pytest.raises(ValueError, match="no layer or weight lin"):
        SparseTraining(model, optimizer, "sst", exclude="lin")
    with pytest.raises(ValueError, match="LayerNorm trains no weight"):
        SparseTraining(model.norm, torch.optim.SGD(model.norm.parameters()), "sst")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [
    torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm,
    torch.nn.utils.parametrizations.orthogonal, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm,
    lambda layer: prune.random_unstructured(layer, "weight", 0.5), lambda layer: nn.Embedding(9, 4, sparse=True)])
def test_weights_that_masks_cannot_follow_are_refused_or_excluded(wrap):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), wrap(nn.Linear(8, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="masks cannot follow the .* of 2: build it without, or exclude it"):
        SparseTraining(model, optimizer, "sst")
    assert SparseTraining(model, optimizer, "sst", exclude="2").masks.keys() == {"0.weight"}
    model[2].requires_grad_(False)
    assert SparseTraining(model, optimizer, "sst").masks.keys() == {"0.weight"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights():
    for regime in ("sst", "dst", "s2d", "d2s"):  # now or at the end
        model = mlp(8, 32, 16, 1)
        with pytest.raises(ValueError, match="0.weight keeps no weight"):
            SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), regime, 0.999, 100, 10)
    assert layer_densities([(0, 4), (8, 8), (4, 0)], 0.5) == [1.0, 0.5, 1.0] and layer_densities([(0, 4)], 0.5) == [1.0]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 0))
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.5, 100, 10)
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


def test_a_new_weight_starts_as_its_own_parameter_group_says():
    model = mlp(6, 20, 20, 1)
    optimizer = torch.optim.Adagrad([
        {"params": model[0].parameters(), "initial_accumulator_value": 0.1},
        {"params": [*model[2].parameters(), *model[4].parameters()], "initial_accumulator_value": 0.3}], lr=0.1)
    for _ in range(3):
        backward(model, 6)
        optimizer.step()
    sparse = SparseTraining(model, optimizer, "dst", 0.5, 100, 10)
    for name, start in (("0.weight", 0.1), ("2.weight", 0.3)):
        assert (optimizer.state[model.get_parameter(name)]["sum"][~sparse.masks[name]] == torch.tensor(start)).all()


def test_masks_are_drawn_without_touching_the_global_generator():
    model = mlp(6, 20, 20, 1)
    state = torch.get_rng_state()
    SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.8, 10, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_nan_gradients_of_pruned_weights_become_zero():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    sparse = SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "dst", 0.8, 10, 1)
    assert set(sparse.layer_densities()) == {"0.weight", "3.weight"}
    assert sparse.density() == pytest.approx(0.2, abs=2 / (16 * 27 + 4 * 16 * 36))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[0].weight.grad[~sparse.masks["0.weight"]] = float("nan")
    sparse.mask_gradients()
    assert model[0].weight.grad.isfinite().all()  # NaN × 0 would be NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128,
                                   torch.float8_e4m3fn])
@pytest.mark.parametrize("transposed", [False, True])
def test_masking_is_exact_in_every_dtype_and_layout(dtype, transposed):
    layout = (lambda t: t.t()) if transposed else (lambda t: t)
    values, mask = layout(torch.randn(1100, 1000)), layout(torch.rand(1100, 1000) < 0.5)  # more than one piece
    expected = torch.where(mask, values.to(dtype).to(torch.complex128), 0)
    tensor = torch.where(mask, values, float("nan")).to(dtype)
    _zero_pruned(tensor, mask)
    assert torch.equal(tensor.to(torch.complex128), expected)


def test_settings_out_of_range_are_refused_and_their_ends_allowed():
    model = mlp(6, 20, 20, 1)
    optimizer, nan = torch.optim.SGD(model.parameters(), lr=0.1), float("nan")
    good = {"regime": "d2s", "sparsity": 0.5, "total_steps": 9, "update_interval": 1}
    for options in ({"sparsity": 0.0}, {"total_steps": 1},
                    {"schedule_start": 1, "schedule_end": 1}, {"schedule_start": 0, "schedule_end": 0},
                    {"drop_fraction_start": 1, "drop_fraction_end": 1},
                    {"drop_fraction_start": 0, "drop_fraction_end": 0}):
        SparseTraining(model, optimizer, **good | options)
    bad = {"regime": ["rigl"], "distribution": ["erk"], "grow": ["momentum"], "sparsity": [nan, 1.0, -0.1],
           "total_steps": [0, nan, math.inf, None], "update_interval": [0, nan, math.inf],
           "drop_fraction_start": [1.5, -0.1, nan], "drop_fraction_end": [1.5, nan],
           "schedule_power": [-1, 0, nan, math.inf], "schedule_end": [nan, 1.5, 0.1],
           "schedule_start": [nan, -0.1, 0.9]}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=re.match("drop_fraction|schedule|.*", name)[0]):
                SparseTraining(model, optimizer, **good | {name: value})
    at_once = SparseTraining(model, optimizer, **good | {"schedule_start": 0, "schedule_end": 0})
    sum(p.sum() for p in model.parameters()).backward()
    assert at_once.update_topology(1) and at_once.sparsity == 0.5  # a schedule without length is over after a step
    with pytest.raises(ValueError, match="does not train"):
        SparseTraining(model, torch.optim.SGD(nn.Linear(2, 2).parameters()), "sst")
