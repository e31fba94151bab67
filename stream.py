"""Stream AC(λ): an actor-critic that uses each transition once, without a replay buffer, a batch or target networks.

Guarantees: the updates of the published algorithm, one per environment step; all five regimes on both modules, with
pruned weights and their traces exactly zero through every step; and a state that resumes exactly.

Paper: Elsayed, Vasan and Mahmood, 2024, "Streaming Deep Reinforcement Learning Finally Works" (the agent, ObGD,
SparseInit); arXiv 2506.17204, Section 5 (static sparsity in streaming RL). obgd.py has the optimizer and the
initialization, online.py the networks and their update from one sample. Run it with `python train.py --algo stream`,
or use it as a part:

    import numpy as np
    from stream import STREAM_MST, StreamAC

    agent = StreamAC(obs_dim=3, action_dim=1, modules=STREAM_MST, total_updates=80)
    for step in range(80):
        obs, next_obs = np.full(3, step, np.float32), np.full(3, step + 1, np.float32)
        agent.update_obs_stats(obs)                                                # counts the first one of an episode
        action = agent.act(obs, explore=True)                                      # unclipped: the environment clips it
        agent.add(obs, action, 1.0, next_obs, terminated=False, truncated=False)   # learns here
    print(agent.info["delta"], agent.info["critic/step_size"])

With one sample per step, a GPU would be slower than a CPU: the agent runs in numpy, on the CPU.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from base import BaseAgent, Choices, ModuleConfig
from networks import scaled_size
from obgd import ObGD, sparse_init
from online import Learner, StreamMLP
from replay import Batch

WIDTH, DEPTH = 128, 2  # hidden units and hidden layers at scale 1
METRIC_WINDOW = 2048  # last transitions, for the metrics; nothing is learned from them
LOG_WINDOW = 1000  # steps that a row of train.csv summarizes
VARIANCE_EPS = 1e-8  # of both normalizers

# Sparsity 0.8, and MST's regimes for the two modules that exist here: critic DST, actor SST (Section 4).
STREAM = {"critic": ModuleConfig("stream", sparsity=0.8), "actor": ModuleConfig("stream", sparsity=0.8)}
STREAM_MST = {"critic": ModuleConfig("stream", "dst", sparsity=0.8),
              "actor": ModuleConfig("stream", "sst", sparsity=0.8)}


@dataclass(frozen=True)
class StreamConfig(Choices):
    """The published settings of Stream AC(λ). Each comment is the flag's help text."""
    discount: float = 0.99  # γ, per agent step
    trace_decay: float = 0.8  # λ; traces decay by γλ per step
    step_size: float = 1.0  # α, ObGD's step size where its bound allows it
    actor_kappa: float = 3.0  # κ of the actor: larger means smaller steps
    critic_kappa: float = 2.0  # κ of the critic
    entropy_weight: float = 0.01  # τ, weight of the entropy in the actor's gradient
    sparse_init: float = 0.9  # fraction of each unit's incoming weights that start at 0 (SparseInit); 0: none
    time_limit: Literal["ends", "bootstraps"] = "ends"  # whether a time limit cuts the bootstrap, as published
    reward_clip: float = 10.0  # largest scaled reward; unclipped, the first reward after n zeros would be sqrt(n)
    growth_score: Literal["sum", "last"] = "sum"  # with --grow gradient: rank by summed delta*z or the last gradient

    presets = {"default": STREAM, "mst": STREAM_MST}
    updates_per_step = 0  # `add` learns
    learning_starts = 0
    horizon = 1
    prioritized = False
    # A step takes less than 1 ms: logging, evaluating and saving as often as elsewhere would be most of the work.
    defaults = {"total_steps": 2_000_000, "eval_every": 100_000, "log_every": 10_000, "save_every": 200_000}

    @staticmethod
    def make_env(name, seed=0, action_repeat=None):
        """As published: one frame per agent step, and the time in the observation."""
        from envs import make_env
        return TimedEnv(make_env(name, seed, action_repeat or 1))


# ---- running statistics ----

class RunningStats:
    """Mean and sample variance (n - 1; 1 until n = 2) of all values so far, in float64, by Welford's update.

    `state` is one tensor (mean, squared deviations, count). The arrays are views of it: restore it in place.
    """

    def __init__(self, dim):
        self.state = torch.zeros(2 * dim + 1, dtype=torch.float64)
        array = self.state.numpy()
        self.mean, self.squares, self.count = array[:dim], array[dim:-1], array[-1:]

    def update(self, value):
        self.count += 1.0
        deviation = value - self.mean
        self.mean += deviation / self.count
        self.squares += deviation * (value - self.mean)

    def std(self, eps=VARIANCE_EPS):
        """(dim,): √(variance + eps)"""
        count = self.count[0]
        if count <= 1.0:
            return np.full_like(self.mean, math.sqrt(1.0 + eps))
        return np.sqrt(self.squares / (count - 1.0) + eps)


class ObsNormalizer:
    """(obs - mean) / std of every observation that was counted. The last entry, the time, stays as it is."""

    def __init__(self, obs_dim, dtype):
        self.stats, self.dtype = RunningStats(obs_dim - 1), dtype

    def __call__(self, obs):
        """(..., obs_dim) -> the same shape, in the networks' dtype"""
        normalized = np.array(obs, self.dtype)
        normalized[..., :-1] = (obs[..., :-1] - self.stats.mean) / self.stats.std()
        return normalized


class RewardScale:
    """r / std(u) with u <- γ·u·(not over) + r, as published: an episode's last reward opens the next one's u."""

    def __init__(self, discount, clip):
        self.discount, self.clip = discount, clip
        self.state = torch.zeros(4, dtype=torch.float64)  # u; mean, squared deviations, count of all u, as RunningStats
        self.array = self.state.numpy()

    def __call__(self, reward, over):
        u, mean, squares, count = self.array.tolist()
        u = (0.0 if over else self.discount * u) + reward
        count, deviation = count + 1.0, u - mean
        mean += deviation / count
        squares += deviation * (u - mean)
        self.array[:] = u, mean, squares, count
        std = math.sqrt((squares / (count - 1.0) if count > 1.0 else 1.0) + VARIANCE_EPS)
        return min(max(reward / std, -self.clip), self.clip)

    def end_episode(self):
        self.array[0] = 0.0


# ---- the agent ----

class StreamAC(BaseAgent):
    """Stream AC(λ). It learns inside `add`, once per environment step, and forgets the transition.

    obs: its last entry is the time within the episode, -0.5 + t/T (`TimedEnv`), and is not normalized.
    modules: a ModuleConfig for "critic" and "actor"; width multiplies 128 units, depth 2 hidden layers.
    total_updates: T of the sparsity schedules, the number of agent steps.
    """

    Config = StreamConfig

    def __init__(self, obs_dim, action_dim, modules=None, config=None, total_updates=2_000_000, device="cpu", seed=0,
                 buffer_size=None, dtype=torch.float32):
        if torch.device(device).type != "cpu":
            raise ValueError(f"Stream AC takes one sample per step, for which {device} is slower than a CPU: "
                             "use --device cpu")
        self.dtype = dtype
        # The base class's replay buffer stays empty.
        super().__init__(obs_dim, action_dim, modules, config, total_updates, device, seed, buffer_size=4)
        config = self.config
        self.learners = {name: Learner(network, self.optimizers[name], self.sparse[name], config.growth_score)
                         for name, network in self.networks.items()}
        self.normalizer = ObsNormalizer(obs_dim, self.optimizers["critic"].weights.dtype)
        self.reward_scale = RewardScale(config.discount, config.reward_clip)
        self.counted = torch.zeros(1, dtype=torch.int64)  # whether the current observation is in the statistics
        self.window = {"obs": torch.zeros(METRIC_WINDOW, obs_dim), "next_obs": torch.zeros(METRIC_WINDOW, obs_dim),
                       "action": torch.zeros(METRIC_WINDOW, action_dim), "ending": torch.zeros(METRIC_WINDOW, 2)}
        self.recent = torch.zeros(LOG_WINDOW, len(self.RECORDED) + action_dim, dtype=torch.float64)
        self._window = {name: tensor.numpy() for name, tensor in self.window.items()}
        self._recent, self._counted = self.recent.numpy(), self.counted.numpy()
        self._forget()

    def _forget(self):
        """Drops what one call keeps for the next, to compute it once."""
        self._seen = None, None  # the last `add`'s next_obs, and its normalized form
        self._acted = None, None, None, None  # the last exploring `act`: obs, its normalized form, outputs, tape

    def make_networks(self, obs_dim, action_dim, modules):
        size = {name: scaled_size(1, module.width_scale, module.depth_scale, WIDTH, DEPTH)
                for name, module in modules.items()}
        networks = {"critic": StreamMLP(obs_dim, [1], *size["critic"]),
                    "actor": StreamMLP(obs_dim, [action_dim, action_dim], *size["actor"])}
        for network in networks.values():
            if not next(network.parameters()).is_meta:
                sparse_init(network.to(getattr(self, "dtype", torch.float32)), self.config.sparse_init)
        return networks

    def network_calls(self, obs, action):
        obs = obs.to(self.dtype)
        yield "critic", "critic(obs)[0]", self.critic(obs)[0], (2, 1)
        for head in range(2):
            yield "actor", f"actor(obs)[{head}]", self.actor(obs)[head], (2, self.action_dim)

    def make_optimizer(self, name, network):
        config = self.config
        return ObGD(network.parameters(), getattr(config, f"{name}_kappa"), config.discount * config.trace_decay,
                    config.step_size)

    # ---- acting ----

    def update_obs_stats(self, obs):
        """Counts an episode's first observation; `add` has counted the others."""
        super().update_obs_stats(obs)
        if not self._counted[0]:
            self.normalizer.stats.update(obs[:-1])
            self._counted[0] = 1

    def act(self, obs, explore):
        """obs: (obs_dim,) or, to evaluate, (n, obs_dim), numpy. Returns actions of the same leading shape: the mean,
        clipped, or a draw from N(μ, softplus(ρ)²), not clipped."""
        if obs.ndim > 1:
            with torch.no_grad():
                return self.actor(self._normalized(obs))[0].clamp(-1, 1).float().numpy()
        x = self._seen[1] if obs is self._seen[0] else self.normalizer(obs)
        (mean, rho), tape = self.learners["actor"].fast.forward(x)
        if not explore:
            return mean.clip(-1, 1).astype(np.float32)
        self._acted = obs, x, (mean, rho), tape
        noise = torch.randn(self.action_dim, dtype=self.dtype).numpy()
        return (mean + np.logaddexp(0.0, rho) * noise).astype(np.float32)

    # ---- learning ----

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        """Learns from one transition. obs must be the last call's next_obs, unless that call ended an episode."""
        config, critic, actor = self.config, self.learners["critic"], self.learners["actor"]
        ends = terminated or (truncated and config.time_limit == "ends")  # what cuts the bootstrap
        over = terminated or truncated
        acted, x, outputs, tape = self._acted
        if acted is not obs:
            x = self.normalizer(obs)
            outputs, tape = actor.fast.forward(x)
        scaled = self.reward_scale(reward, over)
        self.normalizer.stats.update(next_obs[:-1])
        next_x = self.normalizer(next_obs)

        # δ = r + γ·V(s')·(not done) - V(s)
        (value,), value_tape = critic.fast.forward(x)
        next_value = 0.0 if ends else float(critic.fast.forward(next_x)[0][0][0])
        value = float(value[0])
        delta = scaled + config.discount * next_value - value

        gradients, std = self.policy_gradient(outputs, action, delta)
        number = self.updates["critic"] + 1
        self.updates = {"critic": number, "actor": number}
        try:
            critic.update(number, value_tape, [np.full(1, -1.0, x.dtype)], delta, over)  # of -V(s)
            actor.update(number, tape, gradients, delta, over)
        except FloatingPointError as error:
            self.nonfinite["critic"].fill_(1.0)
            raise FloatingPointError(f"{error} at update {number:,}: stopped") from None
        self._acted, self._seen = (None, None, None, None), (next_obs, next_x)  # weights changed, statistics not
        self._counted[0] = not over
        self.record(number - 1, obs, action, next_obs, scaled, ends, delta, value, std)

    def end_episode(self):
        """The episode ends without a last transition: its traces must not reach into the next one."""
        for part in (*self.learners.values(), self.reward_scale):
            part.end_episode()
        self._counted[0] = 0

    def policy_gradient(self, outputs, action, delta):
        """([gradients of -log π(a|s) - τ·sign(δ)·H(π(·|s)) by μ and by ρ], σ), σ = softplus(ρ).

        ObGD multiplies it by δ, so that the entropy term always raises the entropy, by τ·|δ|.
        """
        mean, rho = outputs
        std = np.logaddexp(0.0, rho)
        x = (action - mean) / std  # (action_dim,)
        entropy_weight = math.copysign(self.config.entropy_weight, delta) if delta else 0.0
        by_std = (1.0 - x * x - entropy_weight) / std
        by_rho = by_std * np.exp(rho - std)  # σ' = sigmoid(ρ) = exp(ρ - σ)
        return [(-x / std).astype(mean.dtype), by_rho.astype(mean.dtype)], std

    # ---- logging and metrics ----

    RECORDED = ("delta", "value", "scaled_reward", "critic/trace_norm", "critic/step_size", "actor/trace_norm",
                "actor/step_size")

    def record(self, step, obs, action, next_obs, scaled, ends, delta, value, std):
        """Keeps what the log and the metrics read. Nothing is learned from it."""
        window, row = self._window, step % METRIC_WINDOW
        window["obs"][row], window["action"][row], window["next_obs"][row] = obs, action, next_obs
        window["ending"][row] = scaled, ends
        critic, actor, row = self.optimizers["critic"], self.optimizers["actor"], self._recent[step % LOG_WINDOW]
        row[:-self.action_dim] = (delta, value, scaled, critic.trace_norm, critic.last_step, actor.trace_norm,
                                  actor.last_step)
        row[-self.action_dim:] = std

    @property
    def info(self):
        """Over the last 1,000 steps: means, and medians of the step sizes. Computed on access: steps stay cheap."""
        rows = self.recent[:min(self.updates["critic"], LOG_WINDOW)]
        if not len(rows):
            return {}
        info = {name: rows[:, column].median() if name.endswith("step_size") else rows[:, column].mean()
                for column, name in enumerate(self.RECORDED)}
        std = rows[:, -self.action_dim:]
        entropy = (std.log() + 0.5 * math.log(2.0 * math.pi * math.e)).sum(1)
        steps = {name: rows[:, self.RECORDED.index(f"{name}/step_size")] for name in self.networks}
        bounded = {f"{name}/bounded": (step < self.config.step_size).double().mean() for name, step in steps.items()}
        return info | {"abs_delta": rows[:, 0].abs().mean(), "std": std.mean(), "entropy": entropy.mean()} | bounded

    @info.setter
    def info(self, _):
        """`recent` is part of the state, and `info` follows from it."""

    def metric_batch(self, size):
        count = min(self.updates["critic"], METRIC_WINDOW)
        index = torch.randint(count, (size,)) if count else torch.zeros(2, dtype=torch.long)
        part = {name: tensor[index] for name, tensor in self.window.items()}
        return Batch(index, torch.stack([part["obs"], part["next_obs"]], 1), part["action"].unsqueeze(1),
                     part["ending"][:, :1], part["ending"][:, 1:]), count > 0

    def _normalized(self, obs):
        return torch.from_numpy(self.normalizer(np.asarray(obs)))

    @torch.no_grad()
    def compute_features(self, batch):
        obs = self._normalized(batch.obs[:, 0])
        features = {"critic": {"v": self.critic.features(obs)}, "actor": {"pi": self.actor.features(obs)}}
        self.critic(obs), self.actor(obs)
        return features

    def per_sample_losses(self, batch):
        """½δ² of the critic (semi-gradient), -δ·log π of the actor: (batch,) each. Rewards are scaled."""
        obs = self._normalized(batch.obs[:, 0])
        with torch.no_grad():
            next_value = self.critic(self._normalized(batch.obs[:, 1]))[0][:, 0]
        target = batch.reward[:, 0] + self.config.discount * (1.0 - batch.terminated[:, 0]) * next_value
        delta = target - self.critic(obs)[0][:, 0]
        mean, rho = self.actor(obs)
        log_prob = torch.distributions.Normal(mean, F.softplus(rho)).log_prob(batch.action[:, 0]).sum(-1)
        return {"critic": 0.5 * delta.square(), "actor": -delta.detach() * log_prob}

    def float32_layers(self):
        return []

    def nonfinite_report(self):
        if self.nonfinite["critic"].item():
            return "the TD error or a trace", self.updates["critic"] - 1

    # ---- state ----

    def tensors(self):
        parts = {"obs_stats": self.normalizer.stats.state, "reward_scale": self.reward_scale.state,
                 "counted": self.counted, "recent": self.recent}
        for name, learner in self.learners.items():
            parts |= {f"{name}/{part}": tensor for part, tensor in learner.tensors.items()}
        return parts | {f"window/{name}": tensor for name, tensor in self.window.items()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._forget()
        for learner in self.learners.values():
            learner.refresh_mask()


# ---- the environment's time ----

class TimedEnv:
    """An environment whose observation ends with the time within the episode, -0.5 + t/T, after t agent steps.

    T is the environment's time limit, or 1,000 if it has none.
    """

    def __init__(self, env):
        self.env, self.time = env, 0
        self.obs_dim = env.obs_dim + 1
        self.limit = getattr(env, "episode_steps", None) or 1000

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seed=None):
        self.time = 0
        return self._append(self.env.reset(seed))

    def step(self, action):
        obs, reward, terminated, truncated = self.env.step(action)
        self.time += 1
        return self._append(obs), reward, terminated, truncated

    def restore(self, state):
        obs = self.env.restore(state["env"])
        self.time = state["time"]
        return self._append(obs)

    def state(self):
        return {"env": self.env.state(), "time": self.time}

    def _append(self, obs):
        timed = np.empty(self.obs_dim, np.float32)
        timed[:-1], timed[-1] = obs, -0.5 + self.time / self.limit
        return timed
