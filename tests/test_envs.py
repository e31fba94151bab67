"""Tests of envs: DeepMind Control tasks, Gymnasium environments, exact restore."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import Env, PhysicsError, make_env, task_names

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parents[1]
HAS_GYM = importlib.util.find_spec("gymnasium") is not None
needs_gym = pytest.mark.skipif(not HAS_GYM, reason=f"needs Gymnasium: {envs.GYMNASIUM}")
EITHER = pytest.mark.parametrize("name", ["cartpole-swingup", pytest.param("Hopper-v5", marks=needs_gym)])

if HAS_GYM:
    import gymnasium
    from gymnasium import spaces

    class Point(gymnasium.Env):
        """A point on a line. It starts at random, and terminates beyond 3. Its observation space is nested."""
        observation_space = spaces.Dict({
            "b": spaces.Tuple([spaces.Box(-9, 9, (2, 2)), spaces.Box(-9, 9, (1,), np.float64)]),
            "a": spaces.Box(-9, 9, ())})
        action_space = spaces.Box(np.array([[-2.0], [0.0]]), np.array([[4.0], [1.0]]), dtype=np.float64)  # (2, 1)
        broken, drift = {}, 0.0

        def observe(self):
            matrix = np.array([[1, 2], [3, self.time]], np.float32)
            return {"b": (matrix, np.array([self.x])), "a": np.float32(self.last)}

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.x, self.time, self.last = self.np_random.uniform(-1, 1) + Point.drift, 0, 0.0
            return self.observe(), {}

        def step(self, action):
            assert self.action_space.contains(action)
            if "step" in self.broken and self.time == 2:
                raise KeyError("no such joint")
            self.x, self.time, self.last = self.x + action[0, 0] / 4, self.time + 1, action[1, 0]
            return self.observe(), np.float32(self.x), bool(self.x > 3), False, {}

    def space_env(**own):
        """An environment that has only these spaces."""
        return type("Spaces", (Point,), own)()

    if "Point-v0" not in gymnasium.registry:
        register = functools.partial(gymnasium.register, order_enforce=False)
        register("Point-v0", entry_point=Point, max_episode_steps=12)
        register("Broken-v0", entry_point=functools.partial(space_env, broken={"step"}), max_episode_steps=12)
        for number, own in enumerate(REFUSED := [
                ({"action_space": spaces.Discrete(2)}, "Discrete actions"),
                ({"action_space": spaces.Box(-1, 1, (2,), np.int64)}, "Box actions"),
                ({"action_space": spaces.Box(-np.inf, np.inf, (2,))}, "unbounded actions"),
                ({"action_space": spaces.Box(-1e10, 1.0, (2,), np.float64)}, "unbounded actions"),
                ({"observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)}, "observes images"),
                ({"observation_space": spaces.Box(0, 255, (8, 8), np.uint8)}, "observes images"),
                ({"observation_space": spaces.Discrete(3)}, "observes a Discrete space"),
                ({"observation_space": spaces.Dict(a=spaces.Box(0, 1), b=spaces.MultiBinary(2))}, "MultiBinary"),
                ({"observation_space": spaces.Dict(a=spaces.Box(0, 1, (4,)))}, "observed 1 numbers")]):
            register(f"Refused{number}-v0", entry_point=functools.partial(space_env, **own[0]))
else:
    REFUSED = []


def test_dmc_action_repeat_rewards_and_observations():
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


@pytest.mark.parametrize("name, repeat, steps",
    [("cartpole-swingup", 2, 500), ("cartpole-swingup", 3, 334), ("lqr-lqr_2_1", 2, 500)])
def test_time_limit_truncates(name, repeat, steps):
    env = Env(name, action_repeat=repeat)
    env.reset()
    assert env.episode_steps == steps
    ends = [env.step(np.ones(env.action_dim))[2:] for _ in range(steps)]
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (False, True)
    assert env.frames == 1000  # 333 times 3, and once 1


def test_termination_is_not_a_time_limit():
    env = Env("lqr-lqr_2_1")
    env.reset()
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0.0  # at rest at the origin: LQR's terminal state
        env._env.physics.data.qvel[:] = 0.0
    assert env.step(np.zeros(1))[2:] == (True, False) and env.frames == 1


def test_every_task_of_the_suite_starts_or_names_opengl():
    assert {"dog-run", "ball_in_cup-catch", "humanoid_CMU-stand", "lqr-lqr_6_2"} <= set(task_names())
    for name in task_names():
        try:
            env = Env(name)
            obs, reward, _, _ = env.step(env.random_action())
            assert np.isfinite(obs).all() and np.isfinite(reward)
        except ValueError as error:
            assert name == "quadruped-escape" and "OpenGL" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("width, low", [(9.9e5, -5e5), (1e6, -1.0)])
def test_dmc_actions_without_true_bounds_stay_units(width, low, monkeypatch):
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


def test_lqr_takes_unit_actions_clips_them_and_random_actions_are_uniform():
    from dm_control import suite
    env, raw = Env("lqr-lqr_2_1", seed=3), suite.load("lqr", "lqr_2_1", task_kwargs={"random": 3})
    raw.reset()
    env.reset(), raw.reset()
    reward = env.step(np.array([0.75]))[1]
    assert reward == pytest.approx(raw.step(np.array([0.75])).reward + raw.step(np.array([0.75])).reward)
    actions = np.array([env.random_action() for _ in range(2000)])
    assert actions.dtype == np.float32 and actions.min() < -0.99 and actions.max() > 0.99 and abs(actions.mean()) < 0.05
    assert Env("lqr-lqr_2_1").random_action() != Env("lqr-lqr_2_1", seed=1).random_action()
    beyond, bound = Env("lqr-lqr_2_1", seed=1), Env("lqr-lqr_2_1", seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(beyond.step(np.array([3.0])), bound.step(np.array([1.0]))))


@needs_gym
def test_gym_observations_actions_rewards_and_ends():
    env, raw, rng = make_env("tests.test_envs:Point-v0", seed=4, action_repeat=2), Point(), np.random.RandomState(0)
    assert (env.obs_dim, env.obs_shape, env.obs_dtype, env.action_dim, env.episode_steps) == (6, (6,), np.float32, 2, 6)
    starts, ends = set(), set()
    for _ in range(40):
        obs, frames, done = env.reset(), env.frames, False
        starts.add(obs[-1])
        raw.reset(seed=env.state()["start"])
        assert obs.dtype == np.float32 and obs.tolist() == np.float32([0, 1, 2, 3, 0, raw.x]).tolist()  # "a" before "b"
        while not done:
            action = rng.uniform(-1.2, 1.2, 2).astype(np.float32)
            expected = 0.0
            for _ in range(2):
                unit = np.clip(action, -1, 1).astype(np.float64)
                _, reward, fell, _, _ = raw.step(np.array([[-2 + 3 * (unit[0] + 1)], [(unit[1] + 1) / 2]]))
                expected += reward
                if fell or raw.time == 12:
                    break
            obs, reward, terminated, truncated = env.step(action)
            assert reward == pytest.approx(expected, rel=1e-5, abs=1e-6) and type(reward) is float
            np.testing.assert_allclose(obs, [raw.last, 1, 2, 3, raw.time, raw.x], rtol=1e-5, atol=1e-6)
            assert (terminated, truncated) == (fell, raw.time == 12 and not fell)
            done = terminated or truncated
        assert env.frames == frames + raw.time
        ends.add((terminated, raw.time))
    assert len(starts) == 40 and {end for end, _ in ends} == {True, False}
    assert not np.array_equal(make_env("Point-v0", seed=5).reset(), make_env("Point-v0", seed=4).reset())


@needs_gym
def test_gym_termination_at_the_time_limit_is_a_termination(monkeypatch):
    env = make_env("Point-v0")
    env.reset()
    for _ in range(11):
        env.step(np.array([-1 / 3, 0.0]))  # the point stands still
    env._env.unwrapped.x = 3.5
    assert env.step(np.array([-1 / 3, 0.0]))[2:] == (True, False)


@needs_gym
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_gym_spaces_that_agents_cannot_use_are_refused(number):
    with pytest.raises(ValueError, match=f"Refused{number}-v0 .*{REFUSED[number][1]}") as error:
        make_env(f"Refused{number}-v0")
    assert "\n" not in str(error.value)


@needs_gym
@pytest.mark.parametrize("package, advised", [("imageio", True), ("my_simulator", False)])
def test_a_missing_part_of_gymnasium_comes_with_its_install_command(package, advised, monkeypatch):
    def make(*_, **__):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    monkeypatch.setattr("gymnasium.make", make)
    with pytest.raises(ImportError, match=f"No module named '{package}'") as error:
        make_env("Hopper-v5")
    assert ("gymnasium[mujoco]" in str(error.value)) == advised


def test_unknown_names_are_answered_with_the_nearest(monkeypatch):
    near = {"dog_run": "dog-run", "cartpole-swing": "cartpole-swingup", "reacher": "reacher-"}
    if HAS_GYM:
        near |= {"hopper-v5": "Hopper-v5", "Walker-v5": "Walker2d-v5", "hopper-hops": "hopper-hop, .*Hopper-v5",
                 "tests.test_envs:Points-v0": "tests.test_envs:Point-v0",
                 "PointsOfMine-v0": "needs its module in front", "Ant": "Ant-v5"}
    for name, nearest in near.items():
        with pytest.raises(ValueError, match=f"unknown environment '{name}': did you mean .*{nearest}"):
            make_env(name)
    with pytest.raises(ValueError, match="did you mean dog-run"):
        Env("zzzzz")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match="Gymnasium does not import .*pip install"):
        make_env("Hopper-v5")
    with pytest.raises(ValueError, match="did you mean dog-run"):
        make_env("dog_run")  # needs no Gymnasium
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match="dm_control does not import .*pip install -r requirements.txt"):
        task_names()
    if HAS_GYM:
        make_env("Pendulum-v1")  # needs no dm_control
        with pytest.raises(ImportError, match="importing no_such_package failed"):
            make_env("no_such_package:Env-v0")


@EITHER
def test_wrong_use_is_refused_in_one_line(name):
    for wrong in (3, None, ""):
        with pytest.raises(ValueError):
            make_env(wrong)
    for wrong in ({"seed": -1}, {"seed": 0.5}, {"seed": "1"}, {"action_repeat": 0}, {"action_repeat": 1.5}):
        with pytest.raises(ValueError, match=f"{list(wrong)[0]} must be a whole number") as error:
            make_env(name, **wrong)
    env = make_env(name, action_repeat=1000)
    zero = np.zeros(env.action_dim)
    for wrong in (np.zeros(env.action_dim + 1), np.zeros((1, env.action_dim)), 0.0):
        with pytest.raises(ValueError, match="takes actions of shape") as error:
            env.step(wrong)
        assert "\n" not in str(error.value)
    for wrong in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="was given the action"):
            env.step(zero + wrong)
    assert any(env.step(zero)[2:])  # all of those left the episode as it was, and this step is its whole
    with pytest.raises(ValueError, match=f"episode of {name} has ended: call reset"):
        env.step(zero)
    env.reset()
    env.step(zero)
    assert Env is envs.DMCEnv and env.frames > 1


def ops(env, count):
    """Plays on, a reset wherever an episode has ended: all that an environment returns, as bytes."""
    seen = []
    for _ in range(count):
        if env._ended:
            seen.append(env.reset().tobytes())
        else:
            action = env.random_action()
            obs, *rest = env.step(action)
            seen.append((obs.tobytes(), *rest))
            action[:], obs[:] = 9.0, 9.0  # a caller may reuse its arrays
    return seen


@pytest.mark.parametrize("name, repeat, stops", [
    ("walker-walk", 125, (6, 7, 8)), ("finger-turn_hard", 125, (6, 7, 8)), ("fish-swim", 125, (0, 7)),
    ("lqr-lqr_6_2", 125, (1, 7)), ("cartpole-swingup", 2, (0, 17)),
    *(pytest.param(name, repeat, range(30), marks=needs_gym) for name, repeat in (
        ("Hopper-v5", None), ("Walker2d-v5", 2), ("Humanoid-v5", None), ("Point-v0", None)))])
def test_restore_is_exact_at_every_moment_of_an_episode(name, repeat, stops):
    """With repeat 125 an episode has 8 steps: stops before its last step, after it, and at the next episode's start."""
    env, states, seen = make_env(name, seed=1, action_repeat=repeat), {}, []
    env.reset()
    for op in range(30):
        if op in stops:
            states[op] = json.dumps(env.state()), env._obs, env.frames, env._ended
        seen += ops(env, 1)
    seen += ops(env, 12)
    assert name == "cartpole-swingup" or any(isinstance(item, bytes) for item in seen)  # episodes end among them
    other = make_env(name, seed=1, action_repeat=repeat)
    for op, (state, obs, frames, ended) in states.items():
        assert other.restore(json.loads(state)).tobytes() == obs.tobytes()
        assert (other.frames, other._ended, other.restore_warning) == (frames, ended, None)
        assert json.dumps(other.state()) == state and ops(other, 12) == seen[op:op + 12]


@needs_gym
@pytest.mark.parametrize("stop", [3, 11])
def test_environment_that_is_not_repeatable_is_reported(stop, monkeypatch):
    env = make_env("Point-v0", seed=2)
    env.reset()
    for _ in range(stop):
        env.step(np.array([-1 / 3, 0.5]))
    state = env.state()
    monkeypatch.setattr(Point, "drift", 0.01)
    other = make_env("Point-v0", seed=2)
    obs = other.restore(state)
    assert obs[-1] == pytest.approx(state["obs"][-1] + 0.01)
    assert other.restore_warning.startswith("Point-v0 is not repeatable") and "\n" not in other.restore_warning
    assert len(other.state()["actions"]) == stop and other.frames == stop
    monkeypatch.setattr(Point, "drift", 4.0)  # its episode now ends at once: a new one begins
    if stop == 11:
        other.restore(state)
        assert other.restore_warning and other.state()["actions"] == [] and not other._ended
    monkeypatch.setattr(Point, "drift", 0.0)
    other.restore(state)
    assert other.restore_warning is None
    del state["obs"]  # as an older version saved it
    assert other.restore(state).shape == (6,) and other.restore_warning is None


@EITHER
def test_diverged_physics_discards_an_episode(name):
    env = make_env(name, seed=3)
    env.reset()
    first = [env.step(env.random_action()) for _ in range(4)]
    state = env.state()
    world = env._env.physics if name == "cartpole-swingup" else env._env.unwrapped
    world.data.qvel[:] = 1e30
    with pytest.raises(PhysicsError, match=f"{name} diverged at frame") as error:
        env.step(env.random_action())
    assert "\n" not in str(error.value) and isinstance(error.value, FloatingPointError)
    with pytest.raises(ValueError, match="call reset"):
        env.step(env.random_action())
    assert env.state()["actions"] == state["actions"]  # the step that diverged is not replayed by a resume
    env.reset()
    assert all(np.isfinite(env.step(env.random_action())[0]).all() for _ in range(4))
    obs = make_env(name, seed=3).restore(state)
    assert np.array_equal(obs, first[-1][0])


@EITHER
def test_observations_and_rewards_that_are_not_finite_are_errors(name, monkeypatch):
    for method, where, message in (("_flatten", lambda value: value * np.nan, "observation of .* holds nan"),
                                   ("_step", lambda value: (value[0], np.inf, *value[2:]), "reward of .* is inf")):
        env = make_env(name)
        plain = getattr(env, method)
        env.step(env.random_action())
        monkeypatch.setattr(env, method, lambda *of: where(plain(*of)))
        with pytest.raises(FloatingPointError, match=message):
            env.step(env.random_action())


def test_discrete_dmc_actions_are_refused(monkeypatch):
    from dm_control.rl import control
    from dm_env import specs
    monkeypatch.setattr(control.Environment, "action_spec", lambda self: specs.DiscreteArray(3))
    with pytest.raises(ValueError, match="cartpole-swingup has discrete actions"):
        Env("cartpole-swingup")


def python(code, **variables):
    """What a line of Python prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120,
                            env=os.environ | variables)
    return result.stdout.splitlines(), result.stderr


@EITHER
def test_mujoco_gl_is_named_where_opengl_fails(name):
    made = f"""
import envs
try:
    env = envs.make_env({name!r})
    env.render()
except (ImportError, ValueError) as error:
    print(type(error).__name__, error)
"""
    (line,), _ = python(made, MUJOCO_GL="wrong")
    assert line.startswith("ImportError MUJOCO_GL=wrong does not work here") and "pip" not in line
    (line,), _ = python(made, MUJOCO_GL="disable")
    assert line.startswith(f"ValueError {name} cannot be drawn here") and "MUJOCO_GL=egl" in line and "pip" not in line


@needs_gym
def test_gym_render_replays_to_the_same_moment():
    env, other = make_env("Pendulum-v1", seed=1), make_env("Pendulum-v1", seed=1)
    if importlib.util.find_spec("pygame") is None:
        pytest.skip("drawing Pendulum-v1 needs pygame")
    assert ops(env, 5) == ops(other, 5)
    assert env.render(20, 30).shape == (20, 30, 3) and ops(env, 5) == ops(other, 5)


def test_example_of_an_own_environment_and_loop_learns(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "examples")
    import own_environment
    returns = own_environment.main(total_steps=1500, random_steps=250)
    assert max(returns[:8]) < 38 and np.mean(returns[-3:]) > 43  # of at most 50; seeds 0 to 3 reach 45 to 49
