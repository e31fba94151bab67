"""Tests of resume."""

import itertools
import multiprocessing
import os
import signal
import types
from random import Random

import pytest
import torch
from runtime import checkpoint
from runtime import resume as survive
from runtime.resume import SavedRun

from agents import AGENTS
from sparsity import REGIMES
from tests.helpers import REPLAY_AGENTS, MOMENTS, flags_to_args, in_process, play, timeless, tiny_of, tiny_run


def killed_again_and_again(algo, regimes, kills, folder, random, moments=MOMENTS):
    """Trains undisturbed, then with kills, each resumed. Returns [(moment, steps lost)], after comparing the tables."""
    folder.mkdir(exist_ok=True)
    flags, log = tiny_run(algo, regimes), str(folder / "output")
    assert in_process([*flags, "--runs", str(folder / "whole")], log) == 0, open(log).read()
    record = multiprocessing.get_context("fork").Array("i", 2, lock=False)
    entries = {"a save": 9, "an evaluation": 2, "a step": 900, "an encoder burst": 60, "a topology update": 20, "a log row": 6,
               "the way back": 2}
    lost, reached = [], 0
    for number in range(kills + 1):
        moment = random.choice([name for name in moments if algo.startswith("mr") or name != "an encoder burst"])
        kill = (moment, random.randrange(entries[moment]), random.choice([0, 0, random.random() * 0.05]), signal.SIGKILL)
        more, kill = ([], kill) if number < kills else (["--eval-workers", "1"], None)  # which changes no result
        record[0], record[1] = 0, -1
        status = in_process([*flags, "--runs", str(folder / "killed"), "--resume", *more], log, kill, record)
        assert status == 0 or (kill and status == -signal.SIGKILL), open(log).read()
        if record[1] >= 0 and lost:  # the way back was found: what the kills before have cost is known
            lost[-1] = lost[-1][0], lost[-1][1] + max(0, reached - record[1])
            reached = 0
        if status == 0:
            break
        lost.append((moment, 0))
        reached = max(reached, record[0])
    whole, killed = folder / "whole" / "run", folder / "killed" / "run"
    assert timeless(whole) == timeless(killed)
    assert len(timeless(whole)["eval.csv"]) == 4 and len(timeless(whole)["train.csv"]) == 6
    weights = [checkpoint.read(str(run / "final.pt"))[0]["networks"] for run in (whole, killed)]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
    assert {"config.json", "eval.csv", "final.pt", "lock", "train.csv"} <= {*os.listdir(killed)}
    return lost


@pytest.mark.parametrize("algo, regimes", [("mrq", ("d2s", "dst", "s2d")), ("sac", ())])
@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_was(algo, regimes, tmp_path):
    assert len(killed_again_and_again(algo, regimes, 3, tmp_path, Random(3))) >= 2


@pytest.mark.soak
@pytest.mark.slow
def test_a_hundred_kills_over_all_algorithms_and_regimes(tmp_path, capsys):
    random, all_lost = Random(0), []
    for algo, turn in itertools.product(REPLAY_AGENTS, range(5)):
        regimes, lost = [REGIMES[(turn + shift) % 5] for shift in range(3)], []
        while len(lost) < 6:  # a run may end before its kill
            lost += killed_again_and_again(algo, regimes, 8, tmp_path / f"{algo}{turn}-{len(lost)}-{random.random()}", random)
        all_lost += lost
        with capsys.disabled():
            print(f"\n{algo:6} {' '.join(regimes):16} {len(lost)} kills, steps lost: {[steps for _, steps in lost]}", end="")
    with capsys.disabled():
        counts = {name: sum(moment == name for moment, _ in all_lost) for name in MOMENTS}
        print(f"\n{len(all_lost)} kills {counts}, {sum(steps for _, steps in all_lost)} steps lost, 0 differences")
    assert len(all_lost) >= 100


@pytest.mark.slow
def test_a_signal_saves_at_the_next_safe_point_and_stops(tmp_path):
    flags, log = tiny_run("mrq", ("dense", "dst", "sst")), str(tmp_path / "output")
    assert in_process([*flags, "--runs", str(tmp_path / "whole")], log) == 0
    stopped = [*flags, "--runs", str(tmp_path / "stopped"), "--save-every", "1000", "--resume"]
    run, said = tmp_path / "stopped" / "run", lambda: open(log).read().strip().splitlines()[-1]
    for moment, which, number in (("an encoder burst", 33, signal.SIGTERM), ("an evaluation", 0, signal.SIGINT),
                                  ("a step", 560, signal.SIGUSR1)):
        assert in_process(stopped, log, (moment, which, 0, number)) == 75, open(log).read()
        assert f"stopped by {signal.Signals(number).name}" in said() and "--resume continues" in said()
        state = checkpoint.Checkpoints(str(run)).load()
        if moment == "an encoder burst":  # within it, with the action chosen whose step the burst delays
            assert state["agent"]["updates"]["encoder"] == 34 and state["agent"]["updates"]["critic"] == 20
            assert state["progress"]["step"] == 65 and len(state["progress"]["action"]) == 1
        if moment == "an evaluation":  # within it: the step behind it is not begun
            assert state["progress"]["step"] == 120 and state["progress"]["action"] is None
        assert not (run / "final.pt").exists()
    files = sorted(os.listdir(run))
    for change, message in ((("--critic-lr", "0.1"), "started with --critic-lr 0.0003, not 0.1"), (("--seed", "1"), "--seed 0, not 1"),
                            (("--env", "walker-walk"), "--env cartpole-swingup, not walker-walk"), (("--algo", "mrsac"), "--algo mrq, not mrsac")):
        assert in_process([*stopped, *change], log) == 1 and message in said()
    assert sorted(os.listdir(run)) == files
    assert in_process(stopped, log) == 0, open(log).read()
    assert timeless(tmp_path / "whole" / "run") == timeless(run) and "Traceback" not in open(log).read()
    assert in_process(stopped, log) == 0 and said().startswith("finished already")


def test_what_is_said_to_be_saved():
    """A save's arguments: the rows since the last save and the one before them, whose next observation came later; the oldest
    row still needed; and how far the logs, the clock and the episode are."""
    buffer, told = play(0, 60, 3, 90)[0], []
    log = types.SimpleNamespace(positions=lambda step=None: {"step": step}, folder="here")
    agent = types.SimpleNamespace(state_dict=dict, info={}, nonfinite_report=lambda: None, replay=buffer)
    checkpoints = types.SimpleNamespace(next_row=80, step=None, save=lambda *of, **named: told.append((of, named)))
    saved = SavedRun(checkpoints, flags_to_args(), torch.device("cpu"), agent, types.SimpleNamespace(state=dict), log)
    progress = saved.progress
    progress.step, progress.seconds, progress.episode_return, progress.last_return = 7, 100.0, 2.5, 4.5
    saved.save(wait=True)
    ((step, state, first, rows, oldest, wait), named), = told
    end = buffer.position + 1
    assert (step, first, len(rows["rows"]), oldest, wait, named) == (7, 79, end - 79, end - 60, True, {})
    assert state["log"] == {"step": 7} and 100 <= state["progress"]["seconds"] < 101
    assert (state["progress"]["episode_return"], state["progress"]["last_return"]) == (2.5, 4.5)


def test_which_signals_stop_a_run(monkeypatch):
    taken = set()
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.add(number.name))
    for ignored in (None, signal.SIGHUP):  # nohup ignores it, and is believed
        taken.clear()
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        survive.StopSignals()
        assert taken == {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"} - ({"SIGHUP"} if ignored else set())


def test_a_broken_run_is_not_saved():
    agent, told = types.SimpleNamespace(nonfinite_report=lambda: ("the critic's loss", 3)), []
    checkpoints = types.SimpleNamespace(next_row=0, step=None, save=lambda *of: told.append(of))
    log = types.SimpleNamespace(folder="here", positions=lambda step: {})
    agent.state_dict, agent.info, agent.replay = dict, {}, play(0, 60, 3, 90)[0]
    saved = SavedRun(checkpoints, flags_to_args(), torch.device("cpu"), agent, types.SimpleNamespace(state=dict), log)
    with pytest.raises(FloatingPointError, match="the critic's loss was not finite at agent step 10,003"):
        saved.save(wait=True)
    assert not told


def test_a_checkpoint_is_as_large_as_is_said():
    def size(part):
        if torch.is_tensor(part):
            return part.numel() * part.element_size()
        return sum(map(size, part.values() if isinstance(part, dict) else part)) if isinstance(part, (dict, list, tuple)) else 0

    agent, buffer = tiny_of("mrq")
    agent.update()
    saved = SavedRun(None, None, torch.device("cpu"), agent, None, None)
    one, rows = saved.size()
    assert one == pytest.approx(size(agent.state_dict()) + size(buffer.state_dict()), rel=0.02) and rows == size(buffer.rows) + size(buffer.obs)


def test_what_a_run_was_resumed_from_is_not_saved_again(monkeypatch):
    told = []
    monkeypatch.setattr(SavedRun, "save", lambda self: told.append(self.progress.step))
    saved = SavedRun(types.SimpleNamespace(step=20), flags_to_args("--save-every", "10"), torch.device("cpu"), None, None, None)
    for saved.progress.step in (0, 20, 25, 30):
        saved.save_if_due()
    assert told == [30]
