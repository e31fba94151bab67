"""Evaluation: whole episodes in lockstep, here or in worker processes.

Guarantees: an evaluation episode depends only on its seed, so neither the number of workers nor what was played before
changes a return; an error in a worker is one line.

Not in the paper, which evaluates ten episodes every 5,000 agent steps (Section 3). It needs only numpy and `envs.py`:

    from runtime.evaluator import Evaluator

    evaluate = Evaluator("cartpole-swingup", episodes=2)
    print(evaluate(lambda obs: -obs[:, :1].clip(-1, 1), step=0))          # (2,) returns
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback

import numpy as np

from envs import PhysicsError, make_env, one_line

EVALUATION_LIMIT = 100_000  # agent steps after which an evaluation episode that does not end is an error


def episode_seed(seed, step, episode):
    """The seed of an evaluation episode, as one number."""
    return int(np.random.SeedSequence([seed, step, episode]).generate_state(1)[0])


class Evaluator:
    """Plays whole episodes in lockstep: one call of the policy per step, for all of them.

    make(name, seed), or make(name, seed, action_repeat) if that is given: makes each environment. Workers pickle it.
    workers: processes that only step the simulator; 0 steps it here; None: one for every four cores of this process.
        Their number changes no result.
    diverged: episodes of the last evaluation that ended because their physics diverged; they keep their return so far.

    Episode e of the evaluation at agent step t is seeded only by (seed, t, e). Observations of episodes that have ended
    stay in the batch, so that its shape, and with it the others' rounding, never changes.
    """

    def __init__(self, name, episodes=10, seed=0, action_repeat=None, workers=0, make=make_env):
        if workers is None:
            workers = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // 4
        self.name, self.seed, self.episodes, self.diverged = name, seed, episodes, 0
        parts = np.array_split(np.arange(episodes), min(max(workers, 1), episodes))
        group, repeat = _WorkerEnvs if workers else _LocalEnvs, [] if action_repeat is None else [action_repeat]
        self.groups = [(part, group(make, len(part), name, seed, *repeat)) for part in parts]

    def __call__(self, act, step):
        """act: (episodes, *obs_shape) -> (episodes, action_dim). Returns the episodes' returns, (episodes,)."""
        seeds = [episode_seed(self.seed, step, episode) for episode in range(self.episodes)]
        for part, group in self.groups:
            group.send("reset", [seeds[episode] for episode in part])
        obs, _, running, _ = self._receive()
        returns, self.diverged = np.zeros(self.episodes), 0
        for _ in range(EVALUATION_LIMIT):
            if not running.any():
                return returns
            actions = act(obs)
            for part, group in self.groups:
                group.send("step", actions[part])
            obs, rewards, running, diverged = self._receive()
            returns += rewards
            self.diverged += int(diverged.sum())
        raise ValueError(f"an evaluation episode of {self.name} has not ended after {EVALUATION_LIMIT:,} steps: give "
                         "it a time limit (max_episode_steps, where it is registered)")

    def _receive(self):
        answers = [group.receive() for _, group in self.groups]  # of all, so that no pipe keeps one after an error
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return tuple(np.concatenate(columns) for columns in zip(*answers))


class _LocalEnvs:
    """Some of the evaluation's episodes. `send` asks for a method's result, `receive` waits for it."""

    def __init__(self, make, count, *arguments):
        self.envs = [make(*arguments) for _ in range(count)]

    def send(self, method, argument):
        self._result = getattr(self, method)(argument)

    def receive(self):
        return self._result

    def reset(self, seeds):
        """Returns obs (count, *obs_shape), rewards (count,), and whether each is running and has diverged, (count,)."""
        self.obs = np.stack([env.reset(seed) for env, seed in zip(self.envs, seeds)])
        self.running = np.ones(len(self.envs), bool)
        return self.obs.copy(), np.zeros(len(self.envs)), self.running.copy(), np.zeros(len(self.envs), bool)

    def step(self, actions):
        rewards, diverged = np.zeros(len(self.envs)), np.zeros(len(self.envs), bool)
        for i in np.flatnonzero(self.running):
            try:
                self.obs[i], rewards[i], terminated, truncated = self.envs[i].step(actions[i])
                self.running[i] = not (terminated or truncated)
            except PhysicsError:
                self.running[i], diverged[i] = False, True
        return self.obs.copy(), rewards, self.running.copy(), diverged


class _WorkerEnvs:
    """The same, in a process of its own. `receive` returns an exception instead of raising it."""

    def __init__(self, *arguments):
        try:
            arguments = pickle.dumps(arguments)
        except Exception as error:
            raise ValueError(f"evaluation workers cannot make this environment ({one_line(error)}): `make` must be a "
                             "function of a module, or functools.partial of one; workers=0 needs none") from error
        context = multiprocessing.get_context("spawn")  # a forked process would inherit CUDA, and break
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()

    def send(self, method, argument):
        with contextlib.suppress(OSError):  # a dead worker: `receive` reports it
            self._pipe.send((method, argument))

    def receive(self):
        try:
            return self._pipe.recv()
        except (EOFError, OSError):  # out of memory, or killed
            self._process.join(timeout=1)
            return ChildProcessError(f"an evaluation worker (process {self._process.pid}) died with exit status "
                                     f"{self._process.exitcode}; --eval-workers 0 does without")


def _serve(pipe, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the run answers it
    group = failure = None
    try:
        group = _LocalEnvs(*pickle.loads(arguments))
    except Exception as error:
        failure = _portable(error)
    while True:
        try:
            method, argument = pipe.recv()
            try:
                answer = failure or getattr(group, method)(argument)
            except Exception as error:
                answer = _portable(error)
            pipe.send(answer)
        except (EOFError, OSError, KeyboardInterrupt):
            return  # the run has ended


def _portable(error):
    """An exception that survives the pipe and is one line: as it is where envs.py raised it, else with its place."""
    if type(error) in (ValueError, FloatingPointError, ImportError, PhysicsError):
        return type(error)(str(error))
    error = error.__cause__ or error
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ChildProcessError(f"an evaluation worker failed with {one_line(error)} ({os.path.basename(place.filename)}, "
                             f"line {place.lineno}); --eval-workers 0 shows all of it")
