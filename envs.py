"""DeepMind Control tasks and Gymnasium environments behind one interface.

Guarantees:
- `dog-run` is a DeepMind Control task; `Hopper-v5` and `my_package:MyEnv-v0` are registered with Gymnasium.
- Observations are flat float32 vectors. Actions lie in [-1, 1] and are rescaled to the environment's bounds.
- Rewards are summed over the action repeat, which stops at the episode's last step. An episode ends terminated (a
  terminal state) or truncated (a time limit), never both.
- `reset(seed)` starts an episode that depends only on that seed. `restore` returns exactly to a saved moment of an
  episode; where the environment is not repeatable, it says so.

Paper: Section 3 (Setup). MR.Q's protocol: action repeat 2 on DeepMind Control (500 agent steps, 1,000 frames per
episode), 1 on Gymnasium. This file needs numpy, and dm_control or Gymnasium; copy it into your project.

    from envs import make_env

    env = make_env("cartpole-swingup", seed=0)
    obs, total, done = env.reset(), 0.0, False
    while not done:
        obs, reward, terminated, truncated = env.step(env.random_action())
        total, done = total + reward, terminated or truncated
    print(obs.shape, total)                                               # (5,) and the return of a random policy
"""

import contextlib
import difflib
import importlib
import math
import numbers
import os
import re
import sys
import traceback
import warnings

import numpy as np

UNLIMITED_EPISODE = 1000  # frames, for the LQR tasks, which have no time limit
UNBOUNDED = 1e6  # actions with a wider range than this have no usable bounds
GYMNASIUM = 'pip install "gymnasium[mujoco]>=1.0,<2"'
DRAWING = "set MUJOCO_GL=egl (a GPU or Mesa) or MUJOCO_GL=osmesa (needs libOSMesa)"


class PhysicsError(FloatingPointError):
    """The simulation diverged within an episode. Discard that step, and call `reset` for the next episode."""


def make_env(name, seed=0, action_repeat=None):
    """The environment of that name: a DMCEnv or a GymEnv. action_repeat: None is 2 on DeepMind Control, 1 on Gymnasium.

    ValueError or ImportError, in one line: an unknown name, a missing package, spaces that agents here cannot use.
    """
    return check_task(name)(name, seed, action_repeat)


def check_task(name):
    """The class that plays an environment of that name. ValueError, with the nearest names, if it is unknown."""
    if not isinstance(name, str):
        raise ValueError(f"the name of an environment is text such as 'dog-run' or 'Hopper-v5', not {name!r}")
    like_gym = re.search(r"[:/]|-v\d+$", name)  # no DeepMind Control task is named so: neither kind needs the other
    if not like_gym and name in task_names():
        return DMCEnv
    known = []
    with contextlib.nullcontext() if like_gym else contextlib.suppress(ImportError):
        known = _gym_names(name)
    if name.rpartition(":")[2] in known:
        return GymEnv
    package, colon, own = name.rpartition(":")
    with contextlib.suppress(ImportError):
        known = known if colon else [*task_names(), *known]
    nearest = [package + colon + near for near in _nearest(own, known)]
    nearest = ", ".join(nearest) or "dog-run, Hopper-v5"
    advice = " One of your own needs its module in front: my_package:MyEnv-v0" if like_gym and not colon else ""
    raise ValueError(f"unknown environment {name!r}: did you mean {nearest}?{advice}")


def task_names():
    """Every task of the DeepMind Control suite, `domain-task`. ImportError, in one line, without dm_control."""
    return [f"{domain}-{task}" for domain, task in _suite().ALL_TASKS]


def _nearest(name, known):
    """Up to two names of each kind."""
    found = []
    for kind in ([n for n in known if not re.search(r"-v\d+$", n)], [n for n in known if re.search(r"-v\d+$", n)]):
        lower = {n.lower(): n for n in kind}
        found += [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)]
    return found


def _suite():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about displays, on machines without one: nothing is drawn here
            from absl import logging
            from dm_control import suite
        logging.set_verbosity("error")
        return suite
    except Exception as error:  # a broken install fails in many ways: missing parts, shared libraries, versions
        raise _gl_error(error) or ImportError(f"dm_control does not import ({one_line(error)}); install it as the "
                                              "README says: pip install -r requirements.txt") from error


def _control():
    from dm_control.rl import control
    return control


def _gymnasium():
    try:
        import gymnasium
        return gymnasium
    except Exception as error:
        raise ImportError(f"Gymnasium does not import ({one_line(error)}); install it: {GYMNASIUM}") from error


def _gym_names(name):
    """The ids in Gymnasium's registry, after importing the package in front of the name's colon."""
    registry, (package, _, _) = _gymnasium().registry, name.rpartition(":")
    if package:
        try:
            importlib.import_module(package)
        except Exception as error:
            raise ImportError(f"{name}: importing {package} failed ({one_line(error)}); the package must be installed, "
                              "or its folder on PYTHONPATH") from error
    return list(registry)


def _gl_error(error):
    """An ImportError in one line if a MUJOCO_GL that does not work here is the cause, else None."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is not None and _in_opengl(error):
        return ImportError(f"MUJOCO_GL={chosen} does not work here ({one_line(error)}): unset it, {DRAWING}, or set "
                           "MUJOCO_GL=disable where nothing is drawn")


def _in_opengl(error):
    places = traceback.extract_tb(error.__traceback__)
    return any(re.search(r"_render|gl_context|OpenGL", place.filename) for place in places)


def one_line(error):
    """Type and first line of an exception, some of which cannot even be printed."""
    try:
        first = next(iter(str(error).splitlines()), "")
    except Exception:
        first = ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class BaseEnv:
    """What both kinds of environment share. After construction it stands at the start of an episode.

    obs_dim, obs_shape (obs_dim,), obs_dtype float32; action_dim
    frames: simulator steps over all episodes
    episode_steps: agent steps up to the time limit, or None if no limit is known
    step_seconds: simulated time of an agent step
    restore_warning: None, or one line if the last `restore` could not return exactly

    ValueError, in one line: a bad seed, action repeat or action, or a step after an episode's end.
    """

    obs_dtype = np.dtype(np.float32)

    def __init__(self, name, seed, action_repeat):
        for what, value, least in (("seed", seed, 0), ("action_repeat", action_repeat, 1)):
            if not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"{what} must be a whole number of at least {least}, not {value!r}")
        self.name, self.seed, self.action_repeat = name, int(seed), int(action_repeat)
        self.frames, self.restore_warning = 0, None
        # Random actions have a stream of their own, apart from the one that the resets draw from.
        self._random = np.random.RandomState(np.random.SeedSequence([self.seed, 1]).generate_state(1))

    @property
    def obs_shape(self):
        return (self.obs_dim,)

    def reset(self, seed=None):
        """Starts an episode; with a seed, one that depends only on that. Returns obs (obs_dim,) float32."""
        return self._begin(self._choose_start(seed))

    def _begin(self, start):
        self._start, self._actions, self._ended = start, [], False
        return self._observe(self._reset(start))

    def step(self, action):
        """action: (action_dim,) in [-1, 1], clipped to it. Returns (obs, reward, terminated, truncated).

        PhysicsError if the simulation diverges; FloatingPointError for an action, reward or observation that is not
        finite. After either, only `reset` or `restore` continues.
        """
        action = np.array(action, np.float32)  # a copy: the caller may change its own
        if action.shape != (self.action_dim,):
            raise ValueError(f"{self.name} takes actions of shape ({self.action_dim},), not {action.shape}")
        if not np.isfinite(action).all():
            raise FloatingPointError(f"{self.name} was given the action {action}: the network that chose it diverged")
        if self._ended:
            raise ValueError(f"this episode of {self.name} has ended: call reset() before the next step")
        control = self._low + (np.minimum(np.maximum(action, -1.0), 1.0) + 1.0) / 2.0 * (self._high - self._low)
        reward, self._ended = 0.0, True  # unless all goes well
        for _ in range(self.action_repeat):
            raw, frame_reward, terminated, truncated = self._step(control)
            self.frames += 1
            reward += frame_reward
            if not math.isfinite(reward):
                raise FloatingPointError(f"the reward of {self.name} is {reward} at frame {self.frames}")
            if terminated or truncated:
                break
        obs = self._observe(raw)
        self._actions.append(action)
        self._ended = bool(terminated or truncated)
        return obs, float(reward), bool(terminated), bool(truncated and not terminated)

    def _observe(self, raw):
        obs = self._flatten(raw)
        if not np.isfinite(obs).all():  # it would never leave a normalizer or a network
            raise FloatingPointError(f"the observation of {self.name} holds {obs[~np.isfinite(obs)][0]} at frame "
                                     f"{self.frames}: the physics has diverged")
        self._obs = obs.copy()
        return obs

    def random_action(self):
        """Uniform in [-1, 1], (action_dim,) float32."""
        return self._random.uniform(-1.0, 1.0, self.action_dim).astype(np.float32)

    def state(self):
        """What `restore` needs to return to this moment, as plain values: numbers, lists and strings.

        The physics state is not enough: some tasks change the model at each reset, and solvers keep warm starts.
        Replaying the episode's actions from its start is exact.
        """
        return {"start": _plain(self._start), "actions": [action.tolist() for action in self._actions],
                "frames": self.frames, "random": _plain(self._random.get_state()), "obs": self._obs.tolist()}

    def restore(self, state, after=lambda step: None):
        """Returns to where `state` was taken, in an environment of the same name and seed; returns obs there.

        after: called at the episode's start with 0, and with k after its k-th step.

        Sets `restore_warning` if the environment is not repeatable. Then the episode continues from where its actions
        led this time, or, if it ended before they did, with a new one.
        """
        obs, saved = self._begin(state["start"]), state.get("obs")  # earlier versions saved none
        after(0)
        with contextlib.suppress(PhysicsError):
            for step, action in enumerate(state["actions"], 1):
                if self._ended:
                    break
                obs = self.step(action)[0]
                after(step)
        self.frames = state["frames"]
        self._random.set_state(tuple(state["random"]))
        self.restore_warning = None
        if saved is not None and not np.array_equal(obs, np.asarray(saved, obs.dtype)):
            self.restore_warning = (f"{self.name} is not repeatable: replaying its episode led to another observation. "
                                    "This run continues, but not exactly as an uninterrupted one would")
            if self._ended:
                obs = self.reset()
        return obs

    def render(self, height=480, width=640):
        """The current frame, (height, width, 3) uint8. ValueError, in one line, where OpenGL is missing."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about displays
                return self._render(height, width)
        except Exception as error:  # each OpenGL fails in its own way
            sys.unraisablehook = lambda _: None  # the half-made drawing context complains again when it is deleted
            raise ValueError(f"{self.name} cannot be drawn here ({one_line(error)}): {DRAWING}") from error


class DMCEnv(BaseEnv):
    """A task of the DeepMind Control suite, such as `dog-run`. can_terminate: whether it has terminal states."""

    def __init__(self, name, seed=0, action_repeat=None):
        super().__init__(name, seed, 2 if action_repeat is None else action_repeat)
        if name not in task_names():
            check_task(name)  # names the nearest ones
            raise ValueError(f"{name!r} is not a DeepMind Control task: use make_env")
        domain, task = name.split("-", 1)
        self._env = _suite().load(domain, task, task_kwargs={"random": seed})
        spec = self._env.action_spec()
        if not np.issubdtype(spec.dtype, np.floating):
            raise ValueError(f"{name} has discrete actions: agents here choose continuous ones")
        # LQR's actions are bounded at ±1e10: there a unit action stays a unit.
        bounded = (spec.maximum - spec.minimum) < UNBOUNDED
        self._low = np.where(bounded, spec.minimum, -1.0)
        self._high = np.where(bounded, spec.maximum, 1.0)
        limit = self._env._step_limit
        self._frame_limit = UNLIMITED_EPISODE if np.isinf(limit) else int(np.ceil(limit))
        self.episode_steps = -(-self._frame_limit // self.action_repeat)
        self.step_seconds = self._env.control_timestep() * self.action_repeat
        self.action_dim = spec.shape[0]
        self.can_terminate = type(self._env.task).get_termination is not _control().Task.get_termination
        try:
            self.obs_dim = self.reset().shape[0]
        except Exception as error:  # quadruped-escape draws its terrain through OpenGL
            if not _in_opengl(error):
                raise
            sys.unraisablehook = lambda _: None  # the half-made drawing context complains again when it is deleted
            raise ValueError(f"{name} cannot start here ({one_line(error)[:80]}...): it needs OpenGL; {DRAWING}, or "
                             "choose another task") from error

    def _choose_start(self, seed):
        """The task's random state. The LQR tasks also draw their springs, once, from the seed of the environment."""
        if seed is not None:
            self._env.task.random.seed(seed)
        return self._env.task.random.get_state()

    def _reset(self, start):
        self._env.task.random.set_state(tuple(start))
        self._frame = 0  # of this episode
        with self._diverging():
            return self._env.reset().observation

    def _step(self, control):
        with self._diverging():
            timestep = self._env.step(control)
        self._frame += 1
        terminated = timestep.last() and timestep.discount == 0.0  # discount 0: a terminal state; 1: the time is up
        return timestep.observation, timestep.reward, terminated, timestep.last() or self._frame == self._frame_limit

    @contextlib.contextmanager
    def _diverging(self):
        try:
            yield
        except _control().PhysicsError as error:
            raise PhysicsError(f"{self.name} diverged at frame {self.frames}: {one_line(error)}") from error

    def _flatten(self, raw):
        return np.concatenate([np.asarray(part).ravel() for part in raw.values()]).astype(np.float32)

    def _render(self, height, width):
        return self._env.physics.render(height, width, camera_id=0)  # the task's first camera


class GymEnv(BaseEnv):
    """An environment registered with Gymnasium, such as `Hopper-v5`.

    Observations: a Box, or a Dict or Tuple of them, flattened in its order (Gymnasium sorts a Dict's keys), each
    part in row-major order. Actions: one Box with finite bounds. Each episode starts from a seed drawn from (seed,
    number of the episode), so that it can be replayed.
    """

    def __init__(self, name, seed=0, action_repeat=None):
        super().__init__(name, seed, 1 if action_repeat is None else action_repeat)
        self._env, self._episode = self._make(), 0
        self.obs_dim = sum(int(np.prod(box.shape)) for box in self._boxes(self._env.observation_space))
        actions = self._env.action_space
        if not isinstance(actions, _gymnasium().spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
            raise ValueError(f"{name} has {type(actions).__name__} actions: agents here choose a Box of floats")
        self._low, self._high = (bound.ravel().astype(np.float64) for bound in (actions.low, actions.high))
        if not (self._high - self._low < UNBOUNDED).all():  # `not`: the difference may be NaN
            raise ValueError(f"{name} has unbounded actions: give them bounds, for example with "
                             "gymnasium.wrappers.RescaleAction")
        self.action_dim = self._low.size
        limit = self._env.spec.max_episode_steps if self._env.spec else None
        self.episode_steps = limit and -(-limit // self.action_repeat)
        world = self._env.unwrapped
        frame_seconds = getattr(world, "dt", None) or 1 / (world.metadata.get("render_fps") or 30)
        self.step_seconds = frame_seconds * self.action_repeat
        self.reset()

    def _make(self, **options):
        gym = _gymnasium()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about versions
                return gym.make(self.name, disable_env_checker=True, **options)
        except Exception as error:
            if isinstance(error, (ImportError, gym.error.Error)):
                missing = getattr(error, "name", None) in ("mujoco", "imageio")
                advice = ': pip install "gymnasium[mujoco]>=1.0,<2"' if missing else ""
                line = f"{self.name} cannot start ({one_line(error)}){advice}"
                raise _gl_error(error) or ImportError(line) from error
            raise _gl_error(error) or RuntimeError(f"{self.name} failed in its constructor: "
                                                   f"{one_line(error)}") from error

    def _choose_start(self, seed):
        """The seed of an episode: the given one, or the next of this environment's own."""
        if seed is not None:
            return int(seed)
        self._episode += 1
        return int(np.random.SeedSequence(self.seed, spawn_key=(self._episode,)).generate_state(1)[0])

    def _reset(self, start):
        with self._failing("reset"):
            return self._env.reset(seed=start)[0]

    def _step(self, control):
        space = self._env.action_space
        with self._failing("step"):
            action = np.clip(control, self._low, self._high).reshape(space.shape).astype(space.dtype)
            raw, reward, terminated, truncated, _ = self._env.step(action)
            reward = float(reward)
        # After a bad state MuJoCo resets itself, without a word and within the episode.
        number = getattr(getattr(getattr(self._env.unwrapped, "data", None), "warning", None), "number", None)
        if number is not None and any(number[int(w)] for w in _bad_states()):
            raise PhysicsError(f"{self.name} diverged at frame {self.frames}: MuJoCo found a bad state")
        return raw, reward, terminated, truncated

    @contextlib.contextmanager
    def _failing(self, where):
        """Names the environment in an error of its own code, and keeps the traceback."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"{self.name} failed in {where}: {one_line(error)}") from error

    def _boxes(self, space):
        """The Box spaces in an observation space, in its order. ValueError for what is not a vector."""
        spaces = _gymnasium().spaces
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            return [box for key in _keys(space) for box in self._boxes(space[key])]
        if not isinstance(space, spaces.Box):
            raise ValueError(f"{self.name} observes a {type(space).__name__} space: agents here take a Box, or a Dict "
                             "or Tuple of them")
        if len(space.shape) > 2 or len(space.shape) == 2 and space.dtype == np.uint8:
            raise ValueError(f"{self.name} observes images, {space.shape} {space.dtype}: agents here take vectors")
        return [space]

    def _flatten(self, raw):
        with self._failing("its observation"):
            obs = np.concatenate(_leaves(self._env.observation_space, raw)).astype(np.float32)
        if obs.shape != self.obs_shape:
            raise ValueError(f"{self.name} observed {obs.size} numbers, and its observation space holds {self.obs_dim}")
        return obs

    def state(self):
        return super().state() | {"episode": self._episode}

    def restore(self, state, **options):
        self._episode = state["episode"]
        return super().restore(state, **options)

    def _render(self, height, width):
        if self._env.render_mode is None:  # made without drawing: made again with it, and replayed to this moment
            if "rgb_array" not in self._env.metadata.get("render_modes", ()):
                raise ValueError("it has no render mode rgb_array")
            state, env = self.state(), self._make(render_mode="rgb_array")
            self._env.close()
            self._env = env
            self.restore(state)
        frame = np.asarray(self._env.render())
        rows, columns = (np.arange(size) * old // size for size, old in zip((height, width), frame.shape))
        return frame[rows][:, columns]  # nearest pixels: environments draw in sizes of their own


Env = DMCEnv


def _keys(space):
    return list(space.spaces) if hasattr(space.spaces, "keys") else range(len(space.spaces))


def _leaves(space, value):
    """The parts of an observation as flat arrays, in the order of its space."""
    if not hasattr(space, "spaces"):
        return [np.ravel(value)]
    return [leaf for key in _keys(space) for leaf in _leaves(space[key], value[key])]


def _bad_states():
    """MuJoCo's warnings about positions, velocities, accelerations and controls."""
    return [warning for name, warning in sys.modules["mujoco"].mjtWarning.__members__.items() if "BAD" in name]


def _plain(value):
    """A RandomState's state without arrays; a seed as it is."""
    if isinstance(value, tuple):
        return [part.tolist() if isinstance(part, np.ndarray) else part for part in value]
    return value
