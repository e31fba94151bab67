"""Tests of SimBa's networks and its observation normalizer."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import simba
from sac import SAC
from tests.helpers import count, naive_simba


def test_simba_networks_and_sizes():
    torch.manual_seed(0)
    critic = simba.SimbaCritic(5, 2, 8, num_blocks=3, num_qs=2)
    for name, parameter in critic.named_parameters():
        nn.init.normal_(parameter, std=1e-3 if "projection" in name else 0.5)  # so small that the epsilon counts
    obs, action = torch.randn(7, 5), torch.randn(7, 2)
    x = torch.cat([obs, action], 1)
    both = [naive_simba(q, x, [])[1] for q in (critic.q1, critic.q2)]
    torch.testing.assert_close(critic(obs, action), torch.cat(both, 1))
    assert len(list(simba.SimbaCritic(5, 2, 8, 1).children())) == 1
    actor = simba.SimbaGaussian(5, 2, 8, 1)  # mean first, then log-std, each with a head of its own
    features, mean = naive_simba(actor, obs, [])
    torch.testing.assert_close(actor(obs), torch.cat([mean, features @ actor.log_std.weight.T + actor.log_std.bias], 1))

    def size(inputs, outputs, hidden, blocks):  # weights and biases, and two vectors a LayerNorm
        block = 2 * hidden + hidden * 4 * hidden + 4 * hidden + 4 * hidden * hidden + hidden
        return (inputs + 1) * hidden + blocks * block + 2 * hidden + (hidden + 1) * outputs

    for width, depth, millions in ((1, 1, 4.39), (2, 1, 17.44), (1, 4, 17.40), (4, 3, 207.96)):  # humanoid-run, one Q
        with torch.device("meta"):
            modules = {name: dataclasses.replace(m, width_scale=width, depth_scale=depth) for name,
                       m in SAC.Config.presets["default"].items()}
            agent = SAC(67, 21, modules, device="meta")
        counts = {name: count(network) for name, network in agent.networks.items()}  # log-std and mean: 21 outputs each
        assert counts == {"critic": size(88, 1, 512 * width, 2 * depth), "actor": size(67, 42, 128 * width, depth)}
        assert round(sum(counts.values()) / 1e6, 2) == millions


def test_simba_initialization():
    torch.manual_seed(0)
    q, actor = simba.SimbaCritic(40, 10, 64, 2).q1, simba.SimbaGaussian(50, 10, 64, 2)
    for layer in (q.projection, actor.projection):
        torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(50), atol=1e-5, rtol=0)
    assert q.output.weight.norm().item() == pytest.approx(1, abs=1e-5)  # orthogonal, gain 1
    for layer in (actor.output, actor.log_std):
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(10), atol=1e-5, rtol=0)
    for layer in (q.blocks[0].linear1, q.blocks[1].linear2):
        std = math.sqrt(2 / layer.in_features)  # He; the cut is at two standard deviations of the normal before it
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert 0.99 * 2 < layer.weight.abs().max().item() / (std / 0.8796257) <= 2
    assert not any(layer.bias.any() for module in (q, actor) for layer in module.modules()
                   if isinstance(layer, nn.Linear))


def test_normalizer_against_numpy():
    rng = np.random.RandomState(0)
    seen = (rng.randn(500, 3) * [1, 10, 0] + [5, -300, 2]).astype(np.float32)
    normalizer = simba.RunningNormalizer(3)
    for obs in seen:
        normalizer.update(torch.from_numpy(obs))
    # Mean 0 and variance 1 with the weight of 1e-4 observations, then the rest.
    weights = np.concatenate([[1e-4], np.ones(500)])
    values = np.concatenate([np.zeros((1, 3)), seen.astype(np.float64)])
    mean = np.average(values, axis=0, weights=weights)
    var = np.average((values - mean) ** 2, axis=0, weights=weights) + 1e-4 / weights.sum()  # with the first one's own
    np.testing.assert_allclose(normalizer.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, var, rtol=1e-9)
    assert normalizer.count.item() == pytest.approx(500.0001, abs=1e-9)
    normalized = normalizer(torch.from_numpy(seen))
    np.testing.assert_allclose(normalized, (seen - mean) / np.sqrt(var + 1e-8), rtol=2e-4, atol=2e-4)
    assert normalized.dtype == torch.float32 and normalized.shape == (500, 3)
    assert normalizer(normalized[None]).shape == (1, 500, 3)
    normalizer.mean.zero_(), normalizer.var.zero_()
    np.testing.assert_allclose(normalizer(torch.full((3,), 1e-4)), 1, rtol=1e-6)  # only its epsilon of 1e-8 is left
