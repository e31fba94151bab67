"""Tests of evaluation: episodes depend only on their seeds; workers change nothing; errors in one line."""

import functools
import os

import numpy as np
import pytest

from envs import Env, PhysicsError
from runtime import evaluator
from runtime.evaluator import Evaluator
from tests.test_envs import EITHER, needs_gym

pytestmark = pytest.mark.slow


def test_evaluation_episodes_depend_only_on_their_seed():
    act = lambda obs: np.sin(7 * obs[:, :1])
    five, two = Evaluator("cartpole-swingup", 5, seed=3), Evaluator("cartpole-swingup", 2, seed=3)
    returns = five(act, step=10)
    np.testing.assert_array_equal(five(act, step=10), returns)  # whatever was played before
    np.testing.assert_array_equal(two(act, step=10), returns[:2])
    np.testing.assert_array_equal(Evaluator("cartpole-swingup", 5, seed=3, workers=2)(act, step=10), returns)
    default = Evaluator("cartpole-swingup", 2)
    given = Evaluator("cartpole-swingup", 2, seed=0, action_repeat=2, workers=0)
    np.testing.assert_array_equal(default(act, step=10), given(act, step=10))
    assert len(set(returns)) == 5 and not np.array_equal(five(act, step=20), returns)
    env, total, done = Env("cartpole-swingup"), 0.0, False
    obs = env.reset(int(np.random.SeedSequence([3, 10, 4]).generate_state(1)[0]))
    while not done:
        obs, reward, terminated, truncated = env.step(act(obs[None])[0])
        total, done = total + reward, terminated or truncated
    assert returns[4] == pytest.approx(total)


class ScriptedEnv:
    """Episodes whose length depends on their seed; each action is its own reward."""
    made = []

    def __init__(self, name, seed, action_repeat):
        self.made.append((name, seed, action_repeat))

    def reset(self, seed):
        self.left, self.total = 3 + seed % 5, 0
        return np.array([self.left, 0], np.float32)

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        return np.array([self.left, float(action[0])], np.float32), float(action[0]), \
            self.left == 0 and action[0] > 2, self.left == 0 and action[0] <= 2


def test_evaluation_episodes_end_at_different_steps():
    evaluation, seen = Evaluator("task", 4, seed=2, action_repeat=3, make=ScriptedEnv), []

    def act(obs):
        seen.append(obs.copy())
        return np.full((4, 1), len(seen), np.float32)

    returns = evaluation(act, step=9)
    assert ScriptedEnv.made == [("task", 2, 3)] * 4
    lengths = [3 + int(np.random.SeedSequence([2, 9, episode]).generate_state(1)[0]) % 5 for episode in range(4)]
    assert len(set(lengths)) > 1 and returns.tolist() == [sum(range(1, n + 1)) for n in lengths]
    assert len(seen) == max(lengths)
    for k, obs in enumerate(seen):  # an ended episode keeps its last observation
        assert obs.tolist() == [[n - min(k, n), min(k, n)] for n in lengths]


@EITHER
def test_workers_change_no_result(name):
    assert np.array_equal(*(Evaluator(name, 3, seed=1, workers=workers)(wave, step=5) for workers in (0, 2)))


def wave(obs):
    return np.sin(7 * obs[:, :1]).repeat({5: 1, 6: 2, 11: 3}[obs.shape[1]], axis=1)


class Frames:
    """Whatever an environment observes is stacked as it is: here uint8 frames."""

    def __init__(self, name, seed, size=4):
        self.size = size

    def reset(self, seed):
        self.time = 0
        return np.full((self.size, 2, 3), 7, np.uint8)

    def step(self, action):
        self.time += 1
        return np.full((self.size, 2, 3), self.time, np.uint8), 2.0, False, self.time == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluator_takes_a_factory_and_any_observations(workers):
    seen = []
    evaluation = Evaluator("task", 3, workers=workers, make=functools.partial(Frames, size=5))
    assert evaluation(lambda obs: seen.append(obs) or np.zeros((3, 1)), step=0).tolist() == [6, 6, 6]
    assert [obs.max() for obs in seen] == [7, 1, 2]
    assert all(obs.shape == (3, 5, 2, 3) and obs.dtype == np.uint8 for obs in seen)


class Fails(Frames):
    """Fails in a chosen way: `make_failing` is what a worker is given."""

    def __init__(self, name, seed, error, where):
        self.size, self.error, self.where = 1, error, where
        if where == "make":
            raise error

    def step(self, action):
        if self.where == "always" or self.where == "once" and action[0] == 1:
            raise self.error
        return super().step(action)


@pytest.mark.parametrize("error, where, kind, message", [
    (KeyError("a\nb"), "always", ChildProcessError, r"worker failed with KeyError: .* \(test_evaluator.py, line \d+\)"),
    (AssertionError(), "make", ChildProcessError, r"failed with AssertionError \(test_evaluator.py"),
    (ValueError("no such task"), "make", ValueError, "^no such task$"),
    (FloatingPointError("the reward is nan"), "always", FloatingPointError, "^the reward is nan$")])
def test_worker_errors_are_one_line(error, where, kind, message):
    evaluation = Evaluator("task", 2, workers=2, make=functools.partial(Fails, error=error, where=where))
    with pytest.raises(kind, match=message) as raised:
        evaluation(lambda obs: np.zeros((2, 1)), step=0)
    assert len(str(raised.value).splitlines()) == 1


def test_evaluation_works_again_after_an_error():
    evaluation = Evaluator("task", 2, workers=2, make=functools.partial(Fails, error=ValueError("x"), where="once"))
    with pytest.raises(ValueError):
        evaluation(lambda obs: np.array([[1.0], [0.0]]), step=0)  # the second worker's answer must not wait in its pipe
    seen = []
    assert evaluation(lambda obs: seen.append(obs[:, 0, 0, 0].tolist()) or np.zeros((2, 1)), step=0).tolist() == [6, 6]
    assert seen == [[7, 7], [1, 1], [2, 2]]


@needs_gym
def test_errors_in_the_code_of_a_gym_environment_keep_their_place():
    with pytest.raises(RuntimeError, match="Broken-v0 failed in step: KeyError: 'no such joint'") as error:
        Evaluator("Broken-v0", 1)(wave, step=0)
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(ChildProcessError, match=r"failed with KeyError: 'no such joint' \(test_envs.py, line \d+\)"):
        Evaluator("tests.test_envs:Broken-v0", 1, workers=1)(wave, step=0)


def test_diverged_evaluation_episodes_keep_their_return_and_are_counted():
    evaluation = Evaluator("task", 2, make=functools.partial(Fails, error=PhysicsError("x"), where="once"))
    assert evaluation(lambda obs: np.array([[0.0], [float(obs[1, 0, 0, 0] == 1)]]), step=0).tolist() == [6, 2]
    assert evaluation.diverged == 1
    assert evaluation(lambda obs: np.zeros((2, 1)), step=0).tolist() == [6, 6] and evaluation.diverged == 0


def test_dead_worker_is_one_line():
    evaluation = Evaluator("task", 2, workers=1, make=Frames)

    def act(obs):
        evaluation.groups[0][1]._process.kill()
        return np.zeros((2, 1))
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"worker \(process \d+\) died with exit status -9"):
            evaluation(act, step=0)


def test_factory_that_cannot_be_pickled_and_endless_episodes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="must be a function of a module"):
        Evaluator("task", 2, workers=1, make=lambda *of: None)
    monkeypatch.setattr(evaluator, "EVALUATION_LIMIT", 2)
    with pytest.raises(ValueError, match="of task has not ended after 2 steps"):
        Evaluator("task", 1, make=Frames)(lambda obs: np.zeros((1, 1)), step=0)


def test_default_is_one_worker_per_four_cores(monkeypatch):
    monkeypatch.setattr(evaluator, "_WorkerEnvs", evaluator._LocalEnvs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [len(part) for part, _ in Evaluator("cartpole-swingup", 4, workers=None).groups] == [2, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert len(Evaluator("cartpole-swingup", 4, workers=None).groups) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))  # and none without an episode
    assert [len(part) for part, _ in Evaluator("cartpole-swingup", 4, workers=None).groups] == [1, 1, 1, 1]
