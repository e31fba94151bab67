"""SAC and DDPG on SimBa networks, with module-specific training.

Guarantees: the losses of soft actor-critic and of DDPG as in the published SimBa, all five regimes on both modules, and
soft targets that stay exactly as sparse as the network they follow.

Paper: Section 4, Figures 13 and 14. SAC is Haarnoja et al., 2018; DDPG Lillicrap et al., 2016; SimBa Lee et al., 2024.
Run it with `python train.py --algo sac`, or use it as a part:

    import numpy as np
    from sac import SAC, SACConfig, SIMBA_MST

    agent = SAC(obs_dim=3, action_dim=1, modules=SIMBA_MST, config=SACConfig(batch_size=32), buffer_size=1000)
    for step in range(80):
        obs, next_obs = np.full(3, step, np.float32), np.full(3, step + 1, np.float32)
        agent.update_obs_stats(obs)                                                 # each observation of training, once
        action = agent.act(obs, explore=True)                                       # numpy in, numpy out
        agent.add(obs, action, 1.0, next_obs, terminated=False, truncated=False)
        if step > 70:
            agent.update()                                                   # updates_per_step times per agent step
    print(agent.info["critic_loss"].mean())                                         # of the last update, on the device
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from base import BaseAgent, Choices, ModuleConfig, features, frozen, q_features
from networks import scaled_size
from replay import to_device
from simba import SIMBA_SIZES, RunningNormalizer, SimbaCritic, SimbaGaussian, SimbaMLP

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # of the Gaussian before tanh, as in the published SimBa

# Sparsity 0.8: the published example of sparse SimBa networks, whose configurations this paper follows (Section 4).
SIMBA = {"critic": ModuleConfig("simba", sparsity=0.8), "actor": ModuleConfig("simba", sparsity=0.8)}
SIMBA_MST = {"critic": ModuleConfig("simba", "dst", sparsity=0.8), "actor": ModuleConfig("simba", "sst", sparsity=0.8)}


@dataclass(frozen=True)
class SimbaConfig(Choices):
    """The published SimBa's settings for DeepMind Control. Each comment is the flag's help text."""
    batch_size: int = 256  # transitions per update
    updates_per_step: int = 2  # updates per agent step (replay ratio)
    discount: float = 0.99  # γ, per agent step
    tau: float = 0.005  # τ, how far the target critic moves per update
    actor_lr: float = 1e-4  # AdamW learning rate of the actor
    critic_lr: float = 1e-4  # AdamW learning rate of the critic
    weight_decay: float = 1e-2  # AdamW weight decay of both modules
    twin_critics: bool = False  # two Q networks instead of one
    target_q_reduce: Literal["min", "mean"] = "min"  # how the TD target combines the two Q values
    actor_q_reduce: Literal["min", "mean"] = "min"  # how the actor loss combines the two Q values

    presets = {"default": SIMBA, "mst": SIMBA_MST}
    learning_starts = 5_000
    horizon = 1  # one-step returns
    prioritized = False


@dataclass(frozen=True)
class SACConfig(SimbaConfig):
    """SAC's temperature."""
    initial_temperature: float = 0.01  # α at the start
    temperature_lr: float = 1e-4  # Adam learning rate of log α
    target_entropy: float = -0.5  # target entropy per action dimension


@dataclass(frozen=True)
class DDPGConfig(SimbaConfig):
    """DDPG's noise."""
    exploration_noise: float = 0.1  # std of the Gaussian noise on actions: in acting, the target and the actor loss


# ---- what SAC and MR.SAC share ----

def tanh_gaussian(output):
    """A random action and its log-probability: (..., 2·action_dim) -> (..., action_dim) and (...,).

    output: mean and raw log-std of a Gaussian; a = tanh(x) for a sample x. log π(a) is its log-density at x,
    less log |da/dx| = log(1 - tanh²x) = 2·(log 2 - x - softplus(-2x)): finite even where tanh rounds to 1.
    """
    mean, raw = output.chunk(2, -1)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (1.0 + torch.tanh(raw))
    noise = torch.randn_like(mean)
    x = mean + log_std.exp() * noise
    log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_slope = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
    return torch.tanh(x), (log_density - log_slope).sum(-1)


def tanh_mean(output):
    """The action without noise: (..., 2·action_dim) -> (..., action_dim)"""
    return torch.tanh(output.chunk(2, -1)[0])


def reduce_q(q, reduction):
    """(batch, number of Q) -> (batch,)"""
    return q.amin(1) if reduction == "min" else q.mean(1)


def simba_size(name, module):
    """(hidden width, blocks) of a module."""
    return scaled_size(1, module.width_scale, module.depth_scale, *SIMBA_SIZES[name])


class Temperature:
    """α, learned in log space so that it stays positive. It rises while the policy's entropy is below its target."""

    def __init__(self, config, action_dim, device):
        self.log = nn.Parameter(torch.full((), math.log(config.initial_temperature), device=device))
        self.optimizer = torch.optim.Adam([self.log], lr=config.temperature_lr, fused=True)
        self.target_entropy = config.target_entropy * action_dim

    def value(self):
        """α as a device scalar without gradient."""
        return self.log.detach().exp()

    def update(self, entropy):
        """Minimizes α·(H - H̄). entropy: H, a device scalar without gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        (self.log.exp() * (entropy - self.target_entropy)).backward()
        self.optimizer.step()


# ---- SAC and DDPG ----

class SimbaAgent(BaseAgent):
    """What SAC and DDPG share: everything but the policy and its entropy term.

    A subclass gives `Config`, `actor_class`, `policy` and `best_action`. modules: a ModuleConfig for "critic" and
    "actor"; their arch_type and residual are ignored.
    """

    target_modules = ("critic",)
    compiled_methods = ("critic_loss", "actor_loss")
    graph_methods = {"update": ["critic", "actor"]}

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        self.normalizer = RunningNormalizer(obs_dim).to(self.device)

    # ---- networks: override one to train your own ----

    def make_networks(self, obs_dim, action_dim, modules):
        return {"critic": self.make_critic(obs_dim, action_dim, modules["critic"]),
                "actor": self.make_actor(obs_dim, action_dim, modules["actor"])}

    def make_critic(self, obs_dim, action_dim, module):
        num_qs = 2 if self.config.twin_critics else 1
        return SimbaCritic(obs_dim, action_dim, *simba_size("critic", module), num_qs=num_qs)

    def make_actor(self, obs_dim, action_dim, module):
        return self.actor_class(obs_dim, action_dim, *simba_size("actor", module))

    def network_calls(self, obs, action):
        """Every call that the agent makes to its networks, with the shape it needs."""
        yield "critic", "critic(obs, action)", self.critic(obs, action), (2, None)
        yield "actor", "actor(obs)", self.actor(obs), (2, self.actor_outputs * self.action_dim)

    # ---- acting ----

    def update_obs_stats(self, obs):
        """Once per agent step, random ones included."""
        super().update_obs_stats(obs)
        self.normalizer.update(to_device(obs, self.device))

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] with the same leading shape."""
        obs = self.normalizer(to_device(obs, self.device))
        action = self.policy(obs)[0] if explore else self.best_action(obs)
        return action.cpu().numpy()

    # ---- learning ----

    def draw(self):
        """Observations are stored raw and normalized here, with the current statistics."""
        batch = self.replay.sample(self.config.batch_size, self.config.horizon)
        return batch._replace(obs=self.normalizer(batch.obs))

    def update(self):
        """Actor, temperature, critic, target, in this order: each uses the updated ones before it."""
        batch = self.draw()
        with frozen(self.critic):  # the actor's loss flows through it to the actor's weights
            losses, actor_info = self.actor_loss(batch.obs[:, 0])
        self._step("actor", losses.mean())
        self.update_temperature(actor_info)

        losses, critic_info = self.critic_loss(batch)
        changes = self.sparse["critic"].is_update_step(self.updates["critic"] + 1)
        self._step("critic", losses.mean())
        self.update_target(changes)
        self.info.update(actor_info | critic_info)

    def update_temperature(self, info):
        """DDPG does not have one."""

    @torch.no_grad()
    def update_target(self, topology_changed):
        for target, source in zip(self.targets["critic"].parameters(), self.critic.parameters()):
            target.lerp_(source, self.config.tau)
        if topology_changed:  # the average still holds weights just pruned; at other steps they are 0
            self.sparse["critic"].apply_masks(self.targets["critic"])

    # ---- losses: one value per sample, (batch,) ----

    def actor_loss(self, obs):
        """α·log π(a|s) - Q(s, a), a from the policy. obs: normalized, (batch, obs_dim)."""
        action, entropy_cost, info = self.policy(obs)
        loss = entropy_cost - reduce_q(self.critic(obs, action), self.config.actor_q_reduce)
        return loss, {"actor_loss": loss.detach(), "action_size": action.detach().abs()} | info

    def critic_loss(self, batch):
        """(Q - y)², summed over the Q networks."""
        target = self.td_target(batch)  # (batch, 1)
        q = self.critic(batch.obs[:, 0], batch.action[:, 0])  # (batch, number of Q)
        loss = (q - target).square().sum(1)
        info = {"critic_loss": loss, "q": q, "td_target": target}
        return loss, {name: value.detach() for name, value in info.items()}

    @torch.no_grad()
    def td_target(self, batch):
        """y = r + γ·(not done)·(Q'(s', a') - α·log π(a'|s')), a' from the current policy: (batch, 1)"""
        next_obs = batch.obs[:, 1]
        action, entropy_cost, _ = self.policy(next_obs)
        q = self.targets["critic"](next_obs, action)  # (batch, 1 or 2)
        value = reduce_q(q, self.config.target_q_reduce) - entropy_cost  # (batch,)
        return (batch.reward[:, 0] + self.config.discount * (1.0 - batch.terminated[:, 0]) * value).unsqueeze(1)

    # ---- metrics, state ----

    @torch.no_grad()
    def compute_features(self, batch):
        """One pass of each module. Returns the features for SRank: module -> name -> (batch, ·)."""
        obs = self.normalizer(batch.obs[:, 0])
        return {"critic": q_features(self.critic, obs, batch.action[:, 0]), "actor": {"pi": features(self.actor, obs)}}

    def per_sample_losses(self, batch):
        """Each module's own loss per sample, with its graph: module -> (batch,). Calls the class's plain methods."""
        batch, plain = batch._replace(obs=self.normalizer(batch.obs)), type(self)
        return {"critic": plain.critic_loss(self, batch)[0], "actor": plain.actor_loss(self, batch.obs[:, 0])[0]}

    def tensors(self):
        return {f"normalizer.{name}": tensor for name, tensor in self.normalizer.named_buffers()}


class SAC(SimbaAgent):
    """Soft actor-critic: a tanh-Gaussian policy, and a temperature that keeps its entropy near a target."""

    Config = SACConfig
    actor_class, actor_outputs = SimbaGaussian, 2  # mean and log-std per action dimension

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        self.temperature = Temperature(self.config, action_dim, self.device)
        self.optimizers["temperature"] = self.temperature.optimizer
        self.temperature.optimizer.found_inf = self.nonfinite["actor"]  # it follows the actor's entropy

    def policy(self, obs):
        """A random action, its α·log π, and what to log."""
        action, log_prob = tanh_gaussian(self.actor(obs))
        return action, self.temperature.value() * log_prob, {"entropy": -log_prob.detach().mean()}

    def best_action(self, obs):
        return tanh_mean(self.actor(obs))

    def update_temperature(self, info):
        self.temperature.update(info["entropy"])
        info["temperature"] = self.temperature.value()

    def float32_layers(self):
        return super().float32_layers() + [self.actor.output, self.actor.log_std]  # bfloat16 would lose small changes

    def tensors(self):
        return super().tensors() | {"log_temperature": self.temperature.log}


class DDPG(SimbaAgent):
    """Deep deterministic policy gradient, as in the published SimBa: no target actor, and the same noise everywhere."""

    Config = DDPGConfig
    actor_class, actor_outputs = SimbaMLP, 1

    def policy(self, obs):
        """A noisy action, no entropy term, nothing to log."""
        action = self.best_action(obs)
        action = (action + torch.randn_like(action) * self.config.exploration_noise).clamp(-1, 1)
        return action, torch.zeros_like(action[..., 0]), {}

    def best_action(self, obs):
        return torch.tanh(self.actor(obs))
