"""MR.Q with module-specific training: encoder, critic and actor, each with its own architecture, size and regime.

What it claims: the losses of Eqs. (7)-(12) and the settings of Tables 1 and 2 (in settings.py), updated in the paper's
order; no module's loss computes a gradient for another module's weights; and one update reads nothing back from the device.

Paper: Section 2.3 and Appendix B.3; MR.Q is Fujimoto et al., 2025. Run it by `python train.py`; or, as a part:

    agent = MRQ(obs_dim=24, action_dim=6, modules=MR_MST, config=MRQConfig(), total_updates=490_000)
    replay = ReplayBuffer(24, 6, horizon=agent.horizon)
    action = agent.act(obs, explore=True)       # numpy in, numpy out
    agent.update(replay)                        # one agent step's worth of learning
    agent.info["critic_loss"].mean()            # what the last update saw, on the device
"""

import torch
import torch.nn.functional as F

from base import BaseAgent, frozen
from networks import Actor, Critic, Encoder
from replay import multi_step_return, alive_discount, to_device
from settings import MR_DEFAULT, MRQConfig


class MRQ(BaseAgent):
    """The agent. modules: a ModuleConfig for "encoder", "critic" and "actor".

    total_updates: T of the sparsity schedules. Each module gets as many updates as the agent takes learning steps.
    """

    Config = MRQConfig
    prioritized = True
    compiled_methods, autocast_methods = ("encoder_loss", "critic_loss", "actor_loss"), ("encode",)
    graph_methods = {"update_encoder": ["encoder"], "update_critic_and_actor": ["critic", "actor"]}
    on_encoder_update = staticmethod(lambda doing: None)  # called in a burst: a safe point, where the training loop may stop

    def __init__(self, obs_dim, action_dim, modules=None, config=None, total_updates=490_000, device="cpu", seed=0):
        modules = modules or MR_DEFAULT
        self.config = config = config or self.Config()
        self.horizon = config.horizon
        self.encoder = Encoder(obs_dim, action_dim, num_bins=config.reward_bins, **modules["encoder"].size())
        self.critic = Critic(self.encoder.zsa_dim, **modules["critic"].size())
        self.actor = self.make_actor(self.encoder.zs_dim, action_dim, modules["actor"].size())
        super().__init__(
            {"encoder": self.encoder, "critic": self.critic, "actor": self.actor}, modules,
            {"encoder": config.encoder_lr, "critic": config.critic_lr, "actor": config.actor_lr}, config.weight_decay,
            ("encoder", "critic", "actor"), total_updates, device, seed)
        # Scales as device scalars: a Python number would freeze in a captured graph.
        self.reward_scale = torch.ones((), device=self.device)  # r̄
        self.target_reward_scale = torch.ones((), device=self.device)  # r̄', the scale before
        # Which subtrajectories a burst draws, and how far it has come: decided at its start, when priorities stand still.
        self.encoder_indices = torch.zeros(config.target_update_freq, config.batch_size, dtype=torch.long, device=self.device)
        self.encoder_position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.bins = symexp(torch.linspace(-config.reward_range, config.reward_range, config.reward_bins,
                                          device=self.device))

    def make_actor(self, zs_dim, action_dim, size):
        return Actor(zs_dim, action_dim, **size)

    # ---- acting ----

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] of the same leading shape."""
        obs = to_device(obs, self.device)
        action, _ = self.actor(self.encoder.zs(obs))
        if explore:
            action = (action + torch.randn_like(action) * self.config.exploration_noise).clamp(-1, 1)
        return action.cpu().numpy()

    # ---- learning ----

    def update(self, replay):
        """One agent step of learning. Every 250 of them: new targets, new scales, and a burst of encoder updates.

        The counts of updates say how far a burst has come: an agent saved in the midst of one goes on from there.
        """
        if self.updates["critic"] % self.config.target_update_freq == 0:
            if self.updates["encoder"] == self.updates["critic"]:
                self.refresh_targets(replay)
            while self.updates["encoder"] < self.updates["critic"] + self.config.target_update_freq:
                self.update_encoder(replay)
                done = self.updates["encoder"] - self.updates["critic"]
                self.on_encoder_update(f"encoder update {done} of {self.config.target_update_freq}")
        self.update_critic_and_actor(replay)

    @torch.no_grad()
    def refresh_targets(self, replay):
        """Hard copies; r̄' becomes the r̄ that the copied critic was trained with; and the burst's draws."""
        for name, network in self.networks.items():
            torch._foreach_copy_(list(self.targets[name].parameters()), list(network.parameters()))
        self.target_reward_scale.copy_(self.reward_scale)
        # The paper says "recent experiences in the replay buffer"; all of the buffer is the published MR.Q's reading.
        # 1 until a reward other than 0 has been stored. The published MR.Q divides by 1e-8 instead: its first targets are
        # then 1e8 times a Q, and the largest priority, which never falls, is of the same kind.
        scale = replay.mean_absolute_reward()
        self.reward_scale.copy_(torch.where(scale > 0, scale, 1.0))
        self.info["reward_scale"] = self.reward_scale
        self.encoder_indices.copy_(replay.draw(*self.encoder_indices.shape))
        self.encoder_position.zero_()

    def update_encoder(self, replay):
        index = self.encoder_indices.index_select(0, self.encoder_position).squeeze(0)  # (batch,)
        self.encoder_position.add_(1).remainder_(len(self.encoder_indices))
        batch = replay.gather(index, self.config.encoder_horizon)
        losses, info = self.encoder_loss(batch, replay.termination_seen)
        self._step("encoder", losses.mean())
        self.info.update(info)

    def update_critic_and_actor(self, replay):
        batch = replay.sample(self.config.batch_size, self.config.q_horizon)
        zs = self.encode(batch.obs[:, 0])
        losses, td_error, info = self.critic_loss(batch, zs)
        self._step("critic", losses.mean(), clip=self.config.critic_grad_clip)
        replay.update_priority(batch.index, td_error)
        self.info.update(info)
        self.update_actor(zs)

    def update_actor(self, zs):
        with frozen(self.encoder, self.critic):  # the loss flows through them, and ends at the actor's weights
            losses, info = self.actor_loss(zs)
        self._step("actor", losses.mean())
        self.info.update(info)

    def learning_step(self, name, update):
        if name == "encoder":  # a burst belongs to the step that begins a period
            return (update - 1) // self.config.target_update_freq * self.config.target_update_freq
        return super().learning_step(name, update)

    # ---- losses, one value a sample: (batch,) ----

    @torch.no_grad()
    def encode(self, obs):
        """z_s for critic and actor, which give the encoder no gradient."""
        return self.encoder.zs(obs)

    def encoder_loss(self, batch, termination_seen):
        """Unrolls z_s through the real actions, and predicts reward, next z_s and done at each step.  Eqs. (7)-(10)

        batch: of at least H_Enc steps. termination_seen: 1.0 or 0.0, a device scalar; the done loss counts only once there is
        something to tell apart.
        """
        config, horizon = self.config, self.config.encoder_horizon
        action, reward, terminated = (part[:, :horizon] for part in (batch.action, batch.reward, batch.terminated))
        with torch.no_grad():
            # The target is the target encoder's z_s of the real next observation.
            next_obs = batch.obs[:, 1:horizon + 1].flatten(0, 1)  # one large product; (batch, H, ·) would make H small ones
            target_zs = self.targets["encoder"].zs(next_obs).unflatten(0, (len(batch.obs), -1))  # (batch, H, zs)
        zs = self.encoder.zs(batch.obs[:, 0])  # (batch, zs)
        done, zs, reward_logits = self.encoder.unroll(zs, action)  # Eq. (7): (batch, H, ·) each
        alive = alive_discount(terminated)[:, :-1]  # (batch, H) 0 after a termination; the terminating step itself counts
        reward_loss = (alive * two_hot_cross_entropy(reward_logits, reward, self.bins)).sum(1)  # Eqs. (8), (9)
        dynamics_loss = (alive * F.mse_loss(zs, target_zs, reduction="none").mean(-1)).sum(1)  # Eqs. (8), (10)
        terminal_loss = (alive * F.mse_loss(done.squeeze(-1), terminated, reduction="none")).sum(1)  # Eqs. (8), (10)
        terminal_loss = termination_seen * terminal_loss
        loss = (config.reward_weight * reward_loss + config.dynamics_weight * dynamics_loss
                + config.terminal_weight * terminal_loss)  # (batch,)
        info = {"encoder_loss": loss, "reward_loss": reward_loss, "dynamics_loss": dynamics_loss, "terminal_loss": terminal_loss}
        return loss, {name: value.detach() for name, value in info.items()}

    def critic_loss(self, batch, zs):
        """Huber to the multi-step TD target, for both Q.  Eq. (11)

        zs: (batch, zs) of the first observation. Also returns |δ|, the larger of the two critics': (batch,).
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
        """[Σ γ^k r_k + γ^H · not done · r̄' · V'(s_H)] / r̄: (batch, 1).  Eq. (11)"""
        config = self.config
        returns, bootstrap = multi_step_return(batch.reward[:, :config.q_horizon], batch.terminated[:, :config.q_horizon],
                                               config.discount)  # bootstrap: γ^H · not done
        value = self.target_value(self.targets["encoder"].zs(batch.obs[:, config.q_horizon]))
        return (returns + bootstrap * self.target_reward_scale * value) / self.reward_scale

    def target_value(self, zs):
        """V' = min Q'(s, π'(s) + noise) of the target networks, in units of r̄': (batch, zs) -> (batch, 1).  Eq. (11)"""
        config = self.config
        action, _ = self.targets["actor"](zs)
        noise = (torch.randn_like(action) * config.target_noise).clamp(-config.target_noise_clip, config.target_noise_clip)
        action = (action + noise).clamp(-1, 1)
        return self.targets["critic"](self.targets["encoder"](zs, action)).amin(1, keepdim=True)

    def actor_loss(self, zs):
        """-(Q1 + Q2)/2 of the actor's own action, and a pull on what enters tanh.  Eq. (12)"""
        action, pre_activation = self.actor(zs)
        q = self.critic(self.encoder(zs, action)).mean(1)  # (batch,)
        # The mean over action dimensions, where Eq. (12) leaves the reduction open, is the published MR.Q's.
        loss = self.config.pre_activation_weight * pre_activation.square().mean(1) - q
        return loss, {"actor_loss": loss.detach(), "pre_activation": pre_activation.detach().abs()}

    # ---- looking inside, saving ----

    @torch.no_grad()
    def compute_features(self, batch):
        """One pass of each module over the batch. Returns the features SRank is read from: module -> name -> (batch, ·).

        Whoever wants the hidden activations hooks `networks` while this runs.
        """
        zs = self.encoder.zs(batch.obs[:, 0])
        zsa = self.encoder(zs, batch.action[:, 0])
        critic = {name: q.features(zsa) for name, q in self.critic.named_children()}
        return {"encoder": {"zsa": zsa}, "critic": critic, "actor": {"pi": self.actor.features(zs)}}

    def per_sample_losses(self, batch, replay):
        """Each module's own loss, one value a sample, with its graph: module -> (batch,).

        By the plain methods of the class: what trains may be compiled, for another batch size and without this graph.
        """
        plain = type(self)
        zs = plain.encode(self, batch.obs[:, 0])
        return {"encoder": plain.encoder_loss(self, batch, replay.termination_seen)[0],
                "critic": plain.critic_loss(self, batch, zs)[0], "actor": plain.actor_loss(self, zs)[0]}

    def tensors(self):
        return {"reward_scale": self.reward_scale, "target_reward_scale": self.target_reward_scale,
                "encoder_indices": self.encoder_indices, "encoder_position": self.encoder_position}


def symexp(x):
    """sign(x)·(e^|x| - 1): bins evenly spaced in symlog space, so that small rewards are told apart finely."""
    return x.sign() * (x.abs().exp() - 1)


def two_hot(x, bins):
    """x as weights on two neighbouring bins: (their indices, their weights), (...) -> (..., 2) each.  Eq. (9)

    Beyond the last bins all weight lies on the last.
    """
    lower = torch.searchsorted(bins[1:-1], x.contiguous(), right=True)  # 0 ... len(bins) - 2
    index = torch.stack([lower, lower + 1], -1)
    below, above = bins[index].unbind(-1)
    weight = ((x - below) / (above - below)).clamp(0, 1)
    return index, torch.stack([1 - weight, weight], -1)


def two_hot_cross_entropy(logits, x, bins):
    """CE(logits, Two-Hot(x)), (..., bins) and (...) -> (...). Two entries are gathered; no row is spelt out."""
    index, weight = two_hot(x, bins)
    return -(weight * F.log_softmax(logits, -1).gather(-1, index)).sum(-1)  # Eq. (9)
