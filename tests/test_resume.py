"""Tests of stopping and resuming: kills, signals, what is saved when, and runs of earlier versions."""

import argparse
import itertools
import multiprocessing
import os
import shutil
import signal
from random import Random

import numpy as np
import pytest
import torch

from runtime import checkpoint, resume
from runtime.resume import SavedRun, Stopped, StopSignals
from sparsity import REGIMES
from tests.helpers import (HERE, MOMENTS, REPLAY_AGENTS, Recorder, args_with, in_process, play, refuses, table,
                           timeless, tiny_of, tiny_run)


def killed_again_and_again(algo, regimes, kills, folder, random, moments=MOMENTS):
    """Compares an undisturbed run with one that is killed and resumed. Returns [(moment, steps lost)] of each kill."""
    folder.mkdir(exist_ok=True)
    flags, log = tiny_run(algo, regimes), str(folder / "output")
    assert in_process([*flags, "--runs", str(folder / "whole")], log) == 0, open(log).read()
    record = multiprocessing.get_context("fork").Array("i", 2, lock=False)
    entries = {"a save": 9, "an evaluation": 2, "a step": 900, "an encoder burst": 60, "a topology update": 20,
               "a log row": 6, "the way back": 2}
    lost, reached = [], 0
    for number in range(kills + 1):
        moment = random.choice([name for name in moments if algo.startswith("mr") or name != "an encoder burst"])
        kill = (moment, random.randrange(entries[moment]), random.choice([0, 0, random.random() * 0.05]),
                signal.SIGKILL)
        more, kill = ([], kill) if number < kills else (["--eval-workers", "1"], None)  # changes no result
        record[0], record[1] = 0, -1
        status = in_process([*flags, "--runs", str(folder / "killed"), "--resume", *more], log, kill, record)
        assert status == 0 or (kill and status == -signal.SIGKILL), open(log).read()
        if record[1] >= 0 and lost:  # it resumed: the cost of the kills before is known
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
    files = {name for name in os.listdir(killed) if not name.startswith(("checkpoint-", "rows-"))}  # the last is kept
    assert files == {"config.json", "eval.csv", "final.pt", "lock", "train.csv"}
    return lost


@pytest.mark.parametrize("algo, regimes", [("mrq", ("d2s", "dst", "s2d")), ("sac", ())])
@pytest.mark.slow
def test_resume_after_kill_is_exact(algo, regimes, tmp_path):
    assert len(killed_again_and_again(algo, regimes, 3, tmp_path, Random(3))) >= 2


@pytest.mark.soak
@pytest.mark.slow
def test_resume_after_a_hundred_kills_is_exact(tmp_path, capsys):
    random, all_lost = Random(0), []
    for algo, turn in itertools.product(REPLAY_AGENTS, range(5)):
        regimes, lost = [REGIMES[(turn + shift) % 5] for shift in range(3)], []
        while len(lost) < 6:  # a run may end before its kill
            lost += killed_again_and_again(algo, regimes, 8, tmp_path / f"{algo}{turn}-{len(lost)}-{random.random()}",
                                           random)
        all_lost += lost
        with capsys.disabled():
            print(f"\n{algo:6} {' '.join(regimes):16} {len(lost)} kills, steps lost: {[steps for _, steps in lost]}",
                  end="")
    with capsys.disabled():
        counts = {name: sum(moment == name for moment, _ in all_lost) for name in MOMENTS}
        print(f"\n{len(all_lost)} kills {counts}, {sum(steps for _, steps in all_lost)} steps lost, 0 differences")
    assert len(all_lost) >= 100


@pytest.mark.slow
def test_signal_saves_at_the_next_safe_point_and_stops(tmp_path):
    flags, log = tiny_run("mrq", ("dense", "dst", "sst")), str(tmp_path / "output")
    assert in_process([*flags, "--runs", str(tmp_path / "whole")], log) == 0
    stopped = [*flags, "--runs", str(tmp_path / "stopped"), "--save-every", "1000", "--resume"]
    run, said = tmp_path / "stopped" / "run", lambda: open(log).read().strip().splitlines()[-1]
    for moment, which, number in (("an encoder burst", 33, signal.SIGTERM), ("an evaluation", 0, signal.SIGINT),
                                  ("a step", 560, signal.SIGUSR1)):
        assert in_process(stopped, log, (moment, which, 0, number)) == 75, open(log).read()
        assert f"stopped by {signal.Signals(number).name}" in said() and "--resume" in said()
        state = checkpoint.Checkpoints(str(run)).load()
        if moment == "an encoder burst":  # within it, with the action chosen whose step the burst delays
            assert state["agent"]["updates"]["encoder"] == 34 and state["agent"]["updates"]["critic"] == 20
            assert state["progress"]["step"] == 65 and len(state["progress"]["action"]) == 1
        if moment == "an evaluation":  # within it: the next step has not begun
            assert state["progress"]["step"] == 120 and state["progress"]["action"] is None
        assert not (run / "final.pt").exists()
    files = sorted(os.listdir(run))
    for change, message in ((("--critic-lr", "0.1"), "--critic-lr 0.0003, not 0.1"),
                            (("--seed", "1"), "--seed 0, not 1"),
                            (("--env", "walker-walk"), "--env cartpole-swingup, not walker-walk"),
                            (("--algo", "mrsac"), "--algo mrq, not mrsac")):
        assert in_process([*stopped, *change], log) == 1 and message in said()
    assert sorted(os.listdir(run)) == files
    assert in_process(stopped, log) == 0, open(log).read()
    assert timeless(tmp_path / "whole" / "run") == timeless(run) and "Traceback" not in open(log).read()
    assert in_process(stopped, log) == 0 and said().startswith("finished already")


@pytest.mark.slow
def test_resume_within_one_of_several_updates_per_step_is_exact(tmp_path):
    """Two updates per step, an odd period: a burst begins in the second update of a step, and is stopped there."""
    flags = [*tiny_run("mrq", ("dense", "dst", "s2d")), "--updates-per-step", "2", "--target-update-freq", "15"]
    log, stopped = str(tmp_path / "output"), [*flags, "--runs", str(tmp_path / "stopped"), "--save-every", "999",
                                              "--resume"]
    assert in_process([*flags, "--runs", str(tmp_path / "whole")], log) == 0, open(log).read()
    assert in_process(stopped, log, ("an encoder burst", 20, 0, signal.SIGTERM)) == 75, open(log).read()
    state = checkpoint.Checkpoints(str(tmp_path / "stopped/run")).load()
    assert state["agent"]["updates"] == {"encoder": 21, "critic": 15,
                                         "actor": 15} and state["progress"]["step"] == 45 + 7
    assert in_process(stopped, log) == 0, open(log).read()
    assert timeless(tmp_path / "whole/run") == timeless(tmp_path / "stopped/run")
    assert len(timeless(tmp_path / "whole/run")["train.csv"]) == 6


# ---- what is saved, and when ----

def saved_run(checkpoints, agent=None, **settings):
    """A SavedRun of plain parts."""
    agent = agent or argparse.Namespace(state_dict=dict, info={}, nonfinite_report=lambda: None,
                                        replay=play(0, 60, 3, 90)[0])
    log = argparse.Namespace(positions=lambda step: {"step": step}, folder="here")
    return SavedRun(checkpoints, args_with(**settings), torch.device("cpu"), agent, argparse.Namespace(state=dict), log)


def test_save_holds_new_rows_log_clock_and_episode():
    """New rows: since the last save, and the one before, whose next observation came later."""
    checkpoints = Recorder()
    checkpoints.next_row = 80
    saved = saved_run(checkpoints)
    progress = saved.progress
    progress.step, progress.seconds, progress.episode_return, progress.last_return = 7, 100.0, 2.5, 4.5
    progress.action = np.array([0.5, -1.0], np.float32)
    saved.save(wait=True)
    ((name, (step, state, first, rows, oldest, wait), named),) = checkpoints.calls
    end = saved.agent.replay.position + 1
    assert (name, step, first, len(rows["rows"]), oldest, wait, named) == ("save", 7, 79, end - 79, end - 60, True, {})
    assert state["log"] == {"step": 7} and 100 <= state["progress"]["seconds"] < 101
    assert (state["progress"]["episode_return"], state["progress"]["last_return"]) == (2.5, 4.5)
    assert state["progress"]["action"] == [0.5, -1.0] and torch.equal(state["random"]["cpu"], torch.get_rng_state())


def test_broken_run_is_not_saved():
    checkpoints = Recorder()
    saved = saved_run(checkpoints, argparse.Namespace(nonfinite_report=lambda: ("the critic's loss", 3)))
    refuses(lambda: saved.save(wait=True), "the critic's loss", "agent step 10,003", "here")
    assert not checkpoints.calls


def test_checkpoint_size_is_predicted():
    def size(part):
        if torch.is_tensor(part):
            return part.numel() * part.element_size()
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        return sum(map(size, parts))

    agent, buffer = tiny_of("mrq")
    agent.update()
    one, rows = saved_run(None, agent).size()
    assert one == pytest.approx(size(agent.state_dict()) + size(buffer.state_dict()), rel=0.02)
    assert rows == size(buffer.rows) + size(buffer.obs)


def test_saves_happen_every_n_steps_and_not_again_where_the_run_resumed(monkeypatch):
    steps = []
    monkeypatch.setattr(SavedRun, "save", lambda self: steps.append(self.progress.step))
    saved = saved_run(argparse.Namespace(step=20), save_every=10)
    for saved.progress.step in (0, 20, 25, 30):
        saved.save_if_due()
    assert steps == [30]


@pytest.mark.parametrize("keep, size, kept", [("auto", 1e8, True), ("auto", 1e8 + 2, False), ("on", 1e9, True),
                                              ("off", 1.0, False)])
def test_last_checkpoint_is_kept_if_small_or_asked_for(keep, size, kept, monkeypatch):
    monkeypatch.setattr(SavedRun, "size", lambda self: (size / 2, size / 2))
    for failure in (None, "the disk is full"):
        checkpoints = Recorder()
        checkpoints.next_row, checkpoints.failure = 0, failure
        saved = saved_run(checkpoints, tiny_of("mrq")[0], keep_checkpoint=keep)
        saved.save_for_extension()
        saved.finish()
        assert [name for name, *_ in checkpoints.calls] == ["save"] * kept + ["finish"]
        assert checkpoints.calls[-1][2] == {"keep": kept and not failure}


# ---- signals ----

def test_which_signals_stop_a_run(monkeypatch):
    taken = set()
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.add(number.name))
    for ignored in (None, signal.SIGHUP):  # nohup ignores it
        taken.clear()
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        StopSignals()
        assert taken == {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"} - ({"SIGHUP"} if ignored else set())


def test_only_a_second_ctrl_c_stops_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(resume.os, "_exit", ended.append), monkeypatch.setattr(resume.os, "write", lambda *of: None)
    monkeypatch.setattr(signal, "signal", lambda *of: None)
    for numbers, status in (("TERM", []), ("TERM TERM USR1", []), ("INT", []), ("INT TERM", []), ("INT INT", [1]),
                            ("TERM INT", [1])):
        ended.clear()
        stop = StopSignals()
        for number in numbers.split():
            stop._note(getattr(signal, f"SIG{number}"), None)
        assert ended == status
        with pytest.raises(Stopped, match=f"SIG{numbers.split()[0]}"):
            stop.check()


# ---- a run that version f401c50 began ----

@pytest.mark.slow
def test_run_of_an_earlier_version_resumes(tmp_path):
    """It is found under its old name, keeps its columns, and continues as that version did, up to rounding.

    The archive holds the run, killed after its checkpoint of step 100; its flags; and the tables of the whole run.
    """
    shutil.unpack_archive(HERE / "tests/data/old_run.tar.gz", tmp_path)  # any Python 3.10 to 3.12
    old = tmp_path / "old_run"
    flags, name, log = (old / "flags").read_text().split(), (old / "name").read_text().strip(), str(tmp_path / "output")
    folder = old.rename(tmp_path / name)
    saved = {"eval.csv": (folder / "eval.csv").read_text().splitlines()[:-1],  # the last row came after the checkpoint
             "train.csv": (folder / "train.csv").read_text().splitlines()}
    assert in_process([*flags, "--runs", str(tmp_path), "--resume"], log) == 0, open(log).read()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name] and (folder / "final.pt").exists()
    for name, lines in saved.items():
        rows, whole = table(folder, name), table(folder, f"whole-{name}")
        assert (folder / name).read_text().splitlines()[:len(lines)] == lines and len(lines) > 1
        assert len(rows) == len(whole) > len(lines) and rows[0].keys() == whole[0].keys()
        for row, expected in zip(rows, whole):
            for column in row.keys() - {"seconds", "steps_per_second"}:
                numbers = [[float(word) for word in one[column].split()] for one in (row, expected)]
                assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05, nan_ok=True), (name, column)
