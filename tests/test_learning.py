"""Tests that agents learn a small task."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from agents import AGENTS
from mrq import MRQ
from replay import ReplayBuffer
from base import ModuleConfig
from mrq import MRQConfig, MR_MST


class Corridor:
    """A point on [-1, 1] that the action moves. The reward is its position; beyond the right end it falls off."""

    def reset(self, rng):
        self.x, self.t = rng.uniform(-1, 0), 0
        return self.update_obs_stats()

    def update_obs_stats(self):
        return np.array([self.x, math.sin(3 * self.x)], np.float32)

    def step(self, action):
        self.x, self.t = max(-1.0, self.x + 0.3 * float(action[0])), self.t + 1
        fell = self.x > 1
        return self.update_obs_stats(), -5.0 if fell else self.x, fell, not fell and self.t == 20


def train_on(env, agent, replay, rng):
    """500 random steps, then 800 of learning."""
    obs = env.reset(rng)
    for step in range(1300):
        agent.update_obs_stats(obs)
        action = rng.uniform(-1, 1, 1) if step < 500 else agent.act(obs, explore=True)
        for _ in range(agent.updates_per_step if step >= 500 else 0):
            agent.update()
        next_obs, reward, terminated, truncated = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset(rng) if terminated or truncated else next_obs


def play_corridor(env, agent, x, first_action=None):
    """The rewards of an episode from x."""
    env.x, env.t, rewards, done = x, 0, [], False
    while not done:
        action = agent.act(env.update_obs_stats(), explore=False) if rewards or first_action is None else first_action
        _, reward, terminated, truncated = env.step(action)
        rewards.append(reward)
        done = terminated or truncated
    return rewards


def check_actor(env, agent):
    """From the left, go right and stop short of the edge. An agent that learns nothing gets -4 to -20."""
    returns = [sum(play_corridor(env, agent, x)) for x in np.linspace(-1, 0, 5)]
    assert np.mean(returns) > 1, f"actor: returns {returns}"


def check_critic(env, agent, q):
    """Q is the discounted return of a real rollout, where no time limit cuts it short."""
    predicted, real = [], []
    for x in np.linspace(-0.9, 0.6, 12):
        obs = np.array([x, math.sin(3 * x)], np.float32)
        action = agent.act(obs, explore=False)
        rewards = play_corridor(env, agent, x, action)
        rewards += [rewards[-1]] * 40 if len(rewards) == 20 else []  # bootstrapped past the limit
        real.append(sum(r * 0.9 ** k for k, r in enumerate(rewards)))
        predicted.append(q(torch.tensor(obs)[None], torch.tensor(action)[None]).item())
    assert np.corrcoef(predicted, real)[0, 1] > 0.9, f"critic: {predicted} against {real}"
    assert abs(np.mean(predicted) - np.mean(real)) < 4, f"critic: {predicted} against {real}"


@pytest.mark.slow
def test_mrq_learns_with_all_five_losses():
    """Each loss predicts something of its own, which is compared with the truth."""
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    modules = {name: ModuleConfig(m.arch_type, m.regime, 1 / 8, 1, sparse_options={"update_interval": 100})
               for name, m in MR_MST.items()}
    config = MRQConfig(batch_size=64, target_update_freq=50, encoder_lr=1e-3, critic_lr=1e-3, actor_lr=1e-3,
                       discount=0.9)
    agent = MRQ(2, 1, modules, config, total_updates=800)
    replay, env = ReplayBuffer(2, 1, 5000, agent.config.horizon), Corridor()
    agent.replay = replay
    train_on(env, agent, replay, rng)
    check_actor(env, agent)
    batch = replay.sample(512)
    with torch.no_grad():
        zs = agent.encoder.zs(batch.obs[:, 0])
        zsa = agent.encoder(zs, batch.action[:, 0])
        done, next_zs, logits = agent.encoder.predict(zsa)
    # Terminal loss: told apart from the rest.
    ended = batch.terminated[:, 0] > 0
    yes, no = done[ended].mean(), done[~ended].mean()
    assert yes > 0.3 and no < 0.15, f"terminal: {yes}, {no}"
    # Dynamics loss: closer to the next z_s than the present z_s is, which is close already.
    truth = agent.targets["encoder"].zs(batch.obs[:, 1])
    error, still = ((a - truth)[~ended].square().mean() for a in (next_zs, zs))
    assert error < 0.4 * still, f"dynamics: {error} against {still}"
    # Reward loss: the expected bin is the reward.
    expected = (logits.softmax(1) * agent.bins).sum(1)
    assert (expected - batch.reward[:, 0]).abs().mean() < 0.8, "reward"
    # Critic loss: in units of r̄.
    with torch.no_grad():
        check_critic(env, agent, lambda obs, action: agent.critic(
            agent.encoder(agent.encoder.zs(obs), action)).mean() * agent.reward_scale)


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
@pytest.mark.slow
def test_simba_agents_learn(algo):
    torch.manual_seed(0)
    rng, agent_class = np.random.RandomState(0), AGENTS[algo]
    modules = {name: dataclasses.replace(m, width_scale=1 / 8, sparse_options={"update_interval": 200})
               for name, m in agent_class.Config.presets["mst"].items()}
    agent = agent_class(2, 1, modules, agent_class.Config(batch_size=64, discount=0.9, actor_lr=1e-3, critic_lr=1e-3,
                                                          tau=0.02),
                        total_updates=1600)
    replay, env = ReplayBuffer(2, 1, 5000, agent.config.horizon, agent.config.prioritized), Corridor()
    agent.replay = replay
    train_on(env, agent, replay, rng)
    check_actor(env, agent)
    with torch.no_grad():
        check_critic(env, agent, lambda obs, action: agent.critic(agent.normalizer(obs), action))
