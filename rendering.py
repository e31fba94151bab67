"""Frames of DeepMind Control tasks as observations: a renderer that needs no display, and stacks of frames.

Guarantees: one frame per agent step, drawn after its last repeat; drawing does not change the physics; `restore` is
exact and draws only the frames of the last stack.

The published visual agents (Yarats et al., 2021; Fujimoto et al., 2025) observe three RGB frames of 84×84. This file
needs numpy, dm_control and `envs.py`.

    from rendering import make_pixel_env

    env = make_pixel_env(84, 3, "walker-walk", seed=0)            # also chooses the renderer
    obs = env.reset()                                             # (9, 84, 84) uint8, the newest frame last
    obs, reward, terminated, truncated = env.step(env.random_action())
    print(obs.shape, env.renderer())
"""

import ctypes.util
import os
import weakref
from collections import deque

import numpy as np

from envs import make_env, one_line

FRAME_CHANNELS = 3  # RGB
CAMERAS = {"quadruped": 2}  # other domains: camera 0


def choose_renderer():
    """Sets MUJOCO_GL, unless it is set, before dm_control is imported: EGL, or OSMesa where EGL is missing.

    EGL draws without a display, on a GPU or by Mesa. Returns the choice. ImportError, in one line, if there is neither.
    """
    if "MUJOCO_GL" not in os.environ:
        found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
        if not found:
            raise ImportError("nothing can draw here, and --pixels needs OpenGL: install Mesa's EGL (Debian: apt-get "
                              "install libegl1 libgl1-mesa-dri), or set MUJOCO_GL")
        os.environ["MUJOCO_GL"] = found[0]
    return os.environ["MUJOCO_GL"]


def make_pixel_env(size, stack, name, seed=0, action_repeat=None):
    """That DeepMind Control task as a PixelEnv. ValueError or ImportError, in one line, if it cannot be drawn."""
    choose_renderer()
    return PixelEnv(make_env(name, seed, action_repeat), size, stack)


class PixelEnv:
    """A DeepMind Control task whose observation is a stack of its newest frames: (3 · stack, size, size) uint8.

    env: a DMCEnv of envs.py. The rest is as in `env`. The drawing context is freed with this object.
    """

    obs_dtype = np.dtype(np.uint8)

    def __init__(self, env, size=84, stack=3):
        if not hasattr(env._env, "physics"):
            raise ValueError(f"--pixels draws DeepMind Control tasks, and {env.name} is none")
        self.env, self.size, self.stack = env, size, stack
        self.obs_shape = self.obs_dim = (FRAME_CHANNELS * stack, size, size)
        self.camera = CAMERAS.get(env.name.split("-")[0], 0)
        # Agent steps of the shortest episodes to expect. Half of the time limit: the physics may diverge in some.
        self.shortest_episode = 1 if env.can_terminate else max(1, env.episode_steps // 2)
        self._frames = deque(maxlen=stack)
        self._refill()  # where nothing can be drawn, it fails here
        weakref.finalize(self, env._env.close)

    def __getattr__(self, name):
        if name == "env":  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, seed=None):
        """Starts an episode: its first frame fills the stack."""
        self.env.reset(seed)
        return self._refill()

    def step(self, action):
        """action: (action_dim,) in [-1, 1]. Returns (obs, reward summed over the repeat, terminated, truncated)."""
        _, *rest = self.env.step(action)
        self._frames.append(self._draw())
        return self._stacked(), *rest

    def restore(self, state):
        """Returns to where `state` was taken. Replays the episode, and draws only the frames of the last stack."""
        first = max(0, len(state["actions"]) - self.stack + 1)  # the step whose frame is the stack's first
        self._frames.clear()

        def draw(step):
            if step >= first:
                self._frames.append(self._draw())
        self.env.restore(state, after=draw)
        if self.env.restore_warning or not self._frames:  # the episode may have ended early
            return self._refill()
        while len(self._frames) < self.stack:  # an episode's first frame repeats
            self._frames.appendleft(self._frames[0])
        return self._stacked()

    def renderer(self):
        """What draws: OpenGL's names for the renderer and its version."""
        from OpenGL import GL
        with self.env._env.physics.contexts.gl.make_current() as context:
            return ", ".join(context.call(GL.glGetString, name).decode() for name in (GL.GL_RENDERER, GL.GL_VERSION))

    def _refill(self):
        self._frames.extend([self._draw()] * self.stack)
        return self._stacked()

    def _stacked(self):
        return np.concatenate(self._frames)  # (3 · stack, size, size), the newest last

    def _draw(self):
        try:
            frame = self.env._env.physics.render(self.size, self.size, camera_id=self.camera)
        except Exception as error:  # each OpenGL fails in its own way
            raise ValueError(f"{self.env.name} cannot be drawn with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} "
                             f"({one_line(error)[:80]}): set MUJOCO_GL=egl or osmesa before the start") from error
        return frame.transpose(2, 0, 1)
