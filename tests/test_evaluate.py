"""Tests of evaluating, measuring and filming: `evaluate.py`."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

import envs
import evaluate
from runtime import checkpoint, evaluator
from tests.helpers import Recorder, args_with, in_process, refuses, run_main, table, tiny_of, tiny_run


@pytest.mark.slow
def test_finished_run_is_evaluated_as_it_was(tmp_path, monkeypatch, capsys):
    """With its own seed and number of episodes; by default, with episodes that training never had."""
    log, run = str(tmp_path / "output"), tmp_path / "run"
    flags = [*tiny_run("sac"), "--env", "cartpole-balance", "--runs", str(tmp_path)]
    assert in_process(flags, log) == 0, open(log).read()

    def evaluated(*flags):
        return run_main(evaluate, monkeypatch, capsys, *flags, "--device", "cpu", "--threads", "1", "--eval-workers",
                        "0")

    last = f"return {float(table(run, 'eval.csv')[-1]['return']):.1f}"
    for path in (run, run / "final.pt"):
        assert last in evaluated(path, "--seed", "0", "--episodes", "1")[1][0]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"precision": "tf32"}))  # as if trained on a GPU
    assert last in evaluated(run, "--seed", "0", "--episodes", "1")[1][0]
    fresh = evaluated(run, "--episodes", "2")[1][0]
    assert last not in fresh and evaluated(run, "--episodes", "2", "--seed", str(10 ** 6))[1][0] == fresh
    assert evaluated(run, "--episodes", "2", "--seed", "7")[1][0] != fresh
    monkeypatch.setitem(sys.modules, "imageio", None)
    for flags, word in (([run, "--video", "a.mp4"], "pip install imageio"), ([run, "--video", "a.gif"], ".mp4"),
                        ([run, "--episodes", "0"], "--episodes"), ([tmp_path], "config.json")):
        line = evaluated(*flags)[0]
        assert isinstance(line, str) and word in line and "\n" not in line
    (run / "final.pt").write_bytes((run / "final.pt").read_bytes()[:-100])
    assert "final.pt" in evaluated(run)[0]


def test_film_is_one_episode_at_the_speed_of_the_task():
    frames, calls, actions = [], [], iter([[0.5], [0.25], [1.0]])
    writer = argparse.Namespace(append_data=frames.append)
    imageio = argparse.Namespace(
        get_writer=lambda *of, **named: contextlib.nullcontext(calls.append((of, named)) or writer))
    steps = iter([(np.array([1.0]), 2.0, False, False), (np.array([2.0]), 3.0, False, False),
                  (np.array([3.0]), 4.0, False, True)])
    env = argparse.Namespace(reset=lambda seed: calls.append(seed) or np.array([0.0]), step_seconds=0.05,
                             render=lambda *size: (len(frames), size),
                             step=lambda action: calls.append(action.tolist()) or next(steps))
    act = lambda obs: calls.append(obs.tolist()) or np.array([next(actions)])
    assert evaluate.film(imageio, env, act, 7, "a.mp4", height=4, width=6) == 9
    assert calls == [7, (("a.mp4",), {"fps": 20}), [[0.0]], [0.5], [[1.0]], [0.25], [[2.0]], [1.0]]
    assert frames == [(n, (4, 6)) for n in range(3)]


def test_unfinished_run_is_evaluated_and_filmed_at_its_newest_checkpoint(tmp_path, monkeypatch, capsys):
    args = args_with("sac", env="cartpole-swingup", seed=3, action_repeat=4)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    refuses(lambda: evaluate.load(str(tmp_path)), "checkpoint")
    checkpoint.Checkpoints(str(tmp_path)).save(7000, {"agent": {"networks": {}}}, wait=True)
    assert evaluate.load(str(tmp_path))[1]["step"] == 7000
    calls = Recorder(make_env=argparse.Namespace(obs_dim=5, action_dim=1), film=1.0,
                     Evaluator=lambda act, step: np.array([step + 1.0]))
    for owner, name in ((evaluate, "import_imageio"), (evaluate, "check_drawing"), (evaluate, "restore"),
                        (evaluate, "film"), (envs, "make_env"), (evaluator, "Evaluator"),
                        (sys.modules["agents"], "build_agent")):
        monkeypatch.setattr(owner, name, getattr(calls, name))
    monkeypatch.setattr(torch, "set_num_threads", calls.threads)
    evaluate.run(evaluate.Args(str(tmp_path), episodes=2, seed=11, device="cpu", video="a.mp4", eval_workers=3,
                               threads=4))
    made = {name: (arguments, named) for name, arguments, named in calls.calls}
    assert made["make_env"][0] == ("cartpole-swingup", 3, 4) and made["threads"][0] == (4,)
    assert made["Evaluator"][0] == ("cartpole-swingup", 2, 11, 4, 3)
    assert made["film"][0][-2:] == (evaluator.episode_seed(11, 7000, 0),
                                    "a.mp4") and "7001.0" in capsys.readouterr().out
    del calls.calls[:]
    evaluate.run(evaluate.Args(str(tmp_path), device="cpu"))
    made = {name: arguments for name, arguments, _ in calls.calls}
    assert made["Evaluator"][:3] == ("cartpole-swingup", 10, 1_000_003) and "film" not in made


def test_states_that_do_not_fit_are_refused():
    agent, other = tiny_of("sac")[0], tiny_of("sac", seed=1)[0]
    evaluate.restore(agent, other.state_dict(), "here")
    assert all(torch.equal(a, b) for a, b in zip(agent.actor.parameters(), other.actor.parameters()))
    for state in (tiny_of("mrq")[0].state_dict(), {"networks": {}}):
        refuses(lambda: evaluate.restore(agent, state, "here"), "here", "evaluate.main()")


def test_what_is_no_run_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("")
    for path, folder in ((tmp_path / "nope", "nope"), (tmp_path / "notes.txt", tmp_path.name)):
        status, *_ = run_main(evaluate, monkeypatch, capsys, path)
        assert f"{folder} is not a run's folder" in str(status)


@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_metrics_without_a_batch_are_nan(algo):
    """Unwanted ones, and all before anything is stored: only what needs no batch has values."""
    (agent, buffer), drawn = tiny_of(algo), []
    agent.update()
    full, sample = evaluate.measure(agent), buffer.sample
    assert not any(math.isnan(value) for value in full.values())
    buffer.sample = lambda size, *more: drawn.append(size) or sample(size, *more)
    rows = [evaluate.measure(agent, wanted=False)]
    agent.replay = type(buffer)(4, 2, 400, agent.config.horizon, agent.config.prioritized)
    rows.append(evaluate.measure(agent))
    for row in rows:
        assert row.keys() == full.keys() and drawn == []
        for column, value in row.items():
            known = column.endswith(("/density", "/parameter_norm"))
            assert value == full[column] if known else math.isnan(value), column
