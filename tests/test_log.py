"""Tests of log."""

import dataclasses
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import types

import pytest
from runtime import log as runlog
from runtime.log import RunLocked, RunFinished, RunLog, current_name

import train
from settings import parse, run_name
from tests.helpers import HERE, RecordedRun, flags_to_args, recorded_run, table, tiny_run


def test_a_full_disk_leaves_whole_rows_and_loses_none(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    row = lambda step: {"agent_step": step, "value": step / 3}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write("train", row(1))
    size = os.path.getsize(tmp_path / "run" / "train.csv")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limit[1]))  # the next row is cut after five bytes
        log.write("train", row(2))
        log.write("train", row(3))
        assert os.path.getsize(tmp_path / "run" / "train.csv") == size and "takes no more rows" in log.failure
        where = log.positions()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.write("train", row(4))
    log.close()
    steps = lambda: [int(line["agent_step"]) for line in table(tmp_path / "run", "train.csv")]
    assert steps() == [1, 2, 3, 4] and log.failure is None
    log._lock.close()
    log = RunLog(str(tmp_path / "run"), {}, resume=True)
    log.start(where)  # back to where two rows were waiting
    log.write("train", row(5))
    assert steps() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="must have the columns agent_step, value"):
        log.write("train", {"agent_step": 1})
    with pytest.raises(ValueError, match="rows are missing"):
        log.start({"eval": {"end": 10, "waiting": ""}})


def test_old_column_names_are_known():
    for table, old, new in (
            ("eval", "frames", "env_frames"), ("train", "frames", "env_frames"), ("eval", "actor/dormant", "actor/dormant_ratio"),
            ("eval", "critic/dormant/q1.activation", "critic/dormant_ratio/q1.activation"),
            ("eval", "critic/interference", "critic/grad_cosine"),
            ("eval", "critic/interference_negative", "critic/grad_cosine_negative"),
            ("eval", "critic/gradient_norm", "critic/grad_norm"), ("eval", "critic/srank_q1_cap", "critic/srank_q1_max"),
            ("train", "critic_density", "critic/density"), ("train", "my_net_grad_norm", "my_net/grad_norm")):
        assert current_name(table, old) == new == current_name(table, new)
    for same in ("agent_step", "return", "critic/srank_q1", "critic/parameter_norm", "critic/density"):
        assert current_name("eval", same) == current_name("train", same) == same


def test_a_resumed_run_keeps_the_columns_of_the_version_that_started_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    start = b"agent_step,frames,critic/dormant,critic/srank_q1_cap,return\r\n0,0,nan,8,1.5\r\n"
    (folder / "eval.csv").write_bytes(start + b"5,10,0.5,8,2\r\n")  # the second row is newer than the checkpoint
    log = RunLog(str(folder), {}, resume=True)
    log.start({"eval": {"end": len(start), "waiting": ""}})
    log.write("eval", {"agent_step": 5, "env_frames": 10, "return": 2.5, "critic/dormant_ratio": 0.25, "critic/srank_q1_max": 8})
    log.close()
    assert (folder / "eval.csv").read_bytes() == start + b"5,10,0.25,8,2.5\r\n"


def test_a_full_disk_is_told_once(monkeypatch, capsys):
    run = RecordedRun()
    run.failure = "eval.csv takes no more rows"
    recorded_run(monkeypatch, run)
    assert capsys.readouterr().out.count("note: eval.csv takes no more rows") == 1


def test_two_processes_never_train_one_run(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    with pytest.raises(RunLocked, match="another process"):
        RunLog(str(tmp_path / "run"), {}, resume=True)
    with pytest.raises(FileExistsError, match="continue it by --resume"):
        RunLog(str(tmp_path / "run"), {})
    log._lock.close()
    (tmp_path / "run" / "final.pt").touch()
    with pytest.raises(RunFinished):
        RunLog(str(tmp_path / "run"), {}, resume=True)


def test_rows_are_on_disk_at_once_with_six_digits(tmp_path, monkeypatch):
    told = []
    fake = lambda **methods: type("Fake", (), {name: staticmethod(method) for name, method in methods.items()})
    tell = lambda what: lambda *arguments, **named: told.append((what, *arguments, *sorted(named.items())))
    monkeypatch.setitem(sys.modules, "wandb", fake(init=tell("init"), log=tell("log"), finish=tell("finish")))
    writer = fake(add_scalar=tell("scalar"), close=tell("close"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake(SummaryWriter=lambda folder, purge_step: (told.append(folder), writer)[1]))
    folder = str(tmp_path / "run")
    log = RunLog(folder, {"seed": 1, "scale": 0.5}, tensorboard=True, wandb_project="project")
    log.start()
    log.write("eval", {"agent_step": 1234567, "return": 1 / 3, "text": "a"})
    assert open(tmp_path / "run" / "eval.csv").read().split() == ["agent_step,return,text", "1234567,0.333333,a"]
    log.write("train", {"agent_step": 2, "loss": 123456.789})
    log.write("eval", {"agent_step": 3, "return": math.nan, "text": "b"})
    assert [row["return"] for row in table(tmp_path / "run", "eval.csv")] == ["0.333333", "nan"]
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "2", "loss": "123457"}]
    assert json.load(open(tmp_path / "run" / "config.json")) == {"seed": 1, "scale": 0.5}
    with pytest.raises(ValueError):
        log.write("train", {"agent_step": 3, "other": 1.0})  # another column than the first row's
    log.close()
    assert ("scalar", "train/loss", 123456.789, 2) in told and ("log", {"train/agent_step": 2, "train/loss": 123456.789}) in told
    assert ("init", ("config", {"seed": 1, "scale": 0.5}), ("dir", folder), ("name", "run"), ("project", "project")) in told
    assert folder in told and ("close",) in told and ("finish",) in told
    with pytest.raises(FileExistsError, match="a run never overwrites another"):
        RunLog(folder, {})


def test_a_table_that_was_begun_after_the_checkpoint_begins_anew(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    log.write("eval", {"agent_step": 0, "return": 1.0})
    positions = log.positions()
    log.write("eval", {"agent_step": 5, "return": 2.0})
    log.write("train", {"agent_step": 7, "loss": 1.0})
    log._lock.close()
    again = RunLog(str(tmp_path / "run"), {}, resume=True)
    again.start(positions)
    assert not (tmp_path / "run" / "train.csv").exists() and len(table(tmp_path / "run", "eval.csv")) == 1
    again.write("train", {"agent_step": 6, "loss": 3.0})
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "6", "loss": "3"}]


def test_a_resumed_run_goes_on_in_the_run_that_wandb_has(tmp_path, monkeypatch):
    told = []
    wandb = types.SimpleNamespace(init=lambda **named: told.append(named), log=told.append, finish=lambda: None, run=types.SimpleNamespace(id="x7"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = RunLog(str(tmp_path / "run"), {}, wandb_project="project")
    log.start()
    positions = log.positions(step=5)
    log._lock.close()
    RunLog(str(tmp_path / "run"), {}, resume=True, wandb_project="project").start(positions)
    assert told[1] == told[0] | {"id": "x7", "resume": "allow"} and positions["step"] == 5 and "id" not in told[0]


def test_a_long_name_is_cut_between_characters():
    for start in ("", "a"):
        name = run_name(dataclasses.replace(flags_to_args("--seed", "7"), env=start + "ü" * 300))
        assert len(name.encode()) <= 255 and name.startswith(start + "ü" * 50)
        whole = f"{start}{'ü' * 300}__seed=7"  # the same in every version, or --resume would not find the run
        assert name.endswith(f"__{hashlib.sha256(whole.encode()).hexdigest()[:12]}__seed=7")


@pytest.mark.slow
def test_help_shows_the_flags_of_the_algorithm_that_is_asked_for(capsys):
    for algo, flag, other in (("sac", "--twin-critics", "--encoder-horizon"), ("mrq", "--encoder-horizon", "--twin-critics")):
        with pytest.raises(SystemExit) as stopped:
            parse(["--algo", algo, "--help"])
        said = capsys.readouterr().out
        assert not stopped.value.code and flag in said and other not in said


@pytest.mark.slow
def test_a_run_of_another_process_is_left_alone_with_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_run("sac"), "--runs", str(tmp_path), "--resume"])
    log = RunLog(str(tmp_path / "run"), dataclasses.asdict(parse(sys.argv[1:])))
    with pytest.raises(SystemExit) as stopped:
        train.main()
    log._lock.close()
    captured = capsys.readouterr()
    assert stopped.value.code == 76 and not captured.out and captured.err.endswith("run is being trained by another process\n")  # sweep.sh reads it


def test_a_run_notes_its_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--mst", "--seed", "3"])
    assert runlog.provenance()["command"] == ["train.py", "--mst", "--seed", "3"]


def test_the_commit_that_a_run_notes_is_that_of_the_code(tmp_path, monkeypatch):
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert (runlog.provenance()["commit"] or "").removesuffix("+changes") == head


def test_a_row_goes_by_its_columns_names(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    log.start()
    log.write("eval", {"agent_step": 1, "return": 2.0})
    log.write("eval", {"return": 4.0, "agent_step": 3})
    assert table(tmp_path / "run", "eval.csv") == [{"agent_step": "1", "return": "2"}, {"agent_step": "3", "return": "4"}]


def test_a_resumed_run_purges_what_tensorboard_has_beyond_its_checkpoint(tmp_path, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: told.append(purge_step)))
    RunLog(str(tmp_path / "a"), {}, tensorboard=True).start()
    RunLog(str(tmp_path / "b"), {}, tensorboard=True).start({"step": 5})
    assert told == [None, 5]
