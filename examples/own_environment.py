"""An environment of your own and a loop of your own around MR.Q: `PYTHONPATH=. python examples/own_environment.py`."""

import numpy as np
import torch

from base import ModuleConfig
from mrq import MRQ, MRQConfig


class Reach:
    """A force in [-1, 1]² pushes a point in the plane. The reward is high near the origin."""
    obs_dim, action_dim = 4, 2

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)

    def reset(self):
        self.time, self.x, self.v = 0, self.random.uniform(-1, 1, 2), np.zeros(2)
        return np.concatenate([self.x, self.v]).astype(np.float32)

    def step(self, action):
        self.v = 0.8 * self.v + 0.1 * action
        self.x, self.time = self.x + self.v, self.time + 1
        terminated, truncated = bool(np.abs(self.x).max() > 3), self.time == 50  # it left the plane; the time is up
        return np.concatenate([self.x, self.v]).astype(np.float32), 1 / (1 + self.x @ self.x), terminated, truncated


def main(total_steps=2000, random_steps=250, seed=0):
    torch.manual_seed(seed)  # of the networks' weights and the exploration
    modules = {"encoder": ModuleConfig(6, "dense", 1 / 8), "critic": ModuleConfig(6, "dst", 1 / 8),
               "actor": ModuleConfig(5, "sst", 1 / 8)}  # MST, at an eighth of the width
    env = Reach(seed)
    agent = MRQ(env.obs_dim, env.action_dim, modules, MRQConfig(batch_size=64), buffer_size=10_000,
                total_updates=total_steps - random_steps, seed=seed)
    obs, returns = env.reset(), [0.0]
    for step in range(total_steps):
        learning = step >= random_steps
        action = agent.act(obs, explore=True) if learning else env.random.uniform(-1, 1, 2)
        if learning:
            agent.update()
        next_obs, reward, terminated, truncated = env.step(action)
        agent.add(obs, action, reward, next_obs, terminated, truncated)
        obs, returns[-1] = next_obs, returns[-1] + reward
        if terminated or truncated:
            print(f"step {step + 1:5}  return {returns[-1]:.1f}")
            obs, returns = env.reset(), [*returns, 0.0]
    return returns[:-1]


if __name__ == "__main__":
    main()
