"""Tests of envs."""

import itertools
import math
import os
import sys

import numpy as np
import pytest

import envs
import train
from envs import Env, Evaluator, task_names
from tests.helpers import SHORT


@pytest.mark.slow
def test_action_repeat_rewards_observations_and_the_time_limit():
    from dm_control import suite
    env = Env("quadruped-walk", seed=4)  # its actions reach from -1 to 1.1 in places
    raw = suite.load("quadruped", "walk", task_kwargs={"random": 4})
    spec, rng = raw.action_spec(), np.random.RandomState(0)
    raw.reset()  # Env has reset once to learn its sizes
    obs, timestep = env.reset(), raw.reset()
    flat = lambda t: np.concatenate([np.ravel(v) for v in t.observation.values()]).astype(np.float32)
    np.testing.assert_array_equal(obs, flat(timestep))
    for _ in range(20):
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        rewards = [raw.step(spec.minimum + (action + 1.0) / 2 * (spec.maximum - spec.minimum)) for _ in range(2)]
        obs, reward, terminated, truncated = env.step(action)
        assert reward == pytest.approx(sum(t.reward for t in rewards)) and not terminated and not truncated
        np.testing.assert_array_equal(obs, flat(rewards[-1]))
    assert env.frames == 40 and obs.dtype == np.float32 and obs.shape == (env.obs_dim,)


@pytest.mark.parametrize("name, repeat, steps", [("cartpole-swingup", 2, 500), ("cartpole-swingup", 3, 334), ("lqr-lqr_2_1", 2, 500)])
@pytest.mark.slow
def test_a_time_limit_truncates_and_an_episode_stops_where_it_ends(name, repeat, steps):
    env = Env(name, action_repeat=repeat)
    env.reset()
    ends = [env.step(np.ones(env.action_dim))[2:] for _ in range(steps)]
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (False, True)
    assert env.frames == 1000  # 333 times 3, and once 1


def test_a_termination_is_told_from_a_time_limit():
    env = Env("lqr-lqr_2_1")
    env.reset()
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0.0  # at rest at the origin: LQR's terminal state
        env._env.physics.data.qvel[:] = 0.0
    assert env.step(np.zeros(1))[2:] == (True, False) and env.frames == 1


@pytest.mark.slow
def test_every_task_of_the_suite_starts_or_says_why_not():
    assert {"dog-run", "ball_in_cup-catch", "humanoid_CMU-stand", "lqr-lqr_6_2"} <= set(task_names())
    for name in task_names():
        try:
            env = Env(name)
            obs, reward, _, _ = env.step(env.random_action())
            assert np.isfinite(obs).all() and np.isfinite(reward)
        except ValueError as error:
            assert name == "quadruped-escape" and "OpenGL" in str(error) and "\n" not in str(error)
    with pytest.raises(ValueError, match="did you mean dog-run or"):
        Env("dog_run")


@pytest.mark.slow
@pytest.mark.parametrize("width, low", [(9.9e5, -5e5), (1e6, -1.0)])
def test_actions_without_true_bounds_stay_units(width, low, monkeypatch):
    suite = envs._suite()
    load = suite.load

    def with_bounds(*of, **named):
        env = load(*of, **named)
        spec = env.action_spec().replace(minimum=-5e5, maximum=width - 5e5)
        env.action_spec = lambda: spec
        return env

    monkeypatch.setattr(suite, "load", with_bounds)
    env = Env("cartpole-swingup")
    assert (env._low, env._high) == (low, 1.0 if low == -1 else width - 5e5)


def test_a_broken_dm_control_is_told_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r"dm_control does not import \(ModuleNotFoundError: .*pip install -r requirements.txt$"):
        task_names()


@pytest.mark.slow
def test_discrete_actions_and_broken_observations_are_refused(monkeypatch, tmp_path):
    from dm_control.rl import control
    from dm_env import specs
    monkeypatch.setattr(control.Environment, "action_spec", lambda self: specs.DiscreteArray(3))
    with pytest.raises(ValueError, match="cartpole-swingup has discrete actions") as error:
        Env("cartpole-swingup")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    flat, calls = envs._flat, itertools.count()
    monkeypatch.setattr(envs, "_flat", lambda observation: flat(observation) * (math.nan if next(calls) == 30 else 1))
    env = Env("cartpole-swingup")
    with pytest.raises(FloatingPointError, match="observation of cartpole-swingup holds nan"):
        for _ in range(40):
            env.step(env.random_action())
    calls = itertools.count(-1100)  # past the first evaluation
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs", str(tmp_path), "--algo", "sac", *SHORT[:-2]])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert "holds nan" in str(stopped.value) and len(str(stopped.value).strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["walker-walk", "finger-turn_hard", "fish-swim", "lqr-lqr_6_2"])
@pytest.mark.slow
def test_an_env_returns_exactly_to_a_saved_moment(name):
    env, other = Env(name, seed=1), Env(name, seed=1)
    env.reset(), env.reset()
    for _ in range(6):
        env.step(env.random_action())
    state = env.state()
    ahead = [env.step(env.random_action()) for _ in range(10)]
    other.restore(state)
    assert other.frames == 12
    for (obs, reward, *_), (obs2, reward2, *_) in zip(ahead, [other.step(other.random_action()) for _ in range(10)]):
        assert np.array_equal(obs, obs2) and reward == reward2


@pytest.mark.slow
def test_evaluation_episodes_depend_on_their_seed_alone():
    act = lambda obs: np.sin(7 * obs[:, :1])
    five, two = Evaluator("cartpole-swingup", 5, seed=3), Evaluator("cartpole-swingup", 2, seed=3)
    returns = five(act, step=10)
    np.testing.assert_array_equal(five(act, step=10), returns)  # whatever was played before
    np.testing.assert_array_equal(two(act, step=10), returns[:2])
    np.testing.assert_array_equal(Evaluator("cartpole-swingup", 5, seed=3, workers=2)(act, step=10), returns)
    assert np.array_equal(*(Evaluator("cartpole-swingup", 2, **own)(act, step=10) for own in ({}, {"seed": 0, "workers": 0})))
    assert len(set(returns)) == 5 and not np.array_equal(five(act, step=20), returns)
    env, total, done = Env("cartpole-swingup"), 0.0, False
    obs = env.reset(int(np.random.SeedSequence([3, 10, 4]).generate_state(1)[0]))
    while not done:
        obs, reward, terminated, truncated = env.step(act(obs[None])[0])
        total, done = total + reward, terminated or truncated
    assert returns[4] == pytest.approx(total)


class ScriptedEnv:
    """Stands in for Env: from each seed an episode of another length, and a reward for each action taken."""
    made = []

    def __init__(self, name, seed, action_repeat):
        self.made.append((name, seed, action_repeat))

    def reset(self, seed):
        self.left, self.total = 3 + seed % 5, 0
        return np.array([self.left, 0], np.float32)

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        return np.array([self.left, float(action[0])], np.float32), float(action[0]), self.left == 0 and action[0] > 2, self.left == 0 and action[0] <= 2


def test_episodes_of_an_evaluation_end_each_at_its_own_time(monkeypatch):
    monkeypatch.setattr(envs, "Env", ScriptedEnv)
    evaluation, seen = Evaluator("task", 4, seed=2, action_repeat=3), []

    def act(obs):
        seen.append(obs.copy())
        return np.full((4, 1), len(seen), np.float32)

    returns = evaluation(act, step=9)
    assert ScriptedEnv.made == [("task", 2, 3)] * 4
    lengths = [3 + int(np.random.SeedSequence([2, 9, episode]).generate_state(1)[0]) % 5 for episode in range(4)]
    assert len(set(lengths)) > 1 and returns.tolist() == [sum(range(1, n + 1)) for n in lengths]  # the k-th action pays k
    assert len(seen) == max(lengths)
    for k, obs in enumerate(seen):  # who has ended stays where it ended
        assert obs.tolist() == [[n - min(k, n), min(k, n)] for n in lengths]


@pytest.mark.slow
def test_lqr_takes_unit_actions_and_random_actions_are_uniform():
    from dm_control import suite
    env, raw = Env("lqr-lqr_2_1", seed=3), suite.load("lqr", "lqr_2_1", task_kwargs={"random": 3})  # its bounds are ±1e10
    raw.reset()
    env.reset(), raw.reset()
    reward = env.step(np.array([0.75]))[1]
    assert reward == pytest.approx(raw.step(np.array([0.75])).reward + raw.step(np.array([0.75])).reward)
    actions = np.array([env.random_action() for _ in range(2000)])
    assert actions.dtype == np.float32 and actions.min() < -0.99 and actions.max() > 0.99 and abs(actions.mean()) < 0.05
    assert Env("lqr-lqr_2_1").random_action() != Env("lqr-lqr_2_1", seed=1).random_action()


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_one_line():
    evaluation = Evaluator("cartpole-swingup", 2, workers=1)

    def act(obs):
        evaluation.groups[0][1]._process.kill()
        return np.zeros((2, 1))
    with pytest.raises(ChildProcessError, match=r"an evaluation worker \(process \d+\) died with exit status -9; --eval-workers 0"):
        evaluation(act, step=0)


@pytest.mark.slow
def test_a_worker_for_every_four_cores(monkeypatch):
    monkeypatch.setattr(envs, "_WorkerEnvs", envs._LocalEnvs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [len(part) for part, _ in Evaluator("cartpole-swingup", 4, workers=None).groups] == [2, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert len(Evaluator("cartpole-swingup", 4, workers=None).groups) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))  # and none without an episode
    assert [len(part) for part, _ in Evaluator("cartpole-swingup", 4, workers=None).groups] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_step_lasts_as_long_as_its_frames():
    assert [Env("cartpole-swingup", action_repeat=repeat).step_seconds for repeat in (2, 3)] == pytest.approx([0.02, 0.03])


@pytest.mark.slow
def test_actions_beyond_their_bounds_are_clipped():
    beyond, bound = Env("lqr-lqr_2_1", seed=1), Env("lqr-lqr_2_1", seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(beyond.step(np.array([3.0])), bound.step(np.array([1.0]))))
