"""Tests of rendering, and of whole runs from pixels. What draws runs in processes of its own, with MUJOCO_GL=egl."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import rendering
from envs import Env
from rendering import PixelEnv
from runtime import checkpoint
from tests.helpers import HERE, table, timeless

IN_EGL = os.environ.get("MUJOCO_GL") == "egl"  # MuJoCo reads it once, when it is imported


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"})


@functools.cache
def fault():
    """Why nothing can be drawn here; empty if something can."""
    tried = python("-c", "from rendering import make_pixel_env; make_pixel_env(36, 1, 'cartpole-balance').renderer()")
    return tried.returncode and tried.stderr.strip().splitlines()[-1]


@pytest.fixture
def egl():
    if fault():
        pytest.skip(f"nothing can be drawn here: {fault()}")


@pytest.fixture
def walker():
    """A walker that is drawn in this process."""
    if not IN_EGL:
        pytest.skip("needs MUJOCO_GL=egl from the start: test_drawing_in_a_process_of_its_own runs it")
    return PixelEnv(Env("walker-walk", seed=3), size=36, stack=3)


@pytest.mark.slow
@pytest.mark.skipif(IN_EGL, reason="the tests that it runs are run here")
def test_drawing_in_a_process_of_its_own(egl):
    result = python("-m", "pytest", "-q", "-k", "drawn", "tests/test_rendering.py")
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout


KILLED = """
import os, signal, sys
import rendering, train
step, count = rendering.PixelEnv.step, [0]
def dies(env, action):
    count[0] += 1
    if count[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(env, action)
rendering.PixelEnv.step = dies
sys.argv = ["train.py", *{flags}]
train.main()
"""


@pytest.mark.slow
def test_killed_pixel_run_resumes_exactly(egl, tmp_path):
    """Episodes of 20 agent steps. Saved at step 50 and killed at 66, both in the middle of an episode."""
    flags = ["--pixels", "--image-size", "36", "--env", "cartpole-balance", "--action-repeat", "50", "--mst",
             "--encoder-regime", "dst", "--width-scale", "0.05", "--batch-size", "16", "--total-steps", "90",
             "--learning-starts", "30", "--eval-every", "45", "--eval-episodes", "2", "--log-every", "15",
             "--save-every", "50", "--target-update-freq", "20", "--update-interval", "15", "--buffer-size", "80",
             "--device", "cpu", "--threads", "1", "--name", "run"]
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    first = python("train.py", *flags, "--runs", str(whole.parent), "--eval-workers", "1")
    assert first.returncode == 0, first.stderr
    assert "3 of 36×36 pixels per observation" in first.stdout and "convs.0 " in first.stdout
    own = [*flags, "--runs", str(killed.parent), "--eval-workers", "0", "--resume"]
    at = 80 + 66  # steps of two evaluations before, and of the run
    assert python("-c", KILLED.format(at=at, flags=own)).returncode == -signal.SIGKILL
    config = json.loads((killed / "config.json").read_text())
    (killed / "config.json").write_text(json.dumps(config | {"renderer": "another"}))
    second = python("train.py", *own)
    assert second.returncode == 0 and "resumes at step 50" in second.stderr + second.stdout, second.stderr
    assert "earlier frames of this run were drawn by another: new ones may differ in bits" in second.stdout
    assert timeless(whole) == timeless(killed) and len(table(whole, "eval.csv")) == 3
    weights = [checkpoint.read(str(run / "final.pt"))[0]["networks"] for run in (whole, killed)]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
    played = python("evaluate.py", str(whole), "--seed", "0", "--episodes", "2")
    assert f"return {float(table(whole, 'eval.csv')[-1]['return']):.1f} " in played.stdout, played.stderr


def test_gymnasium_environments_are_refused_in_one_line():
    class Gym:
        name, _env = "Hopper-v5", object()
    with pytest.raises(ValueError, match="--pixels draws DeepMind Control tasks, and Hopper-v5 is none"):
        PixelEnv(Gym())


@pytest.mark.slow
def test_drawn_env_stacks_one_frame_per_step(walker):
    drawn, draw = [], walker._draw
    walker._draw = lambda: drawn.append(draw()) or drawn[-1]
    plain = Env("walker-walk", seed=3)
    plain.reset()
    obs = walker.reset()
    assert obs.shape == walker.obs_shape == (9, 36, 36) and obs.dtype == np.uint8 and obs.std() > 5
    assert (obs[:3] == obs[3:6]).all() and (obs[:3] == obs[6:]).all()
    for step in range(4):
        action = walker.random_action()
        obs, *rest = walker.step(action)
        assert rest == list(plain.step(action)[1:])  # drawing does not touch the physics
        np.testing.assert_array_equal(obs, np.concatenate([drawn[max(0, k)] for k in range(step - 1, step + 2)]))
    assert len(drawn) == 5 and walker.frames == 8
    assert walker.render(48, 64).shape == (48, 64, 3)  # as a video has it
    assert walker.step(action)[0].shape == (9, 36, 36)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_drawn_restore_is_exact_and_draws_only_the_last_stack(walker, steps):
    other = PixelEnv(Env("walker-walk", seed=3), size=36, stack=3)
    obs = walker.reset()
    for _ in range(steps):
        obs = walker.step(walker.random_action())[0]
    drawn, draw = [], other._draw
    other._draw = lambda: drawn.append(draw()) or drawn[-1]
    np.testing.assert_array_equal(other.restore(walker.state()), obs)
    assert len(drawn) == min(steps, 2) + 1 and other.frames == walker.frames
    action = walker.random_action()
    np.testing.assert_array_equal(other.random_action(), action)
    for one, two in zip(walker.step(action), other.step(action)):
        np.testing.assert_array_equal(one, two)


def test_renderer_is_egl_then_osmesa_then_one_line(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering.choose_renderer() == "glfw"  # the user's choice
    for libraries, chosen in ((("EGL", "OSMesa"), "egl"), (("OSMesa",), "osmesa")):
        monkeypatch.delenv("MUJOCO_GL")
        monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda name: name if name in libraries else None)
        assert rendering.choose_renderer() == chosen == os.environ["MUJOCO_GL"]
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ImportError, match="--pixels needs OpenGL: install Mesa's EGL"):
        rendering.choose_renderer()
