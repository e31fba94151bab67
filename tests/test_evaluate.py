"""Tests of evaluate."""

import contextlib
import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
from runtime import checkpoint
import evaluate as watch

import envs
import train
from tests.helpers import flags_to_args, in_process, table, tiny_run


@pytest.mark.slow
def test_a_finished_run_is_evaluated_as_it_was(tmp_path, monkeypatch, capsys):
    log = str(tmp_path / "output")
    assert in_process([*tiny_run("sac"), "--runs", str(tmp_path)], log) == 0, open(log).read()
    run = tmp_path / "run"
    watch.run(watch.Args(str(run), episodes=1, seed=0, device="cpu", threads=1))
    assert f"step 130: return {float(table(run, 'eval.csv')[-1]['return']):.1f}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "imageio", None)
    for change, word in (({"video": str(tmp_path / "a.mp4")}, "pip install imageio"), ({"video": "a.gif"}, ".mp4"),
                         ({"run": str(tmp_path)}, "config.json"), ({"episodes": 0}, "--episodes")):
        with pytest.raises((ValueError, OSError, ImportError), match=word):
            watch.run(watch.Args(**({"run": str(run), "device": "cpu", "threads": 1} | change)))


def test_a_film_is_one_episode_at_the_speed_of_the_task():
    frames, told, actions = [], [], iter([[0.5], [0.25], [1.0]])
    writer = types.SimpleNamespace(append_data=frames.append)
    imageio = types.SimpleNamespace(get_writer=lambda *of, **named: contextlib.nullcontext(told.append((of, named)) or writer))
    steps = iter([(np.array([1.0]), 2.0, False, False), (np.array([2.0]), 3.0, False, False), (np.array([3.0]), 4.0, False, True)])
    env = types.SimpleNamespace(reset=lambda seed: told.append(seed) or np.array([0.0]), step_seconds=0.05, render=lambda *size: (len(frames), size),
                                step=lambda action: told.append(action.tolist()) or next(steps))
    act = lambda obs: told.append(obs.tolist()) or np.array([next(actions)])
    assert watch.film(imageio, env, act, 7, "a.mp4", height=4, width=6) == 9
    assert told == [7, (("a.mp4",), {"fps": 20}), [[0.0]], [0.5], [[1.0]], [0.25], [[2.0]], [1.0]] and frames == [(n, (4, 6)) for n in range(3)]


def test_a_run_is_evaluated_on_its_own_seeds_and_as_far_as_it_came(tmp_path, monkeypatch, capsys):
    args, told = flags_to_args("--algo", "sac", "--env", "cartpole-swingup", "--seed", "3"), []
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    checkpoint.Checkpoints(str(tmp_path)).save(7000, {"agent": {"networks": {}}}, wait=True)
    assert watch.load(str(tmp_path))[1]["step"] == 7000  # not ended: where it stands
    for name in ("import_imageio", "check_drawing", "restore"):
        monkeypatch.setattr(watch, name, lambda *of: None)
    monkeypatch.setattr("agents.build_agent", lambda *of, **named: None)
    monkeypatch.setattr("envs.make_env", lambda *of: told.append(of) or types.SimpleNamespace(obs_dim=5, action_dim=1))
    monkeypatch.setattr("envs.Evaluator", lambda *of, make: told.append(of[:3]) or (lambda act, step: np.array([step])))
    monkeypatch.setattr(watch, "film", lambda imageio, env, act, seed, path: told.append(seed) or 1.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for path, seed, used in ((tmp_path, 3, 3), (tmp_path / "config.json", None, 3 + watch.FRESH_SEEDS)):
        told.clear()
        watch.run(watch.Args(str(path), episodes=2, seed=seed, device="cpu", video="a.mp4"))
        assert told == [("cartpole-swingup", 3, None), ("cartpole-swingup", 2, used), envs.episode_seed(used, 7000, 0)]
    assert "return 7000.0" in capsys.readouterr().out
