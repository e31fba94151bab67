"""SimBa's networks and its running observation normalizer, for SAC and DDPG.

Guarantees: the published SimBa's layers, initialization and sizes. On humanoid-run, the actor and one critic together
have 4.39 M parameters at scale 1.

Paper: SimBa is Lee et al., 2024; Section 4 and Figures 13 and 14 train it with module-specific regimes. This file needs
torch and networks.py.

    import torch
    from simba import RunningNormalizer, SimbaCritic

    normalizer, critic = RunningNormalizer(67), SimbaCritic(67, 21, hidden_dim=512, num_blocks=2)
    obs = torch.randn(67)
    normalizer.update(obs)                                             # once per observation of training
    q = critic(normalizer(obs.expand(256, 67)), torch.zeros(256, 21))  # (256, 1)
    print(q.shape, sum(p.numel() for p in critic.parameters()))
"""

import torch
import torch.nn as nn

from networks import GaussianHeads

SIMBA_SIZES = {"critic": (512, 2), "actor": (128, 1)}  # hidden width and number of blocks at scale 1


def init_he(layer):
    """He truncated normal, as flax draws it (cut at two standard deviations, then rescaled to √(2 / fan_in))."""
    std = (2.0 / layer.in_features) ** 0.5 / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


def init_orthogonal(layer):
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)


class SimbaBlock(nn.Module):
    """x + Linear(ReLU(Linear(LayerNorm(x)))), four times wider inside. This LayerNorm has parameters."""

    def __init__(self, hidden_dim):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.linear1 = nn.Linear(hidden_dim, 4 * hidden_dim)
        self.activation = nn.ReLU()
        self.linear2 = nn.Linear(4 * hidden_dim, hidden_dim)
        init_he(self.linear1)
        init_he(self.linear2)

    def forward(self, x):
        return x + self.linear2(self.activation(self.linear1(self.norm(x))))


class SimbaMLP(nn.Module):
    """Linear projection, blocks, LayerNorm, linear output. By itself it is SimBa's actor for DDPG."""

    def __init__(self, input_dim, output_dim, hidden_dim, num_blocks):
        super().__init__()
        self.projection = nn.Linear(input_dim, hidden_dim)
        self.blocks = nn.ModuleList(SimbaBlock(hidden_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.output = nn.Linear(hidden_dim, output_dim)
        init_orthogonal(self.projection)
        init_orthogonal(self.output)

    def features(self, x):
        """(..., input) -> (..., hidden): the penultimate features, used for SRank."""
        x = self.projection(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.output(self.features(x))


class SimbaGaussian(GaussianHeads, SimbaMLP):
    """SimBa's actor for SAC."""

    def __init__(self, input_dim, action_dim, hidden_dim, num_blocks):
        super().__init__(input_dim, action_dim, hidden_dim, num_blocks)
        self.log_std = nn.Linear(hidden_dim, action_dim)
        init_orthogonal(self.log_std)


class SimbaCritic(nn.Module):
    """One Q, or two with nothing shared, on observation and action."""

    def __init__(self, obs_dim, action_dim, hidden_dim, num_blocks, num_qs=1):
        super().__init__()
        for number in range(1, num_qs + 1):
            self.add_module(f"q{number}", SimbaMLP(obs_dim + action_dim, 1, hidden_dim, num_blocks))

    def forward(self, obs, action):
        """(..., obs_dim), (..., action_dim) -> (..., number of Q)"""
        x = torch.cat([obs, action], -1)
        return torch.cat([q(x) for q in self.children()], -1)


class RunningNormalizer(nn.Module):
    """(obs - mean) / std, the statistics over all observations so far, by Welford's running form in float64.

    As in the published SimBa, it starts from mean 0 and variance 1 with the weight of 1e-4 observations. The statistics
    are buffers that change in place, so they are part of `state_dict`, and a captured CUDA graph reads the current
    values.
    """

    def __init__(self, dim, eps=1e-8):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.full((), 1e-4, dtype=torch.float64))

    @torch.no_grad()
    def update(self, obs):
        """One observation, (dim,)."""
        delta = obs.double() - self.mean
        share = 1.0 / (self.count + 1.0)  # weight of the new observation
        self.mean.add_(delta * share)
        self.var.add_(delta.square() * share).mul_(1.0 - share)  # n/(n+1) · (var + δ²/(n+1))
        self.count.add_(1.0)

    def forward(self, obs):
        """(..., dim) -> the same shape and dtype"""
        return (obs - self.mean.to(obs.dtype)) * (self.var + self.eps).rsqrt().to(obs.dtype)
