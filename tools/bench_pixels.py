"""CPU time of an agent step from pixels, by phase, beside a plain form of the same update: `tools/bench.py --pixels`.

    python tools/bench.py --pixels                                                 # 84×84, batch 256, on one core
    python tools/bench.py --pixels --image-size 64 --batch-size 64 --width-scale 0.5

"plain" is written here, as published pixel agents do it: frames by advanced indexing, converted to floats, shifted by
`grid_sample`, all four stacks of the critic's subtrajectories, and one autograd pass over all images. Each form runs in
processes of its own, in turns; the figures are medians of CPU milliseconds, so that neighbors of a busy machine count
less.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the project

import torch
import torch.nn as nn
import torch.nn.functional as F

from base import frozen
from mrq import MRQConfig
from pixels import FrameReplayBuffer, ImageLayers, PixelMRQ, random_shift
from rendering import make_pixel_env
from runtime import fast

FORMS = ("plain", "fp32", "bf16")
PHASES = ("physics", "frame", "act", "draw", "shift", "encoder", "critic", "actor", "update")
TASK = "walker-walk"


class PlainReplay(FrameReplayBuffer):
    """Float stacks, shifted by bilinear sampling at whole pixels."""

    def gather(self, index, horizon=None, ends=False):
        return super().gather(index, horizon)

    def _stacks(self, rows):
        lags = torch.minimum(self.lags, self.age[rows].unsqueeze(-1))
        return self.frames[(rows.unsqueeze(-1) - lags) % self.capacity].flatten(-4, -3)

    def _gather_obs(self, rows):
        return plain_shift(self._stacks(rows), self.shift)


def plain_shift(obs, pad):
    images = F.pad(obs.flatten(0, 1).float(), (pad,) * 4, "replicate")
    size = images.shape[-1]
    corner = torch.randint(0, 2 * pad + 1, (2, len(images), 1))
    y, x = 2 * (torch.arange(size - 2 * pad) + corner + 0.5) / size - 1  # grid_sample's coordinates, (count, size) each
    grid = torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), -1)
    return F.grid_sample(images, grid, align_corners=False).unflatten(0, obs.shape[:2])


class PlainLayers(ImageLayers):
    def forward(self, obs):
        x = obs.reshape(-1, *obs.shape[-3:]) / 255 - 0.5
        for layer in self.convs:
            x = F.elu(x) if isinstance(layer, nn.ELU) else layer(x)
        return self.linear(x.flatten(1)).view(*obs.shape[:-3], -1)


class PlainMRQ(PixelMRQ):
    def make_encoder(self, obs_shape, action_dim, module):
        encoder = super().make_encoder(obs_shape, action_dim, module)
        encoder.zs_mlp.__class__ = PlainLayers
        return encoder

    def make_replay(self, obs_shape, action_dim, buffer_size):
        return PlainReplay(obs_shape, action_dim, buffer_size, self.config.horizon, shift=self.shift)


def make_agent(form, env, size):
    torch.manual_seed(0)
    modules = {name: dataclasses.replace(module, width_scale=size["width_scale"])
               for name, module in MRQConfig.presets["default"].items()}
    config = MRQConfig(batch_size=size["batch_size"])
    kind = PlainMRQ if form == "plain" else PixelMRQ
    agent = kind(env.obs_shape, env.action_dim, modules, config, buffer_size=20_000)
    if form != "plain":
        fast.keep_freed_memory()
        fast.speed_up(agent, form)
    agent.replay.frames.random_(0, 256)  # rows that look filled: what they show does not change the time
    for row in range(10_000):
        agent.replay._make_valid(row)
    agent.replay.rows.normal_()
    agent.replay.rows[:, -2:] = torch.tensor([0.0, 1.0])
    agent.replay.age.fill_(agent.replay.stack - 1)
    return agent


def time_phases(form, size, steps):
    """phase -> median CPU milliseconds per agent step."""
    torch.set_num_threads(1)
    env = make_pixel_env(size["image_size"], 3, TASK)
    agent, obs, action = make_agent(form, env, size), env.reset(), env.random_action()
    config, replay = agent.config, agent.replay
    agent.refresh_targets()
    index, steps_of = agent.encoder_indices[0], torch.arange(config.encoder_horizon + 1)
    rows = index.unsqueeze(1) + steps_of
    parts = {
        "physics": lambda: env.env.step(action) if not env.env._ended else env.env.reset(), "frame": env._draw,
        "act": lambda: agent.act(obs, explore=True), "draw": lambda: replay._stacks(rows)}
    stacks, batch = replay._stacks(rows), replay.gather(index, config.encoder_horizon)
    short = replay.sample(config.batch_size, config.q_horizon, ends=True)
    zs = agent.encode(short.obs[:, 0])

    def backward(name, losses):
        agent.optimizers[name].zero_grad(set_to_none=True)
        losses.mean().backward()

    def actor():
        with frozen(agent.encoder, agent.critic):
            losses = agent.actor_loss(zs)[0]
        backward("actor", losses)

    def update():
        agent.update_encoder()
        agent.update_critic_and_actor()

    parts |= {
        "shift": lambda: (plain_shift if form == "plain" else random_shift)(stacks, 4),
        "encoder": lambda: backward("encoder", agent.encoder_loss(batch, replay.termination_seen)[0]),
        "critic": lambda: backward("critic", agent.critic_loss(short, agent.encode(short.obs[:, 0]))[0]),
        "actor": actor, "update": update}
    update()
    times = {name: [] for name in parts}
    for _ in range(steps):
        for name, function in parts.items():
            began = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def run(size, steps, rounds=3):
    """Prints one row per form. size: image_size, batch_size, width_scale."""
    forms = [form for form in FORMS if form != "bf16" or torch.backends.cpu.get_cpu_capability() == "AVX512"]
    found = {form: [] for form in forms}
    for _ in range(rounds):
        for form in forms:
            command = [sys.executable, os.path.abspath(__file__), form, json.dumps(size), str(steps)]
            result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if result.returncode:
                raise ValueError(f"{form}: {result.stderr.strip().splitlines()[-1]}")
            found[form].append(json.loads(result.stdout))
    medians = {form: {name: statistics.median(times[name] for times in found[form]) for name in PHASES}
               for form in forms}
    print(f"MR.Q on {TASK} from pixels, one core, CPU ms per agent step: {size}\n")
    print(f"| form | {' | '.join(PHASES)} | plain / form |\n|---{'|---' * (len(PHASES) + 1)}|")
    for form, times in medians.items():
        print(f"| {form} | {' | '.join(f'{times[name]:.3g}' for name in PHASES)} | "
              f"{medians['plain']['update'] / times['update']:.2f} |")
    print("\ndraw, shift: of the encoder's batch. encoder, critic, actor: loss and gradients. "
          "update: all but physics, frame, act.")


if __name__ == "__main__":
    print(json.dumps(time_phases(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))))
