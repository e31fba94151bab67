"""Tests of log."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import re
import resource
import struct
import subprocess
import sys
import time
import types

import mujoco
import numpy as np
import pytest
import torch
from runtime import log as runlog
from runtime.log import RunLocked, RunFinished, RunLog, current_name

import train
from settings import from_config, parse
from tests.helpers import HERE, RecordedRun, recorded_run, table, tiny_run


def begun(folder, positions=None, config=None, **options):
    """A log that may write; with positions, of a resumed run."""
    log = RunLog(str(folder), config or {}, resume=positions is not None, **options)
    log.start(positions)
    return log


@contextlib.contextmanager
def full_disk(limit=0):
    """Within it, a file takes no byte beyond the limit, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_whole_rows_and_loses_none(tmp_path):
    log, path = begun(tmp_path / "run"), tmp_path / "run" / "train.csv"
    row = lambda step: {"agent_step": step, "value": step / 3}
    log.write("train", row(1))
    size = os.path.getsize(path)
    with full_disk(size + 5):  # the next row is cut after five bytes
        log.write("train", row(2))
        log.write("train", row(3))
        assert os.path.getsize(path) == size and "train.csv" in log.failures[0]
        where = log.positions()
    log.write("train", row(4))
    log.close()
    steps = lambda: [int(line["agent_step"]) for line in table(tmp_path / "run", "train.csv")]
    assert steps() == [1, 2, 3, 4] and log.failures == []
    log._lock.close()
    log = begun(tmp_path / "run", where)  # back to where two rows were waiting
    log.write("train", row(5))
    assert steps() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="agent_step, value"):
        log.write("train", {"agent_step": 1})
    with pytest.raises(ValueError, match="rows are missing"):
        log.start({"eval": {"end": 10, "waiting": ""}})


def test_old_column_names_are_known():
    for kind, old, new in (
            ("eval", "frames", "env_frames"), ("train", "frames", "env_frames"),
            ("eval", "actor/dormant", "actor/dormant_ratio"),
            ("eval", "critic/dormant/q1.activation", "critic/dormant_ratio/q1.activation"),
            ("eval", "critic/interference", "critic/grad_cosine"),
            ("eval", "critic/interference_negative", "critic/grad_cosine_negative"),
            ("eval", "critic/gradient_norm", "critic/grad_norm"),
            ("eval", "critic/srank_q1_cap", "critic/srank_q1_max"),
            ("train", "critic_density", "critic/density"), ("train", "my_net_grad_norm", "my_net/grad_norm")):
        assert current_name(kind, old) == new == current_name(kind, new)
    for same in ("agent_step", "return", "critic/srank_q1", "critic/parameter_norm", "critic/density"):
        assert current_name("eval", same) == current_name("train", same) == same


def test_a_resumed_run_keeps_the_columns_of_the_version_that_started_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    start = b"agent_step,frames,critic/dormant,critic/srank_q1_cap,return\r\n0,0,nan,8,1.5\r\n"
    (folder / "eval.csv").write_bytes(start + b"5,10,0.5,8,2\r\n")  # the second row is newer than the checkpoint
    log = begun(folder, {"eval": {"end": len(start), "waiting": ""}})
    log.write("eval", {"agent_step": 5, "env_frames": 10, "return": 2.5, "critic/dormant_ratio": 0.25,
                       "critic/srank_q1_max": 8, "critic/dropped": 3.0})  # that version had no such column
    log.close()
    assert (folder / "eval.csv").read_bytes() == start + b"5,10,0.25,8,2.5\r\n"


def test_a_full_disk_is_reported_once(monkeypatch, capsys):
    run = RecordedRun()
    run.failure = "eval.csv cannot be written"
    recorded_run(monkeypatch, run)
    assert capsys.readouterr().out.count("note: eval.csv cannot be written") == 1


def test_two_processes_never_train_one_run(tmp_path):
    log = RunLog(str(tmp_path / "run"), {})
    with pytest.raises(RunLocked, match="another process"):
        RunLog(str(tmp_path / "run"), {}, resume=True)
    with pytest.raises(FileExistsError, match="continue it with --resume"):
        RunLog(str(tmp_path / "run"), {})
    log._lock.close()
    (tmp_path / "run" / "final.pt").touch()
    with pytest.raises(RunFinished):
        RunLog(str(tmp_path / "run"), {}, resume=True)


def test_rows_are_on_disk_at_once_with_six_digits(tmp_path):
    log = begun(tmp_path / "run", config={"seed": 1, "scale": 0.5})
    log.write("eval", {"agent_step": 1234567, "return": 1 / 3, "text": "a"})
    assert open(tmp_path / "run" / "eval.csv").read().split() == ["agent_step,return,text", "1234567,0.333333,a"]
    log.write("train", {"agent_step": 2, "loss": 123456.789})
    log.write("eval", {"return": math.nan, "text": "b", "agent_step": 3})  # by name
    assert table(tmp_path / "run", "eval.csv")[1] == {"agent_step": "3", "return": "nan", "text": "b"}
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "2", "loss": "123457"}]
    assert json.load(open(tmp_path / "run" / "config.json")) == {"seed": 1, "scale": 0.5}
    with pytest.raises(ValueError):
        log.write("train", {"agent_step": 3, "other": 1.0})  # another column than the first row's
    log.close()


def test_a_table_newer_than_the_checkpoint_starts_again(tmp_path):
    log = begun(tmp_path / "run")
    log.write("eval", {"agent_step": 0, "return": 1.0})
    positions = log.positions()
    log.write("eval", {"agent_step": 5, "return": 2.0})
    log.write("train", {"agent_step": 7, "loss": 1.0})
    log._lock.close()
    again = begun(tmp_path / "run", positions)
    assert not (tmp_path / "run" / "train.csv").exists() and len(table(tmp_path / "run", "eval.csv")) == 1
    again.write("train", {"agent_step": 6, "loss": 3.0})
    assert table(tmp_path / "run", "train.csv") == [{"agent_step": "6", "loss": "3"}]


@pytest.mark.slow
def test_help_shows_the_flags_of_the_algorithm_that_is_asked_for(capsys):
    for algo, flag, other in (("sac", "--twin-critics", "--encoder-horizon"),
                              ("mrq", "--encoder-horizon", "--twin-critics")):
        with pytest.raises(SystemExit) as stopped:
            parse(["--algo", algo, "--help"])
        said = capsys.readouterr().out
        assert not stopped.value.code and flag in said and other not in said


@pytest.mark.slow
def test_a_run_of_another_process_ends_with_status_76(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_run("sac"), "--runs", str(tmp_path), "--resume"])
    log = RunLog(str(tmp_path / "run"), dataclasses.asdict(parse(sys.argv[1:])))
    with pytest.raises(SystemExit) as stopped:
        train.main()
    log._lock.close()
    captured = capsys.readouterr()
    assert stopped.value.code == 76 and not captured.out  # sweep.sh reads the status
    assert captured.err.endswith("run is being trained by another process\n")


def test_config_records_what_repeats_a_run(tmp_path, monkeypatch):
    """Command, commit, versions and machine, from other sources than the code's."""
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--mst", "--seed", "3"])
    monkeypatch.chdir(tmp_path)  # the commit is that of the code, not of this folder
    for name in [name for name in os.environ if name.startswith(runlog.RECORDED_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = runlog.provenance()
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (found.pop("commit") or "").removesuffix("+changes") == head
    assert found.pop("processor") in open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else True
    versions = found.pop("versions")
    assert versions.items() >= {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                                "mujoco": mujoco.__version__}.items()
    assert versions.keys() == {"python", "torch", "numpy", "dm_control", "mujoco", "gymnasium"}
    assert found == {"command": ["train.py", "--mst", "--seed", "3"], "system": platform.platform(),
                     "cores": os.cpu_count(), "environment": {"OMP_NUM_THREADS": "1"}}


@pytest.mark.slow
def test_config_records_settings_modules_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "_commit", lambda folder: None)
    args = parse([*tiny_run("mrq"), "--runs", str(tmp_path), "--critic-sparsity", "0.7", "--threads", "1"])
    train.build(args)[-2].close()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.items() >= json.loads(json.dumps(dataclasses.asdict(args))).items()  # every flag
    assert from_config(config) == args
    assert {name: (module["regime"], module["arch_type"], module["width_scale"], module["sparsity"])
            for name, module in config["modules"].items()} == {
        "encoder": ("dense", 6, 0.05, 0.6), "critic": ("dst", 6, 0.05, 0.7), "actor": ("sst", 5, 0.05, 0.6)}
    assert config["modules"]["critic"]["sparse_options"]["update_interval"] == 15
    assert (config["device_used"], config["threads_used"], config["compiled"], config["gpu"]) == ("cpu", 1, False, None)
    assert config.keys() >= runlog.provenance().keys()


def test_a_table_that_the_disk_never_took_has_one_header_after_resume(tmp_path):
    log = begun(tmp_path / "run")
    with full_disk():
        log.write("eval", {"agent_step": 0, "return": 1.0})
        where = log.positions()
    log._lock.close()
    begun(tmp_path / "run", where).write("eval", {"agent_step": 5, "return": 2.0})
    rows = table(tmp_path / "run", "eval.csv")
    assert rows == [{"agent_step": "0", "return": "1"}, {"agent_step": "5", "return": "2"}]


def test_a_quota_at_fsync_stops_nothing_and_loses_no_row(tmp_path, monkeypatch):
    """The system may forget what it could not sync: those rows must be in the checkpoint."""
    log = begun(tmp_path / "run")
    log.write("eval", {"agent_step": 0, "return": 1.0})
    synced = log.positions()["eval"]["end"]
    log.write("eval", {"agent_step": 5, "return": 2.0})

    def over_quota(_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", over_quota)
        where = log.positions()
        assert "eval.csv may be incomplete on the disk" in log.failures[0] and where["eval"]["end"] == synced
        log.write("eval", {"agent_step": 10, "return": 3.0})
    log._lock.close()
    path, whole = tmp_path / "run" / "eval.csv", (tmp_path / "run" / "eval.csv").read_bytes()
    path.write_bytes(whole[:synced])  # a power cut
    log = begun(tmp_path / "run", where)
    log.write("eval", {"agent_step": 10, "return": 3.0})
    assert path.read_bytes() == whole and log.failures == []
    assert log.positions()["eval"] == {"end": len(whole), "waiting": ""}


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_that_an_editor_changed_do_not_matter(line_end, tmp_path):
    """git and editors rewrite them. By its length, a row then ended within another: 30 continued as 3030."""
    log, rows = begun(tmp_path / "run"), [{"agent_step": 30 * t, "return": t / 2} for t in range(9)]
    for number, row in enumerate(rows):
        log.write("eval", row)
        if number == 3:
            where = log.positions()
    log._lock.close()
    path = tmp_path / "run" / "eval.csv"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\r\n", line_end))
    log = begun(tmp_path / "run", where)
    for row in rows[4:]:
        log.write("eval", row)
    assert path.read_bytes() == whole and not (tmp_path / "run" / "eval.csv.part").exists()
    log._lock.close()
    path.write_bytes(whole.replace(b"30,", b"30.0,"))
    with pytest.raises(ValueError, match=r"eval.csv.* byte \d+"):
        begun(tmp_path / "run", where)


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run .*Not a directory.* --runs"):
        RunLog(str(tmp_path / "file" / "run"), {})
    with full_disk(), pytest.raises(OSError, match="config.json cannot be written"):
        RunLog(str(tmp_path / "run"), {"seed": 1})
    assert not (tmp_path / "run").exists()  # the next attempt finds nothing in its way
    (tmp_path / "held" / "lock").mkdir(parents=True)
    with pytest.raises(OSError, match="held cannot be written"):
        RunLog(str(tmp_path / "held"), {}, resume=True)


# ---- trackers: the real packages, where they are installed ----

CONFIG = {"algo": "mrq", "env": "dog-run", "lr": 0.5, "name": None, "modules": {"critic": {"regime": "dst"}}}


def tracked_run(folder, positions=None, steps=(0, 5), **options):
    log = begun(folder, positions, CONFIG, **options)
    for step in steps:
        log.write("train", {"agent_step": step, "loss": 10.0 + step})
        log.write("eval", {"agent_step": step, "return": 0.5 * step, "returns": "1 2"})
    where = log.positions(steps[-1])
    log.write("train", {"agent_step": 7, "loss": 0.0})  # newer than the checkpoint
    assert log.failures == []
    log.close()
    log._lock.close()
    return where


@pytest.mark.slow
def test_tensorboard_shows_tables_over_agent_steps_and_settings(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    where = tracked_run(tmp_path / "run", tensorboard=True)
    time.sleep(1)  # TensorBoard reads the files in the order of the seconds in their names
    tracked_run(tmp_path / "run", where, (6, 8), tensorboard=True)
    found = accumulator.EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss", "eval/return"]
    assert [(event.step, event.value) for event in found.Scalars("eval/return")] == [(t, t / 2) for t in (0, 5, 6, 8)]
    assert [event.step for event in found.Scalars("train/loss")] == [0, 5, 6, 8, 7]  # the first 7 is gone
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {key: value.string_value or value.number_value for key, value in settings.items()} == {
        "algo": "mrq", "env": "dog-run", "lr": 0.5, "name": "None", "modules.critic.regime": "dst"}


@pytest.mark.slow
def test_tensorboard_on_a_full_disk_is_dropped(tmp_path):
    """SummaryWriter's thread would end, and the run would wait for it forever."""
    pytest.importorskip("tensorboard")
    log = begun(tmp_path / "run", config=CONFIG, tensorboard=True)
    with full_disk(2000):
        for step in range(60):
            log.write("train", {"agent_step": step, "loss": 1.0})
    log.write("train", {"agent_step": 60, "loss": 1.0})
    (line,) = log.failures
    assert line.startswith("tensorboard failed (OSError")
    log.close()
    assert len(table(tmp_path / "run", "train.csv")) == 61


def wandb_records(path):
    """The records of a W&B file: LevelDB's log format. A file of this size is one block, each record whole."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, place = path.read_bytes(), 7
    while place + 7 <= len(data):
        _, size, _ = struct.unpack("<IHB", data[place:place + 7])
        yield Record.FromString(data[place + 7:place + 7 + size])
        place += 7 + size


def wandb_run(folder, **environment):
    """A run in a process of its own: W&B reads its environment once. Returns (exit status, last line)."""
    if not hasattr(pytest.importorskip("wandb"), "init"):
        pytest.skip("wandb is only a folder here")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    code = f"from tests.test_log import tracked_run; tracked_run({str(folder)!r}, wandb_project='p')"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True,
                            timeout=300, env=outside | environment | {
                                "WANDB_SILENT": "true", "HOME": str(folder.parent), "PYTHONPATH": str(HERE)})
    return result.returncode, (result.stderr.splitlines() or [""])[-1]


@pytest.mark.slow
def test_wandb_gets_agent_steps_config_group_and_tags(tmp_path):
    assert wandb_run(tmp_path / "dog-run__mst__seed=3", WANDB_MODE="offline") == (0, "")
    (path,) = tmp_path.glob("dog-run__mst__seed=3/wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_group, list(run.tags)) == ("p", "dog-run__mst", ["mrq", "dog-run"])
    assert run.display_name == "dog-run__mst__seed=3"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() >= CONFIG.items()
    assert ("*", "agent_step") in [(r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField("metric")]
    rows = [{item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in records if record.HasField("history")]
    assert [(row["agent_step"], row.get("train/loss"), row.get("eval/return")) for row in rows] == [
        ("0", "10", None), ("0", None, "0"), ("5", "15", None), ("5", None, "2.5"), ("7", "0", None)]
    (tmp_path / "else").mkdir()
    assert wandb_run(tmp_path / "other", WANDB_MODE="offline", WANDB_DIR=str(tmp_path / "else"), WANDB_RUN_GROUP="mine",
                     WANDB_TAGS="a,b") == (0, "")
    (path,) = tmp_path.glob("else/wandb/offline-run-*/*.wandb")
    (run,) = [record.run for record in wandb_records(path) if record.HasField("run")]
    assert (run.run_group, list(run.tags)) == ("mine", ["a", "b"]) and not (tmp_path / "other" / "wandb").exists()


@pytest.mark.slow
def test_a_missing_wandb_key_is_reported_before_a_folder_is_made(tmp_path):
    for key, message in (("", "W&B has no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"),
                         ("short", "WANDB_API_KEY invalid: .*; WANDB_MODE=offline needs no login")):
        status, line = wandb_run(tmp_path / "run", WANDB_API_KEY=key)
        assert status == 1 and re.fullmatch(f"ValueError: --wandb-project: {message}", line)
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    """W&B itself leaves such a folder where a run was started; Python takes it for a package without content."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ImportError, match="wandb is not installed"):
        RunLog(str(tmp_path / "run"), {}, wandb_project="p")


def test_errors_of_wandb_stop_nothing_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    """What only the server can cause, by a stand-in: an account that may not write, a connection that ends."""
    calls, fails = [], set()

    def call(name):
        def method(*arguments, **named):
            calls.append((name, named))
            if name in fails:
                raise ConnectionError(f"no {name}\nsecond line")
            return fake
        return method
    fake = types.SimpleNamespace(id="x7", **{name: call(name) for name in ("init", "log", "finish", "define_metric")})
    fake.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="offline"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    where = tracked_run(tmp_path / "run", wandb_project="p")
    assert where["wandb"] == "x7" and where["step"] == 5
    tracked_run(tmp_path / "run", where, (6,), wandb_project="p")
    inits = [named for name, named in calls if name == "init"]
    assert inits[1] == inits[0] | {"id": "x7", "resume": "allow"} and "id" not in inits[0]
    for name in ("init", "log", "finish"):
        fails = {name}
        log = begun(tmp_path / name, wandb_project="p")
        log.write("eval", {"agent_step": 0, "return": 1.0})
        log.write("eval", {"agent_step": 1, "return": 2.0})
        log.close()
        assert len(log.failures) == 1 and log.failures[0].startswith(f"wandb failed (ConnectionError: no {name})")
        assert len(table(tmp_path / name, "eval.csv")) == 2
