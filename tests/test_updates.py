"""A second, plain implementation of every agent's whole update, and what holds for all updates."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import evaluate
from agents import AGENTS
from replay import Batch
from sparsity import REGIMES
from tests.helpers import REPLAY_AGENTS, play, regimes_dense, tiny_of
from tests.naive import MOVING, UNEQUAL, Naive, Noise, between, double


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
