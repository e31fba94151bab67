"""Tests of metrics."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
import networks
from tests.helpers import mlp


def test_srank_against_published_values_and_svd():
    assert metrics.srank(torch.diag(torch.tensor([50, 30, 15, 4, 0.9, 0.1]))) == 4
    assert metrics.srank(torch.diag(torch.tensor([99.0, 1.0]))) == 1  # exactly 99 %
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
    rows = [[1.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.2, 0.0], [2.0, 0.0, 0.1, 2.0], [2.0, 0.0, 0.1, 2.0]]
    layers = {"a": torch.tensor(rows), "b": torch.tensor([[0.0, 1.0]] * 4)}
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


def test_outputs_of_all_activation_layers_are_recorded():
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
    with metrics.record_activations(model.act) as recorded:  # default: channels first only in images
        model.act(x)
    assert recorded[""].shape[1] == (8 if dims == 1 else 2)
    model = nn.ModuleList([nn.Conv1d(2, 4, 3), nn.GRU(2, 5, batch_first=True), nn.ReLU()])
    with metrics.record_activations(model) as recorded:
        model[2](model[0](torch.randn(3, 2, 8)))
        model[2](model[1](torch.randn(3, 8, 2))[0])
    assert recorded["2"].shape == (3 * 8, 5)


def test_every_kind_of_activation_is_recorded_by_copy():
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


@pytest.fixture
def task():
    """(model, losses of six samples with their graph, their gradients one after the other (6, parameters))."""
    model = mlp(5, 7, 3)
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    gradients = []
    for i in range(6):
        model.zero_grad()
        (model(x[i:i + 1]) - y[i:i + 1]).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return model, (model(x) - y).square().mean(1), torch.stack(gradients)


def gram_of(losses, model, *rest, **options):
    return metrics.gradient_gram(losses, list(model.parameters()), *rest, **options)


def test_norms_against_naive_forms(task):
    model, _, gradients = task
    assert metrics.gradient_norm(model) == pytest.approx(gradients[-1].norm().item(), rel=1e-5)
    squares = sum(p.square().sum().item() for p in model.parameters())
    assert metrics.parameter_norm(model) == pytest.approx(math.sqrt(squares), rel=1e-5)
    model.zero_grad()
    assert math.isnan(metrics.gradient_norm(model)) and math.isnan(metrics.parameter_norm(nn.ReLU()))


def test_interference_against_a_naive_form(task):
    model, losses, gradients = task
    cosine = F.cosine_similarity(gradients[:, None].double(), gradients[None].double(), dim=2)
    torch.testing.assert_close(metrics.gradient_interference(gradients), cosine, atol=1e-6, rtol=1e-5)
    for group_size in (1, 20, 10**6):  # however the layers are grouped
        gram = gram_of(losses, model, group_size=group_size)
        torch.testing.assert_close(metrics.cosines(gram), cosine, atol=1e-5, rtol=1e-4)
    assert [len(group) for group in metrics._groups([(torch.zeros(5), None)] * 5, 10)] == [2, 2, 1]
    mean, negative = metrics.interference_summary(cosine)
    off = cosine[~torch.eye(6, dtype=torch.bool)]
    assert mean == pytest.approx(off.mean().item()) and negative == pytest.approx((off < 0).double().mean().item())
    summary = metrics.interference_summary(torch.tensor([[1, 0, -1], [0, 1, 0], [-1, 0, 1.0]]))
    assert summary == (pytest.approx(-1 / 3), pytest.approx(1 / 3))
    assert all(math.isnan(value) for value in metrics.interference_summary(torch.full((3, 3), float("nan"))))


def test_interference_leaves_out_pruned_and_frozen_weights(task):
    model, losses, gradients = task
    masks = [torch.rand(p.shape) < 0.5 for p in model.parameters()]
    masked = gradients * torch.cat([m.flatten() for m in masks])
    torch.testing.assert_close(gram_of(losses, model, masks), (masked @ masked.T).double(), atol=1e-6, rtol=1e-4)
    model[0].requires_grad_(False)
    trained = gradients[:, 5 * 7 + 7:].double()
    torch.testing.assert_close(gram_of(losses, model), trained @ trained.T, atol=1e-6, rtol=1e-4)


def test_interference_is_summed_in_float64(task):
    model, losses, gradients = task
    weight, data = torch.ones(3000, requires_grad=True), torch.randn(4, 3000)
    with torch.autocast("cpu", torch.bfloat16):  # whatever precision products have, as tf32 on a GPU
        gram = metrics.gradient_gram((data * weight).sum(1), [weight])
    torch.testing.assert_close(gram, data.double() @ data.double().T, atol=1e-9, rtol=0)
    tiny = gram_of(losses * 1e-24, model)  # their squares underflow in float32
    torch.testing.assert_close(metrics.cosines(tiny), metrics.gradient_interference(gradients), atol=1e-5, rtol=1e-4)


def test_a_metric_without_anything_to_measure_is_nan(task):
    model, losses, _ = task
    for nothing in (model.requires_grad_(False), nn.ReLU(), mlp(5, 7, 3)):  # frozen; no parameters; not in the graph
        row = metrics.module_metrics(nothing, {"z": torch.zeros(0, 4)}, {}, losses)
        assert all(math.isnan(row[key]) for key in ("srank_z", "dormant_ratio", "grad_cosine", "grad_norm"))
        assert math.isnan(row["parameter_norm"]) == (nothing.__class__ is nn.ReLU)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch.compile", "Module.compile", "function"])
@pytest.mark.parametrize("ran_before", [False, True])
def test_compiled_networks_are_recorded(kind, ran_before):
    """torch.compile ignores hooks that were set after its first call: the dormant ratio was NaN without a word."""
    model, x = mlp(4, 8, 1), torch.randn(16, 4)
    with metrics.record_activations(model) as expected:
        model(x)
    if kind == "Module.compile":
        model.compile(backend="aot_eager")
    call = model if kind == "Module.compile" else torch.compile(
        model if kind == "torch.compile" else lambda x: model(x), backend="aot_eager")
    if ran_before:
        call(x)
    with metrics.record_activations(call if kind == "torch.compile" else model) as recorded:
        call(x)
    assert recorded.keys() == expected.keys() == {"1"}
    torch.testing.assert_close(recorded["1"], expected["1"])


def test_a_network_without_recorded_activations_is_reported():
    class Functional(nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = Functional(4, 4)
    with pytest.warns(UserWarning, match="no activation of this Functional was recorded, so its dormant ratio is NaN"):
        with metrics.record_activations(model) as recorded:
            model(torch.ones(2, 4))
    assert recorded == {}


def test_srank_max_is_the_smaller_of_samples_and_features():
    row = metrics.module_metrics(nn.ReLU(), {"wide": torch.randn(5, 8), "tall": torch.randn(8, 5)}, {}, torch.ones(2))
    assert row["srank_wide_max"] == row["srank_tall_max"] == 5


def test_dormant_scores_of_bfloat16_are_float32_means():
    layer = torch.tensor([[1.0, 1.0], [1.0078125, 1.0]]).bfloat16()  # the mean between two neighbors is neither
    assert metrics.dormant_ratio({"a": layer}, tau=1.0)[0] == 0.5
