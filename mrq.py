"""MR.Q with module-specific training: encoder, critic and actor, each with its own architecture, size and regime.

Guarantees: the losses of Eqs. (7)-(12) with the settings of Tables 1 and 2, updated in the paper's order; no module's
loss computes a gradient for another module's weights; and an update waits for the device only where a topology change
is due.

Paper: Section 2.3 and Appendix B.3; MR.Q is Fujimoto et al., 2025. Run it with `python train.py`, or use it as a part:

    import numpy as np
    from mrq import MR_MST, MRQ, MRQConfig

    config = MRQConfig(batch_size=32, target_update_freq=10)
    agent = MRQ(obs_dim=3, action_dim=1, modules=MR_MST, config=config, buffer_size=1000)
    for step in range(80):
        obs, next_obs = np.full(3, step, np.float32), np.full(3, step + 1, np.float32)
        action = agent.act(obs, explore=True)                                       # numpy in, numpy out
        agent.add(obs, action, 1.0, next_obs, terminated=False, truncated=False)
        if step > 70:
            agent.update()                                                          # one agent step of learning
    print(agent.info["critic_loss"].mean())                                         # of the last update, on the device
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from base import BaseAgent, Choices, ModuleConfig, features, frozen, q_features
from networks import Actor, Critic, Encoder
from replay import alive_discount, to_device

MR_DEFAULT = {"encoder": ModuleConfig(4), "critic": ModuleConfig(4), "actor": ModuleConfig(3)}  # Table 2
MR_MST = {"encoder": ModuleConfig(6), "critic": ModuleConfig(6, "dst"), "actor": ModuleConfig(5, "sst")}  # Section 4


@dataclass(frozen=True)
class MRConfig(Choices):
    """Tables 1 and 2 without the policy; MR.SAC has these settings too. Each comment is the flag's help text."""
    batch_size: int = 256  # transitions or subtrajectories per update
    updates_per_step: int = 1  # updates per agent step (replay ratio)
    discount: float = 0.99  # γ, per agent step
    encoder_horizon: int = 5  # H_Enc, steps that the dynamics are unrolled
    q_horizon: int = 3  # H_Q, steps of the multi-step return
    target_update_freq: int = 250  # updates between two copies to the targets; also encoder updates in a row
    dynamics_weight: float = 1.0  # λ_Dynamics
    reward_weight: float = 0.1  # λ_Reward
    terminal_weight: float = 0.1  # λ_Terminal
    encoder_lr: float = 1e-4  # AdamW learning rate of the encoder
    critic_lr: float = 3e-4  # AdamW learning rate of the critic
    actor_lr: float = 3e-4  # AdamW learning rate of the actor
    weight_decay: float = 1e-4  # AdamW weight decay of all three modules
    critic_grad_clip: float = 20.0  # largest gradient norm of the critic; the others are not clipped
    reward_bins: int = 65  # bins of the two-hot reward
    reward_symlog_limit: float = 10.0  # bins span ±this in symlog space: ±22,000 in rewards

    presets = {"default": MR_DEFAULT, "mst": MR_MST}
    learning_starts = 10_000  # Table 1, initial random steps
    prioritized = True  # LAP

    @property
    def horizon(self):
        """The longest subtrajectory that the replay buffer must keep."""
        return max(self.encoder_horizon, self.q_horizon)


@dataclass(frozen=True)
class MRQConfig(MRConfig):
    """Table 2: MR.Q's deterministic policy."""
    exploration_noise: float = 0.2  # std of the Gaussian noise added to actions
    target_noise: float = 0.2  # std of the Gaussian noise added to target actions
    target_noise_clip: float = 0.3  # bound of the target noise
    pre_activation_weight: float = 1e-5  # λ_pre-activ, on the actor's output before tanh


class MRQ(BaseAgent):
    """The agent. modules: a ModuleConfig for "encoder", "critic" and "actor"; each gets `total_updates` updates."""

    Config = MRQConfig
    target_modules = ("encoder", "critic", "actor")
    compiled_methods, autocast_methods = ("encoder_loss", "critic_loss", "actor_loss"), ("encode",)
    graph_methods = {"update_encoder": ["encoder"], "update_critic_and_actor": ["critic", "actor"]}
    on_encoder_update = staticmethod(lambda message: None)  # called between encoder updates: the loop may stop there

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        config = self.config
        # CUDA graph: the scales are tensors, because a Python number would be recorded as a constant.
        self.reward_scale = torch.ones((), device=self.device)  # r̄
        self.target_reward_scale = torch.ones((), device=self.device)  # r̄', the previous scale
        # The subtrajectories of 250 encoder updates are drawn at once: priorities do not change between them.
        shape = (config.target_update_freq, config.batch_size)
        self.encoder_indices = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.encoder_position = torch.zeros(1, dtype=torch.long, device=self.device)  # row of the next update
        limit = config.reward_symlog_limit
        self.bins = symexp(torch.linspace(-limit, limit, config.reward_bins, device=self.device))

    # ---- networks: override one to train your own ----

    def make_networks(self, obs_dim, action_dim, modules):
        encoder = self.make_encoder(obs_dim, action_dim, modules["encoder"])
        if not (hasattr(encoder, "zs_dim") and hasattr(encoder, "zsa_dim")):
            raise ValueError("make_encoder: the encoder must have zs_dim and zsa_dim, the widths of z_s and z_sa")
        return {"encoder": encoder, "critic": self.make_critic(encoder.zsa_dim, modules["critic"]),
                "actor": self.make_actor(encoder.zs_dim, action_dim, modules["actor"])}

    def make_encoder(self, obs_dim, action_dim, module):
        return Encoder(obs_dim, action_dim, num_bins=self.config.reward_bins, **module.size())

    def make_critic(self, zsa_dim, module):
        return Critic(zsa_dim, **module.size())

    def make_actor(self, zs_dim, action_dim, module):
        return Actor(zs_dim, action_dim, **module.size())

    def network_calls(self, obs, action):
        """Every call that the agent makes to its networks, with the shape it needs."""
        zs = self.encoder.zs(obs)
        yield "encoder", "zs(obs)", zs, (2, self.encoder.zs_dim)
        zsa = self.encoder(zs, action)
        yield "encoder", "encoder(zs, action)", zsa, (2, self.encoder.zsa_dim)
        done, next_zs, reward_logits = self.encoder.unroll(zs, action.unsqueeze(1))
        yield "encoder", "unroll(zs, actions)[0]", done, (2, 1, 1)
        yield "encoder", "unroll(zs, actions)[1]", next_zs, (2, 1, self.encoder.zs_dim)
        yield "encoder", "unroll(zs, actions)[2]", reward_logits, (2, 1, self.config.reward_bins)
        yield "critic", "critic(zsa)", self.critic(zsa), (2, None)
        yield from self.actor_calls(zs)

    def actor_calls(self, zs):
        action, pre_activation = self.actor(zs)
        yield "actor", "actor(zs)[0]", action, (2, self.action_dim)
        yield "actor", "actor(zs)[1]", pre_activation, (2, self.action_dim)

    # ---- acting ----

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] with the same leading shape."""
        obs = to_device(obs, self.device)
        action, _ = self.actor(self.encoder.zs(obs))
        if explore:
            action = (action + torch.randn_like(action) * self.config.exploration_noise).clamp(-1, 1)
        return action.cpu().numpy()

    # ---- learning ----

    def update(self):
        """One update. Every `target_update_freq` of them (250, Table 2): new targets and reward scales, then as many
        encoder updates in a row. An agent saved between two encoder updates continues there."""
        period = self.config.target_update_freq
        if self.updates["critic"] % period == 0:
            if self.updates["encoder"] == self.updates["critic"]:  # else restored within a period
                self.refresh_targets()
            while (done := self.updates["encoder"] - self.updates["critic"]) < period:
                self.update_encoder()
                self.on_encoder_update(f"encoder update {done + 1} of {period}")
        self.update_critic_and_actor()

    @torch.no_grad()
    def refresh_targets(self):
        """New targets, new reward scales, and the subtrajectories of the next encoder updates.

        Stored weights are masked, so the copied targets are as sparse as their networks, without `apply_masks`.
        """
        for name, network in self.networks.items():
            torch._foreach_copy_(list(self.targets[name].parameters()), list(network.parameters()))
        self.target_reward_scale.copy_(self.reward_scale)  # r̄' is the r̄ that the copied critic was trained with
        # "Recent experiences in the replay buffer" (the paper) is read as the whole buffer, as in the published MR.Q.
        # r̄ stays 1 until a nonzero reward is stored. The published MR.Q clamps it at 1e-8 instead, which makes its
        # first TD targets, and its largest priority for good, about 1e8 times too large.
        scale = self.replay.mean_absolute_reward()
        self.reward_scale.copy_(torch.where(scale > 0, scale, 1.0))
        self.info["reward_scale"] = self.reward_scale
        self.encoder_indices.copy_(self.replay.draw(*self.encoder_indices.shape))
        self.encoder_position.zero_()

    def update_encoder(self):
        # CUDA graph: the position is a tensor, so a replayed update takes the next row.
        index = self.encoder_indices.index_select(0, self.encoder_position).squeeze(0)  # (batch,)
        self.encoder_position.add_(1).remainder_(len(self.encoder_indices))
        batch = self.replay.gather(index, self.config.encoder_horizon)
        losses, info = self.encoder_loss(batch, self.replay.termination_seen)
        self._step("encoder", losses.mean())
        self.info.update(info)

    def update_critic_and_actor(self):
        batch = self.replay.sample(self.config.batch_size, self.config.q_horizon, ends=True)
        zs = self.encode(batch.obs[:, 0])
        losses, td_error, info = self.critic_loss(batch, zs)
        self._step("critic", losses.mean(), clip=self.config.critic_grad_clip)
        self.replay.update_priority(batch.index, td_error)
        self.info.update(info)
        self.update_actor(zs)

    def update_actor(self, zs):
        with frozen(self.encoder, self.critic):  # the loss flows through them to the actor's weights
            losses, info = self.actor_loss(zs)
        self._step("actor", losses.mean())
        self.info.update(info)

    def learning_step(self, name, update):
        if name == "encoder":  # its updates belong to the step that begins a period
            update = (update - 1) // self.config.target_update_freq * self.config.target_update_freq + 1
        return super().learning_step(name, update)

    # ---- losses: one value per sample, (batch,). docs/training.md shows how to add a term ----

    @torch.no_grad()
    def encode(self, obs):
        """z_s for critic and actor, which give the encoder no gradient."""
        return self.encoder.zs(obs)

    def encoder_loss(self, batch, termination_seen):
        """Unrolls z_s along the real actions and predicts reward, next z_s and done at each step.  Eqs. (7)-(10)

        batch: at least H_Enc steps. termination_seen: scalar tensor, 1.0 once any termination is stored; without one,
        the done loss would have nothing to separate.
        """
        config, horizon = self.config, self.config.encoder_horizon
        action, reward, terminated = (part[:, :horizon] for part in (batch.action, batch.reward, batch.terminated))
        with torch.no_grad():
            # The target is the target encoder's z_s of the real next observation. One large product for all H steps.
            next_obs = batch.obs[:, 1:horizon + 1].flatten(0, 1)
            target_zs = self.targets["encoder"].zs(next_obs).unflatten(0, (len(batch.obs), -1))  # (batch, H, zs)
        zs = self.encoder.zs(batch.obs[:, 0])  # (batch, zs)
        done, zs, reward_logits = self.encoder.unroll(zs, action)  # Eq. (7): (batch, H, ·) each
        alive = alive_discount(terminated)[:, :-1]  # (batch, H) 0 after a termination; that step counts
        reward_loss = (alive * two_hot_cross_entropy(reward_logits, reward, self.bins)).sum(1)  # Eqs. (8), (9)
        dynamics_loss = (alive * F.mse_loss(zs, target_zs, reduction="none").mean(-1)).sum(1)  # Eqs. (8), (10)
        terminal_loss = (alive * F.mse_loss(done.squeeze(-1), terminated, reduction="none")).sum(1)  # Eqs. (8), (10)
        terminal_loss = termination_seen * terminal_loss
        loss = (config.reward_weight * reward_loss + config.dynamics_weight * dynamics_loss
                + config.terminal_weight * terminal_loss)  # (batch,)  Eq. (8)
        info = {"encoder_loss": loss, "reward_loss": reward_loss, "dynamics_loss": dynamics_loss,
                "terminal_loss": terminal_loss}
        return loss, {name: value.detach() for name, value in info.items()}

    def critic_loss(self, batch, zs):
        """Huber loss to the multi-step TD target (the two methods below), for both Q.  Eq. (11)

        batch.obs: from o_t to o_{t+H_Q}, or only these two. zs: (batch, zs) of o_t. Also returns |δ|, (batch,): the
        larger of both critics.
        """
        target = self.td_target(batch)  # (batch, 1)
        with torch.no_grad():
            zsa = self.encoder(zs, batch.action[:, 0])
        q = self.critic(zsa)  # (batch, 2)
        loss = F.smooth_l1_loss(q, target.expand_as(q), reduction="none").mean(1)  # averaged over both Q
        td_error = (q.detach() - target).abs().amax(1)
        info = {"critic_loss": loss, "q": q, "td_target": target, "td_error": td_error}
        return loss, td_error, {name: value.detach() for name, value in info.items()}

    @torch.no_grad()
    def td_target(self, batch):
        """y = [Σ γ^k r_k + γ^H · (not done) · r̄' · V'(s_H)] / r̄: (batch, 1).  Eq. (11)"""
        horizon = self.config.q_horizon
        weight = alive_discount(batch.terminated[:, :horizon], self.config.discount)  # (batch, H + 1) γ^k or 0
        returns = (batch.reward[:, :horizon] * weight[:, :-1]).sum(1, keepdim=True)  # (batch, 1)
        value = self.target_value(self.targets["encoder"].zs(batch.obs[:, -1]))  # (batch, 1)
        return (returns + weight[:, -1:] * self.target_reward_scale * value) / self.reward_scale

    def target_value(self, zs):
        """V' = min Q'(s, π'(s) + noise), target networks, in units of r̄': (batch, zs) -> (batch, 1).  Eq. (11)"""
        config = self.config
        action, _ = self.targets["actor"](zs)
        limit = config.target_noise_clip
        noise = (torch.randn_like(action) * config.target_noise).clamp(-limit, limit)
        action = (action + noise).clamp(-1, 1)
        return self.targets["critic"](self.targets["encoder"](zs, action)).amin(1, keepdim=True)

    def actor_loss(self, zs):
        """-(Q1 + Q2)/2 of the actor's action, plus a penalty on the input of its tanh.  Eq. (12)"""
        action, pre_activation = self.actor(zs)
        q = self.critic(self.encoder(zs, action)).mean(1)  # (batch,)
        # Eq. (12) leaves the reduction open; the mean over action dimensions is the published MR.Q's.
        loss = self.config.pre_activation_weight * pre_activation.square().mean(1) - q
        return loss, {"actor_loss": loss.detach(), "pre_activation": pre_activation.detach().abs()}

    # ---- metrics, state ----

    @torch.no_grad()
    def compute_features(self, batch):
        """One pass of each module. Returns the features for SRank: module -> name -> (batch, ·).

        The activations are read by hooks on `networks` during this pass.
        """
        zs = self.encoder.zs(batch.obs[:, 0])
        zsa = self.encoder(zs, batch.action[:, 0])
        return {"encoder": {"zsa": zsa}, "critic": q_features(self.critic, zsa),
                "actor": {"pi": features(self.actor, zs)}}

    def per_sample_losses(self, batch):
        """Each module's own loss per sample, with its graph: module -> (batch,).

        Calls the class's plain methods: the agent's own may be compiled for another batch size, without this graph.
        """
        plain = type(self)
        zs = plain.encode(self, batch.obs[:, 0])
        short = batch._replace(obs=batch.obs[:, :self.config.q_horizon + 1])
        return {"encoder": plain.encoder_loss(self, batch, self.replay.termination_seen)[0],
                "critic": plain.critic_loss(self, short, zs)[0], "actor": plain.actor_loss(self, zs)[0]}

    def tensors(self):
        return {"reward_scale": self.reward_scale, "target_reward_scale": self.target_reward_scale,
                "encoder_indices": self.encoder_indices, "encoder_position": self.encoder_position}


def symexp(x):
    """sign(x)·(e^|x| - 1): bins that are evenly spaced in symlog space resolve small rewards finely."""
    return x.sign() * (x.abs().exp() - 1)


def two_hot(x, bins):
    """x as weights on two neighboring bins: (their indices, their weights), (...) -> (..., 2) each.  Eq. (9)

    Beyond the outermost bins, all weight is on the last one.
    """
    lower = torch.searchsorted(bins[1:-1], x.contiguous(), right=True)  # 0 ... len(bins) - 2
    index = torch.stack([lower, lower + 1], -1)
    below, above = bins[index].unbind(-1)
    weight = ((x - below) / (above - below)).clamp(0, 1)
    return index, torch.stack([1 - weight, weight], -1)


def two_hot_cross_entropy(logits, x, bins):
    """CE(logits, Two-Hot(x)), (..., bins) and (...) -> (...), without building the dense two-hot row."""
    index, weight = two_hot(x, bins)
    return -(weight * F.log_softmax(logits, -1).gather(-1, index)).sum(-1)  # Eq. (9)
