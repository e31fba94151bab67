"""Tests of agents with networks of the user's own: `make_encoder`, `make_critic`, `make_actor`."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import evaluate
from mrq import MRQ, MRQConfig
from networks import Actor, Encoder
from sac import SAC, SACConfig
from tests.helpers import play, refuses


class PlainCritic(nn.Module):
    """One Q, without `features` or `output`."""

    def __init__(self, inputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.ELU(), nn.Linear(8, 1))

    def forward(self, *parts):
        return self.layers(torch.cat(parts, -1))


class OwnMRQ(MRQ):
    made = ()

    def make_encoder(self, obs_dim, action_dim, module):
        self.made += (("encoder", obs_dim, action_dim, module.arch_type),)
        return Encoder(obs_dim, action_dim, num_bins=self.config.reward_bins, width_scale=1 / 64)

    def make_critic(self, zsa_dim, module):
        self.made += (("critic", zsa_dim, module.arch_type),)
        return PlainCritic(zsa_dim)

    def make_actor(self, zs_dim, action_dim, module):
        self.made += (("actor", zs_dim, action_dim, module.arch_type),)
        return Actor(zs_dim, action_dim, width_scale=1 / 64)


class OwnSAC(SAC):
    def make_critic(self, obs_dim, action_dim, module):
        return PlainCritic(obs_dim + action_dim)


@pytest.mark.parametrize("agent_class, config", [(OwnMRQ, MRQConfig(batch_size=16, target_update_freq=4)),
                                                 (OwnSAC, SACConfig(batch_size=16))])
def test_own_networks_learn_sparsely(agent_class, config):
    modules = {name: m for name, m in agent_class.Config.presets["mst"].items()}
    agent = agent_class(4, 2, modules, config, total_updates=40, buffer_size=400)
    agent.replay = play(0, 400, config.horizon, 300, obs_dim=4, action_dim=2, prioritized=config.prioritized)[0]
    before = [p.clone() for p in agent.critic.parameters()]
    for _ in range(6):
        agent.update()
    assert isinstance(agent.critic, PlainCritic) and isinstance(agent.targets["critic"], PlainCritic)
    assert all(not torch.equal(a, b) for a, b in zip(before, agent.critic.parameters()))
    sparsity = modules["critic"].sparsity
    assert agent.sparse["critic"].density() == pytest.approx(1 - sparsity, abs=0.01)
    row = evaluate.measure(agent)
    assert np.isnan(row["critic/srank_q"]) and np.isfinite(row["critic/dormant_ratio"])  # no `features`: no SRank
    if agent_class is OwnMRQ:
        assert agent.made == (("encoder", 4, 2, 6), ("critic", 8, 6), ("actor", 8, 2, 5))


def test_own_networks_that_do_not_fit_are_refused_by_name():
    class Wide(MRQ):
        def make_actor(self, zs_dim, action_dim, module):
            return Actor(zs_dim, action_dim + 1, width_scale=1 / 64)

    class Without(MRQ):
        def make_encoder(self, obs_dim, action_dim, module):
            return PlainCritic(obs_dim)

    class Flat(MRQ):
        def make_critic(self, zsa_dim, module):
            return nn.Flatten(0)

    class Tuple(SAC):
        def make_actor(self, obs_dim, action_dim, module):
            return nn.LSTM(obs_dim, 2 * action_dim)

    for agent_class, words in ((Wide, ("make_actor", "(2, 2)", "(2, 3)")), (Without, ("make_encoder", "zsa_dim")),
                               (Flat, ("make_critic",)), (Tuple, ("make_actor", "tuple"))):
        modules = {name: m for name, m in agent_class.Config.presets["default"].items()}
        refuses(lambda: agent_class(4, 2, modules, buffer_size=400), *words)
