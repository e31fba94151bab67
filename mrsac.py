"""MR.SAC: MR.Q's encoder with SAC's actor and critic.

Guarantees: MR.Q's encoder, buffer, horizons, reward scales, LAP and targets, unchanged; SAC's policy and temperature.

Paper: Figure 26 and Appendix E, which gives no details. These are therefore choices of this code: the log-std lies in
[-10, 2] as in SAC; mean and log-std have separate heads; the penalty on pre-activations of Eq. (12) is omitted, since
the entropy term already keeps tanh from saturating; α is in units of the reward scale, and is updated after the actor,
with the entropy of the actor's own update. Run it with `python train.py --algo mrsac`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from mrq import MRConfig, MRQ
from networks import GaussianActor
from replay import to_device
from sac import Temperature, reduce_q, tanh_gaussian, tanh_mean


@dataclass(frozen=True)
class MRSACConfig(MRConfig):
    """MR.Q's settings without its policy, and SAC's temperature, in units of the reward scale."""
    initial_temperature: float = 0.01  # α at the start
    temperature_lr: float = 3e-4  # Adam learning rate of log α
    target_entropy: float = -0.5  # target entropy per action dimension
    target_policy: Literal["target", "online"] = "target"  # which actor chooses the action of the TD target
    target_q_reduce: Literal["min", "mean"] = "min"  # how the TD target combines the two Q values
    actor_q_reduce: Literal["min", "mean"] = "min"  # how the actor loss combines the two Q values


class MRSAC(MRQ):
    """MR.Q's Q values are in units of r̄, so α weighs entropy in those units too."""

    Config = MRSACConfig

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        self.temperature = Temperature(self.config, action_dim, self.device)
        self.optimizers["temperature"] = self.temperature.optimizer
        self.temperature.optimizer.found_inf = self.nonfinite["actor"]  # it follows the actor's entropy

    def make_actor(self, zs_dim, action_dim, module):
        return GaussianActor(zs_dim, action_dim, **module.size())

    def actor_calls(self, zs):
        yield "actor", "actor(zs)", self.actor(zs), (2, 2 * self.action_dim)

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] with the same leading shape."""
        output = self.actor(self.encoder.zs(to_device(obs, self.device)))
        return (tanh_gaussian(output)[0] if explore else tanh_mean(output)).cpu().numpy()

    def target_value(self, zs):
        """V' = Q'(s, a') - α·log π(a'|s), a' from the target policy on the target features: (batch, 1)"""
        actor = self.targets["actor"] if self.config.target_policy == "target" else self.actor
        action, log_prob = tanh_gaussian(actor(zs))
        q = reduce_q(self.targets["critic"](self.targets["encoder"](zs, action)), self.config.target_q_reduce)
        return (q - self.temperature.value() * log_prob).unsqueeze(1)

    def actor_loss(self, zs):
        """α·log π(a|s) - Q(s, a), a from the policy."""
        action, log_prob = tanh_gaussian(self.actor(zs))
        q = reduce_q(self.critic(self.encoder(zs, action)), self.config.actor_q_reduce)  # (batch,)
        loss = self.temperature.value() * log_prob - q
        info = {"actor_loss": loss, "action_size": action.abs(), "entropy": -log_prob.mean()}
        return loss, {name: value.detach() for name, value in info.items()}

    def update_actor(self, zs):
        super().update_actor(zs)
        self.temperature.update(self.info["entropy"])
        self.info["temperature"] = self.temperature.value()

    def float32_layers(self):
        actors = (self.actor, self.targets["actor"])
        return super().float32_layers() + [head for actor in actors for head in (actor.output, actor.log_std)]

    def tensors(self):
        return super().tensors() | {"log_temperature": self.temperature.log}
