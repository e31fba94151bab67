"""Tests of MR.Q: its losses against plain loops, faults, bursts, acting, states."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mrq import symexp, two_hot, two_hot_cross_entropy
from replay import ReplayBuffer
from mrq import MR_DEFAULT
from tests.helpers import REPLAY_AGENTS, dense_two_hot, play, regimes_dense, tiny_of


def test_two_hot_against_a_dense_row():
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


@pytest.mark.parametrize("algo, name", [("mrq", "encoder"), ("mrq", "critic"), ("mrq", "actor"), ("sac", "critic"),
                                        ("sac", "actor"), ("ddpg", "actor"), ("mrsac", "actor")])
def test_nan_stops_only_its_module(algo, name, monkeypatch):
    """After one loss that is NaN or infinite, only that module stops; which one, and when, is reported."""
    agent, buffer = tiny_of(algo, interval=100)
    original, calls = getattr(agent, f"{name}_loss"), itertools.count(1)
    bad = 6 if name == "encoder" else 3  # the encoder's sixth update is in the burst of step 4
    wrong = math.inf if algo == "mrq" and name == "critic" else math.nan
    monkeypatch.setattr(agent, f"{name}_loss", lambda *arguments: (
        (lambda losses, *rest: (losses + (wrong if next(calls) == bad else 0.0), *rest))(*original(*arguments))))
    weights = lambda: {n: torch.cat([p.detach().flatten() for p in network.parameters()]) for n,
                       network in agent.networks.items()}
    for _ in itertools.takewhile(lambda _: agent.nonfinite_report() is None, range(20)):
        agent.update()
    then = weights()
    for _ in range(5):  # another burst among them
        agent.update()
    assert {n: torch.equal(w, then[n]) for n, w in weights().items()} == {n: n == name for n in then}
    assert all(w.isfinite().all() for w in weights().values())
    assert agent.nonfinite_report() == (f"the {name}'s loss or gradient (its update {bad})", 4 if name == "encoder"
                                        else (bad - 1) // agent.updates_per_step)
    assert [n for n, broken in agent.nonfinite.items() if broken] == [name]
    if algo in ("sac", "mrsac"):
        log = agent.temperature.log
        assert log.isfinite() and (agent.temperature.optimizer.state[log]["step"] == 2) == (name == "actor")


def test_priorities_stay_finite():
    buffer = play(0, 400, 5, 300)[0]
    index = buffer.priority.nonzero().flatten()[:3]
    buffer.update_priority(index, torch.tensor([math.nan, math.inf, 32.0]))
    assert buffer.priority[index].tolist() == pytest.approx([1, 1, 4]) and buffer.max_priority == 4


def test_what_is_1_or_0_until_a_reward_or_a_termination_is_stored():
    agent = tiny_of("mrq")[0]
    agent.replay = buffer = ReplayBuffer(4, 2, 400, 5)
    add = lambda reward, terminated: buffer.add(np.ones(4), np.zeros(2), reward, np.ones(4), terminated, False)
    for _ in range(60):
        add(0.0, False)
    agent.refresh_targets()
    assert agent.reward_scale == agent.target_reward_scale == 1
    add(-6.1, False)
    agent.refresh_targets()
    assert agent.reward_scale.item() == pytest.approx(0.1) and agent.target_reward_scale == 1
    agent.update()
    done = agent.encoder.model.weight.grad  # its first row
    assert not agent.info["terminal_loss"].any() and not done[0].any() and done[1:].any()
    add(1.0, True)
    agent.update_encoder()
    assert agent.info["terminal_loss"].any() and agent.encoder.model.weight.grad[0].any()


def test_actor_loss_computes_no_gradient_of_critic_and_encoder():
    agent = tiny_of("mrq", MR_DEFAULT)[0]
    agent.refresh_targets()
    agent.update()
    zs = agent.encode(torch.randn(16, 4))
    with FlopCounterMode(display=False) as counter:
        agent.update_actor(zs)
    # One product per weight forward, one backward, and one more for the actor's weights.
    products = lambda module: sum(2 * 16 * p.numel() for p in module.parameters() if p.ndim == 2)
    way = products(agent.critic) + products(agent.encoder.zsa_mlp) + products(agent.encoder.za_linear)
    first = 2 * 16 * agent.actor.mlp.projection.weight.numel()  # z_s needs no gradient
    assert counter.get_total_flops() <= 2 * way + 3 * products(agent.actor) - first


def test_burst_is_drawn_at_its_start_and_resumes_exactly():
    agent = tiny_of("mrq")[0]
    buffer, drawn = agent.replay, []
    gather = buffer.gather
    buffer.gather = lambda index, horizon: drawn.append(index) or gather(index, horizon)
    agent.refresh_targets()
    burst = agent.encoder_indices.clone()
    assert burst.shape == (4, 16) and len(burst.unique()) > 30 and (buffer.priority[burst] > 0).all()
    agent.update_encoder()
    other = tiny_of("mrq", seed=9)[0]
    other.replay = buffer
    other.load_state_dict(copy.deepcopy(agent.state_dict()))  # stopped after one update of four
    torch.manual_seed(123)
    for one in (agent, other):
        for _ in range(3):
            one.update_encoder()
    assert torch.equal(torch.stack(drawn), torch.cat([burst, burst[1:]]))
    assert all(torch.equal(a, b) for a, b in zip(agent.encoder.parameters(), other.encoder.parameters()))
    agent.refresh_targets()
    assert not torch.equal(agent.encoder_indices, burst) and agent.encoder_position == 0


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_agent_resumes_exactly_from_its_state(algo):
    agent, buffer = tiny_of(algo)
    for _ in range(5):
        agent.update()
    other = tiny_of(algo, seed=9)[0]
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    other.replay = copy.deepcopy(buffer)
    for one in (agent, other):
        torch.manual_seed(1)
        for _ in range(6):
            one.update()
    for kind in ("networks", "targets"):
        for name, network in getattr(agent, kind).items():
            for a, b in zip(network.parameters(), getattr(other, kind)[name].parameters()):
                assert torch.equal(a, b)
    assert {k: v.tolist() for k, v in agent.info.items()} == {k: v.tolist() for k, v in other.info.items()}
    obs = np.ones(4, np.float32)
    np.testing.assert_array_equal(agent.act(obs, explore=False), other.act(obs, explore=False))  # the normalizer too


def test_state_of_another_agent_is_refused_before_anything_changes():
    agent = tiny_of("sac", seed=2)[0]
    weights = [p.clone() for p in agent.critic.parameters()]
    dense = tiny_of("sac", regimes_dense("sac"))[0].state_dict()
    second = copy.deepcopy(tiny_of("sac", seed=3)[0].state_dict())  # the first module's masks fit
    second["sparse"]["actor"]["regime"] = "s2d"
    for state, message in ((dense, "regime.*dense"), (second, "regime.*s2d"),
                           (tiny_of("mrsac")[0].state_dict(), "encoder, critic, actor"),
                           (tiny_of("ddpg")[0].state_dict(), "optimizers are critic, actor")):
        with pytest.raises(ValueError, match=message):
            agent.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(weights, agent.critic.parameters()))
    other, buffer = tiny_of("sac", critic_lr=0.5)
    other.update()
    agent.load_state_dict(other.state_dict())
    optimizer = agent.optimizers["critic"]
    assert optimizer.param_groups[0]["lr"] == 1e-4 and optimizer.state  # moments, not settings
