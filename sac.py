"""SAC and DDPG on SimBa networks, with module-specific training.

What it claims: the losses of soft actor-critic and of DDPG as the published SimBa runs them, all five regimes on both
modules, and soft targets that stay exactly as sparse as the network they follow.

Paper: Section 4, Figures 13 and 14. SAC is Haarnoja et al., 2018; DDPG Lillicrap et al., 2016; SimBa Lee et al., 2024.
The settings are in settings.py. Run it by `python train.py --algo sac`; or, as a part:

    agent = SAC(obs_dim=24, action_dim=6, modules=SIMBA_MST, total_updates=990_000)
    replay = ReplayBuffer(24, 6, horizon=agent.horizon, prioritized=agent.prioritized)
    agent.update_obs_stats(obs)                          # every observation of training, for the normaliser
    action = agent.act(obs, explore=True)       # numpy in, numpy out
    agent.update(replay)                        # one update; an agent step has agent.updates_per_step of them
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from base import BaseAgent, frozen
from networks import SIMBA_SIZES, RunningNormalizer, SimbaCritic, SimbaGaussian, SimbaMLP, scaled_size
from replay import to_device
from settings import SIMBA, DDPGConfig, SACConfig

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # of the Gaussian before tanh, as in the published SimBa


# ---- what SAC and MR.SAC share ----

def tanh_gaussian(output):
    """A random action and its log-probability: (..., 2·action_dim) -> (..., action_dim) and (...,).

    output: the mean and the raw log-std of a Gaussian, which tanh squashes. log π(a) is the Gaussian's log-density at x,
    a = tanh(x), less log |da/dx| = log(1 - tanh²x) = 2·(log 2 - x - softplus(-2x)): finite even where tanh rounds to 1.
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


class Temperature:
    """α, learnt in log space so that it stays positive: it rises while the policy's entropy is below its target."""

    def __init__(self, config, action_dim, device):
        self.log = nn.Parameter(torch.full((), math.log(config.initial_temperature), device=device))
        self.optimizer = torch.optim.Adam([self.log], lr=config.temperature_lr, fused=True)
        self.target_entropy = config.target_entropy * action_dim

    def value(self):
        """α as a device scalar without gradient."""
        return self.log.detach().exp()

    def update(self, entropy):
        """Minimises α·(H - H̄). entropy: H, a device scalar without gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        (self.log.exp() * (entropy - self.target_entropy)).backward()
        self.optimizer.step()


# ---- SAC and DDPG ----

class SimbaAgent(BaseAgent):
    """What SAC and DDPG share: everything but the policy and what entropy is worth, which they give by `Config`,
    `make_actor`, `policy` and `best_action`.

    modules: a ModuleConfig for "critic" and "actor"; its arch_type and residual say nothing here.
    total_updates: T of the sparsity schedules: two an agent step.
    """

    prioritized = False
    compiled_methods = ("critic_loss", "actor_loss")
    graph_methods = {"update": ["critic", "actor"]}

    def __init__(self, obs_dim, action_dim, modules=None, config=None, total_updates=990_000, device="cpu", seed=0):
        modules = modules or SIMBA
        self.config = config = config or self.Config()
        self.horizon = config.horizon
        size = {name: scaled_size(1, modules[name].width_scale, modules[name].depth_scale, *base)
                for name, base in SIMBA_SIZES.items()}
        self.critic = SimbaCritic(obs_dim, action_dim, *size["critic"], num_qs=2 if config.twin_critics else 1)
        self.actor = self.make_actor(obs_dim, action_dim, *size["actor"])
        self.normalizer = RunningNormalizer(obs_dim)
        super().__init__({"critic": self.critic, "actor": self.actor}, modules,
                         {"critic": config.critic_lr, "actor": config.actor_lr}, config.weight_decay, ("critic",),
                         total_updates, device, seed)
        self.normalizer.to(self.device)

    # ---- acting ----

    def update_obs_stats(self, obs):
        """Once an agent step, random ones included."""
        super().update_obs_stats(obs)
        self.normalizer.update(to_device(obs, self.device))

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] of the same leading shape."""
        obs = self.normalizer(to_device(obs, self.device))
        action = self.policy(obs)[0] if explore else self.best_action(obs)
        return action.cpu().numpy()

    # ---- learning ----

    def draw(self, replay):
        """Observations are stored as they came and normalised here, by what is known now."""
        batch = replay.sample(self.config.batch_size, self.horizon)
        return batch._replace(obs=self.normalizer(batch.obs))

    def update(self, replay):
        """Actor, temperature, critic, target: each sees the ones before it as just updated."""
        batch = self.draw(replay)
        with frozen(self.critic):  # the actor's loss flows through it, and ends at the actor's weights
            losses, actor_info = self.actor_loss(batch.obs[:, 0])
        self._step("actor", losses.mean())
        self.update_temperature(actor_info)

        losses, critic_info = self.critic_loss(batch)
        changes = self.sparse["critic"].is_update_step(self.updates["critic"] + 1)
        self._step("critic", losses.mean())
        self.update_target(changes)
        self.info.update(actor_info | critic_info)

    def update_temperature(self, info):
        """DDPG has none."""

    @torch.no_grad()
    def update_target(self, topology_changed):
        for target, source in zip(self.targets["critic"].parameters(), self.critic.parameters()):
            target.lerp_(source, self.config.target_rate)
        if topology_changed:  # the average still holds what was just pruned; between changes both sides are 0 there
            self.sparse["critic"].apply_masks(self.targets["critic"])

    # ---- losses, one value a sample: (batch,) ----

    def actor_loss(self, obs):
        """α·log π(a|s) - Q(s, a), a from the policy. obs: normalised, (batch, obs_dim)."""
        action, entropy_cost, info = self.policy(obs)
        loss = entropy_cost - reduce_q(self.critic(obs, action), self.config.actor_q)
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
        """y = r + γ·(not done)·(Q'(s', a') - α·log π(a'|s')), a' from the policy as it is now: (batch, 1)"""
        next_obs = batch.obs[:, 1]
        action, entropy_cost, _ = self.policy(next_obs)
        value = reduce_q(self.targets["critic"](next_obs, action), self.config.target_q) - entropy_cost  # (batch,)
        return (batch.reward[:, 0] + self.config.discount * (1.0 - batch.terminated[:, 0]) * value).unsqueeze(1)

    # ---- looking inside ----

    @torch.no_grad()
    def compute_features(self, batch):
        """One pass of each module over the batch. Returns what SRank is read from: module -> name -> (batch, ·)."""
        obs = self.normalizer(batch.obs[:, 0])
        x = torch.cat([obs, batch.action[:, 0]], -1)
        return {"critic": {name: q.features(x) for name, q in self.critic.named_children()},
                "actor": {"pi": self.actor.features(obs)}}

    def per_sample_losses(self, batch, replay):
        """Each module's own loss, one value a sample, with its graph: module -> (batch,). By the plain methods."""
        batch, plain = batch._replace(obs=self.normalizer(batch.obs)), type(self)
        return {"critic": plain.critic_loss(self, batch)[0], "actor": plain.actor_loss(self, batch.obs[:, 0])[0]}

    def tensors(self):
        return {f"normalizer.{name}": tensor for name, tensor in self.normalizer.named_buffers()}


class SAC(SimbaAgent):
    """Soft actor-critic: a tanh-Gaussian policy, and a temperature that holds its entropy near a target."""

    Config = SACConfig
    make_actor = SimbaGaussian

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        self.temperature = Temperature(self.config, action_dim, self.device)
        self.optimizers["temperature"] = self.temperature.optimizer
        self.temperature.optimizer.found_inf = self.nonfinite["actor"]  # whose entropy it follows

    def policy(self, obs):
        """A random action, α·log π of it, and what to log."""
        action, log_prob = tanh_gaussian(self.actor(obs))
        return action, self.temperature.value() * log_prob, {"entropy": -log_prob.detach().mean()}

    def best_action(self, obs):
        return tanh_mean(self.actor(obs))

    def update_temperature(self, info):
        self.temperature.update(info["entropy"])
        info["temperature"] = self.temperature.value()

    def float32_layers(self):
        return super().float32_layers() + [self.actor.output, self.actor.log_std]  # in bfloat16 it would move in steps

    def tensors(self):
        return super().tensors() | {"log_temperature": self.temperature.log}


class DDPG(SimbaAgent):
    """Deep deterministic policy gradient, as the published SimBa runs it: no target actor, one noise everywhere."""

    Config = DDPGConfig
    make_actor = SimbaMLP

    def policy(self, obs):
        """A noisy action; entropy costs nothing."""
        action = self.best_action(obs)
        action = (action + torch.randn_like(action) * self.config.exploration_noise).clamp(-1, 1)
        return action, torch.zeros_like(action[..., 0]), {}

    def best_action(self, obs):
        return torch.tanh(self.actor(obs))
