"""Stream AC(λ): an actor-critic that uses each transition once, without a replay buffer, a batch or target networks.

Guarantees: the updates of the published algorithm, one per environment step; all five regimes on both modules, with pruned
weights and their traces exactly zero through every step; and a state that resumes exactly.

Paper: Elsayed, Vasan and Mahmood, 2024, "Streaming Deep Reinforcement Learning Finally Works" (the agent, ObGD, SparseInit);
arXiv 2506.17204, Section 5 (static sparsity in streaming RL). `ObGD` and `sparse_init` can be copied alone: they need torch,
numpy and scipy. Run it with `python train.py --algo stream`, or use it as a part:

    import numpy as np
    from stream import STREAM_MST, StreamAC

    agent = StreamAC(obs_dim=3, action_dim=1, modules=STREAM_MST, total_updates=80)
    for step in range(80):
        obs, next_obs = np.full(3, step, np.float32), np.full(3, step + 1, np.float32)
        agent.update_obs_stats(obs)                                                 # counts the first one of an episode
        action = agent.act(obs, explore=True)                                       # unclipped: the environment clips it
        agent.add(obs, action, 1.0, next_obs, terminated=False, truncated=False)    # learns here
    print(agent.info["delta"], agent.info["critic/step_size"])

One step's gradient is an outer product per layer, so a step is a handful of vector operations, and the overhead of calling
them decides the speed. `FastMLP` therefore computes the forward and backward pass in numpy, on the memory of the PyTorch
module `StreamMLP`, several times faster than autograd. A GPU would be slower: the agent runs on the CPU.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import get_blas_funcs

from base import BaseAgent, Choices, ModuleConfig
from networks import scaled_size
from replay import Batch

WIDTH, DEPTH = 128, 2  # hidden units and hidden layers at scale 1
NORM_EPS, LEAK = 1e-5, 0.01  # of LayerNorm and LeakyReLU
METRIC_WINDOW = 2048  # last transitions, for the metrics; nothing is learned from them
LOG_WINDOW = 1000  # steps that a row of train.csv summarizes

# Sparsity 0.8, and MST's regimes for the two modules that exist here: critic DST, actor SST (Section 4).
STREAM = {"critic": ModuleConfig("stream", sparsity=0.8), "actor": ModuleConfig("stream", sparsity=0.8)}
STREAM_MST = {"critic": ModuleConfig("stream", "dst", sparsity=0.8), "actor": ModuleConfig("stream", "sst", sparsity=0.8)}


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
    reward_clip: float = 10.0  # largest scaled reward; without it, the first reward after n zeros counts as sqrt(n)
    growth_score: Literal["sum", "last"] = "sum"  # with --grow gradient: rank by the sum of delta*z, or by the last gradient

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


# ---- the optimizer and the initialization: copy them alone ----

class ObGD(torch.optim.Optimizer):
    """Gradient descent with eligibility traces and a bound on the overshoot (Elsayed et al., 2024, Algorithm 3).

        z <- decay·z + gradient;   M = κ·α·max(|δ|, 1)·‖z‖₁;   w <- w - α/max(M, 1)·δ·z

    Usage: `loss.backward(); optimizer.step(delta, reset)`, where the loss is -V(s) or -log π(a|s) and δ the TD error.
    All weights move into one vector, all traces into another; parameters and `state[p]["trace"]` are views of them. So a bound
    over the whole network is two calls, and numpy code may work on `weights` and `traces`. CPU only, one dtype.
    """

    def __init__(self, params, kappa, decay, step_size=1.0):
        super().__init__(params, {"kappa": kappa, "decay": decay, "step_size": step_size})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(self.param_groups) > 1 or len({(p.dtype, p.device.type) for p in parameters} | {(parameters[0].dtype, "cpu")}) > 1:
            raise ValueError("ObGD bounds one step for all weights: it takes one group, of one dtype, on the CPU")
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        traces = torch.zeros_like(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, weight, trace in zip(parameters, flat.split(sizes), traces.split(sizes)):
            parameter.data = weight.view(parameter.shape)
            self.state[parameter]["trace"] = trace.view(parameter.shape)
        self.weights, self.traces = flat.numpy(), traces.numpy()
        self._asum, self._axpy = get_blas_funcs(("asum", "axpy"), (self.weights,))
        self.trace_norm, self.last_step = 0.0, 0.0  # ‖z‖₁ and the step size of the last step, for the log

    @torch.no_grad()
    def step(self, delta, reset=False):
        """delta: the TD error, a number. reset: the episode has ended, so the traces become 0 after the step."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter]["trace"].mul_(self.param_groups[0]["decay"]).add_(parameter.grad)
        self.move(delta, reset)

    def move(self, delta, reset=False):
        """The step with the traces as they are. FloatingPointError, and no step, if δ or the traces are not finite."""
        group = self.param_groups[0]
        self.trace_norm = float(self._asum(self.traces))
        if not math.isfinite(delta * self.trace_norm):
            raise FloatingPointError(f"the TD error is {delta}, and the traces' L1 norm {self.trace_norm}")
        bound = group["kappa"] * group["step_size"] * max(abs(delta), 1.0) * self.trace_norm  # M
        self.last_step = group["step_size"] / max(bound, 1.0)
        self._axpy(self.traces, self.weights, a=-self.last_step * delta)
        if reset:
            self.traces.fill(0.0)

    @torch.no_grad()
    def load_state_dict(self, state):
        """In place: parameters and traces stay views of the two vectors."""
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter]["trace"].copy_(state["state"][index]["trace"])


@torch.no_grad()
def sparse_init(module, sparsity=0.9):
    """SparseInit: uniform in ±1/√fan_in, then ⌈sparsity·fan_in⌉ weights of each output unit are 0; biases are 0.

    All weights stay trainable. Each unit keeps at least one weight: the published formula leaves none below 10 inputs, and
    a task with 6 would start without any input.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            fan_in = layer.in_features
            layer.weight.uniform_(-fan_in ** -0.5, fan_in ** -0.5)
            zeros = min(math.ceil(sparsity * fan_in - 1e-9), fan_in - 1)  # 0.9·190 is 171.00000000000003
            layer.weight.scatter_(1, torch.rand_like(layer.weight).argsort(1)[:, :zeros], 0.0)
            layer.bias.zero_()


# ---- running statistics ----

class RunningStats:
    """Mean and sample variance (n - 1) of all values so far, in float64, by Welford's update. The variance is 1 until n = 2.

    `state` is one tensor (mean, squared deviations, count) and the arrays are views of it, so restoring it in place is enough.
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

    def std(self, eps=1e-8):
        """(dim,): √(variance + eps)"""
        count = self.count[0]
        return np.sqrt(self.squares / (count - 1.0) + eps) if count > 1 else np.full_like(self.mean, math.sqrt(1.0 + eps))


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
        self.discount, self.clip, self.stats = discount, clip, RunningStats(1)
        self.state = torch.zeros(1, dtype=torch.float64)  # u
        self.trace = self.state.numpy()

    def __call__(self, reward, over):
        self.trace[:] = (0.0 if over else self.discount * self.trace[0]) + reward
        self.stats.update(self.trace)
        return min(max(reward / float(self.stats.std()[0]), -self.clip), self.clip)


# ---- the network, twice: for autograd and batches, and by hand for one sample ----

class StreamMLP(nn.Module):
    """Hidden layers of Linear, LayerNorm without parameters, LeakyReLU; then one or more linear heads.

    input_dim; output_dims: one size per head. Returns a list of (..., output) tensors.
    """

    def __init__(self, input_dim, output_dims, hidden, depth):
        super().__init__()
        self.hidden = nn.Sequential(*[nn.Sequential(
            nn.Linear(hidden if layer else input_dim, hidden), nn.LayerNorm(hidden, eps=NORM_EPS, elementwise_affine=False),
            nn.LeakyReLU(LEAK)) for layer in range(depth)])
        self.heads = nn.ModuleList([nn.Linear(hidden, output_dim) for output_dim in output_dims])

    def features(self, x):
        """(..., input) -> (..., hidden): what SRank is read from."""
        return self.hidden(x)

    def forward(self, x):
        x = self.features(x)
        return [head(x) for head in self.heads]


class FastMLP:
    """A StreamMLP's forward and backward pass for one sample, in numpy on the same memory."""

    def __init__(self, network, optimizer):
        self.optimizer = optimizer
        self.layers, self.heads = len(network.hidden), len(network.heads)
        self.shapes = [tuple(parameter.shape) for parameter in network.parameters()]
        self.weights = self.views(optimizer.weights)
        self._ger, = get_blas_funcs(("ger",), (optimizer.weights,))

    def views(self, vector):
        """One vector -> [(weight, bias), ...], the hidden layers first."""
        parts = np.split(vector, np.cumsum([math.prod(shape) for shape in self.shapes])[:-1])
        parts = [part.reshape(shape) for part, shape in zip(parts, self.shapes)]
        return list(zip(parts[::2], parts[1::2]))

    def forward(self, x):
        """(input,) -> ([(output,) of each head], tape)"""
        tape = []
        for weight, bias in self.weights[:self.layers]:
            y = weight @ x
            y += bias
            y -= y.sum() / y.size
            scale = 1.0 / math.sqrt(float(y @ y) / y.size + NORM_EPS)
            y *= scale  # LayerNorm
            slope = np.where(y > 0, y.dtype.type(1.0), y.dtype.type(LEAK))
            tape.append((x, y, scale, slope))
            x = y * slope  # LeakyReLU
        tape.append(x)
        return [weight @ x + bias for weight, bias in self.weights[self.layers:]], tape

    def backward(self, tape, output_gradients, total):
        """Adds the gradient to `total`, the `views` of a vector. output_gradients: (output,) of each head."""
        x, gradient = tape[-1], 0.0
        for (weight, _), sums, output in zip(self.weights[self.layers:], total[self.layers:], output_gradients):
            self._add(sums, output, x)
            gradient = gradient + output @ weight
        for layer in reversed(range(self.layers)):
            x, y, scale, slope = tape[layer]
            gradient *= slope
            gradient -= gradient.sum() / y.size + y * (float(gradient @ y) / y.size)  # of LayerNorm: y has mean 0, variance 1 - ε'
            gradient *= scale
            self._add(total[layer], gradient, x)
            if layer:
                gradient = gradient @ self.weights[layer][0]

    def _add(self, sums, output, x):
        """weight += output ⊗ x, bias += output. In place: the transpose of a C-ordered matrix is what BLAS expects."""
        self._ger(1.0, x, output, a=sums[0].T, overwrite_a=True)
        sums[1][...] += output


class Learner:
    """One module's streaming update: traces, growth scores, topology, masks, ObGD.

    Growth: one step's gradient has rank one, so its largest entries lie in a few rows and columns. `--grow gradient`
    therefore ranks by |Σ δ·z̃| since the last change, z̃ being the trace of all weights, the pruned ones included: it is the
    move that a weight would have made in that time, up to the step size, as the batch gradient E[δz] is for a replay buffer.
    """

    def __init__(self, network, optimizer, sparse, growth_score):
        self.optimizer, self.sparse = optimizer, sparse
        self.fast = FastMLP(network, optimizer)
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters = list(network.parameters())
        self.ranked = sparse.dynamic and sparse.grow == "gradient"  # whether growth needs scores
        self.summed = self.ranked and growth_score == "sum"
        size = optimizer.weights.size if self.summed else 0
        self.tensors = {"dense_traces": torch.zeros(size, dtype=self.parameters[0].dtype),
                        "scores": torch.zeros(size, dtype=self.parameters[0].dtype)}
        # z̃ where growth sums it, else the traces themselves
        self.traces = self.tensors["dense_traces"].numpy() if self.summed else optimizer.traces
        self.scores = self.tensors["scores"].numpy()
        self.trace_views = self.fast.views(self.traces)
        self._axpy, = get_blas_funcs(("axpy",), (optimizer.weights,))
        self.refresh_mask()

    def refresh_mask(self):
        """The masks of all parameters as one vector of 0 and 1, or None if nothing is pruned."""
        masks = [self.sparse.masks.get(name, torch.ones_like(parameter, dtype=torch.bool)).flatten()
                 for name, parameter in zip(self.names, self.parameters)]
        self.mask = torch.cat(masks).numpy().astype(self.optimizer.weights.dtype) if self.sparse.masks else None

    def update(self, number, tape, output_gradients, delta, over):
        """Update `number` (1, 2, ...) with the gradients of the loss by the outputs that `tape` belongs to."""
        self.traces *= self.optimizer.param_groups[0]["decay"]
        self.fast.backward(tape, output_gradients, self.trace_views)  # z <- γλz + gradient
        if self.summed:
            self._axpy(self.traces, self.scores, a=delta)
        if self.sparse.is_update_step(number):
            self.change_topology(number, tape, output_gradients)
        if self.mask is not None:
            np.multiply(self.traces, self.mask, out=self.optimizer.traces)
        self.optimizer.move(delta, reset=over)
        if over and self.summed:
            self.traces.fill(0.0)

    def change_topology(self, number, tape, output_gradients):
        """A weight that grows starts at 0 and without a trace, in z̃ as well."""
        before, scores = self.mask, None
        if self.ranked:
            vector = self.scores if self.summed else np.zeros_like(self.optimizer.weights)
            if not self.summed:
                self.fast.backward(tape, output_gradients, self.fast.views(vector))
            parts = [part for pair in self.fast.views(vector) for part in pair]
            scores = {name: torch.from_numpy(part) for name, part in zip(self.names, parts)}
        self.sparse.update_topology(number, scores)
        self.refresh_mask()
        if self.summed:
            self.scores.fill(0.0)
            self.traces[self.mask > before] = 0.0


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
            raise ValueError(f"Stream AC takes one sample per step, for which {device} is slower than a CPU: use --device cpu")
        self.dtype = dtype
        # The base class's replay buffer stays empty.
        super().__init__(obs_dim, action_dim, modules, config, total_updates, device, seed, buffer_size=4)
        config = self.config
        self.learners = {name: Learner(self.networks[name], self.optimizers[name], self.sparse[name], config.growth_score)
                         for name in self.networks}
        self.normalizer = ObsNormalizer(obs_dim, self.optimizers["critic"].weights.dtype)
        self.reward_scale = RewardScale(config.discount, config.reward_clip)
        self.counted = torch.zeros(1, dtype=torch.int64)  # whether the current observation is in the statistics
        self.window = {"obs": torch.zeros(METRIC_WINDOW, obs_dim), "next_obs": torch.zeros(METRIC_WINDOW, obs_dim),
                       "action": torch.zeros(METRIC_WINDOW, action_dim), "ending": torch.zeros(METRIC_WINDOW, 2)}
        self.recent = torch.zeros(LOG_WINDOW, len(self.LOGGED), dtype=torch.float64)
        self._window = {name: tensor.numpy() for name, tensor in self.window.items()}
        self._recent = self.recent.numpy()
        self._acted = (None, None, None, None)  # the last exploring `act`: obs, its outputs and its tape

    def make_networks(self, obs_dim, action_dim, modules):
        size = {name: scaled_size(1, modules[name].width_scale, modules[name].depth_scale, WIDTH, DEPTH) for name in modules}
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
        if not self.counted:
            self.normalizer.stats.update(obs[:-1])
            self.counted.fill_(1)

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions of the same leading shape: the mean, or (for one
        observation) a draw from N(μ, softplus(ρ)²), not clipped."""
        if not explore:
            return self.actor(torch.from_numpy(self.normalizer(obs)))[0].clamp(-1, 1).float().numpy()
        x = self.normalizer(obs)
        (mean, rho), tape = self.learners["actor"].fast.forward(x)
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
        self._acted = (None, None, None, None)  # the weights have changed
        self.counted.fill_(not over)
        self.record(number - 1, obs, action, next_obs, (scaled, float(ends)), delta, value, std)

    def end_episode(self):
        """The episode ends without a last transition: its traces must not reach into the next one."""
        for name, learner in self.learners.items():
            learner.traces.fill(0.0)
            self.optimizers[name].traces.fill(0.0)
        self.reward_scale.trace.fill(0.0)
        self.counted.fill_(0)

    def policy_gradient(self, outputs, action, delta):
        """Gradient of -log π(a|s) - τ·sign(δ)·H(π(·|s)) by (μ, ρ), where σ = softplus(ρ). Returns ([μ's, ρ's], σ).

        ObGD multiplies it by δ, so that the entropy term always raises the entropy, by τ·|δ|.
        """
        mean, rho = outputs
        std = np.logaddexp(0.0, rho)
        x = (action - mean) / std  # (action_dim,)
        by_std = (1.0 - x * x - self.config.entropy_weight * float(np.sign(delta))) / std
        return [(-x / std).astype(mean.dtype), (by_std * np.exp(rho - std)).astype(mean.dtype)], std  # σ' = sigmoid(ρ) = exp(ρ - σ)

    # ---- logging and metrics ----

    LOGGED = ("delta", "abs_delta", "value", "scaled_reward", "std", "entropy", "critic/trace_norm", "critic/step_size",
              "critic/bounded", "actor/trace_norm", "actor/step_size", "actor/bounded")

    def record(self, step, obs, action, next_obs, ending, delta, value, std):
        """Keeps what the log and the metrics read. Nothing is learned from it."""
        window, row = self._window, step % METRIC_WINDOW
        window["obs"][row], window["action"][row], window["next_obs"][row] = obs, action, next_obs
        window["ending"][row] = ending
        log_std = float(np.log(std).sum())
        entropy = log_std + 0.5 * len(std) * math.log(2.0 * math.pi * math.e)
        critic, actor = self.optimizers["critic"], self.optimizers["actor"]
        limit = self.config.step_size
        self._recent[step % LOG_WINDOW] = (
            delta, abs(delta), value, ending[0], float(std.mean()), entropy, critic.trace_norm, critic.last_step,
            critic.last_step < limit, actor.trace_norm, actor.last_step, actor.last_step < limit)

    @property
    def info(self):
        """Over the last 1,000 steps: means, and the median of the step sizes. Computed when asked, so that a step stays cheap."""
        rows = self.recent[:min(self.updates["critic"], LOG_WINDOW)]
        if not len(rows):
            return {}
        return {name: rows[:, column].median() if name.endswith("step_size") else rows[:, column].mean()
                for column, name in enumerate(self.LOGGED)}

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
        return torch.from_numpy(self.normalizer(obs.numpy()))

    @torch.no_grad()
    def compute_features(self, batch):
        obs = self._normalized(batch.obs[:, 0])
        features = {"critic": {"v": self.critic.features(obs)}, "actor": {"pi": self.actor.features(obs)}}
        self.critic(obs), self.actor(obs)
        return features

    def per_sample_losses(self, batch):
        """½δ² of the critic (semi-gradient) and -δ·log π of the actor: (batch,) each. reward holds scaled rewards."""
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
        parts = {"obs_stats": self.normalizer.stats.state, "reward_stats": self.reward_scale.stats.state,
                 "reward_trace": self.reward_scale.state, "counted": self.counted, "recent": self.recent}
        for name, learner in self.learners.items():
            parts |= {f"{name}/{part}": tensor for part, tensor in learner.tensors.items()}
        return parts | {f"window/{name}": tensor for name, tensor in self.window.items()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._acted = (None, None, None, None)
        for learner in self.learners.values():
            learner.refresh_mask()


# ---- the environment's time ----

class TimedEnv:
    """An environment whose observation ends with the time within the episode, -0.5 + t/T, for t agent steps of at most T.

    T is the environment's time limit, or 1,000 if it has none.
    """

    def __init__(self, env):
        self.env, self.time = env, 0
        self.obs_dim = env.obs_dim + 1

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
        limit = getattr(self.env, "episode_steps", None) or 1000
        return np.append(obs, np.float32(-0.5 + self.time / limit)).astype(np.float32)
