"""Tests of SAC and DDPG: log-probabilities and normalization; whole updates: test_updates.py."""

import math

import numpy as np
import pytest
import torch

from sac import reduce_q, tanh_gaussian
from tests.helpers import REPLAY_AGENTS, tiny_of


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
def test_log_probability_where_tanh_rounds_to_1(mean):
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


def test_observations_are_stored_raw_and_normalized_when_drawn():
    agent, buffer = tiny_of("sac")
    seen = []
    agent.critic_loss = lambda batch, original=agent.critic_loss: (seen.append(batch.obs), original(batch))[1]
    torch.manual_seed(3)
    raw = buffer.sample(16, 1).obs
    torch.manual_seed(3)
    agent.update()
    torch.testing.assert_close(seen[0], (raw - agent.normalizer.mean.float()) / agent.normalizer.var.sqrt().float())
    obs = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
    before = agent.normalizer.mean.clone()
    agent.act(obs, explore=False), agent.act(obs, explore=True)
    assert torch.equal(before, agent.normalizer.mean)  # only `update_obs_stats` changes it
    agent.update_obs_stats(obs)
    assert not torch.equal(before, agent.normalizer.mean)
    for algo in REPLAY_AGENTS:
        with pytest.raises(FloatingPointError, match="nan"):
            tiny_of(algo)[0].update_obs_stats(np.array([1.0, float("nan"), 0, 0], np.float32))


def test_reductions_and_wrong_choices():
    q = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    assert reduce_q(q, "min").tolist() == [1, 2] and reduce_q(q, "mean").tolist() == [2, 3.5]
    for algo, settings, message in (("sac", {"twin_critics": True, "target_q_reduce": "max"}, "choose min or mean"),
                                    ("mrsac", {"target_policy": "both"}, "choose target or online")):
        with pytest.raises(ValueError, match=message):
            tiny_of(algo, **settings)
