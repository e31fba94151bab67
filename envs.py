"""DeepMind Control tasks as a researcher writes them: `dog-run`, `ball_in_cup-catch`, `cartpole-swingup_sparse`.

What it claims: actions in [-1, 1], flat float32 observations, action repeat 2 with rewards summed (it stops at the
episode's last step), time limits told apart from terminations, evaluation episodes that depend on their seed alone,
and an exact way back to any moment of an episode.

Paper: Section 3 (Setup); MR.Q's protocol of 500 agent steps, 1,000 frames, an episode. This file needs dm_control and
numpy; copy it into your project.

    from envs import Env, Evaluator

    env = Env("cartpole-swingup", seed=0)
    obs, done = env.reset(), False
    while not done:
        obs, reward, terminated, truncated = env.step(env.random_action())
        done = terminated or truncated
    evaluate = Evaluator("cartpole-swingup", episodes=2)
    print(evaluate(lambda obs: -obs[:, :1].clip(-1, 1), step=0))          # (2,) returns
"""

import contextlib
import difflib
import multiprocessing
import os
import signal
import sys
import warnings

import numpy as np

UNLIMITED_EPISODE = 1000  # frames, for the LQR tasks, which have no time limit of their own


def task_names():
    """Every task of the suite, `domain-task`. ImportError, in one line, if dm_control is missing or broken."""
    return [f"{domain}-{task}" for domain, task in _suite().ALL_TASKS]


def check_task(name):
    """ValueError, in one line and with the nearest names, for a task that the suite does not have."""
    if name not in (known := task_names()):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ValueError(f"unknown environment {name!r}: did you mean {' or '.join(near) or 'dog-run'}?")


def _suite():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about displays, on machines that have none: nothing is drawn here
            from absl import logging
            from dm_control import suite
        logging.set_verbosity("error")
        return suite
    except Exception as error:  # a broken install fails in many ways: missing parts, shared libraries, versions
        raise ImportError(f"dm_control does not import ({type(error).__name__}: {str(error).splitlines()[0]}); install "
                           "it as the README says: pip install -r requirements.txt") from error


class Env:
    """One task. `step` counts as one agent step and up to `action_repeat` frames; `frames` adds them up.

    Raises ValueError, in one line, for an unknown task (with the nearest names) or one that cannot run here.
    """

    def __init__(self, name, seed=0, action_repeat=2):
        check_task(name)
        domain, task = name.split("-", 1)
        self.name, self.action_repeat = name, action_repeat
        self._env = _suite().load(domain, task, task_kwargs={"random": seed})
        spec = self._env.action_spec()
        if not np.issubdtype(spec.dtype, np.floating):
            raise ValueError(f"{name} has discrete actions: agents here choose continuous ones")
        # LQR's actions are bounded at ±1e10: there a unit action stays a unit.
        bounded = (spec.maximum - spec.minimum) < 1e6
        self._low = np.where(bounded, spec.minimum, -1.0)
        self._high = np.where(bounded, spec.maximum, 1.0)
        self._frame_limit = UNLIMITED_EPISODE if np.isinf(self._env._step_limit) else None
        # Random actions have a stream of their own, and not the one that the task draws its resets from.
        self._random = np.random.RandomState(np.random.SeedSequence([seed, 1]).generate_state(1))
        self.frames = 0  # control steps over all episodes
        self.action_dim = spec.shape[0]
        try:
            self.obs_dim = self.reset().shape[0]
        except Exception as error:  # quadruped-escape draws its terrain through OpenGL
            sys.unraisablehook = lambda _: None  # the half-made drawing context complains again as it goes
            raise ValueError(f"{name} cannot start here ({str(error).splitlines()[0][:80]}...): it needs OpenGL; with a "
                             "GPU or Mesa try MUJOCO_GL=egl, or choose another task") from None

    def reset(self, seed=None):
        """Starts an episode; with a seed, one that depends on that alone. Returns obs (obs_dim,) float32.

        The LQR tasks also draw their springs, once, from the seed of the Env.
        """
        if seed is not None:
            self._env.task.random.seed(seed)
        self._start, self._actions = self._env.task.random.get_state(), []
        self._frame = 0  # of this episode
        return self._observed(self._env.reset())

    def step(self, action):
        """action: (action_dim,) in [-1, 1]. Returns (obs, reward summed over the repeat, terminated, truncated)."""
        action = np.asarray(action, np.float32)
        if not np.isfinite(action).all():
            raise FloatingPointError(f"{self.name} was given the action {action}: the network that chose it has diverged")
        self._actions.append(action)
        control = self._low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (self._high - self._low)
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.action_repeat):
            timestep = self._env.step(control)
            self._frame += 1
            self.frames += 1
            reward += timestep.reward
            if not np.isfinite(reward):
                raise FloatingPointError(f"the reward of {self.name} is {reward} at frame {self.frames}")
            terminated = timestep.last() and timestep.discount == 0.0
            truncated = not terminated and (timestep.last() or self._frame == self._frame_limit)
            if terminated or truncated:  # discount 0: a terminal state; 1: only the time was up
                break
        return self._observed(timestep), float(reward), bool(terminated), bool(truncated)

    def _observed(self, timestep):
        obs = _flat(timestep.observation)
        if not np.isfinite(obs).all():  # once in a normaliser or a network, it would never leave
            raise FloatingPointError(f"the observation of {self.name} holds {obs[~np.isfinite(obs)][0]} at frame "
                                     f"{self.frames}: the physics has diverged")
        return obs

    def random_action(self):
        """Uniform in [-1, 1], (action_dim,) float32."""
        return self._random.uniform(-1.0, 1.0, self.action_dim).astype(np.float32)

    @property
    def step_seconds(self):
        """How long an agent step lasts in the simulated world."""
        return self._env.control_timestep() * self.action_repeat

    def render(self, height=480, width=640):
        """What the task's first camera sees: (height, width, 3) uint8. Needs OpenGL."""
        return self._env.physics.render(height, width, camera_id=0)

    def state(self):
        """What `restore` needs to come back to this very moment.

        The physics state alone does not do it: some tasks move the model itself at each reset, and solvers keep warm
        starts. Replaying the episode from the random state before its reset is exact on every task.
        Plain values: numbers, lists and strings.
        """
        plain = lambda state: [part.tolist() if isinstance(part, np.ndarray) else part for part in state]
        return {"start": plain(self._start), "actions": [action.tolist() for action in self._actions],
                "frames": self.frames, "random": plain(self._random.get_state())}

    def restore(self, state):
        """Back to where `state` was taken, in an Env of the same name and seed; returns the observation there."""
        self._env.task.random.set_state(tuple(state["start"]))
        obs = self.reset()
        for action in state["actions"]:
            obs = self.step(action)[0]
        self.frames = state["frames"]
        self._random.set_state(tuple(state["random"]))
        return obs


def episode_seed(seed, step, episode):
    """What an evaluation's episode depends on, as one number."""
    return int(np.random.SeedSequence([seed, step, episode]).generate_state(1)[0])


class Evaluator:
    """Plays whole episodes side by side: one call of the policy a step, for all of them.

    episode e of the evaluation at agent step t is seeded by (seed, t, e) and by nothing else. Observations of episodes
    that have ended stay in the batch, so that its shape, and with it the others' rounding, never changes.
    workers: processes that step MuJoCo, and do nothing else; 0 steps it here; None: one for every four cores of this
        process. Their number changes no result.
    """

    def __init__(self, name, episodes=10, seed=0, action_repeat=None, workers=0, make=Env):
        if workers is None:
            workers = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // 4
        self.seed, self.episodes = seed, episodes
        parts = np.array_split(np.arange(episodes), min(max(workers, 1), episodes))
        group, repeat = _WorkerEnvs if workers else _LocalEnvs, [] if action_repeat is None else [action_repeat]
        self.groups = [(part, group(make, len(part), name, seed, *repeat)) for part in parts]

    def __call__(self, act, step):
        """act: (episodes, obs_dim) -> (episodes, action_dim). Returns the episodes' returns, (episodes,)."""
        seeds = [episode_seed(self.seed, step, episode) for episode in range(self.episodes)]
        for part, group in self.groups:
            group.send("reset", [seeds[episode] for episode in part])
        obs, _, running = self._receive()
        returns = np.zeros(self.episodes)
        while running.any():
            actions = act(obs)
            for part, group in self.groups:
                group.send("step", actions[part])
            obs, rewards, running = self._receive()
            returns += rewards
        return returns

    def _receive(self):
        return tuple(np.concatenate(columns) for columns in zip(*(group.receive() for _, group in self.groups)))


class _LocalEnvs:
    """Some of the evaluation's episodes. `send` asks for a method's result, `receive` waits for it."""

    def __init__(self, make, count, *arguments):
        self.envs = [make(*arguments) for _ in range(count)]

    def send(self, method, argument):
        self._result = getattr(self, method)(argument)

    def receive(self):
        return self._result

    def reset(self, seeds):
        """Returns obs (count, obs_dim), rewards (count,), running (count,)."""
        self.obs = np.stack([env.reset(seed) for env, seed in zip(self.envs, seeds)])
        self.running = np.ones(len(self.envs), bool)
        return self.obs.copy(), np.zeros(len(self.envs)), self.running.copy()

    def step(self, actions):
        rewards = np.zeros(len(self.envs))
        for i in np.flatnonzero(self.running):
            self.obs[i], rewards[i], terminated, truncated = self.envs[i].step(actions[i])
            self.running[i] = not (terminated or truncated)
        return self.obs.copy(), rewards, self.running.copy()


class _WorkerEnvs:
    """The same, in a process of its own."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")  # a forked process would inherit CUDA, and break
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()

    def send(self, method, argument):
        with self._told_in_a_line():
            self._pipe.send((method, argument))

    def receive(self):
        with self._told_in_a_line():
            result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    @contextlib.contextmanager
    def _told_in_a_line(self):
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):  # out of memory, or killed by somebody
            self._process.join(timeout=1)
            raise ChildProcessError(f"an evaluation worker (process {self._process.pid}) died with exit status "
                                    f"{self._process.exitcode}; --eval-workers 0 does without") from None


def _serve(pipe, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: it is the run's to answer
    group = _LocalEnvs(*arguments)
    while True:
        try:
            method, argument = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return  # the run has ended
        try:
            pipe.send(getattr(group, method)(argument))
        except Exception as error:
            pipe.send(error)


def _flat(observation):
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)
