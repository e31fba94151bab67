"""Learning from pixels: image encoder, random shift, and a replay buffer that stores each frame once.

Guarantees: no stack holds a frame of another episode or an overwritten one; each frame is stored once, as uint8 (a
million frames of 84×84 take 21.2 GB); the frames of a stack share one random shift; and losses, settings and masks are
those of states, convolutions included.

MR.Q from pixels (Fujimoto et al., 2025) has the losses and hyperparameters of MR.Q from states. It replaces the state
MLP by four convolutions and a linear layer, and shifts each stack of frames at random (Yarats et al., 2021).

    env = make_pixel_env(84, 3, "walker-walk", seed=0)         # rendering.py; obs: (9, 84, 84) uint8, three RGB frames
    agent = PixelMRQ(env.obs_shape, env.action_dim, buffer_size=100_000)
    obs = env.reset()
    action = agent.act(obs, explore=True)
    next_obs, reward, terminated, truncated = env.step(action)
    agent.add(obs, action, reward, next_obs, terminated, truncated)
"""

import numpy as np
import torch
import torch.nn as nn

from mrq import MRQ
from mrsac import MRSAC
from networks import ACTIVATIONS, WIDTH, Encoder, arch_config
from rendering import FRAME_CHANNELS
from replay import ReplayBuffer, free_memory, to_device

CHANNELS, KERNEL, STRIDES = 32, 3, (2, 2, 2, 1)  # the published MR.Q's, at scale 1: 84 -> 41 -> 20 -> 9 -> 7
PIECE = 32  # images that pass the convolutions together without gradients on a CPU: their activations stay small


# ---- encoder ----

def conv_size(size):
    """Height of the last convolution's output. ValueError for an image that is too small."""
    for stride in STRIDES:
        size = (size - KERNEL) // stride + 1
    if size < 1:
        raise ValueError("images must have at least 31 pixels per side: the convolutions leave nothing of smaller ones")
    return size


class ImageLayers(nn.Module):
    """Four convolutions, each with an activation, and a linear layer: (..., channels, size, size) -> (..., zs_dim).

    obs: uint8. No normalization between them, as published. Activations are modules: metrics see channels as units.
    """

    def __init__(self, obs_shape, zs_dim, channels, activation):
        super().__init__()
        layers, inputs = [], obs_shape[0]
        for stride in STRIDES:
            layers += [nn.Conv2d(inputs, channels, KERNEL, stride), ACTIVATIONS[activation](inplace=True)]
            inputs = channels
        self.convs = nn.Sequential(*layers)
        self.linear = nn.Linear(channels * conv_size(obs_shape[1]) * conv_size(obs_shape[2]), zs_dim)
        for layer in (*self.convs, self.linear):
            if hasattr(layer, "weight"):  # Table 2: Xavier uniform with ReLU's gain, biases 0
                nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("relu"))
                nn.init.zeros_(layer.bias)

    def forward(self, obs):
        images = obs.reshape(-1, *obs.shape[-3:])
        hooked = any(layer._forward_hooks for layer in self.convs)  # the metrics read whole batches
        if torch.is_grad_enabled() or hooked or images.device.type != "cpu":
            zs = self._embed(images)
        else:
            zs = torch.cat([self._embed(piece) for piece in images.split(PIECE)])
        return zs.unflatten(0, obs.shape[:-3]) if obs.ndim > 3 else zs.squeeze(0)

    def _embed(self, images):
        x = images.to(self.linear.weight.dtype, memory_format=torch.channels_last, copy=True).div_(255).sub_(0.5)
        return self.linear(self.convs(x).flatten(1))


class PixelEncoder(Encoder):
    """MR.Q's encoder on stacks of frames. Width scales the channels; depth scales only z_sa's blocks.  Eq. (7)"""

    def __init__(self, obs_shape, action_dim, arch_type=4, **options):
        super().__init__(1, action_dim, arch_type, **options)
        channels = max(1, round(CHANNELS * self.zs_dim / WIDTH))
        # In the place of the state MLP, under its name: `zs` then needs no change.
        self.zs_mlp = ImageLayers(obs_shape, self.zs_dim, channels, arch_config(arch_type)["activation"])


# ---- augmentation ----

def random_shift(obs, pad):
    """Moves each stack of frames by up to `pad` pixels in x and y, and repeats the edge pixels (DrQ).

    obs: (..., channels, height, width) uint8. All channels of a stack move alike. Same shape.
    """
    if not pad:
        return obs
    images = obs.reshape(-1, *obs.shape[-3:])
    shift = torch.randint(-pad, pad + 1, (2, len(images)), device=images.device)  # down and right
    return (shift_by_copy if images.device.type == "cpu" else shift_by_index)(images, shift, pad).view(obs.shape)


def shift_by_copy(images, shift, pad):
    """A window of each padded stack. On a CPU, copying rows is several times as fast as indexing pixels."""
    count, channels, height, width = images.shape
    padded = np.empty((channels, height + 2 * pad, width + 2 * pad), np.uint8)  # small enough for the cache
    moved = torch.empty(images.shape, dtype=torch.uint8)
    for image, target, y, x in zip(images.numpy(), moved.numpy(), *(shift + pad).tolist()):
        padded[:, pad:-pad, pad:-pad] = image
        padded[:, pad:-pad, :pad], padded[:, pad:-pad, -pad:] = image[:, :, :1], image[:, :, -1:]
        padded[:, :pad], padded[:, -pad:] = padded[:, pad, None], padded[:, -pad - 1, None]
        target[:] = padded[:, y:y + height, x:x + width]
    return moved


def shift_by_index(images, shift, pad):
    """The same on a GPU, without a read from the device."""
    count, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + shift[0].unsqueeze(1)).clamp(0, height - 1)  # (count, height)
    columns = (torch.arange(width, device=images.device) + shift[1].unsqueeze(1)).clamp(0, width - 1)  # (count, width)
    rows = rows.view(count, 1, height, 1).expand(-1, channels, -1, width)
    return images.gather(2, rows).gather(3, columns.view(count, 1, 1, width).expand(-1, channels, height, -1))


# ---- experience ----

class FrameReplayBuffer(ReplayBuffer):
    """A ReplayBuffer of frame stacks that stores each frame once. Stacks are built when drawn, and shifted at random.

    obs_shape: (3 · number of frames, height, width); the newest frame is last, and a reset repeats its first frame.
    shift: pixels of the random shift; 0 for none. Frames are kept on the device if they fit there, else on the host.
    """

    def __init__(self, obs_shape, action_dim, *arguments, shift=4, **options):
        if len(obs_shape) != 3 or obs_shape[0] % FRAME_CHANNELS:
            raise ValueError(f"a stack of RGB frames has shape (3 · frames, height, width), not {tuple(obs_shape)}")
        self.stack, self.shift = obs_shape[0] // FRAME_CHANNELS, shift
        self.history = self.stack - 1
        super().__init__(obs_shape, action_dim, *arguments, obs_dtype=torch.uint8, **options)

    def _check_memory(self, padded):
        needed = self.stored_bytes + 8 * padded
        # A quarter of a GPU stays free, for activations, gradients and moments: these come later.
        on_host = self.device.type == "cuda" and needed > 0.75 * free_memory(self.device)
        self.frame_device = torch.device("cpu") if on_host else self.device
        if needed > (free := free_memory(self.frame_device)):
            raise MemoryError(f"a buffer of {self.capacity:,} frames of {self.obs_shape[1]}×{self.obs_shape[2]} takes "
                              f"{needed / 1e9:.2f} GB, but {self.frame_device} has {free / 1e9:.2f} GB: use a smaller "
                              "--buffer-size or --image-size")

    def _obs_bytes(self):
        return FRAME_CHANNELS * self.obs_shape[1] * self.obs_shape[2] + 8

    def _allocate_obs(self):
        shape = (self.capacity, FRAME_CHANNELS, *self.obs_shape[1:])
        if self.frame_device.type == "cpu":
            self.frames = torch.from_numpy(np.zeros(shape, np.uint8))  # takes memory only as it fills
        else:
            self.frames = torch.zeros(shape, dtype=torch.uint8, device=self.frame_device)
        # Steps since the episode began, up to stack - 1: how many earlier rows the stack of this row reaches.
        self.age = torch.zeros(self.capacity, dtype=torch.long, device=self.device)
        self.lags = torch.arange(self.stack - 1, -1, -1, device=self.device)  # oldest frame first

    def _saved(self):
        return {"frames": self.frames, "age": self.age, "rows": self.rows}

    def _write_obs(self, row, following, obs, next_obs):
        if self.episode_length == 0:
            self._write_frame(row, obs, 0)
        self._write_frame(following, next_obs, min(self.episode_length + 1, self.stack - 1))

    def _write_frame(self, row, obs, age):
        self.frames[row].copy_(to_device(obs[-FRAME_CHANNELS:], self.frame_device))
        self.age[row].fill_(age)

    def _gather_obs(self, rows):
        return random_shift(self._stacks(rows), self.shift)

    def _stacks(self, rows):
        """(...) rows -> (..., 3 · stack, height, width)"""
        lags = torch.minimum(self.lags, self.age[rows].unsqueeze(-1))  # (..., stack) an episode's first frame repeats
        index = (rows.unsqueeze(-1) - lags) % self.capacity
        if self.frame_device.type == "cpu":  # numpy's take is four times as fast as index_select
            frames = torch.from_numpy(np.take(self.frames.numpy(), index.flatten().cpu().numpy(), axis=0))
            frames = to_device(frames, self.device)
        else:
            frames = self.frames.index_select(0, index.flatten())
        return frames.view(*rows.shape, *self.obs_shape)


# ---- agents ----

class FromPixels:
    """Mixin for MR.Q's agents: obs_dim is the shape of a stack of frames. The losses are unchanged."""

    metric_samples = 256  # 2,048 stacks would take gigabytes of activations

    def __init__(self, *arguments, shift=4, **options):
        """shift: pixels of the random shift, on inputs and targets."""
        self.shift = shift
        super().__init__(*arguments, **options)

    def make_encoder(self, obs_shape, action_dim, module):
        return PixelEncoder(obs_shape, action_dim, num_bins=self.config.reward_bins, **module.size())

    def make_replay(self, obs_shape, action_dim, buffer_size):
        return FrameReplayBuffer(obs_shape, action_dim, buffer_size, self.config.horizon, self.config.prioritized,
                                 device=self.device, shift=self.shift)

    def metric_batch(self, size):
        """As drawn, without the shift."""
        self.replay.shift = 0
        try:
            return super().metric_batch(min(size, self.metric_samples))
        finally:
            self.replay.shift = self.shift


class PixelMRQ(FromPixels, MRQ):
    """MR.Q from pixels."""


class PixelMRSAC(FromPixels, MRSAC):
    """MR.SAC from pixels."""
