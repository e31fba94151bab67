"""sparsity.py in other projects: what its users expect, and ways of training that it must not disturb."""

import copy
import io
import itertools
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsity
from sparsity import SparseTraining, layer_densities
from tests.helpers import backward, mlp
from tests.test_sparse_guards import adamw, build, masks, moved, pruned_are_zero, train


# ---- what users expect ----

def test_after_backward_is_topology_and_then_gradients():
    (one, one_optimizer, sparse), (two, two_optimizer, halves) = build(), build()
    for step in range(1, 41):
        torch.manual_seed(step)
        backward(one, 6)
        changed = sparse.after_backward(step)
        torch.manual_seed(step)
        backward(two, 6)
        assert halves.update_topology(step) == changed == (step % 10 == 0)
        halves.mask_gradients()
        one_optimizer.step(), two_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_examples_of_the_docstring_run(capsys):
    code = "\n".join(line[4:] for line in sparsity.__doc__.splitlines() if line.startswith("    ") or not line)
    names = {}
    exec(code[code.index("import"):], names)
    assert re.search("error [0-2][.].*, SparseTraining.*all +2304  density 0.4", capsys.readouterr().out, re.DOTALL)
    for name, mask in names["sparse"].masks.items():  # the soft target
        target, model = names["target"].get_parameter(name), names["model"].get_parameter(name)
        assert not target[~mask].any() and not model[~mask].any() and not torch.equal(target, model)
    assert len(moved(names["sparse"], names["sparse"].first_masks)) == 1  # the head stays dense


class Gained(nn.Linear):
    """A linear layer with a gain per unit."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight_gain = nn.Parameter(torch.ones(sizes[1], 1))


class Noisy(nn.Module):
    """Fortunato et al., with the names of one published version or another's."""

    def __init__(self, n_in, n_out, mean="weight_mu", sigma="weight_sigma"):
        super().__init__()
        self.names = mean, sigma
        for name in self.names:
            setattr(self, name, nn.Parameter(torch.randn(n_out, n_in)))
        self.bias_mu, self.bias_sigma = nn.Parameter(torch.zeros(n_out)), nn.Parameter(torch.ones(n_out))

    def effective(self):
        mean, sigma = (getattr(self, name) for name in self.names)
        return mean + sigma * torch.randn_like(sigma)

    def forward(self, x):
        return F.linear(x, self.effective(), self.bias_mu)


class NoisyLinear(nn.Linear):
    """As another published version has it: a subclass of nn.Linear."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.sigma_weight = nn.Parameter(torch.full((sizes[1], sizes[0]), 0.017))

    def effective(self):
        return self.weight + self.sigma_weight * torch.randn_like(self.sigma_weight)

    def forward(self, x):
        return F.linear(x, self.effective(), self.bias)


class Ensemble(nn.Module):
    """n linear layers in one tensor: (n, batch, in) -> (n, batch, out)."""

    def __init__(self, n, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n, 1, n_out))

    def forward(self, x):
        return x @ self.weight.mT + self.bias


@pytest.mark.filterwarnings("ignore:left dense")
def test_a_gain_per_unit_is_not_masked():
    model = nn.Sequential(Gained(6, 20), nn.Linear(20, 8))
    assert SparseTraining(model, adamw(model), "sst", 0.5).masks.keys() == {"0.weight", "1.weight"}
    assert model[0].weight_gain.all()


@pytest.mark.parametrize("layer", [Noisy, NoisyLinear, lambda *sizes: Noisy(*sizes, "mu_w", "sigma_w")])
def test_noise_shares_the_mask_of_its_mean(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(6, 20), nn.Tanh(), layer(20, 8))
    optimizer = adamw(model)
    sparse = SparseTraining(model, optimizer, "dst", 0.7, 100, 10, include=() if layer is NoisyLinear else Noisy)
    assert len(sparse.masks) == 2 and sparse.density() == pytest.approx(0.3, abs=1e-2)
    before = masks(sparse)
    assert not train(model, [optimizer], sparse, range(1, 45)) and pruned_are_zero(sparse)
    assert len(moved(sparse, before)) == 2
    for mask, layer in zip(sparse.masks.values(), (model[0], model[2])):
        assert torch.equal(layer.effective() != 0, mask)


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.body = nn.Conv2d(2, 4, 3), nn.Linear(6, 20)
        self.critics, self.noisy = Ensemble(5, 20, 7), Noisy(20, 3)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.position = nn.Parameter(torch.randn(1, 9, 4), requires_grad=False)
        self.norm, self.gain = nn.LayerNorm([4, 8]), nn.Parameter(torch.ones(4))


def test_layers_left_dense_are_named_once_and_included_by_name_kind_layer_or_tensor():
    model = Agent()
    make = lambda **options: SparseTraining(model, adamw(model), "sst", 0.5, seed=1, **options)
    dense = "left dense: mixing, critics.weight, noisy.weight_mu, noisy.weight_sigma; mask"
    with pytest.warns(RuntimeWarning, match=dense):
        assert make().masks.keys() == {"image.weight", "body.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(exclude=[Ensemble, "mixing", model.noisy]).masks.keys() == {"image.weight", "body.weight"}
        everything = {"image.weight", "body.weight", "critics.weight", "noisy.weight_mu", "mixing"}
        for include in ([Ensemble, Noisy, "mixing"], ["critics", model.noisy, model.mixing],
                        ["critics.weight", "noisy.weight_mu", "mixing"],
                        [model.critics.weight, Noisy, "mixing"], Agent):
            assert make(include=include).masks.keys() == everything
        assert make(include=Agent, exclude=[nn.Conv2d, model.body.weight]).masks.keys() == everything - {
            "image.weight", "body.weight"}
        SparseTraining(model, None, "dense")
    assert make(include="mixing").masks.keys() == {"image.weight", "body.weight", "mixing"}
    for choice, message in (("gain", "no trainable matrix"), (model.position, "no trainable matrix"),
                            ("norm", "no trainable"), ("critic", "no layer or weight critic"),
                            (nn.Conv3d, "no layer or weight <class"), (torch.ones(4, 4), "no layer or weight tensor"),
                            (nn.Linear(2, 2), "no layer or weight Linear")):
        with pytest.raises(ValueError, match=message):
            make(include=choice)


@pytest.mark.parametrize("distribution", ["er", "uniform"])
def test_a_vectorized_ensemble_is_as_sparse_as_its_layers_apart(distribution):
    stacked = nn.Sequential(Ensemble(20, 6, 30), nn.ELU(), Ensemble(20, 30, 7))
    sparse = SparseTraining(stacked, adamw(stacked), "dst", 0.7, 100, 10, distribution, include=Ensemble)
    densities = layer_densities([(30, 6)] * 20 + [(7, 30)] * 20, 0.7, distribution)
    expected = {"0.weight": densities[0], "2.weight": densities[-1]}
    assert sparse.layer_densities() == pytest.approx(expected, abs=1 / 3600)
    optimizer, before = sparse.optimizer, masks(sparse)
    for step in range(1, 31):
        optimizer.zero_grad()
        stacked(torch.randn(20, 16, 6)).square().mean().backward()
        sparse.after_backward(step)
        optimizer.step()
    assert pruned_are_zero(sparse) and len(moved(sparse, before)) == 2
    assert sparse.layer_densities() == pytest.approx(expected, abs=1 / 3600)


@pytest.mark.parametrize("regime", ["dst", "s2d", "d2s"])
def test_the_record_of_what_moved(regime):
    """Counted by hand, and the same after a resume."""
    model, optimizer, sparse = build(regime, total_steps=100)
    assert all(math.isnan(value) for value in sparse.movement().values())
    first = masks(sparse)
    for step in range(1, 101):
        before, magnitude = masks(sparse), {name: model.get_parameter(name).detach().abs() for name in first}
        train(model, [optimizer], sparse, [step])
        if step % 10 == 0:
            total = dict.fromkeys(("dropped", "grown", "regrown"), 0)
            zeta = sparsity.drop_fraction(step, 100)
            for name, record in sparse.last_update.items():
                old, new = before[name], sparse.masks[name]
                if not old.all() or not new.all():
                    active = int(old.sum())
                    dropped = max(math.floor(zeta * active), active - int(new.sum()))
                    weakest = magnitude[name][old].sort().values[:dropped]
                    returned = dropped - int((old & ~new).sum())
                    kept = int((first[name] & new).sum()) / int(first[name].sum())
                    grown = dropped + int(new.sum()) - active
                    assert record == {"dropped": dropped, "grown": grown, "regrown": returned, "initial_kept": kept}
                    assert not dropped or magnitude[name][old & ~new].le(weakest.max()).all()
                total = {key: total[key] + record[key] for key in total}
            kept = sum(int((first[name] & mask).sum()) for name, mask in sparse.masks.items())
            if sparse.last_update:
                assert sparse.movement() == pytest.approx(
                    total | {"initial_kept": kept / sum(int(mask.sum()) for mask in first.values())}, rel=1e-12)
        if step == 45:
            resumed = build(regime, total_steps=100, seed=9)[2]
            resumed.load_state_dict(copy.deepcopy(sparse.state_dict()))
            assert resumed.movement() == pytest.approx(sparse.movement(), nan_ok=True)
            assert resumed.last_update == sparse.last_update
            assert all(torch.equal(mask, first[name]) for name, mask in resumed.first_masks.items())
    assert all(math.isnan(value) for value in build("sst")[2].movement().values())


def test_printing_shows_layers_shapes_and_densities():
    _, _, sparse = build(sizes=(6, 20, 8))
    lines = repr(sparse).splitlines()
    assert lines[0] == "SparseTraining of Sequential: dst, step 0"
    densities = sparse.layer_densities()
    layers = (("0.weight", "20x6", densities["0.weight"]), ("2.weight", "8x20", densities["2.weight"]),
              ("all", "280", sparse.density()))
    assert [line.split() for line in lines[1:]] == [
        [name, shape, "density", f"{density:.4f}"] for name, shape, density in layers]


WRAPS = (lambda model: model, nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel)


@pytest.mark.parametrize("wrap, other", list(itertools.product(WRAPS, WRAPS)))
def test_masks_of_a_wrapped_module_load_into_a_plain_one_and_back(wrap, other):
    one, two = wrap(mlp(6, 20, 20, 8)), other(mlp(6, 20, 20, 8))
    sparse, second = (SparseTraining(model, adamw(model), "dst", 0.7, 100, 10, seed=seed)
                      for seed, model in ((1, one), (2, two)))
    state = sparse.state_dict()
    second.load_state_dict(state)
    assert all(torch.equal(mask, second.masks[name]) for name, mask in sparse.masks.items()) and pruned_are_zero(second)
    # Older versions saved the names of the wrapped module's parameters.
    names = [name for name, parameter in one.named_parameters() if parameter.ndim == 2]
    old = {key: state[key] for key in ("regime", "last_step", "sparsity", "seed")}
    third = SparseTraining(mlp(6, 20, 20, 8), None, "sst", 0.7, seed=3)
    third.load_state_dict(old | {"regime": "sst", "masks": dict(zip(names, state["masks"].values()))})
    assert all(torch.equal(mask, third.masks[name]) for name, mask in sparse.masks.items())


# ---- ways of training that stay exact ----

def steps(model, optimizer, sparse, data, first=1):
    for number, (x, y) in enumerate(data, first):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        sparse.after_backward(number)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def batches(n=30, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, width, generator=generator), torch.randn(16, 8, generator=generator)) for _ in range(n)]


def test_accumulated_gradients_equal_one_large_batch():
    sgd = lambda model: torch.optim.SGD(model.parameters(), 0.1)
    (one, one_optimizer, sparse), (two, two_optimizer, parts) = (build(optimizer=sgd) for _ in range(2))
    one.double(), two.double(), sparse.set_optimizer(one_optimizer), parts.set_optimizer(two_optimizer)
    for step, (x, y) in enumerate(batches(), 1):
        x, y = x.double(), y.double()
        steps(one, one_optimizer, sparse, [(x, y)], step)
        two_optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (0.5 * (two(x[part]) - y[part]).square().mean()).backward()
        parts.after_backward(step)
        two_optimizer.step()
    assert all(torch.equal(mask, parts.masks[name]) for name, mask in sparse.masks.items())
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(one.parameters(), two.parameters()))


def by_torch_save(parts):
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts)), by_torch_save],
                         ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("regime", sparsity.REGIMES)
def test_copies_of_model_optimizer_and_masks_go_on_exactly(regime, copier):
    model, optimizer, sparse = build(regime, total_steps=40)
    data = batches(40)
    steps(model, optimizer, sparse, data[:15])
    copied = copier((model, optimizer, sparse))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for a, b in zip(steps(model, optimizer, sparse, data[15:], 16), steps(*copied, data[15:], 16)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_foreach_and_fused_optimizers_keep_pruned_weights_at_zero(options):
    model, optimizer, sparse = build(optimizer=lambda model: adamw(model, **options))
    assert not train(model, [optimizer], sparse, range(1, 45)) and pruned_are_zero(sparse)


@pytest.mark.slow
def test_compiled_steps_and_compiled_masking_change_nothing():
    plain, compiled = build(), build()
    (model, optimizer, sparse), data = compiled, batches(25)
    forward = torch.compile(model, backend="aot_eager")
    mask = torch.compile(sparse.mask_gradients, backend="eager", fullgraph=True)
    expected = steps(*plain, data)
    for number, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        (forward(x) - y).square().mean().backward()
        sparse.update_topology(number)
        mask()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters()))


@pytest.mark.slow
def test_data_parallel_training_with_one_process_changes_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (plain, plain_optimizer, expected), (model, optimizer, sparse) = build(), build()
        wrapped, data = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), batches(35)
        values = steps(plain, plain_optimizer, expected, data)
        assert all(torch.equal(a, b) for a, b in zip(values, steps(wrapped, optimizer, sparse, data)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layer", [
    lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: nn.Conv2d(8, 16, 3, groups=8),
    lambda: nn.Conv2d(8, 12, 3, groups=4), lambda: nn.Conv2d(8, 12, 1), lambda: nn.ConvTranspose2d(8, 12, 3),
    lambda: nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 12, (1, 3, 3)))])
def test_convolutions_of_every_kind_stay_exactly_sparse(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.ELU(), nn.Flatten(), nn.LazyLinear(8))
    x = torch.randn(4, 8, 6, 6)
    model(x)
    optimizer = adamw(model)
    sparse = SparseTraining(model, optimizer, "dst", 0.7, 100, 5)
    size = sum(mask.numel() for mask in sparse.masks.values())
    for step in range(1, 31):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        sparse.after_backward(step)
        optimizer.step()
        assert sum(int(mask.sum()) for mask in sparse.masks.values()) == math.floor(0.3 * size + 0.5)
        assert pruned_are_zero(sparse)
    assert len(sparse.last_update) == 2 and sparse.movement()["initial_kept"] < 1
