"""A second, plain implementation of an agent's whole update, in float64; settings that tell its parts apart."""

import copy
import math

import numpy as np
import torch

import networks
from replay import Batch
from tests.helpers import (dense_two_hot, layer_norm, naive_activation, naive_block_mlp, naive_counts, naive_simba,
                           naive_update_mask)


class Noise:
    """Replaces torch.randn_like: numbers that depend only on the order of the calls, equal on both sides."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(torch, "randn_like", self)

    def __call__(self, like):
        self.calls += 1
        return 1.7 * torch.sin(12.9898 * torch.arange(like.numel()) + 78.233 * self.calls).to(like).view(like.shape)


def naive_adam(p, g, m, v, t, lr, decay=0.0):
    """AdamW as its paper writes it: new (p, m, v)."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - lr * decay * p - lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)) ** 0.5 + 1e-8), m, v


class Naive:
    """A second implementation of an agent: networks, losses, topology, AdamW, targets and temperature, in float64.

    It starts from the agent's weights and masks, and shares nothing with it afterwards.
    """

    def __init__(self, agent, modules, total_updates):
        self.config, self.modules, self.total = agent.config, modules, total_updates
        self.networks, self.targets = copy.deepcopy((agent.networks, agent.targets))
        self.normalizer = getattr(agent, "normalizer", None)
        for network in (*self.networks.values(), *self.targets.values()):
            network.double().requires_grad_(True)
        self.masks = {name: {n: mask.clone() for n, mask in sparse.masks.items()}
                      for name, sparse in agent.sparse.items()}
        self.seeds = {name: sparse.seed for name, sparse in agent.sparse.items()}
        self.moments = {name: {n: [torch.zeros_like(p)] * 2 for n, p in network.named_parameters()}
                        for name, network in self.networks.items()}
        self.updates, self.scale, self.target_scale, self.info = dict.fromkeys(self.networks, 0), 1.0, 1.0, {}
        self.gaussian = hasattr(self.config, "initial_temperature")
        if self.gaussian:
            self.log_alpha, self.alpha_moments = math.log(self.config.initial_temperature), (0.0, 0.0)
            self.target_entropy = self.config.target_entropy * self.networks["actor"].output.out_features

    # ---- networks: `seen` takes what leaves each activation

    def mlp(self, name, model, x, seen):
        """The model's features and its output."""
        if self.modules[name].arch_type == "simba":
            return naive_simba(model, x, seen)
        y = naive_block_mlp(model, x, networks.ARCH_CONFIGS[self.modules[name].arch_type], self.modules[name].residual,
                            seen)
        return seen[-1], y

    def zs(self, encoder, obs, seen=None):
        seen = [] if seen is None else seen
        config = networks.ARCH_CONFIGS[self.modules["encoder"].arch_type]
        x = self.mlp("encoder", encoder.zs_mlp, obs, seen)[1]
        seen.append(naive_activation(config)(layer_norm(x) if config["use_layer_norm"] else x))
        return seen[-1]

    def zsa(self, encoder, zs, action, seen=None):
        seen = [] if seen is None else seen
        act = naive_activation(networks.ARCH_CONFIGS[self.modules["encoder"].arch_type])
        seen.append(act(action @ encoder.za_linear.weight.T + encoder.za_linear.bias))
        return self.mlp("encoder", encoder.zsa_mlp, torch.cat([zs, seen[-1]], -1), seen)[1]

    def q(self, critic, x, seen=None):
        return torch.cat([self.mlp("critic", q, x, [] if seen is None else seen)[1] for q in critic.children()], -1)

    def policy(self, actor, x, noise=None, clip=math.inf):
        """An action, its log-probability (0 if it has none) and what went into tanh. noise: its std, or None."""
        features, mean = self.mlp("actor", getattr(actor, "mlp", actor), x, [])
        if not self.gaussian:
            action = mean.tanh()
            if noise is not None:
                action = (action + (noise * torch.randn_like(action)).clamp(-clip, clip)).clamp(-1, 1)
            return action, torch.zeros(len(x), dtype=x.dtype), mean
        log_std = -10 + 6 * (1 + (features @ actor.log_std.weight.T + actor.log_std.bias).tanh())
        draw = torch.randn_like(mean)
        x = mean + log_std.exp() * draw
        log_slope = 2 * (math.log(2) - torch.logaddexp(x, -x))  # log(1 - tanh²) = -2 log cosh
        return x.tanh(), (-draw ** 2 / 2 - log_std - math.log(2 * math.pi) / 2 - log_slope).sum(-1), mean

    def act(self, obs, explore):
        x = self.normalized(obs) if self.normalizer else self.zs(self.networks["encoder"], obs)
        noise = getattr(self.config, "exploration_noise", None) if explore else None
        action, _, mean = self.policy(self.networks["actor"], x, noise)
        return action if explore or not self.gaussian else mean.tanh()

    normalized = lambda self, obs: (obs - self.normalizer.mean) / (self.normalizer.var + 1e-8).sqrt()

    # ---- losses, one value per sample

    def encoder_loss(self, batch, seen):
        c, encoder = self.config, self.networks["encoder"]
        places = np.linspace(-c.reward_symlog_limit, c.reward_symlog_limit, c.reward_bins)
        bins = torch.tensor([math.copysign(math.expm1(abs(x)), x) for x in places], dtype=torch.float64)
        zs, alive = self.zs(encoder, batch.obs[:, 0]), torch.ones(len(batch.obs), dtype=torch.float64)
        parts = dict.fromkeys(("reward_loss", "dynamics_loss", "terminal_loss"), 0.0)
        for k in range(c.encoder_horizon):
            out = self.zsa(encoder, zs, batch.action[:, k]) @ encoder.model.weight.T + encoder.model.bias
            done, zs, logits = out[:, 0], out[:, 1:-c.reward_bins], out[:, -c.reward_bins:]
            two_hot = torch.stack([dense_two_hot(r, bins) for r in batch.reward[:, k]])
            parts["reward_loss"] += alive * -(two_hot * logits.log_softmax(-1)).sum(-1)
            with torch.no_grad():
                target = self.zs(self.targets["encoder"], batch.obs[:, k + 1])
            parts["dynamics_loss"] += alive * ((zs - target) ** 2).mean(-1)
            parts["terminal_loss"] += alive * seen * (done - batch.terminated[:, k]) ** 2
            alive = alive * (batch.terminated[:, k] == 0)
        loss = sum(getattr(c, f"{part}_weight") * parts[f"{part}_loss"] for part in ("reward", "dynamics", "terminal"))
        return loss, {"encoder_loss": loss} | parts

    def td_target(self, batch):
        """y: MR.Q's by Eq. (11), MR.SAC's and the one-step targets, of shape (batch,)."""
        c, steps = self.config, getattr(self.config, "q_horizon", 1)
        y, discount = torch.zeros(len(batch.obs), dtype=torch.float64), torch.ones(len(batch.obs), dtype=torch.float64)
        for k in range(steps):
            y, discount = y + discount * batch.reward[:, k], discount * c.discount * (batch.terminated[:, k] == 0)
        if self.normalizer:
            x = batch.obs[:, 1]
            action, log_prob, _ = self.policy(self.networks["actor"], x, getattr(c, "exploration_noise", None))
            x = torch.cat([x, action], -1)
        else:
            actor = self.networks["actor"] if getattr(c, "target_policy",
                                                      "target") == "online" else self.targets["actor"]
            zs = self.zs(self.targets["encoder"], batch.obs[:, steps])
            action, log_prob, _ = self.policy(actor, zs, getattr(c, "target_noise", None),
                                              getattr(c, "target_noise_clip", math.inf))
            x = self.zsa(self.targets["encoder"], zs, action)
        value = self.reduced(self.q(self.targets["critic"], x), getattr(c, "target_q_reduce", "min"))
        value = value - math.exp(self.log_alpha) * log_prob if self.gaussian else value
        return (y + discount * self.target_scale * value) / self.scale

    reduced = lambda self, q, how: q.min(1).values if how == "min" else q.mean(1)

    def critic_loss(self, batch):
        with torch.no_grad():
            y = self.td_target(batch)[:, None]
            x = torch.cat([batch.obs[:, 0], batch.action[:, 0]], -1) if self.normalizer else self.zsa(
                self.networks["encoder"], self.zs(self.networks["encoder"], batch.obs[:, 0]), batch.action[:, 0])
        q = self.q(self.networks["critic"], x)
        error = (q - y).abs()
        loss = (error ** 2).sum(1) if self.normalizer else torch.where(error < 1, error ** 2 / 2, error - 0.5).mean(1)
        info = {} if self.normalizer else {"td_error": error.max(1).values}
        return loss, info | {"critic_loss": loss, "q": q, "td_target": y}

    def actor_loss(self, obs):
        c, actor = self.config, self.networks["actor"]
        if self.normalizer:
            action, log_prob, pre = self.policy(actor, obs, getattr(c, "exploration_noise", None))
            x = torch.cat([obs, action], -1)
        else:
            zs = self.zs(self.networks["encoder"], obs).detach()
            action, log_prob, pre = self.policy(actor, zs)
            x = self.zsa(self.networks["encoder"], zs, action)
        loss = -self.reduced(self.q(self.networks["critic"], x), getattr(c, "actor_q_reduce", "mean"))
        info = {"action_size": action.abs()} if self.gaussian or self.normalizer else {}
        if self.gaussian:
            loss, info["entropy"] = loss + math.exp(self.log_alpha) * log_prob, -log_prob
        elif not self.normalizer:
            loss, info["pre_activation"] = loss + c.pre_activation_weight * (pre ** 2).mean(1), pre.abs()
        return loss, {"actor_loss": loss} | info

    # ---- updates

    def step(self, name, loss, info, clip=math.inf):
        parameters = dict(self.networks[name].named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss.mean(), list(parameters.values()))))
        self.updates[name] += 1
        self.move(name, parameters, gradients, self.updates[name])
        for n, mask in self.masks[name].items():
            gradients[n] = gradients[n] * mask
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
        for n, p in parameters.items():
            p.data, *self.moments[name][n] = naive_adam(p.data, gradients[n] * min(1.0, clip / (norm + 1e-6)),
                                                        *self.moments[name][n], self.updates[name],
                                                        getattr(self.config, f"{name}_lr"), self.config.weight_decay)
        self.info |= {key: value.mean().item() for key, value in info.items()} | {f"{name}/grad_norm": norm}

    def move(self, name, parameters, gradients, t):
        """Algorithm 1 with Eqs. (1) and (2), where the regime moves and a boundary, or the schedule's end, has come."""
        regime, sparsity, o = self.modules[name].regime, self.modules[name].sparsity, self.modules[name].sparse_options
        first, last = round(o["schedule_start"] * self.total), round(o["schedule_end"] * self.total)
        moving = regime in ("s2d", "d2s")
        if regime in ("dense", "sst") or not (t % o["update_interval"] == 0 or moving and t == last):
            return
        share = min(max((t - first) / (last - first), 0.0), 1.0)
        left = (1 - share) ** o["schedule_power"]
        wanted = {"dst": sparsity, "s2d": sparsity * left, "d2s": sparsity * (1 - left)}[regime]
        start, end = o["drop_fraction_start"], o["drop_fraction_end"]
        zeta = end + (start - end) / 2 * (1 + math.cos(math.pi * min(t, self.total) / self.total))
        masks, moving = self.masks[name], 0
        for (n, mask), count in zip(masks.items(), naive_counts([tuple(parameters[n].shape) for n in masks], wanted)):
            if mask.all() and count == mask.numel():
                continue
            # Gradients of 0 rank at random.
            generator = torch.Generator().manual_seed(hash((self.seeds[name], t, moving)))
            order, moving = torch.rand(mask.shape, dtype=torch.float64, generator=generator), moving + 1
            masks[n] = naive_update_mask(parameters[n].detach(), gradients[n], mask, zeta, count, order)
            stays = mask & masks[n]
            parameters[n].data = parameters[n].data * stays
            self.moments[name][n] = [moment * stays for moment in self.moments[name][n]]

    def temper(self, entropy):
        gradient = math.exp(self.log_alpha) * (entropy - self.target_entropy)
        self.log_alpha, *self.alpha_moments = naive_adam(self.log_alpha, gradient, *self.alpha_moments,
                                                         self.updates["actor"], self.config.temperature_lr)
        self.info["temperature"] = math.exp(self.log_alpha)

    def update(self, batches, rewards, seen):
        """One agent update. batches: drawn for it, in order. Returns |δ| of each sample of the last batch, or None."""
        batches = iter(batches)
        if self.normalizer:
            batch = next(batches)
            batch = batch._replace(obs=self.normalized(batch.obs))
            self.step("actor", *self.actor_loss(batch.obs[:, 0]))
            if self.gaussian:
                self.temper(self.info["entropy"])
            self.step("critic", *self.critic_loss(batch))
            for (n, target), source in zip(self.targets["critic"].named_parameters(),
                                           self.networks["critic"].parameters()):
                target.data = (1 - self.config.tau) * target.data + self.config.tau * source.data
                target.data = target.data * self.masks["critic"].get(n, 1)
            return None
        if self.updates["critic"] % self.config.target_update_freq == 0:
            self.targets = copy.deepcopy(self.networks)
            self.target_scale, self.scale = self.scale, float(np.mean(np.abs(rewards)))
            self.info["reward_scale"] = self.scale
            for _ in range(self.config.target_update_freq):
                self.step("encoder", *self.encoder_loss(next(batches), seen))
        batch = next(batches)
        loss, info = self.critic_loss(batch)
        self.step("critic", loss, info, self.config.critic_grad_clip)
        self.step("actor", *self.actor_loss(batch.obs[:, 0]))
        if self.gaussian:
            self.temper(self.info["entropy"])
        return info["td_error"]


def double(batch):
    return Batch(batch.index, *(part.double() for part in batch[1:]))


def between(batch):
    """A batch of o_t and o_{t+H}, with NaN as the observations between them."""
    obs = batch.obs.new_full((len(batch.obs), batch.reward.shape[1] + 1, *batch.obs.shape[2:]), math.nan)
    obs[:, 0], obs[:, -1] = batch.obs[:, 0], batch.obs[:, 1]
    return batch._replace(obs=obs)


UNEQUAL = {  # no two alike that could be mistaken for one another
    "batch_size": 12, "discount": 0.9, "target_update_freq": 4, "dynamics_weight": 0.7, "reward_weight": 0.3,
    "terminal_weight": 0.5, "encoder_lr": 1e-3, "critic_lr": 2e-3, "actor_lr": 3e-3, "weight_decay": 0.05,
    "critic_grad_clip": 0.3, "reward_bins": 31, "reward_symlog_limit": 3.0, "exploration_noise": 0.15,
    "target_noise": 0.35, "target_noise_clip": 0.25, "pre_activation_weight": 0.2, "tau": 0.1,
    "initial_temperature": 0.3, "temperature_lr": 4e-3, "target_entropy": -0.8}
MOVING = {"update_interval": 3, "drop_fraction_start": 0.4, "drop_fraction_end": 0.15, "schedule_start": 0.1,
          "schedule_end": 0.75, "schedule_power": 3.0}
