"""sparsity.py in other projects: each way to use it wrongly is made right, or refused in one line."""

import copy
import io
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune as prune
from torch.nn.utils.parametrizations import weight_norm

import sparsity
from sparsity import SparseTraining
from tests.helpers import backward, mlp


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)


def build(regime="dst", sizes=(6, 20, 20, 8), optimizer=None, **options):
    model = mlp(*sizes)
    optimizer = adamw(model) if optimizer is None else optimizer(model)
    options = {"sparsity": 0.7, "total_steps": 1000, "update_interval": 10, "seed": 1} | options
    return model, optimizer, SparseTraining(model, optimizer, regime, **options)


def train(model, optimizers, sparse, steps, width=6):
    """Returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            backward(model, width)
            sparse.after_backward(step)
            for optimizer in optimizers:
                optimizer.step()
    return [str(warning.message) for warning in caught]


def pruned_are_zero(sparse):
    return not any(weight[~mask].any() for _, weight, mask in sparse._tensors())


def masks(sparse):
    return {name: mask.clone() for name, mask in sparse.masks.items()}


def moved(sparse, before):
    return [name for name, mask in before.items() if not torch.equal(mask, sparse.masks[name])]


# ---- A. pruned weights stay zero, or it is reported ----

class Lookahead(torch.optim.Optimizer):
    """As published: it averages the weights of an inner optimizer, and keeps its slow weights in a state of its own."""

    def __init__(self, inner, hidden=False):
        self.param_groups, self.state, self.count = inner.param_groups, {}, 0
        self.inner = [inner] if hidden else inner

    def step(self):
        (self.inner[0] if isinstance(self.inner, list) else self.inner).step()
        self.count += 1
        for weight in self.param_groups[0]["params"]:
            slow = self.state.setdefault(weight, {"slow": weight.detach().clone()})["slow"]
            if self.count % 3 == 0:
                slow.lerp_(weight.detach(), 0.5)
                weight.data.copy_(slow)


@pytest.mark.parametrize("make", [
    lambda m: [adamw(m), torch.optim.SGD(m.parameters(), 0.1, 0.9)], lambda m: [adamw(m[:2]), adamw(m[2:])],
    lambda m: [Lookahead(adamw(m))]], ids=["two of all weights", "each of a part", "wrapper"])
def test_optimizers_in_a_list_or_a_wrapper_are_followed(make):
    model, optimizers, sparse = build(optimizer=make)
    assert not train(model, optimizers, sparse, range(1, 60)) and pruned_are_zero(sparse)


def test_optimizers_that_sparse_training_does_not_know_are_reported_once():
    model, optimizer, sparse = build()
    told = train(model, [optimizer, adamw(model)], sparse, range(1, 40))
    assert len(told) == 1 and re.search("pruned weights of .* List all optimizers", told[0])
    model, optimizer, sparse = build(optimizer=lambda m: Lookahead(adamw(m), hidden=True))
    assert len(train(model, [optimizer], sparse, range(1, 60))) == 1
    for other in (lambda m: torch.optim.AdamW, lambda m: m.parameters(), lambda m: {"all": adamw(m)}):
        with pytest.raises(ValueError, match="no param_groups"):
            build(optimizer=other)


@pytest.mark.parametrize("told", [False, True])
def test_a_new_optimizer_is_reported_or_followed_when_it_is_set(told):
    model, optimizer, sparse = build()
    train(model, [optimizer], sparse, range(1, 16))
    restarted = adamw(model)
    if told:
        sparse.set_optimizer(restarted)
    warned = train(model, [restarted], sparse, range(16, 60))
    assert pruned_are_zero(sparse) and not warned if told else len(warned) == 1 and "set_optimizer" in warned[0]


class EightBit(torch.optim.Optimizer):
    """Momentum as codes of 0 to 255; the number 0 has code 127."""

    flat = False

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                codes = torch.full([weight.numel()] if self.flat else weight.shape, 127, dtype=torch.uint8)
                state = self.state.setdefault(weight, {"state1": codes})
                weight.data.sub_((state["state1"].float().view_as(weight) - 127) * 1e-4)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("regime", ["sst", "dst"])
def test_eight_bit_moments_are_refused(regime, flat):
    model, optimizer, sparse = build(regime, optimizer=lambda model: EightBit(model.parameters(), {}))
    optimizer.flat = flat
    train(model, [optimizer], sparse, range(1, 10))
    with pytest.raises(ValueError, match="EightBit keeps .*state1.* as codes"):
        train(model, [optimizer], sparse, range(10, 12))
    assert pruned_are_zero(sparse)
    with pytest.raises(ValueError, match="as codes"):  # its state is there already
        SparseTraining(model, optimizer, regime, 0.7, 100, 10)


def overwrite(how, model, dense):
    with torch.no_grad():
        if how == "load":
            model.load_state_dict(dense)
        elif how == "initialize":
            nn.init.normal_(model[2].weight)
        elif how == "average":
            torch._foreach_copy_(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
        for parameter in model.parameters() if how == "data" else ():
            parameter.data = torch.ones_like(parameter)


@pytest.mark.parametrize("how", ["load", "initialize", "average", "data"])
@pytest.mark.parametrize("regime", ["sst", "dst", "s2d", "d2s"])
def test_weights_written_from_outside_are_cleared_and_reported_once(regime, how):
    dense = mlp(6, 20, 20, 8, seed=3).state_dict()
    for first in (1, 25):  # before the first step, and in training
        model, optimizer, sparse = build(regime, schedule_start=0.0, schedule_end=0.03)  # all have pruned weights at 25
        assert not train(model, [optimizer], sparse, range(1, first))
        overwrite(how, model, dense)
        unseen = how == "data" and first == 1  # it counts no version: cleared at the first step, without a word
        told = train(model, [optimizer], sparse, range(first, first + (1 if unseen else 15)))
        if regime == "d2s" and first == 1 or regime == "s2d" and first == 25:
            continue  # hardly anything is pruned
        assert pruned_are_zero(sparse) and len(told) == 1 - unseen and (unseen or "apply_masks()" in told[0])
        overwrite(how, model, dense)
        sparse.apply_masks()
        assert pruned_are_zero(sparse) and not train(model, [optimizer], sparse, range(first + 15, first + 40))


def test_those_who_only_mask_gradients_are_checked_too():
    model, optimizer, sparse = build("sst")
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                backward(model, 6)
                sparse.mask_gradients()
                optimizer.step()
        assert pruned_are_zero(sparse)
    assert len(caught) == 1 and "were not 0" in str(caught[0].message)


def assign(model):
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def replace(model):
    model[2] = nn.Linear(20, 20)


@pytest.mark.parametrize("regime", ["sst", "dst"])
@pytest.mark.parametrize("change", [assign, replace])
def test_parameters_that_the_optimizer_no_longer_trains_are_refused_until_it_is_set_anew(change, regime):
    model, optimizer, sparse = build(regime)
    train(model, [optimizer], sparse, range(1, 5))
    change(model)
    with pytest.raises(ValueError, match="does not train [02].weight.*set_optimizer"):
        train(model, [optimizer], sparse, range(5, 15))
    optimizer = adamw(model)
    sparse.set_optimizer(optimizer)
    assert pruned_are_zero(sparse)  # a new layer was dense
    before = model[2].weight.detach().clone()
    assert not train(model, [optimizer], sparse, range(15, 30)) and pruned_are_zero(sparse)
    assert not torch.equal(before, model[2].weight)


def test_a_module_converted_afterwards_is_refused_where_a_pruned_weight_would_become_nan():
    model, optimizer, sparse = build("sst")
    model.half()
    for _ in range(2):  # nor is it forgotten
        with pytest.raises(ValueError, match="eps=1e-08 is 0 in torch.float16.*at least eps"):
            sparse.update_topology(1)
    model, optimizer, sparse = build("sst")
    model.double()
    sparse.update_topology(1)


def test_a_layer_of_two_sparse_trainings_is_refused_for_the_older():
    encoder, critic, actor = nn.Linear(6, 20), nn.Linear(20, 5), nn.Linear(20, 3)
    parts = [nn.Sequential(encoder, nn.ELU(), head) for head in (critic, actor)]
    first, second = (SparseTraining(part, adamw(part), "sst", 0.5, seed=1) for part in parts)
    with pytest.raises(ValueError, match="0.weight is also masked by a SparseTraining built later: exclude"):
        first.update_topology(1)
    second.update_topology(1)
    third = SparseTraining(parts[0], adamw(parts[0]), "sst", 0.5, exclude="0", seed=1)
    third.update_topology(1), second.update_topology(2)
    del second, third  # replaced ones do not count
    SparseTraining(parts[0], adamw(parts[0]), "sst", 0.5, seed=1).update_topology(1)
    copied = copy.deepcopy(SparseTraining(parts[0], adamw(parts[0]), "sst", 0.5, seed=1))
    copied.update_topology(1)


@pytest.fixture
def two_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_several_processes_need_one_seed(two_processes):
    model = mlp(6, 20, 1)
    with pytest.raises(ValueError, match="the same seed"):
        SparseTraining(model, adamw(model), "sst", 0.5)
    SparseTraining(model, adamw(model), "sst", 0.5, seed=1).update_topology(1)


@pytest.mark.parametrize("regime", sparsity.REGIMES)
def test_the_checks_read_from_the_device_only_at_changes_or_once_per_interval(regime, monkeypatch):
    model, optimizer, sparse = build(regime)
    plain, reads = sparsity._read, []
    monkeypatch.setattr(sparsity, "_read", lambda *flags: reads.extend(flags) or plain(*flags))
    steps = []
    for step in range(1, 41):
        reads.clear()
        train(model, [optimizer], sparse, [step])
        if reads:
            steps.append(step)
    assert steps == ([] if regime == "dense" else [10, 20, 30, 40])


# ---- B. growth ranked by gradients that say nothing ----

@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, None])
@pytest.mark.parametrize("names", [("0.weight", "2.weight", "4.weight"), ("2.weight",)])
def test_a_change_waits_for_a_usable_gradient(broken, names):
    """The whole module, or one layer alone: the others change on time."""
    model, optimizer, sparse = build()
    train(model, [optimizer], sparse, range(1, 10))
    before = masks(sparse)
    for step in (10, 11):
        backward(model, 6)
        for name in names:
            weight = model.get_parameter(name)
            if broken is None:
                weight.grad = None
            elif broken == 0.0:
                weight.grad.zero_()
            else:
                weight.grad[0, 0] = broken
        assert sparse.is_update_step(step)
        assert sparse.update_topology(step) == (step == 10 and len(names) == 1)
        assert not set(moved(sparse, before)) & set(names) and len(moved(sparse, before)) == 3 - len(names)
        sparse.load_state_dict(copy.deepcopy(sparse.state_dict()))  # also where it waits
    first = masks(sparse)
    assert not train(model, [optimizer], sparse, [12])
    assert set(moved(sparse, first)) == set(names) and not sparse.is_update_step(13)
    assert sparse.density() == pytest.approx(0.3, abs=1e-3) and pruned_are_zero(sparse)


@pytest.mark.parametrize("regime, final", [("d2s", 0.3), ("s2d", 1.0)])
def test_a_schedule_reaches_its_end_when_a_layer_had_to_wait(regime, final):
    model, optimizer, sparse = build(regime, total_steps=50)
    for step in range(1, 60):
        backward(model, 6)
        if step % 10 < 3:
            model[2].weight.grad = None
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
    assert sparse.density() == pytest.approx(final, abs=1e-3) and pruned_are_zero(sparse)


def test_two_heads_that_take_turns_both_change():
    model = nn.ModuleDict({"body": nn.Linear(6, 20), "one": nn.Linear(20, 10), "two": nn.Linear(20, 10)})
    optimizer = adamw(model)
    sparse = SparseTraining(model, optimizer, "dst", 0.7, 100, 10)
    before = masks(sparse)
    for step in range(1, 22):
        optimizer.zero_grad()
        model["one" if step % 2 else "two"](model["body"](torch.randn(8, 6)).tanh()).square().sum().backward()
        sparse.after_backward(step)
        optimizer.step()
    assert set(moved(sparse, before)) == set(before)


def test_a_layer_that_never_has_a_gradient_is_reported():
    model, optimizer, sparse = build()
    model[0].weight.register_hook(torch.zeros_like)
    told = train(model, [optimizer], sparse, range(1, 50))
    assert len(told) == 1 and re.search("0.weight stands still.*exclude the layer", told[0])


@pytest.mark.parametrize("clip, unscale, late", [(False, False, False), (True, False, False), (True, True, False),
                                                 (False, False, True), (True, False, True)])
def test_topology_after_masking_is_refused(clip, unscale, late):
    model, optimizer, sparse = build()
    with pytest.raises(RuntimeError, match="masked already.*after_backward"):
        for step in range(1, 11):
            backward(model, 6)
            sparse.mask_gradients()
            for parameter in model.parameters() if unscale else ():  # as a GradScaler does
                parameter.grad.div_(2.0)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if late:
                optimizer.step()
            sparse.update_topology(step)
            if not late:
                optimizer.step()
    model, optimizer, sparse = build(grow="random")  # which gradients do not rank
    backward(model, 6)
    sparse.mask_gradients()
    assert sparse.update_topology(10)


@pytest.mark.parametrize("regime", ["dst", "d2s"])
def test_the_right_order_is_not_refused_where_gradients_live_on(regime):
    """Gradients zeroed in place, gradients added to masked ones, and clipped ones: `.grad` stays the same tensor."""
    for zero in (True, False):
        model, optimizer, sparse = build(regime, total_steps=50, schedule_start=0)
        for step in range(1, 31):
            if zero or step % 5 == 0:
                optimizer.zero_grad(set_to_none=False)
            (model(torch.randn(32, 6)) - torch.randn(32, 1)).square().mean().backward()
            sparse.after_backward(step)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert set(sparse.last_update) == set(sparse.masks)


def test_growth_without_information_does_not_depend_on_position():
    torch.manual_seed(0)
    model = nn.Linear(40, 400)
    sparse = SparseTraining(model, adamw(model), "dst", 0.5, 100, 10, seed=1)
    before = sparse.masks["weight"].clone()
    model.weight.grad = torch.zeros(400, 40)
    model.weight.grad[0] = 1.0  # one row alone has a gradient
    assert sparse.update_topology(10)
    rows = (sparse.masks["weight"] & ~before).nonzero()[:, 0]
    assert len(rows) > 1000 and (rows == 0).sum() == (~before[0]).sum()
    assert 0.45 < (rows[rows > 0] < 200).double().mean() < 0.55


# ---- C. the step ----

def test_any_count_of_updates_works_and_is_kept_as_a_plain_number():
    plain = build(grow="random")
    counted, growing = build(grow="random"), torch.tensor(0)
    fresh, numbered = build(grow="random"), build(grow="random")
    for step in range(1, 41):
        growing += 1
        kinds = ((plain, step), (counted, growing), (fresh, torch.tensor(float(step))), (numbered, np.int64(step)))
        for (model, optimizer, sparse), kind in kinds:
            torch.manual_seed(step)
            train(model, [optimizer], sparse, [kind])
    for model, _, sparse in (counted, fresh, numbered):
        assert all(torch.equal(mask, plain[2].masks[name]) for name, mask in sparse.masks.items())
        file = io.BytesIO()
        torch.save(sparse.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["last_step"] == 40


def test_settings_given_as_numpy_scalars_save_as_plain_numbers():
    sparse = build(total_steps=np.int64(100), update_interval=np.int32(5), seed=np.int64(3), sparsity=np.float64(0.7),
                   drop_fraction_start=np.float32(0.5), schedule_power=np.float64(2))[2]
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    sparse.load_state_dict(torch.load(file, weights_only=True))


def test_steps_that_cannot_be_counts_are_refused():
    _, _, sparse = build("sst")
    sparse.update_topology(5)
    with pytest.raises(ValueError, match="step 1 comes after step 5.*not per epoch"):
        sparse.update_topology(1)
    assert sparse.last_step == 5 and not sparse.update_topology(5)
    for step in (5.5, -1, float("nan"), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match="the step"):
            sparse.update_topology(step)
    build("dense")[2].update_topology(3)


# ---- D. schedules ----

def test_a_saved_schedule_is_not_continued_as_another():
    _, _, sparse = build("d2s", total_steps=100)
    state = sparse.state_dict()
    for name, value in {"total_steps": 300, "update_interval": 5, "drop_fraction_start": 0.4, "drop_fraction_end": 0.1,
                        "schedule_start": 0.1, "schedule_end": 0.9, "schedule_power": 3.0, "grow": "random"}.items():
        other = build("d2s", **{"total_steps": 100} | {name: value})[2]
        with pytest.raises(ValueError, match=f"{name}=.*delete state"):
            other.load_state_dict(copy.deepcopy(state))
        other.load_state_dict({key: part for key, part in state.items() if key != "schedule"})
    model = mlp(6, 20, 20, 8)
    with pytest.raises(ValueError, match="final=0.7"):
        SparseTraining(model, adamw(model), "d2s", 0.8, 100, 10).load_state_dict(state)
    # What a regime does not read may differ.
    build("dst", schedule_power=3.0)[2].load_state_dict(build("dst")[2].state_dict())
    build("sst", total_steps=7, update_interval=3)[2].load_state_dict(build("sst")[2].state_dict())


def test_a_topology_that_never_changes_is_reported():
    model = mlp(6, 20, 20, 1)
    for total, interval, options in ((600, 1000, {}), (1000, 1000, {}), (10, 5, {"drop_fraction_start": 0.001}),
                                     (10, 5, {"drop_fraction_start": 0.0})):
        with pytest.warns(RuntimeWarning, match="topology never changes: lower update_interval"):
            SparseTraining(model, adamw(model), "dst", 0.7, total, interval, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseTraining(model, adamw(model), "dst", 0.7, 1999, 1000)
        SparseTraining(model, adamw(model), "dst", 0.7, 10, 5, drop_fraction_start=0.0, drop_fraction_end=0.5)
        SparseTraining(model, adamw(model), "dst", 0.0, 600, 1000)
        SparseTraining(model, adamw(model), "sst", 0.7, 10, 50)
    for regime in ("s2d", "d2s"):  # one change, at the end of the schedule
        with pytest.warns(RuntimeWarning, match="topology never changes before the end: lower"):
            SparseTraining(model, adamw(model), regime, 0.7, 10, 50)


@pytest.mark.parametrize("regime", sparsity.REGIMES)
def test_the_length_of_training_and_the_optimizer_are_asked_for_where_they_matter(regime):
    model = mlp(6, 20, 8)
    if regime in ("dense", "sst"):
        sparse = SparseTraining(model, None, regime, 0.5, update_interval=2)
        for step in (1, 2, 3, 5000):
            sparse.after_backward(step)
        sparse.load_state_dict(sparse.state_dict())
    else:
        with pytest.raises(ValueError, match=f"{regime} needs total_steps"):
            SparseTraining(model, adamw(model), regime)
        with pytest.raises(ValueError, match=f"{regime} needs the optimizer"):
            SparseTraining(model, None, regime, 0.5, 100, 10)


# ---- E. modules that changed, or that masks cannot follow ----

CHANGES = {"tied": lambda m: setattr(m[4], "weight", m[2].weight), "normed": lambda m: weight_norm(m[2]),
           "pruned": lambda m: prune.random_unstructured(m[2], "weight", 0.5),
           "removed": lambda m: m.__setitem__(2, nn.Identity()),
           "resized": lambda m: m.__setitem__(2, nn.Linear(20, 21))}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_module_is_refused_in_words(change):
    for call in (lambda sparse: sparse.mask_gradients(), lambda sparse: sparse.update_topology(1),
                 lambda sparse: sparse.after_backward(10), lambda sparse: sparse.apply_masks(),
                 lambda sparse: sparse.load_state_dict(sparse.state_dict())):
        model, optimizer, sparse = build(sizes=(6, 20, 20, 20))
        backward(model, 6)
        change(model)
        with pytest.raises(RuntimeError, match="[24].weight is gone or has another shape: build"):
            call(sparse)


def test_sharded_and_lazy_and_other_tensors_are_refused_in_words(two_processes):
    from torch.distributed._composable.fsdp import fully_shard
    model = mlp(6, 20, 8)
    sparse = SparseTraining(model, adamw(model), "sst", 0.5, seed=1)
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    for call in (lambda: SparseTraining(model, adamw(model), "sst", 0.5, seed=1), lambda: sparse.update_topology(1)):
        with pytest.raises(ValueError, match="is a DTensor.*DistributedDataParallel"):
            call()
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="0.weight is a UninitializedParameter.*first pass a batch"):
        SparseTraining(lazy, adamw(lazy), "sst", 0.5, seed=1)

