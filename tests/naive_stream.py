"""A second, plain implementation of Stream AC(λ)'s whole step."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F


class Plain:
    """Stream AC(λ) from its equations, by autograd, tensor by tensor, with statistics over the whole history."""

    def __init__(self, agent):
        self.config = agent.config
        self.critic, self.actor = copy.deepcopy(agent.critic), copy.deepcopy(agent.actor)
        self.sparse = agent.sparse
        self.masks = {name: {key: mask.clone() for key, mask in sparse.masks.items()}
                      for name, sparse in agent.sparse.items()}
        self.traces = {name: [torch.zeros_like(p) for p in net.parameters()] for name, net in self.nets().items()}
        self.dense = {name: [torch.zeros_like(p) for p in net.parameters()] for name, net in self.nets().items()}
        self.sums = {name: [torch.zeros_like(p) for p in net.parameters()] for name, net in self.nets().items()}
        self.seen, self.returns, self.u, self.number = [], [], 0.0, 0

    def nets(self):
        return {"critic": self.critic, "actor": self.actor}

    def normalize(self, obs):
        seen = np.stack(self.seen)[:, :-1]
        var = seen.var(0, ddof=1) if len(seen) > 1 else np.ones(seen.shape[1])
        out = np.array(obs, np.float64)
        out[:-1] = (out[:-1] - seen.mean(0)) / np.sqrt(var + 1e-8)
        return torch.from_numpy(out)

    def add(self, obs, action, reward, next_obs, terminated, truncated, start):
        c, self.number = self.config, self.number + 1
        over = terminated or truncated
        cut = terminated or (truncated and c.time_limit == "ends")
        if start:
            self.seen.append(np.float64(obs))
        s = self.normalize(obs)
        self.u = c.discount * self.u * (not over) + reward
        self.returns.append(self.u)
        scale = math.sqrt((np.var(self.returns, ddof=1) if len(self.returns) > 1 else 1.0) + 1e-8)
        scaled = float(np.clip(reward / scale, -c.reward_clip, c.reward_clip))
        self.seen.append(np.float64(next_obs))
        value, next_value = self.critic(s)[0], self.critic(self.normalize(next_obs))[0].detach()
        delta = (scaled + c.discount * next_value * (not cut) - value).item()
        mean, rho = self.actor(s)
        policy = torch.distributions.Normal(mean, F.softplus(rho))
        log_prob = policy.log_prob(torch.from_numpy(np.float64(action)))
        actor_loss = (-log_prob - c.entropy_weight * np.sign(delta) * policy.entropy()).sum()
        for name, loss, kappa in (("critic", -value.sum(), c.critic_kappa), ("actor", actor_loss, c.actor_kappa)):
            net = self.nets()[name]
            grads = torch.autograd.grad(loss, list(net.parameters()))
            self.step(name, net, grads, delta, kappa, over)
        return delta

    @torch.no_grad()
    def step(self, name, net, grads, delta, kappa, over):
        c, masks = self.config, self.masks[name]
        decay = c.discount * c.trace_decay
        new = {key: mask for key, mask in self.sparse[name].masks.items()}  # the agent has stepped already
        changed = any(not torch.equal(new[key], masks[key]) for key in new)
        for (key, p), z, dense, total, grad in zip(net.named_parameters(), self.traces[name], self.dense[name],
                                                   self.sums[name], grads):
            old = masks.get(key, torch.ones_like(p, dtype=torch.bool))
            mask = new.get(key, old)
            dense.mul_(decay).add_(grad)
            total.add_(dense, alpha=delta)
            z.mul_(decay).add_(grad)
            if changed:
                grown = mask & ~old
                p[~(mask & old)] = 0.0
                z[grown], dense[grown] = 0.0, 0.0
            z[~mask] = 0.0
        if changed:
            self.masks[name] = {key: mask.clone() for key, mask in new.items()}
        norm = sum(z.abs().sum().item() for z in self.traces[name])
        bound = kappa * c.step_size * max(abs(delta), 1.0) * norm
        step = c.step_size / bound if bound > 1.0 else c.step_size
        for p, z, dense in zip(net.parameters(), self.traces[name], self.dense[name]):
            p -= step * delta * z
            if over:
                z.zero_(), dense.zero_()
