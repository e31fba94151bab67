"""Tests of train."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from random import Random

import numpy as np
import tqdm
import pytest
import torch
import torch.nn as nn
from runtime import resume as survive
from runtime.resume import SavedRun

import agents
import train
from envs import Env, Evaluator
from agents import AGENTS, build_agent
from base import ModuleConfig
from mrq import MRQConfig, MR_DEFAULT, MR_MST
from sac import DDPGConfig, SACConfig
from settings import CONFIGS, NOT_IN_NAME, check, defaults, diff_settings, flag_names, from_config, module_configs, parse, run_name, unused_flag_notes
from sparsity import REGIMES, SparseTraining
from runtime import console
import evaluate
from tests.helpers import (HERE, RecordedRun, SHORT, backward, count, flags_to_args, recorded_run, regimes_dense, table,
                           tiny, tiny_of)


@pytest.mark.slow
@pytest.mark.parametrize("own, spins", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_do_not_spin_for_ever_beside_a_busy_neighbour(own, spins):
    """What the OpenMP library itself says that it was told, by us or by the user, when PyTorch loaded it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run([sys.executable, HERE / "train.py", "--help"], env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | own,
                          capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("PyTorch is built on another OpenMP library here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


def run_train(folder, *flags, timeout=300):
    return subprocess.run([sys.executable, str(HERE / "train.py"), "--runs", str(folder), "--device", "cpu", *flags],
                          capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path):
    result = run_train(tmp_path, "--mst", *SHORT)
    assert result.returncode == 0, result.stderr
    for line in ("encoder  type 6  dense", "critic   type 6  dst", "actor    type 5  sst", "density 0.4", str(tmp_path)):
        assert line in result.stdout
    (folder,) = tmp_path.iterdir()
    rows = table(folder, "eval.csv")
    assert [int(row["agent_step"]) for row in rows] == [0, 50, 100, 130]
    assert [int(row["env_frames"]) for row in rows] == [0, 100, 200, 260]
    for module in ("encoder", "critic", "actor"):
        columns = [c for c in rows[0] if c.startswith(module)]
        assert all(any(key in c for c in columns) for key in ("srank", "dormant_ratio/", "grad_cosine", "parameter_norm", "grad_norm"))
        assert math.isnan(float(rows[0][f"{module}/dormant_ratio"])) and math.isnan(float(rows[0][f"{module}/grad_norm"]))
        assert all(float(rows[-1][c]) == float(rows[-1][c]) for c in columns)  # nothing is NaN by the end
    assert float(rows[-1]["critic/density"]) == pytest.approx(0.4, abs=1e-3) and float(rows[-1]["encoder/density"]) == 1
    training = table(folder, "train.csv")
    assert [(int(row["agent_step"]), int(row["env_frames"])) for row in training] == [(90, 180), (120, 240), (130, 260)]
    assert all(math.isfinite(float(row[c])) for row in training for c in row if c != "episode_return")
    config = json.load(open(folder / "config.json"))
    assert config["mst"] and config["modules"]["critic"]["regime"] == "dst" and config["versions"]["torch"] == torch.__version__

    again = run_train(tmp_path, "--mst", *SHORT)  # the folder is there already
    assert again.returncode != 0 and "exists" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    assert table(folder, "eval.csv") == rows
    # The same seed gives the same run; evaluating more often changes nothing of what is learnt.
    more = run_train(tmp_path / "more", "--mst", *SHORT, "--eval-every", "10")
    assert more.returncode == 0
    (folder2,) = (tmp_path / "more").iterdir()
    timeless = lambda rows: [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    assert timeless(table(folder2, "train.csv")) == timeless(training)
    assert timeless(table(folder2, "eval.csv"))[-1] == timeless(rows)[-1]


@pytest.mark.parametrize("algo", ["sac", "ddpg", "mrsac"])
@pytest.mark.slow
def test_every_algorithm_runs_from_the_command_line(tmp_path, algo):
    own = ("--target-update-freq", "20") if algo == "mrsac" else ()
    result = run_train(tmp_path, "--algo", algo, "--mst", "--precision", "bf16", *SHORT[:-2], *own)
    assert result.returncode == 0, result.stderr
    names = ("encoder", "critic", "actor") if algo == "mrsac" else ("critic", "actor")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"cartpole-swingup__{algo}__") and f"{algo} on cartpole-swingup" in result.stdout
    for line in ("critic   type 6  dst", "actor    type 5  sst") if algo == "mrsac" else (
            "critic   type simba  dst", "actor    type simba  sst", "density 0.2"):
        assert line in result.stdout
    rows, training = table(folder, "eval.csv"), table(folder, "train.csv")
    assert [int(row["agent_step"]) for row in rows] == [0, 50, 100, 130]
    for module in names:
        columns = [c for c in rows[0] if c.startswith(module + "/")]
        assert all(any(key in c for c in columns) for key in ("srank", "dormant_ratio/", "grad_cosine", "parameter_norm", "grad_norm"))
        assert all(math.isfinite(float(rows[-1][c])) for c in columns)
    assert any(c.startswith("encoder/") for c in rows[0]) == (algo == "mrsac")
    assert ("temperature" in training[0]) == (algo != "ddpg")
    assert all(math.isfinite(float(row[c])) for row in training for c in row if c != "episode_return")
    assert json.load(open(folder / "config.json"))["learning_starts"] == 60


BAD_FLAGS = [
    (("--save-every", "0"), "--save-every must lie in [1, 1e12], not 0"),
    (("--critic-grad-clip", "0"), "--critic-grad-clip must lie in (0, inf)"),
    (("--reward-range", "81"), "--reward-symlog-limit must lie in (0, 80]"),
    (("--reward-bins", "1"), "--reward-bins must lie in [2, "),
    (("--threads", "-1"), "--threads must lie"),
    (("--eval-workers", "-1"), "--eval-workers must lie"),
    (("--eval-episodes", "0"), "--eval-episodes must lie"),
    (("--env", "walker-wlk"), "did you mean walker-walk"),
    (("--algo", "sac", "--encoder-regime", "dst"), "--encoder-regime: sac has no encoder, only critic and actor"),
    (("--algo=ddpg", "--encoder-scale", "2"), "--encoder-scale: ddpg has no encoder"),
    (("--algo", "sac", "--critic-type", "6"), "--critic-type: sac uses SimBa networks"),
    (("--algo", "ddpg", "--residual", "post"), "--residual: ddpg uses SimBa networks"),
    (("--algo", "sac", "--target-q", "mean"), "--target-q-reduce mean combines two Q networks"),
    (("--algo", "ddpg", "--actor-q", "mean"), "--actor-q-reduce mean combines two Q networks"),
    (("--algo", "ddpg", "--sparsity", "1"), "--sparsity must lie in [0, 1), not 1.0"),
    (("--actor-regime", "sst", "--actor-sparsity", "1.0"), "--actor-sparsity must lie in [0, 1), not 1.0"),
    (("--sparsity", "-0.1"), "--sparsity must lie in [0, 1)"),  # a dense run refuses it as well
    (("--scale", "0"), "--scale must lie in (0, 1e4], not 0.0"),
    (("--depth-scale", "1e9"), "--depth-scale must lie in (0, 1e4]"),
    (("--encoder-scale", "3", "--width-scale", "1", "--depth-scale", "2"), "--encoder-scale has no effect"),
    (("--scale", "3", "--width-scale", "1", "--depth-scale", "2"), "--scale has no effect"),
    (("--residual", "post"), "--residual post has no effect"),
    (("--schedule-power", "-1"), "--schedule-power must lie in (0, inf), not -1.0"),
    (("--schedule-power", "nan", "--critic-regime", "s2d"), "--schedule-power must lie in (0, inf), not nan"),
    (("--schedule-start", "0.9"), "--schedule-start (0.9) must not exceed"),
    (("--drop-initial", "1.5"), "--drop-fraction-start must lie in [0, 1]"),
    (("--q-horizon", "600"), "--q-horizon must lie in [1, 500], not 600"),
    (("--encoder-horizon", "501"), "--encoder-horizon must lie in [1, 500], not 501"),
    (("--seed", "-1"), "--seed must lie in [0, 4294967295], not -1"),
    (("--total-steps", "1" + 29 * "0"), "--total-steps must lie in [1, 1e12]"),
    (("--total-steps", "50"), "--total-steps 50 trains nothing: it must be above --learning-starts 50"),
    (("--name", "../../x"), "--name '../../x' must be a plain folder name"),
    (("--name", ".."), "--name '..' must be a plain folder name"),
    (("--name", ""), "--name '' must be a plain folder name"),
    (("--buffer-size", "100000000000", "--total-steps", "100000000000"), "GB"),
    (("--device", "cuda"), "--device cpu"),
    (("--device", "gpu"), "--device"),
    (("--device", "mps"), "choose auto, cpu, cuda or cuda:N"),
    (("--device", "meta"), "choose auto, cpu, cuda or cuda:N"),
    (("--scale", "3000"), "choose a smaller --scale"),
    (("--algo", "sac", "--scale", "3000"), "choose a smaller --scale"),
    (("--discount", "1.1"), "--discount must lie in (0, 1], not 1.1"),
    (("--critic-lr", "-1"), "--critic-lr must lie in [0, inf), not -1.0"),
    (("--algo", "sac", "--initial-temperature", "0"), "--initial-temperature must lie in (0, inf), not 0.0"),
    (("--algo", "sac", "--target-entropy", "nan"), "--target-entropy must lie in (-inf, inf)"),
    (("--algo", "ddpg", "--target-rate", "-3"), "--tau must lie in (0, 1]"),
    (("--algo", "ddpg", "--exploration-noise", "inf"), "--exploration-noise must lie in [0, inf)"),
    (("--learning-starts", "2"), "--learning-starts must be at least 6, not 2"),
    (("--target-update-freq", "0"), "--target-update-freq must lie in [1, 1e12]"),
    (("--precision", "tf32", "--device", "cpu"), "choose fp32 or bf16"),
    (("--cuda-graphs", "on", "--device", "cpu"), "--cuda-graphs needs a CUDA device"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, flags, message):
    if flags == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train.py", "--env", "cartpole-swingup", "--total-steps", "100", "--learning-starts", "50",
                                      "--runs", str(tmp_path / "runs"), *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert isinstance(stopped.value.code, str) and message in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag, wrong, choices", [
    ("--algo", "ppo", "mrq sac ddpg mrsac"), ("--critic-regime", "rigl", "dense sst dst s2d d2s"), ("--critic-type", "7", "1 2 3 4 5 6"),
    ("--grow", "momentum", "gradient random"), ("--distribution", "erk", "er uniform"), ("--residual", "none", "pre post"),
    ("--precision", "fp16", "auto fp32 tf32 bf16")])
@pytest.mark.slow
def test_a_wrong_choice_is_answered_with_the_choices(capsys, flag, wrong, choices):
    with pytest.raises(SystemExit) as stopped:
        flags_to_args(flag, wrong)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in said and all(f"'{choice}'" in said for choice in choices.split())


def test_the_bar_says_what_goes_on_and_how_long_it_takes(monkeypatch):
    drawn, now, agent = [], [0.0], types.SimpleNamespace(updates={"encoder": 0, "critic": 0}, updates_per_step=1)
    monkeypatch.setattr("tqdm.tqdm", type("Bar", (tqdm.tqdm,), {
        "__init__": lambda bar, **settings: None, "set_postfix_str": lambda bar, text: drawn.append((bar.n, text))}))
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    bar = console.Bar(flags_to_args("--total-steps", "1000", "--learning-starts", "200"), agent, 0)
    for now[0], step, updates, more in ((59, 1, 0, {}), (60, 5, 0, {}), (100, 300, 100, {"return": "2.5"}), (200, 400, 300, {}), (259, 450, 350, {})):
        agent.updates["critic"] = updates
        bar.show(step, "learning", **more)
    # A minute between two lines; 200 updates in the 100 seconds since the first that it saw, and 1,300 of 2 × 800 to come.
    assert drawn == [(5, "? left, 0.0833 steps/s, learning"), (400, "10:50 left, 2.82 steps/s, return 2.5, learning")]


def test_the_order_of_events_in_a_run(monkeypatch, capsys):
    """Against a plain list of what must happen, step by step."""
    run, shown = RecordedRun(), []
    monkeypatch.setattr(console.Bar, "show", lambda bar, step, doing, **more: shown.append((step, doing, more)))
    events, draws = recorded_run(monkeypatch, run)
    assert [line for line in shown if line[1] == "evaluating" or line[2]] == [
        line for t in (0, 5, 10, 11) for line in ((t, "evaluating", {}), (t, "learning", {"return": "2.5"}))]
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if "return" in line] == [
        f"step {t:>9}  return     2.5 ± 1.5 (mean ± sd of 2 episodes)" for t in (0, 5, 10, 11)]
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
        chosen = action if t >= 4 else -action
        expected += [("step", chosen), ("add", obs, chosen, 10.0 ** length, obs + 1, ends.get(t) == "terminated", ends.get(t) == "truncated")]
        obs += 1
        if t in ends:
            obs, length = obs + 1, 0
            expected += [("reset", obs)]
        expected += [("write", "train")] if t in (5, 8, 10) else []
    assert events == expected + evaluation(11) + [("close",), ("finish", 11)]
    rows = {table: [row for name, row in run.rows if name == table] for table in ("eval", "train")}
    timeless = lambda row: {key: value for key, value in row.items() if "second" not in key}
    assert [timeless(row) for row in rows["eval"]] == [
        {"agent_step": t, "env_frames": 2 * t, "return": 2.5, "return_std": 1.5, "returns": "1 4", "metric": 0.5} for t in (0, 5, 10, 11)]
    assert [(row["agent_step"], row["env_frames"], row["episode_return"]) for row in rows["train"]] == [
        (6, 12, 110.0), (9, 18, 10.0), (11, 22, 10.0)]  # of the last episode that has ended
    assert all(row["loss"] == 1 + max(i for i, event in enumerate(run.events[:mark]) if event == ("update",))  # of the last update
               for row, mark in zip(rows["train"], [i for i, event in enumerate(run.events) if event == ("write", "train")]))
    assert all(row["seconds"] >= 0 and row["steps_per_second"] > 0 for row in rows["train"])
    assert all(row["steps_per_second"] == pytest.approx((row["agent_step"] - last["agent_step"]) / (row["seconds"] - last["seconds"]))
               for last, row in itertools.pairwise(rows["train"]))
    # Evaluations draw random numbers of their own, the same whenever they come, and leave the training's alone.
    evaluated = [(event[1], run.events[i + 1][3]) for i, event in enumerate(run.events) if event[0] == "evaluate"]
    assert all(draw == (torch.manual_seed(6 + step), torch.rand(()).item())[1] for step, draw in evaluated)
    assert recorded_run(monkeypatch, RecordedRun(), eval_every=1000)[1] == draws
    torch.manual_seed(6)
    assert draws == [torch.rand(()).item() for _ in draws]


def test_a_fault_stops_a_run_after_its_row_is_written(monkeypatch):
    run = RecordedRun()
    run.nonfinite_report = lambda: ("the actor's loss", 1) if run.time > 8 else None
    with pytest.raises(FloatingPointError, match="the actor's loss was not finite at agent step 5; stopped.*here"):
        recorded_run(monkeypatch, run)
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6, 9][:1 + (run.rows[-1][1]["agent_step"] == 9)]
    run = RecordedRun()
    act = run.act
    run.act = lambda obs, explore: act(obs, explore) * (math.nan if run.time > 8 else 1)
    with pytest.raises(FloatingPointError, match=r"the action is \[nan\] at agent step 6"):
        recorded_run(monkeypatch, run)
    assert not any(event[0] == "step" and event[1] != event[1] for event in run.events)
    assert [row["agent_step"] for table, row in run.rows if table == "train"] == [6]  # once, though it was written just before


def test_a_signal_to_a_broken_run_is_answered_in_a_line(monkeypatch):
    agent, log = types.SimpleNamespace(nonfinite_report=lambda: ("the critic's loss", 3)), types.SimpleNamespace(folder="here")
    saved = SavedRun(types.SimpleNamespace(last=lambda: "none"), flags_to_args(), torch.device("cpu"), agent, None, log)

    def stopped(*_):
        raise survive.Stopped("SIGTERM")

    monkeypatch.setattr(train, "build", lambda args: (None, log, saved))
    monkeypatch.setattr(train, "train", stopped)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="the critic's loss was not finite at agent step 10,003.*the last checkpoint is none"):
        train.main()


@pytest.mark.slow
def test_what_a_run_is_built_from(tmp_path):
    """Seeds, sizes and numbers of the settings reach environment, evaluation, buffer, networks and masks."""
    build = lambda *flags: train.build(flags_to_args("--mst", *SHORT[:-2], "--runs", str(tmp_path / "_".join(flags)), *flags))
    _, env, agent, evaluation, *_ = build("--seed", "7", "--eval-episodes", "3")
    device, replay = agent.device, agent.replay
    same = Env("cartpole-swingup", seed=7)
    assert np.array_equal(env.random_action(), same.random_action()) and np.array_equal(env.reset(), same.reset())
    hold = lambda obs: np.sin(7 * obs[:, :1])
    np.testing.assert_array_equal(evaluation(hold, 20), Evaluator("cartpole-swingup", 3, seed=7)(hold, 20))
    assert (replay.capacity, replay.horizon, replay.prioritized, replay.obs.shape[1], replay.action.shape[1]) == (272, 5, True, 5, 1)
    torch.manual_seed(7)
    alike = build_agent(flags_to_args("--mst", *SHORT, "--seed", "7"), 5, 1, device)
    masks = lambda one: [mask for sparse in one.sparse.values() for mask in sparse.masks.values()]
    for a, b in zip([*agent.critic.parameters(), *masks(agent)], [*alike.critic.parameters(), *masks(alike)]):
        assert torch.equal(a, b)
    _, _, agent_of_sac, *_ = build("--algo", "sac", "--buffer-size", "90")
    small = agent_of_sac.replay
    assert (small.capacity, small.horizon, small.prioritized, agent_of_sac.sparse["critic"].total_steps) == (90, 1, False, 140)
    other = build_agent(flags_to_args("--mst", *SHORT, "--seed", "8"), 5, 1, device)
    assert not any(torch.equal(a, b) for a, b in zip(masks(agent), masks(other)) if not b.all())


@pytest.mark.slow
def test_workers_and_threads_reach_what_uses_them(tmp_path, monkeypatch):
    asked, threads = [], []
    monkeypatch.setattr(train, "Evaluator", lambda *of, make: asked.append(of))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train.build(flags_to_args("--mst", *SHORT, "--runs", str(tmp_path), "--eval-workers", "3", "--threads", "5", "--seed", "4"))
    assert asked == [("cartpole-swingup", 2, 4, None, 3)] and threads == [5]


def test_metrics_that_are_not_wanted_are_not_computed():
    agent, buffer = tiny_of("mrq")
    agent.update()
    full = evaluate.measure(agent)
    buffer.sample = lambda *_: pytest.fail("drawn though nothing is wanted")
    row = evaluate.measure(agent, wanted=False)
    assert row.keys() == full.keys()
    for column, value in row.items():  # what needs no batch is there all the same
        assert value == full[column] if column.endswith(("/density", "/parameter_norm")) else math.isnan(value), column


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_before_training_is_told_in_a_line(number, status, tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--runs", str(tmp_path)], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text()).group(1), 16)
    while not caught() >> (signal.SIGUSR1 - 1) & 1:  # the last of them that train.py takes
        time.sleep(0.005)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].split("\n") == ["", "train.py: stopped before training began", ""]
    assert process.returncode == status and not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_loss_that_turns_nan_stops_the_run(tmp_path):
    result = run_train(tmp_path, *SHORT, "--critic-lr", "1e30")
    assert result.returncode != 0 and re.search(r"(critic|actor)'s loss or gradient \(its update [12]\).* was not finite at agent step 6[01]; stopped", result.stderr)
    assert "Traceback" not in result.stderr
    (folder,) = tmp_path.iterdir()
    assert len(table(folder, "eval.csv")) == 2 and len(table(folder, "train.csv")) == 1  # nothing is lost


@pytest.mark.parametrize("flags, package", [(("--tensorboard",), "tensorboard"), (("--wandb-project", "x"), "wandb")])
@pytest.mark.slow
def test_a_tracker_is_imported_only_if_asked_for(tmp_path, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)  # not there
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs", str(tmp_path / "runs"), *SHORT, *flags])
    with pytest.raises(SystemExit, match=f"{package} is not installed"):
        train.main()
    assert not (tmp_path / "runs").exists()


VALUES = ["0", "1", "-1", "0.5", "5", "1e9", "1e-3", "nan", "inf", "-inf", "9" * 30, "", " ", "x", "None", "True", "../..", "a/b",
          "é", "\0", "dog-run", "walker-wlk", "cpu", "cuda", "mst", "dst", "dense", "er", "6", "7", "1e400", "0x10", "min", "a.mp4"]


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.slow])])
@pytest.mark.slow
def test_any_flags_are_accepted_or_refused_in_a_line(count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random, outcomes = Random(0), {"accepted": 0, "refused by tyro": 0, "refused in one line": 0}
    flags = {algo: sorted({"--" + name.replace("_", "-") for _, name in flag_names(defaults(algo))}
                          | {"--" + name.replace("_", "-") for name in NOT_IN_NAME}) for algo in CONFIGS}
    for _ in range(count):
        algo = random.choice(list(CONFIGS))
        line = ["--algo", algo] if random.random() < 0.9 else []
        for flag in random.sample(flags[algo], random.randrange(1, 5)):
            usual = {"--mst", "--resume", "--compile", "--cuda-graphs", "--eval-only", "--tensorboard", "--twin-critics"}
            line += [flag] if flag in usual or random.random() < 0.05 else [flag, random.choice(VALUES)]
        try:
            args = parse(line)
            check(args)
        except SystemExit as stop:
            assert stop.code in (0, 2), line
            outcomes["refused by tyro"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error), (line, error)
            outcomes["refused in one line"] += 1
        else:
            outcomes["accepted"] += 1
            name = run_name(args)
            assert len(name.encode()) <= 200 and "/" not in name and "\0" not in name, line
            again = from_config(json.loads(json.dumps(dataclasses.asdict(args))))  # as config.json keeps it
            assert again == args and diff_settings(again, args) == "", line
        assert "Traceback" not in capsys.readouterr().err, line
    assert min(outcomes.values()) >= count / 100 and not os.listdir(tmp_path), outcomes


def test_a_config_of_another_version_is_read_or_refused():
    config = json.loads(json.dumps(dataclasses.asdict(flags_to_args("--mst", "--critic-lr", "0.01", "--metrics-every", "3"))))
    del config["metrics_every"], config["agent"]["q_horizon"]  # flags that are newer than the run
    again = from_config(config | {"command": ["train.py"]})
    assert (again.metrics_every, again.agent.q_horizon, again.agent.critic_lr, again.mst) == (1, 3, 0.01, True)
    for broken, message in ((config | {"sparse": {"density": 0.5}}, "does not have density"), (config | {"agent": 3}, "does not have agent"),
                            ([], "names no algorithm"), ({"algo": "ppo"}, "names no algorithm")):
        with pytest.raises(ValueError, match=message):
            from_config(broken)


def test_presets_and_flags_reach_the_modules():
    types = lambda *flags: [(m.arch_type, m.regime, m.width_scale, m.depth_scale, m.sparsity)
                            for m in module_configs(flags_to_args(*flags)).values()]
    assert types() == [(4, "dense", 1, 1, 0.6), (4, "dense", 1, 1, 0.6), (3, "dense", 1, 1, 0.6)]  # Table 2
    assert types("--mst", "--scale", "5") == [(6, "dense", 5, 5, 0.6), (6, "dst", 5, 5, 0.6), (5, "sst", 5, 5, 0.6)]
    assert types("--mst", "--critic-regime", "s2d", "--actor-type", "6", "--sparsity", "0.8", "--critic-sparsity", "0.5",
                 "--scale", "3", "--encoder-scale", "1", "--depth-scale", "2") == [
        (6, "dense", 1, 2, 0.8), (6, "s2d", 3, 2, 0.5), (6, "sst", 3, 2, 0.8)]
    assert types("--critic-regime", "dst", "--scale", "5")[1] == (4, "dst", 5, 5, 0.6)
    options = module_configs(flags_to_args("--mst", "--distribution", "uniform", "--growth", "random",
                                                 "--update-interval", "7"))["critic"].sparse_options
    assert (options["distribution"], options["grow"], options["update_interval"]) == ("uniform", "random", 7)


@pytest.mark.slow
def test_every_algorithm_has_its_own_defaults():
    sac, mrsac = flags_to_args("--algo", "sac"), flags_to_args("--mst", "--algo=mrsac")
    assert (sac.learning_starts, sac.sparse.sparsity, sac.agent) == (5000, 0.8, SACConfig())
    assert (mrsac.learning_starts, mrsac.sparse.sparsity, mrsac.agent.temperature_lr) == (10_000, 0.6, 3e-4)
    assert isinstance(flags_to_args("--algo", "ddpg").agent, DDPGConfig) and isinstance(flags_to_args().agent, MRQConfig)
    regimes = lambda *flags: {name: (m.regime, m.sparsity, m.width_scale, m.depth_scale)
                              for name, m in module_configs(flags_to_args(*flags)).items()}
    assert regimes("--algo", "sac", "--mst", "--width-scale", "4", "--depth-scale", "3") == {
        "critic": ("dst", 0.8, 4, 3), "actor": ("sst", 0.8, 4, 3)}
    assert regimes("--algo", "ddpg", "--actor-regime", "dst", "--critic-sparsity", "0.5", "--scale", "2") == {
        "critic": ("dense", 0.5, 2, 2), "actor": ("dst", 0.8, 2, 2)}  # Fig. 14 swaps the regimes
    assert regimes("--algo", "mrsac", "--mst")["encoder"][0] == "dense"


@pytest.mark.slow
def test_run_names_tell_runs_apart():
    names = {run_name(flags_to_args(*flags)) for flags in (
        (), ("--mst",), ("--seed", "1"), ("--scale", "5"), ("--critic-scale", "5"), ("--critic-lr", "1e-3"), ("--env", "walker-run"),
        ("--mst", "--sparsity", "0.5"), ("--discount", "0.9"), ("--total-steps", "7"), ("--algo", "sac"), ("--algo", "ddpg"),
        ("--algo", "mrsac"), ("--algo", "sac", "--twin-critics"), ("--algo", "sac", "--mst", "--sparsity", "0.6"))}
    assert len(names) == 15 and {"dog-run__seed=0", "dog-run__sac__seed=0", "dog-run__sac__twin-critics__seed=0",
                                 "dog-run__scale=5__seed=0", "dog-run__sac__mst__sparsity=0.6__seed=0"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("flags, name", [
    (("--encoder-type", "4", "--actor-regime", "dense", "--critic-scale", "1"), "dog-run__seed=0"),  # defaults restated
    (("--sparsity", "0.9", "--growth", "random", "--schedule-start", "0.1"), "dog-run__seed=0"),  # nothing is sparse
    (("--critic-sparsity", "0.9",), "dog-run__seed=0"),
    (("--critic-regime", "sst", "--sparsity", "0.9", "--growth", "random"), "dog-run__critic-regime=sst__sparsity=0.9__seed=0"),
    (("--critic-regime", "dst", "--schedule-end", "0.9", "--growth", "random"), "dog-run__critic-regime=dst__grow=random__seed=0"),
    (("--scale", "3", "--encoder-scale", "3", "--width-scale", "3"), "dog-run__scale=3__seed=0"),
    (("--mst", "--residual", "post", "--critic-regime", "dst"), "dog-run__mst__residual=post__seed=0")])
def test_what_changes_nothing_is_no_part_of_the_name(flags, name):
    assert run_name(flags_to_args(*flags)) == name


@pytest.mark.slow
def test_the_name_grows_by_what_is_needed_and_no_more():
    """Against the definition: two command lines share a name if and only if they build and train the same."""
    rng = np.random.RandomState(0)
    choices = {"--mst": None, "--scale": (1, 3), "--critic-scale": (1, 3), "--width-scale": (1, 3), "--critic-type": (4, 6),
               "--critic-regime": ("dense", "sst", "dst", "d2s"), "--sparsity": (0.6, 0.8), "--critic-sparsity": (0.6, 0.8),
               "--grow": ("gradient", "random"), "--schedule-power": (2, 3), "--residual": ("pre", "post"), "--discount": (0.99, 0.9)}
    seen = {}
    for _ in range(300):
        flags = [part for flag, values in choices.items() if rng.rand() < 0.5
                 for part in ([flag] if values is None else [flag, str(values[rng.randint(len(values))])])]
        args = flags_to_args(*flags)
        modules = {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale, m.residual if m.arch_type > 4 else 0,
                          m.sparsity if m.regime != "dense" else 0, m.sparse_options["grow"] if m.regime in ("dst", "d2s") else 0,
                          m.sparse_options["schedule_power"] if m.regime == "d2s" else 0) for name, m in module_configs(args).items()}
        seen.setdefault(run_name(args), set()).add(str((modules, args.agent.discount)))
    assert len(seen) > 100 and all(len(meanings) == 1 for meanings in seen.values())
    assert len(set().union(*seen.values())) >= 0.97 * len(seen)  # scale=3 and width, depth by module may say the same twice


@pytest.mark.slow
def test_flags_that_change_nothing_are_told():
    told = lambda *flags: " ".join(unused_flag_notes(flags_to_args(*flags)))
    assert told() == told("--mst", "--sparsity", "0.8") == told("--encoder-type", "4") == ""
    assert "--sparsity, --grow changes nothing" in told("--sparsity", "0.9", "--growth", "random")
    assert "--critic-sparsity changes nothing" in told("--critic-sparsity", "0.9")
    assert "--schedule-end changes nothing" in told("--critic-regime", "dst", "--schedule-end", "0.9")
    assert "--scale changes nothing" in told("--scale", "3", "--encoder-scale", "1", "--critic-scale", "1", "--actor-scale", "1")


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_a_sparse_flag_is_in_the_name_if_and_only_if_it_moves_a_mask(regime):
    """Each regime is run with the flag and without: what the name leaves out must change nothing, and the other way round."""
    def masks(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.ELU(), nn.Linear(20, 4))
        sparse = SparseTraining(model, torch.optim.AdamW(model.parameters(), lr=0.01), regime, **({"sparsity": 0.6, "update_interval": 3,
                                "seed": 1} | options), total_steps=30)
        seen = []
        for step in range(1, 31):
            backward(model, 6)
            sparse.update_topology(step)
            sparse.mask_gradients()
            sparse.optimizer.step()
            seen.append(torch.cat([torch.ones(1), *(mask.flatten() for mask in sparse.masks.values())]))
        return torch.stack(seen)

    base, plain = ("--critic-regime", regime, "--update-interval", "3"), masks()
    for flag, argument, value in (
            ("--sparsity", "sparsity", 0.7), ("--distribution", "distribution", "uniform"), ("--growth", "grow", "random"),
            ("--update-interval", "update_interval", 5), ("--drop-initial", "drop_fraction_start", 0.8), ("--drop-final", "drop_fraction_end", 0.4),
            ("--schedule-start", "schedule_start", 0.4), ("--schedule-end", "schedule_end", 0.6), ("--schedule-power", "schedule_power", 4.0)):
        moved = not torch.equal(masks(**{argument: value}), plain)
        named = run_name(flags_to_args(*base, flag, str(value))) != run_name(flags_to_args(*base))
        assert named == moved, f"{flag} with {regime}: named {named}, moves masks {moved}"


@pytest.mark.slow
def test_a_long_name_is_shortened_and_stays_its_own():
    numbers = [flag for name in ("critic_lr", "actor_lr", "encoder_lr", "weight_decay", "reward_weight", "terminal_weight",
                                 "dynamics_weight", "exploration_noise", "target_noise", "target_noise_clip", "reward_symlog_limit")
               for flag in ("--" + name.replace("_", "-"), "0.0123456")]
    names = {run_name(flags_to_args(*numbers, "--discount", discount, "--seed", seed)) for discount in ("0.9", "0.91") for seed in "01"}
    assert len(names) == 4 and all(len(name) == 200 and name.startswith("dog-run__") for name in names)
    assert sum(name.endswith("__seed=1") for name in names) == 2


@pytest.mark.parametrize("algo, blocks", [("mrq", (2, 3, 1)), ("sac", (6, 1))])
def test_memory_check_and_sizes_against_real_networks(algo, blocks, monkeypatch):
    """Sixteen bytes per weight, counted in real networks."""
    scales = zip(AGENTS[algo].Config.presets["mst"], blocks)
    args = flags_to_args("--algo", algo, "--mst", "--width-scale", "0.1", *(word for name, b in scales for word in (f"--{name}-scale", str(b))))
    agent = agents.build_agent(args, 4, 2, torch.device("cpu"), buffer_size=100)
    weights = sum(p.numel() for network in agent.networks.values() for p in network.parameters())
    sizes = {name: count(network) - (count(network.model) if name == "encoder" else 0) for name, network in agent.networks.items()}
    assert agents.count_parameters(args, 4, 2) == sizes  # the encoder's head is counted apart
    monkeypatch.setattr(agents, "free_memory", lambda device: 16 * weights)
    agents.check_memory(args, 4, 2, torch.device("cpu"))
    monkeypatch.setattr(agents, "free_memory", lambda device: 16 * weights - 1)
    with pytest.raises(MemoryError, match=f"{16 * weights / 1e9:.3g} GB to train, but cpu has .* choose a smaller --scale"):
        agents.check_memory(args, 4, 2, torch.device("cpu"))


def test_a_disk_that_is_too_small_is_told_of(monkeypatch):
    log = types.SimpleNamespace(folder="here")
    saved = types.SimpleNamespace(size=lambda: (2e9, 3e9), log=log, args=flags_to_args("--save-every", "5000"))
    for free, told in ((9e9 + 1, False), (9e9, True)):  # two checkpoints, a third while it is written, and the buffer
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
        said = "".join(console.describe_saving(saved))
        assert "every 5,000 steps: up to 9.00 GB" in said and ("will not fit" in said) == told


def test_a_second_ctrl_c_stops_at_once_and_another_signal_does_not(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append), monkeypatch.setattr(os, "write", lambda *of: None)
    monkeypatch.setattr(signal, "signal", lambda *of: None)
    for numbers, status in (("TERM", []), ("TERM TERM USR1", []), ("INT", []), ("INT TERM", []), ("INT INT", [1]), ("TERM INT", [1])):
        ended.clear()
        stop = survive.StopSignals()
        for number in numbers.split():
            stop._note(getattr(signal, f"SIG{number}"), None)
        assert ended == status
        with pytest.raises(survive.Stopped, match=f"SIG{numbers.split()[0]}"):
            stop.check()


def test_what_is_said_of_a_run_is_true_of_its_networks():
    agent, modules = tiny(), {name: dataclasses.replace(m, width_scale=1 / 32) for name, m in MR_MST.items()}
    said = console.describe(agent, modules, flags_to_args("--seed", "4", "--total-steps", "12345"), "cpu", "folder").splitlines()
    assert said[0] == "mrq on dog-run, seed 4, 12,345 agent steps on cpu" and said[-1].split() == ["writes", "folder"] and len(said) == 5
    head = count(agent.encoder.model)
    for line, (name, network), millions in zip(said[1:], agent.networks.items(), (count(agent.encoder) - head, count(agent.critic), count(agent.actor))):
        density = np.mean(np.concatenate([mask.flatten() for mask in agent.sparse[name].masks.values()] or [[1]]))
        assert line.split() == [name, "type", str(modules[name].arch_type), modules[name].regime, "width", "×0.03125,", "depth", "×1", f"{millions / 1e6:.3f}",
                                "M", *(["+", f"{head / 1e6:.2f}", "M", "head"] if name == "encoder" else []), "density", f"{density:.3f}"]


@pytest.mark.slow
def test_large_networks_without_residuals_are_named(tmp_path):
    agent = tiny()
    modules = {name: ModuleConfig(m.arch_type, width_scale=5, depth_scale=5) for name, m in MR_DEFAULT.items()}
    assert "--mst" in console.describe(agent, modules, flags_to_args(), "cpu", "x")
    for arch_type, width, depth in itertools.product(range(1, 7), (1, 3), (2.9, 3)):
        one = MR_MST | {"critic": ModuleConfig(arch_type, width_scale=width, depth_scale=depth)}
        assert ("(critic)" in console.describe(agent, one, flags_to_args(), "cpu", "x")) == (arch_type < 5 and 3 in (width, depth))
    assert "--mst" not in console.describe(agent, MR_MST, flags_to_args(), "cpu", "x")


def test_the_last_evaluation_measures_whatever_its_number(monkeypatch):
    run = RecordedRun()
    recorded_run(monkeypatch, run, metrics_every=4)  # 0, 5, 10, and the end at 11: the third, as 10 is
    assert [event[1] for event in run.events if event[0] == "measure"] == [True, False, False, True]


def test_densities_and_the_first_speed_of_a_run_are_those_of_its_learning(monkeypatch):
    run = RecordedRun()
    run.sparse = {"net": types.SimpleNamespace(density=lambda: 0.25, sparsity=0.75)}
    monkeypatch.setattr(SavedRun, "seconds", lambda saved: float(len(run.events)))  # a clock that events alone move
    recorded_run(monkeypatch, run)
    rows = [row for name, row in run.rows if name == "train"]
    assert [row["net/density"] for row in rows] == [0.25] * 3
    began = [i for i, event in enumerate(run.events) if event[0] == "observe"][4]  # the first step that learns
    assert rows[0]["steps_per_second"] == (6 - 4) / (rows[0]["seconds"] - began)


def test_the_bar_counts_all_updates_of_a_step(monkeypatch):
    drawn, now, agent = [], [0.0], types.SimpleNamespace(updates={"critic": 0, "actor": 0}, updates_per_step=2)
    monkeypatch.setattr("tqdm.tqdm", type("Bar", (tqdm.tqdm,), {
        "__init__": lambda bar, **settings: None, "set_postfix_str": lambda bar, text: drawn.append(text)}))
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    bar = console.Bar(flags_to_args("--total-steps", "1000", "--learning-starts", "200"), agent, 0)
    for now[0], updates in ((100, 100), (200, 300)):
        agent.updates["critic"] = updates
        bar.show(400, "learning")
    assert drawn[-1].startswith("24:10 left, ")  # 2,900 of 2 × 2 × 800 are to come, two a second


def test_an_action_is_broken_by_any_of_its_numbers(monkeypatch):
    run = RecordedRun()
    act = run.act
    run.act = lambda obs, explore: np.append(act(obs, explore), math.nan if explore and run.time > 8 else 0.0)
    with pytest.raises(FloatingPointError, match="at agent step 6: the actor has diverged"):
        recorded_run(monkeypatch, run)


def test_modules_draw_masks_of_their_own():
    seeds = [sparse.seed for seed in (0, 1) for sparse in tiny_of("mrq", regimes_dense("mrq", "sst", "dst", "sst"), seed=seed)[0].sparse.values()]
    assert len(set(seeds)) == 6


def test_of_two_faults_the_first_is_told():
    agent, buffer = tiny_of("mrq", interval=100)
    for broken in ("critic", "actor"):  # the critic from its fourth update on, the actor from its seventh
        for _ in range(3):
            agent.update()
        agent.nonfinite[broken].fill_(1.0)
    assert agent.nonfinite_report() == ("the critic's loss or gradient (its update 4)", 3)
