"""Tests of the training loop: what happens when, what is recorded, and what stops a run."""

import argparse
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import agents
import train
from agents import AGENTS, build_agent
from envs import Env
from runtime import console
from runtime.resume import SavedRun, Stopped
from tests.helpers import (HERE, SHORT, RecordedRun, Recorder, count, flags_to_args, in_process, recorded_run, refuses,
                           run_main, table, timeless, tiny_of, tiny_run)


# ---- the loop ----

def test_order_of_events_in_a_run(monkeypatch, capsys):
    """Against a plain list of what must happen, step by step."""
    run, shown = RecordedRun(), []
    monkeypatch.setattr(console.Bar, "show", lambda bar, step, doing, **more: shown.append((step, doing, more)))
    events, draws = recorded_run(monkeypatch, run)
    assert [line for line in shown if line[1] == "evaluating" or line[2]] == [
        line for t in (0, 5, 10, 11) for line in ((t, "evaluating", {}), (t, "learning", {"return": "2.5"}))]
    assert [line.split()[:5] for line in capsys.readouterr().out.splitlines() if "return" in line] == [
        ["step", str(t), "return", "2.5", "±"] for t in (0, 5, 10, 11)]
    expected, obs, action = [("start",), ("reset", 1.0)], 1.0, 0
    evaluation = lambda step: [("evaluate", step), ("act", [-1.0, -2.0], False),
                               ("measure", step in (0, 10, 11)), ("write", "eval")]
    ends = {2: "terminated", 4: "truncated", 7: "truncated", 8: "terminated"}  # after these steps
    length = 0
    for t in range(11):
        length, action = length + 1, action + 1
        expected += [("save", t)] if t in (2, 4, 6, 8, 10) else []
        expected += evaluation(t) if t in (0, 5, 10) else []
        expected += [("observe", obs), ("act", [obs], True) if t >= 4 else ("random action",)]
        expected += [("update",)] * 2 if t >= 4 else []
        chosen, ended = action if t >= 4 else -action, ends.get(t)
        expected += [("step", chosen),
                     ("add", obs, chosen, 10.0 ** length, obs + 1, ended == "terminated", ended == "truncated")]
        obs += 1
        if ended:
            obs, length = obs + 1, 0
            expected += [("reset", obs)]
        expected += [("write", "train")] if t in (5, 8, 10) else []
    assert events == expected + [("save", 11)] + evaluation(11) + [("close",), ("finish", 11)]
    rows = {table: [row for name, row in run.rows if name == table] for table in ("eval", "train")}
    plain = lambda row: {key: value for key, value in row.items() if "second" not in key}
    assert [plain(row) for row in rows["eval"]] == [
        {"agent_step": t, "env_frames": 2 * t, "return": 2.5, "return_std": 1.5, "returns": "1 4", "metric": 0.5}
        for t in (0, 5, 10, 11)]
    assert [(row["agent_step"], row["env_frames"], row["episode_return"]) for row in rows["train"]] == [
        (6, 12, 110.0), (9, 18, 10.0), (11, 22, 10.0)]  # of the last episode that has ended
    marks = [i for i, event in enumerate(run.events) if event == ("write", "train")]
    assert [row["loss"] for row in rows["train"]] == [  # of the last update
        1 + max(i for i, event in enumerate(run.events[:mark]) if event == ("update",)) for mark in marks]
    assert all(row["seconds"] >= 0 and row["steps_per_second"] > 0 for row in rows["train"])
    assert all(row["steps_per_second"] == pytest.approx(
        (row["agent_step"] - last["agent_step"]) / (row["seconds"] - last["seconds"]))
        for last, row in itertools.pairwise(rows["train"]))
    # Evaluations draw their own random numbers, the same whenever they happen, and do not change those of training.
    evaluated = [(event[1], run.events[i + 1][3]) for i, event in enumerate(run.events) if event[0] == "evaluate"]
    assert all(draw == (torch.manual_seed(6 + step), torch.rand(()).item())[1] for step, draw in evaluated)
    assert recorded_run(monkeypatch, RecordedRun(), eval_every=1000)[1] == draws
    torch.manual_seed(6)
    assert draws == [torch.rand(()).item() for _ in draws]


@pytest.mark.parametrize("total, every, metrics, steps, measured", [
    (11, 5, 1, [0, 5, 10, 11], [0, 5, 10, 11]), (11, 5, 4, [0, 5, 10, 11], [0, 11]), (10, 5, 3, [0, 5, 10], [0, 10]),
    (11, 20, 1, [0, 11], [0, 11]), (9, 3, 2, [0, 3, 6, 9], [0, 6, 9]), (6, 1, 6, [0, 1, 2, 3, 4, 5, 6], [0, 6])])
def test_evaluations_at_the_start_every_n_steps_and_at_the_end(total, every, metrics, steps, measured, monkeypatch):
    run = RecordedRun()
    recorded_run(monkeypatch, run, total_steps=total, eval_every=every, metrics_every=metrics)
    assert [row["agent_step"] for name, row in run.rows if name == "eval"] == steps
    wanted = [event[1] for event in run.events if event[0] == "measure"]
    assert [step for step, one in zip(steps, wanted) if one] == measured


def test_rows_have_the_density_and_the_speed_of_learning(monkeypatch):
    run = RecordedRun()
    run.sparse = {"net": argparse.Namespace(density=lambda: 0.25, sparsity=0.75, masks={}, first_masks={},
                                            dynamic=False)}
    monkeypatch.setattr(SavedRun, "seconds", lambda saved: float(len(run.events)))  # a clock that only events move
    recorded_run(monkeypatch, run)
    rows = [row for name, row in run.rows if name == "train"]
    assert [row["net/density"] for row in rows] == [0.25] * 3
    began = [i for i, event in enumerate(run.events) if event[0] == "observe"][4]  # the first step that learns
    assert rows[0]["steps_per_second"] == (6 - 4) / (rows[0]["seconds"] - began)


# ---- faults ----

def test_broken_loss_stops_after_its_row(monkeypatch):
    run = RecordedRun()
    run.nonfinite_report = lambda: ("the actor's loss", 1) if run.time > 8 else None
    refuses(lambda: recorded_run(monkeypatch, run), "the actor's loss", "agent step 5", "here")
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6]


@pytest.mark.parametrize("extra", [[], [0.0]])
def test_action_with_any_nan_stops_before_the_step(extra, monkeypatch):
    run = RecordedRun()
    act = run.act
    run.act = lambda obs, explore: np.append(act(obs, explore) * (math.nan if explore and run.time > 8 else 1.0), extra)
    refuses(lambda: recorded_run(monkeypatch, run), "nan", "agent step 6", "here")
    assert not any(event[0] == "step" and event[1] != event[1] for event in run.events)
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6]  # once, though it was just written


def test_first_of_two_faults_is_reported():
    agent, _ = tiny_of("mrq", interval=100)
    for broken in ("critic", "actor"):  # the critic from its fourth update on, the actor from its seventh
        for _ in range(3):
            agent.update()
        agent.nonfinite[broken].fill_(1.0)
    assert agent.nonfinite_report() == ("the critic's loss or gradient (its update 4)", 3)


def test_signal_to_a_broken_run_names_the_fault(monkeypatch, capsys):
    agent = argparse.Namespace(nonfinite_report=lambda: ("the critic's loss", 3))
    log, checkpoints = argparse.Namespace(folder="here"), argparse.Namespace(last=lambda: "no checkpoint was saved")
    saved = SavedRun(checkpoints, flags_to_args(), torch.device("cpu"), agent, None, log)

    def stopped(*_):
        raise Stopped("SIGTERM")

    monkeypatch.setattr(train, "build", lambda args: (None, log, saved))
    monkeypatch.setattr(train, "train", stopped)
    line = run_main(train, monkeypatch, capsys)[0]
    assert "critic's loss" in line and "agent step 10,003" in line and "no checkpoint" in line


# ---- what a run is built from ----

@pytest.mark.slow
def test_settings_reach_what_they_set(tmp_path, monkeypatch):
    evaluators, threads = Recorder(), []
    monkeypatch.setattr(train, "Evaluator", evaluators.make)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def build(*flags):
        _, env, agent, _, log, _ = train.build(flags_to_args(
            "--mst", *SHORT[:-2], "--runs", str(tmp_path / "_".join(flags)), "--device", "cpu", *flags))
        log._lock.close()
        return env, agent

    env, agent = build("--seed", "7", "--eval-episodes", "3", "--eval-workers", "3", "--threads", "5")
    ((_, arguments, _),) = evaluators.calls
    assert arguments == ("cartpole-swingup", 3, 7, None, 3) and threads == [5]
    same = Env("cartpole-swingup", seed=7)
    assert np.array_equal(env.random_action(), same.random_action()) and np.array_equal(env.reset(), same.reset())
    size = lambda replay: (replay.capacity, replay.horizon, replay.prioritized, replay.obs.shape[1])
    assert size(agent.replay) == (272, 5, True, 5)  # no more rows than the run can fill
    torch.manual_seed(7)
    alike, other = (build_agent(flags_to_args("--mst", *SHORT, "--seed", seed), 5, 1, torch.device("cpu"))
                    for seed in ("7", "8"))
    masks = lambda one: [mask for sparse in one.sparse.values() for mask in sparse.masks.values()]
    for a, b in zip([*agent.critic.parameters(), *masks(agent)], [*alike.critic.parameters(), *masks(alike)]):
        assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(masks(agent), masks(other)) if not b.all())
    sac = build("--algo", "sac", "--buffer-size", "90")[1]
    assert size(sac.replay) == (90, 1, False, 5) and sac.sparse["critic"].total_steps == 140


@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_memory_check_counts_every_weight(algo, monkeypatch):
    """Sixteen bytes for each weight of the networks."""
    args = flags_to_args("--algo", algo, "--mst", "--scale", "0.2")
    agent = build_agent(args, 4, 2, torch.device("cpu"), buffer_size=20)
    needed = 16 * sum(count(network) for network in agent.networks.values())
    assert agents.count_parameters(args, 4, 2) == {  # the encoder's head is counted apart
        name: count(network) - (count(network.model) if name == "encoder" else 0) for name,
        network in agent.networks.items()}
    monkeypatch.setattr(agents, "free_memory", lambda device: needed)
    agents.check_memory(args, 4, 2, torch.device("cpu"))
    monkeypatch.setattr(agents, "free_memory", lambda device: needed - 1)
    refuses(lambda: agents.check_memory(args, 4, 2, torch.device("cpu")), f"{needed / 1e9:.3g} GB", "--scale")


@pytest.mark.slow
def test_runs_that_cannot_start_are_refused_before_their_folder_is_made(tmp_path, monkeypatch, capsys):
    """`check` refuses bad numbers (test_settings); these need the device, the task, the memory or a package."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    monkeypatch.setitem(sys.modules, "wandb", None)
    for flags, word in (("--env walker-wlk", "walker-walk"), ("--device gpu", "--device"), ("--device mps", "cuda:N"),
                        ("--device meta", "cuda:N"), ("--scale 3000", "--scale"),
                        ("--algo sac --scale 3000", "--scale"),
                        ("--buffer-size 100000000000 --total-steps 100000000000", "GB"), ("--seed -1", "--seed"),
                        ("--precision tf32 --device cpu", "bf16"), ("--cuda-graphs on --device cpu", "--cuda-graphs"),
                        ("--tensorboard", "pip install tensorboard"), ("--wandb-project x", "pip install wandb"),
                        *([] if torch.cuda.is_available() else [("--device cuda", "--device cpu")])):
        line, out, err = run_main(train, monkeypatch, capsys, "--env", "cartpole-swingup", "--total-steps", "100",
                                  "--learning-starts", "50", "--runs", tmp_path / "runs", *flags.split())
        assert isinstance(line, str) and word in line and "\n" not in line and line.startswith("train.py: "), flags
        assert not (tmp_path / "runs").exists()


# ---- whole runs ----

def run_train(folder, *flags):
    return subprocess.run([sys.executable, str(HERE / "train.py"), "--runs", str(folder), "--device", "cpu", *flags],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("algo", AGENTS)
def test_every_algorithm_runs_from_the_command_line(algo, tmp_path):
    mr = algo.startswith("mr")
    own = {"mrq": (), "mrsac": ("--target-update-freq", "20", "--precision", "bf16"),
           "stream": ("--total-steps", "130", "--learning-starts", "0")}
    flags = SHORT if algo == "mrq" else SHORT[:-2] if algo != "stream" else tuple(
        word for flag, value in zip(SHORT[::2], SHORT[1::2]) if flag in (
            "--env", "--total-steps", "--eval-every", "--eval-episodes", "--log-every") for word in (flag, value))
    result = run_train(tmp_path, "--algo", algo, "--mst", *flags, *own.get(algo, ("--precision", "bf16")))
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert f"{algo} on cartpole-swingup" in result.stdout and str(folder) in result.stdout
    assert folder.name.startswith("cartpole-swingup__" + ("" if algo == "mrq" else algo))
    rows, training = table(folder, "eval.csv"), table(folder, "train.csv")
    steps, frames = [0, 50, 100, 130], 1 if algo == "stream" else 2
    assert [(int(row["agent_step"]), int(row["env_frames"])) for row in rows] == [(t, frames * t) for t in steps]
    if algo != "stream":
        assert [int(row["agent_step"]) for row in training] == [90, 120, 130]
    none_yet = ("episode_return", "dropped", "grown", "initial_kept")  # no episode has ended, no topology has changed
    assert all(math.isfinite(float(row[c])) for row in training for c in row if not c.endswith(none_yet))
    modules = ("encoder", "critic", "actor") if mr else ("critic", "actor")
    assert {c.split("/")[0] for c in rows[0] if "/" in c} == set(modules)
    kept = {"encoder": 1.0, "critic": 0.4, "actor": 0.4} if mr else dict.fromkeys(modules, 0.2)
    for module in modules:
        columns = [c for c in rows[0] if c.startswith(module + "/")]
        for key in ("srank", "dormant_ratio/", "grad_cosine", "parameter_norm", "grad_norm", "density"):
            assert any(key in c for c in columns), (module, key)
        assert all(math.isfinite(float(rows[-1][c])) for c in columns), module
        if algo != "stream":
            assert float(rows[-1][f"{module}/density"]) == pytest.approx(kept[module], abs=3e-3)
            assert all(math.isnan(float(rows[0][f"{module}/{key}"])) for key in ("dormant_ratio", "grad_norm"))
    assert ("temperature" in training[0]) == (algo in ("sac", "mrsac"))


@pytest.mark.slow
def test_same_seed_same_run_whatever_is_evaluated_and_no_run_is_overwritten(tmp_path):
    for name, flags in (("once", ()), ("more", ("--eval-every", "10"))):
        assert run_train(tmp_path, "--mst", *SHORT, "--name", name, *flags).returncode == 0
    again = run_train(tmp_path, "--mst", *SHORT, "--name", "once")
    assert again.returncode == 1 and "exists" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    once, more = timeless(tmp_path / "once"), timeless(tmp_path / "more")
    assert once["train.csv"] == more["train.csv"] and once["eval.csv"][-1] == more["eval.csv"][-1]
    assert len(once["eval.csv"]) == 4 and len(more["eval.csv"]) == 14


@pytest.mark.slow
def test_train_csv_shows_whether_a_topology_moves(tmp_path):
    flags = tiny_run("mrq", ("sst", "dst", "dense"))
    assert in_process([*flags, "--runs", str(tmp_path)], str(tmp_path / "output")) == 0
    rows = table(tmp_path / "run", "train.csv")
    assert not {"encoder/dropped", "actor/dropped"} & rows[0].keys()  # only regimes that move have the columns
    dropped, kept = ([float(row[f"critic/{key}"]) for row in rows] for key in ("dropped", "initial_kept"))
    assert all(value > 0 for value in dropped)  # an interval of 15 updates ends with each row
    assert all(0 < value < 1 for value in kept)
    for row in rows:
        assert float(row["critic/dropped"]) == float(row["critic/grown"]) >= float(row["critic/regrown"])


@pytest.mark.slow
def test_loss_that_becomes_nan_stops_the_run(tmp_path):
    result = run_train(tmp_path, *SHORT, "--critic-lr", "1e30")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert "agent step 6" in line and ("critic's loss" in line or "actor's loss" in line)
    (folder,) = tmp_path.iterdir()
    assert len(table(folder, "eval.csv")) == 2 and len(table(folder, "train.csv")) == 1  # nothing is lost
