"""A second, plain implementation of every agent's whole update, and what holds for all updates."""

import copy
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import networks
from agents import AGENTS
from replay import Batch
import evaluate
from sparsity import REGIMES
from tests.helpers import (REPLAY_AGENTS, dense_two_hot, layer_norm, naive_activation, naive_block_mlp, naive_counts,
                           naive_simba, naive_update_mask, play, regimes_dense, tiny_of)


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


def unequal_agent(algo, regimes, **settings):
    """An agent with unequal settings, moved away from its targets, its modules, T, and a buffer."""
    agent_class = AGENTS[algo]
    presets = agent_class.Config.presets["mst"]
    modules = {name: dataclasses.replace(m, regime=regime, width_scale=width / (16 if m.arch_type == "simba" else 64),
                                         depth_scale=depth, residual="post" if name == "critic" else "pre",
                                         sparsity=sparsity, sparse_options=MOVING)
               for (name, m), regime, width, depth, sparsity in zip(
                   presets.items(), regimes, (1, 1.5, 2), (1, 2, 1), (0.5, 0.6, 0.7))}
    fields = {spec.name for spec in dataclasses.fields(agent_class.Config)}
    config = agent_class.Config(**{name: value for name, value in UNEQUAL.items() if name in fields} | settings)
    torch.manual_seed(3)
    agent = agent_class(4, 2, modules, config, 14, seed=3)
    for network in agent.networks.values():  # biases and LayerNorms that matter
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter) * (parameter != 0 if parameter.ndim > 1 else 1)
    buffer, episodes = play(3, 400, agent.config.horizon, 300, obs_dim=4, action_dim=2,
                            prioritized=agent.config.prioritized)
    agent.replay = buffer
    for obs in buffer.obs[:50].numpy():
        agent.update_obs_stats(2 * obs + 1)
    return agent, modules, buffer, episodes


WHOLE_UPDATES = [  # algorithm, regimes, settings
    ("mrq", ("s2d", "dst", "d2s"), {"encoder_horizon": 2, "q_horizon": 3}),
    ("sac", ("d2s", "dst"), {"twin_critics": True, "actor_q_reduce": "mean"}),
    ("sac", ("dst", "s2d"), {"twin_critics": True, "target_q_reduce": "mean"}), ("ddpg", ("dst", "d2s"), {}),
    ("mrsac", ("dst", "s2d", "d2s"), {"encoder_horizon": 3, "q_horizon": 2, "target_policy": "online",
                                      "target_q_reduce": "mean"}),
    ("mrsac", ("d2s", "dst", "s2d"), {"encoder_horizon": 3, "q_horizon": 2, "actor_q_reduce": "mean"})]


@pytest.mark.parametrize("algo, regimes, settings", WHOLE_UPDATES, ids=[algo for algo, *_ in WHOLE_UPDATES])
def test_whole_update_against_a_second_implementation(algo, regimes, settings, monkeypatch):
    """Weights, targets, masks, temperature, priorities and everything logged, over fourteen updates."""
    agent, modules, buffer, episodes = unequal_agent(algo, regimes, **settings)
    stored = [step[3] for episode in episodes for step in episode]
    for network in (*agent.networks.values(), *agent.targets.values()):
        network.double()
    if hasattr(agent, "bins"):
        agent.bins = agent.bins.double()
    naive, noise, drawn = Naive(agent, modules, 14), Noise(monkeypatch), []
    gather, update_priority, horizons = buffer.gather, buffer.update_priority, []

    def double_gather(index, horizon=None, ends=False):
        batch = double(gather(index, horizon, ends))
        assert len(batch.index) == 12
        horizons.append(batch.reward.shape[1])
        drawn.append(between(batch) if ends else batch)
        return batch

    buffer.gather, buffer.update_priority = double_gather, lambda index, error: update_priority(index, error.float())
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7, check_dtype=False)
    for step in range(14):
        buffer.add(np.ones(4), np.ones(2), 3.0 * step, np.ones(4), False, True)  # the reward scale moves
        stored.append(3.0 * step)
        drawn.clear()
        noise.calls, before = 0, buffer.priority.clone()
        agent.update()
        noise.calls = 0
        error = naive.update(drawn, stored, float(any(step[5] for episode in episodes for step in episode)))
        info = {key: value.mean().item() for key, value in agent.info.items()}
        assert info == pytest.approx(naive.info, rel=1e-5, abs=1e-7)
        assert agent.updates == naive.updates
        if error is not None:  # LAP: at least 1, to the power 0.4; of a row drawn twice the larger one
            for row, delta in sorted(zip(drawn[-1].index.tolist(), error.tolist()), key=lambda pair: pair[1]):
                before[row] = max(delta, 1.0) ** 0.4
            close(buffer.priority, before)
        for name, network in naive.networks.items():
            close(list(agent.networks[name].parameters()), list(network.parameters()))
            assert all(torch.equal(mask, naive.masks[name][n]) for n, mask in agent.sparse[name].masks.items())
        for name, network in naive.targets.items():
            close(list(agent.targets[name].parameters()), list(network.parameters()))
    for name, sparse in agent.sparse.items():  # topologies moved
        assert modules[name].regime == "s2d" or any((sparse.first_masks[n] != m).any() for n, m in sparse.masks.items())
    own = getattr(agent.config, "encoder_horizon", 1), getattr(agent.config, "q_horizon", 1)
    assert set(horizons) == set(own) and agent.config.horizon == max(own)
    # Acting, in float32 as always.
    for network in agent.networks.values():
        network.float()
    obs = torch.randn(5, 4)
    for explore, rows in itertools.product((True, False), (slice(5), 0)):  # a batch, or one observation
        noise.calls = 0
        action = agent.act(obs[rows].numpy(), explore)
        noise.calls = 0
        expected = naive.act(obs[rows].view(-1, 4).double(), explore).detach().view(action.shape)
        np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algo, regimes, settings", [WHOLE_UPDATES[0], WHOLE_UPDATES[1], WHOLE_UPDATES[3],
                                                     WHOLE_UPDATES[5]], ids=REPLAY_AGENTS)
def test_metrics_against_a_second_implementation(algo, regimes, settings, monkeypatch):
    """Its activations, its losses, and the gradients of one sample after the other."""
    agent, modules, buffer, _ = unequal_agent(algo, regimes, **settings)
    for _ in range(6):
        agent.update()
    naive, noise, drawn, sample = Naive(agent, modules, 14), Noise(monkeypatch), [], buffer.sample
    if hasattr(agent, "reward_scale"):
        naive.scale, naive.target_scale = agent.reward_scale.item(), agent.target_reward_scale.item()
    if naive.gaussian:
        naive.log_alpha = math.log(agent.info["temperature"].item())
    buffer.sample = lambda *arguments: drawn.append((arguments, sample(*arguments))) or drawn[-1][1]
    row = evaluate.measure(agent)
    ((arguments, batch),) = drawn
    assert arguments == (2048,)
    batch = Batch(batch.index, *(part.double() for part in batch[1:]))
    batch = batch._replace(obs=naive.normalized(batch.obs)) if naive.normalizer else batch
    few = Batch(*(part[:32] for part in batch))
    seen, features, losses, expected = {name: [] for name in naive.networks}, {}, {}, {}
    with torch.no_grad():
        x = batch.obs[:, 0]
        z = torch.cat([x, batch.action[:, 0]], -1)
        if not naive.normalizer:
            x = naive.zs(naive.networks["encoder"], batch.obs[:, 0], seen["encoder"])
            features["encoder"] = {"zsa": (z := naive.zsa(naive.networks["encoder"], x, batch.action[:, 0],
                                                          seen["encoder"]))}
        features["critic"] = {name: naive.mlp("critic", q, z, seen["critic"])[0] for name,
                              q in naive.networks["critic"].named_children()}
        features["actor"] = {"pi": naive.mlp("actor", getattr(naive.networks["actor"], "mlp", naive.networks["actor"]),
                                             x, seen["actor"])[0]}
    noise.calls = 0
    if "encoder" in naive.networks:
        losses["encoder"] = naive.encoder_loss(few, float(buffer.terminated.any()))[0]
    losses["critic"], losses["actor"] = naive.critic_loss(few)[0], naive.actor_loss(few.obs[:, 0])[0]
    for name, network in naive.networks.items():
        columns, parameters = {}, dict(network.named_parameters())
        for key, values in features[name].items():
            singular = np.linalg.svd(values.numpy(), compute_uv=False)
            columns[f"srank_{key}"] = 1 + sum(singular[:k].sum() < 0.99 * singular.sum()
                                              for k in range(1, len(singular)))
            columns[f"srank_{key}_max"] = min(2048, values.shape[1])
        dormant = [[score <= 0.025 * np.mean(scores) for score in scores]
                   for scores in (v.abs().mean(0).numpy() for v in seen[name])]
        columns["dormant_ratio"] = np.mean(np.concatenate(dormant))
        gradients = [torch.cat([(g * naive.masks[name].get(n, 1)).flatten() for n, g in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))])
                     for loss in losses[name]]
        cosines = [(a @ b / (a.norm() * b.norm())).item() for i, a in enumerate(gradients) for j,
                   b in enumerate(gradients) if i != j]
        cosines = [cosine for cosine in cosines if cosine == cosine]  # a gradient of zeros has no direction
        columns["grad_cosine"], columns["grad_cosine_negative"] = np.mean(cosines), np.mean(np.array(cosines) < 0)
        columns["parameter_norm"] = math.sqrt(sum((p ** 2).sum().item() for p in parameters.values()))
        columns["grad_norm"] = (sum(gradients) / 32).norm().item()
        columns["density"] = torch.cat([m.flatten() for m in naive.masks[name].values()]).double().mean().item()
        layers = [column for column in row if column.startswith(f"{name}/dormant_ratio/")]
        assert [row.pop(layer) for layer in layers] == pytest.approx([np.mean(layer) for layer in dormant])
        expected |= {f"{name}/{key}": value for key, value in columns.items()}
    assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
@pytest.mark.parametrize("shift", range(5))
def test_every_regime_on_every_module(algo, shift):
    """Exact counts at the end of training; pruned weights are 0, in targets too; everything logged is finite."""
    names = list(AGENTS[algo].Config.presets["default"])
    regimes = [REGIMES[(shift + 2 * number) % 5] for number in range(len(names))]
    agent, _ = tiny_of(algo, regimes_dense(algo, *regimes))
    for _ in range(40):
        agent.update()
    if hasattr(agent, "refresh_targets"):
        agent.refresh_targets()
    for name, regime in zip(names, regimes):
        sparse, weights = agent.sparse[name], dict(agent.networks[name].named_parameters())
        size = sum(w.numel() for w in weights.values() if w.ndim >= 2)
        kept = size * (1 if regime in ("dense", "s2d") else 0.4 if "encoder" in names else 0.2)
        assert abs(sparse.density() * size - kept) <= 0.5 + 1e-6, (name, regime)
        for network in (agent.networks[name], *([agent.targets[name]] if name in agent.targets else [])):
            parameters = dict(network.named_parameters())
            assert not any(parameters[weight][~mask].any() for weight, mask in sparse.masks.items())
        assert all(mask.sum() == sparse.active[weight] for weight, mask in sparse.masks.items())
    assert all(value.isfinite().all() for value in agent.info.values())


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_losses_give_gradients_only_to_their_own_module(algo):
    """Between two optimizer steps, gradients arrive at the weights of the module that steps next, and at no other's."""
    agent, buffer = tiny_of(algo)
    arrived, seen = set(), []
    for kind, parts in (("", agent.networks), ("target ", agent.targets)):
        for name, network in parts.items():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda _, name=kind + name: arrived.add(name))
    for name in agent.networks:
        def step(*arguments, name=name, original=agent.optimizers[name].step):
            seen.append((name, set(arrived)))
            arrived.clear()
            return original(*arguments)
        agent.optimizers[name].step = step
    for _ in range(2):
        agent.update()
    assert len(seen) >= 4 and all(gradients == {name} for name, gradients in seen)


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_tensors_change_in_place(algo):
    """Every tensor of agent, replay, optimizers, masks and targets keeps its address, as a captured graph needs."""
    agent, buffer = tiny_of(algo)
    for _ in range(2):
        agent.update()

    def tensors(owner, path, depth=7):
        if torch.is_tensor(owner):
            yield path, owner
        elif isinstance(owner, nn.Module):
            yield from ((f"{path}.{name}", value) for name, value in owner.state_dict(keep_vars=True).items())
        elif depth and path.split(".")[-1] not in ("info", "module", "generator"):
            parts = owner if isinstance(owner, dict) else vars(owner) if hasattr(owner, "__dict__") else {}
            for key, value in parts.items():
                yield from tensors(value, f"{path}.{key if isinstance(key, str) else id(key)}", depth - 1)

    before = {path: (tensor, tensor.data_ptr(), tensor.detach().clone()) for path,
              tensor in (*tensors(agent, "agent"), *tensors(buffer, "buffer"))}
    watched = " ".join(before)
    assert all(name in watched for name in ("max_priority", "termination_seen", "nonfinite", "masks", "exp_avg",
                                            "projection.weight"))
    assert ("reward_scale" in watched and "target_reward_scale" in watched) == ("encoder" in agent.networks)
    for step in range(12):  # bursts, topology changes and new targets among them
        agent.update_obs_stats(np.full(4, step, np.float32))
        buffer.add(np.ones(4), np.ones(2), 5.0, np.ones(4), step == 5, step == 11)
        agent.update()
    after = dict([*tensors(agent, "agent"), *tensors(buffer, "buffer")])
    for path, (tensor, address, value) in before.items():
        assert after[path] is tensor and tensor.data_ptr() == address, f"{path} was replaced"
    changed = {path for path, (tensor, _, value) in before.items() if not torch.equal(tensor.detach(), value)}
    assert len(changed) > len(before) / 2
