"""MR.SAC: MR.Q's encoder learning under SAC's actor and critic.

What it claims: MR.Q's encoder, buffer, horizons, reward scales, LAP and targets, unchanged; SAC's policy and temperature.

Paper: Figure 26 and Appendix E, which says no more than that. These are therefore choices of this code: the log-std lies
in [-10, 2] as in SAC; mean and log-std come from a head each, as there; the penalty on the actor's pre-activations,
Eq. (12), is left out, since the entropy term already keeps tanh from saturating; α is in units of the reward scale, and is
updated after the actor, by the entropy that the actor had in its own update. Run it by `python train.py --algo mrsac`.
"""

import torch

from mrq import MRQ
from networks import GaussianActor
from replay import to_device
from sac import Temperature, reduce_q, tanh_gaussian, tanh_mean
from settings import MRSACConfig


class MRSAC(MRQ):
    """The Q of MR.Q are in units of r̄, so α weighs entropy in those units too."""

    Config = MRSACConfig

    def __init__(self, obs_dim, action_dim, *arguments, **options):
        super().__init__(obs_dim, action_dim, *arguments, **options)
        self.temperature = Temperature(self.config, action_dim, self.device)
        self.optimizers["temperature"] = self.temperature.optimizer
        self.temperature.optimizer.found_inf = self.nonfinite["actor"]  # whose entropy it follows

    def make_actor(self, zs_dim, action_dim, size):
        return GaussianActor(zs_dim, action_dim, **size)

    @torch.no_grad()
    def act(self, obs, explore):
        """obs: (obs_dim,) or (n, obs_dim), numpy. Returns actions in [-1, 1] of the same leading shape."""
        output = self.actor(self.encoder.zs(to_device(obs, self.device)))
        return (tanh_gaussian(output)[0] if explore else tanh_mean(output)).cpu().numpy()

    def target_value(self, zs):
        """V' = Q'(s, a') - α·log π(a'|s), a' from the target policy on the target features: (batch, 1)"""
        actor = self.targets["actor"] if self.config.target_policy == "target" else self.actor
        action, log_prob = tanh_gaussian(actor(zs))
        q = reduce_q(self.targets["critic"](self.targets["encoder"](zs, action)), self.config.target_q)
        return (q - self.temperature.value() * log_prob).unsqueeze(1)

    def actor_loss(self, zs):
        """α·log π(a|s) - Q(s, a), a from the policy."""
        action, log_prob = tanh_gaussian(self.actor(zs))
        q = reduce_q(self.critic(self.encoder(zs, action)), self.config.actor_q)  # (batch,)
        loss = self.temperature.value() * log_prob - q
        return loss, {"actor_loss": loss.detach(), "action_size": action.detach().abs(), "entropy": -log_prob.detach().mean()}

    def update_actor(self, zs):
        super().update_actor(zs)
        self.temperature.update(self.info["entropy"])
        self.info["temperature"] = self.temperature.value()

    def float32_layers(self):
        return super().float32_layers() + [head for actor in (self.actor, self.targets["actor"]) for head in (actor.output, actor.log_std)]

    def tensors(self):
        return super().tensors() | {"log_temperature": self.temperature.log}
