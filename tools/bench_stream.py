"""Time of one streaming update next to a plain autograd form of it, in turns within one process; and of the whole loop.

    python tools/bench_stream.py                    # widths 128 and 512, dense and MST

The plain form has the published code's structure: autograd, one tensor after the other, a read for each norm. CPU time,
so that neighbors slow both. Steps per second: acting, walker-walk's simulator and learning, in blocks of 100 steps, the
median block and the fastest tenth, which neighbors disturb least. A whole run logs its own in train.csv.
"""

import math
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the project

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from online import StreamMLP
from stream import STREAM, STREAM_MST, StreamAC


class TensorByTensor(torch.optim.Optimizer):
    """ObGD with the published code's cost: one tensor after the other, and one read from it for each norm."""

    def __init__(self, params, kappa, decay):
        super().__init__(params, {"kappa": kappa, "decay": decay})

    @torch.no_grad()
    def step(self, delta):
        group, norm = self.param_groups[0], 0.0
        for parameter in group["params"]:
            trace = self.state[parameter].setdefault("trace", torch.zeros_like(parameter))
            trace.mul_(group["decay"]).add_(parameter.grad)
            norm += trace.abs().sum().item()
        bound = group["kappa"] * max(abs(delta), 1.0) * norm
        for parameter in group["params"]:
            parameter.add_(delta * self.state[parameter]["trace"], alpha=-1.0 / max(bound, 1.0))


def rounds(width, presets, number=6, updates=60):
    """(seconds of ours, seconds of the plain form) for each round. width: a multiple of 128."""
    modules = {name: dataclasses.replace(module, width_scale=width, sparse_options={"update_interval": 10_000})
               for name, module in presets.items()}
    agent = StreamAC(25, 6, modules, total_updates=100_000)
    critic, actor = StreamMLP(25, [1], 128 * width, 2), StreamMLP(25, [6, 6], 128 * width, 2)
    optimizers = TensorByTensor(critic.parameters(), 2.0, 0.792), TensorByTensor(actor.parameters(), 3.0, 0.792)
    observations, action = np.random.RandomState(0).randn(updates + 1, 25).astype(np.float32), np.zeros(6, np.float32)

    def plain(index):
        obs, next_obs = torch.from_numpy(observations[index]), torch.from_numpy(observations[index + 1])
        value = critic(obs)[0]
        with torch.no_grad():
            delta = 0.1 + 0.99 * critic(next_obs)[0].item() - value.item()
        mean, rho = actor(obs)
        policy = torch.distributions.Normal(mean, F.softplus(rho))
        log_prob, entropy = policy.log_prob(torch.from_numpy(action)).sum(), policy.entropy().sum()
        loss = -log_prob - 0.01 * math.copysign(1.0, delta) * entropy
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-value).sum().backward()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(delta)

    def seconds(update):
        begin = time.process_time()
        for index in range(updates):
            update(index)
        return time.process_time() - begin

    def ours(index):
        agent.add(observations[index], action, 0.1, observations[index + 1], False, False)

    return updates, [(seconds(ours), seconds(plain)) for _ in range(number + 1)][1:]  # the first warms up


def loop(width, presets, blocks=30, steps=100):
    """Steps per second of each block: act, step walker-walk, learn."""
    modules = {name: dataclasses.replace(module, width_scale=width, sparse_options={"update_interval": 10_000})
               for name, module in presets.items()}
    env = StreamAC.Config.make_env("walker-walk")
    agent, obs = StreamAC(env.obs_dim, env.action_dim, modules, total_updates=100_000), env.reset()

    def block(obs):
        for _ in range(steps):
            agent.update_obs_stats(obs)
            action = agent.act(obs, explore=True)
            next_obs, reward, terminated, truncated = env.step(action)
            agent.add(obs, action, reward, next_obs, terminated, truncated)
            obs = env.reset() if terminated or truncated else next_obs
        return obs

    speeds = []
    for _ in range(blocks):
        begin = time.process_time()
        obs = block(obs)
        speeds.append(steps / (time.process_time() - begin))
    return speeds


def main():
    torch.set_num_threads(1)
    print("| width | | µs per update | plain form | ratio | steps/s, median | fastest tenth |")
    print("|---|---|---|---|---|---|---|")
    for width in (1, 4):
        for name, presets in (("dense", STREAM), ("MST", STREAM_MST)):
            updates, times = rounds(width, presets)
            ours, plain = (1e6 * statistics.median(column) / updates for column in zip(*times))
            speeds = loop(width, presets)
            print(f"| {128 * width} | {name} | {ours:.0f} | {plain:.0f} | {plain / ours:.1f} "
                  f"| {statistics.median(speeds):,.0f} | {statistics.quantiles(speeds, n=10)[-1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
