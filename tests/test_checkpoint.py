"""Tests of checkpoint."""

import collections
import enum
import errno
import itertools
import math
import os
import threading
from random import Random

import numpy as np
import pytest
import torch
from runtime import checkpoint

from replay import ReplayBuffer
from tests.helpers import damaged


def some_state():
    generator = torch.Generator().manual_seed(0)
    return {"weights": {"a": torch.randn(20, 10, generator=generator), "b": torch.ones(3, dtype=torch.bool)}, "step": 7,
            "nan": math.nan, "name": "x", "nothing": None, "scalar": torch.tensor(2.5), "pairs": [(0.9, 0.999)]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_damaged_files_are_refused_and_run_no_code(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, content, random = tmp_path / "a.pt", some_state(), Random(0)
    check = checkpoint.write(str(path), content)
    whole, refused = path.read_bytes(), 0
    assert checkpoint.read(str(path))[1] == check == checkpoint.digest(content)
    for _ in range(count):
        damaged(path, whole, random)
        try:
            # What is accepted equals what was written: a byte of zip's padding may differ.
            assert checkpoint.read(str(path))[1] == check
        except checkpoint.CorruptCheckpoint as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 0.8 * count and os.listdir(tmp_path) == ["a.pt"]  # no code has run, nothing was written
    path.write_bytes(whole.replace(b"format", b"farmat"))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="not a checkpoint"):
        checkpoint.read(str(path))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path.write_bytes(whole)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="format 1.* format 2"):
        checkpoint.read(str(path))
    with pytest.raises(TypeError, match=r"the content\['a'\] is a torch._C.Generator"):
        checkpoint.digest({"a": torch.Generator()})


def fill(buffer, count, rng):
    for _ in range(count):
        end = rng.random()
        start = rng.normal(size=2) if buffer.episode_length == 0 else fill.last
        fill.last = rng.normal(size=2)
        buffer.add(start, rng.normal(size=1), rng.normal(), fill.last, end < 0.05, 0.05 < end < 0.1)
        if buffer.num_valid and rng.random() < 0.2:
            batch = buffer.sample(4)
            buffer.update_priority(batch.index, torch.as_tensor(rng.normal(size=4) * 9, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [40, 1000])
def test_replay_buffer_restored_from_parts_is_equal(capacity, tmp_path):
    rng = np.random.default_rng(0)
    buffer, checkpoints = ReplayBuffer(2, 1, capacity, horizon=3), checkpoint.Checkpoints(str(tmp_path))
    for step in range(1, 25):
        fill(buffer, int(rng.integers(0, 25)), rng)
        first, rows = buffer.rows_since(max(0, checkpoints.next_row - 1))
        assert len(rows["rows"]) <= min(capacity, 1 + buffer.position + 1 - checkpoints.next_row + 1)  # only new rows
        checkpoints.save(step, {"replay": buffer.state_dict()}, first, rows, buffer.position + 1 - capacity, wait=True)
        found, other = checkpoint.Checkpoints(str(tmp_path)), ReplayBuffer(2, 1, capacity, horizon=3)
        state = found.load()
        for start, part in found.rows():
            other.load_rows(start, part)
        other.load_state_dict(state["replay"])
        for name in ("obs", "rows", "priority", "max_priority", "termination_seen"):
            assert torch.equal(getattr(buffer, name), getattr(other, name)), (step, name)
        for name in ("row", "episode_length", "num_valid", "_valid_cpu"):
            assert getattr(buffer, name) == getattr(other, name), (step, name)
        assert found.step == step
    names = os.listdir(tmp_path)
    assert sum(name.startswith("checkpoint") for name in names) == 2
    # Parts whose rows were overwritten are gone.
    assert sum(name.startswith("rows") for name in names) <= (8 if capacity == 40 else 24)


class Killed(BaseException):
    """Ends the writer's thread where it stands."""


@pytest.mark.slow
def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """Full disk or kill at each call that touches the disk. Then the newest intact checkpoint is used."""
    rows = {"x": torch.arange(100.0)}

    def begin(folder):
        checkpoints = checkpoint.Checkpoints(str(folder))
        folder.mkdir()
        checkpoints.save(1, {"a": torch.ones(3)}, 0, rows, wait=True)
        return checkpoints

    def load(folder):
        found = checkpoint.Checkpoints(str(folder))
        state = found.load()
        return found.step, state["a"].sum().item(), sum(len(part["x"]) for _, part in found.rows())

    old, new = (1, 3.0, 100), (2, 6.0, 150)
    for name, calls in (("torch.save", 2), ("os.fsync", 4), ("os.replace", 2)):
        for broken in range(calls):
            for error, killed in ((OSError(28, "No space left on device"), False), (Killed(), True)):
                folder, count = tmp_path / f"{name}{broken}{killed}", itertools.count()
                checkpoints = begin(folder)
                module, function = name.split(".")
                plain = getattr({"os": os, "torch": torch}[module], function)

                def breaks(*arguments):
                    if next(count) == broken:
                        raise error
                    return plain(*arguments)
                with monkeypatch.context() as patch:
                    patch.setattr(f"{name}", breaks)
                    patch.setattr("threading.excepthook", lambda _: None)
                    checkpoints.save(2, {"a": 2 * torch.ones(3)}, 100, {"x": torch.arange(50.0)}, wait=True)
                landed = (name, broken) == ("os.fsync", 3)  # all is written; only the folder is not synced
                assert load(folder) == (new if landed else old), (name, broken, killed)
                if not killed:
                    assert "No space left" in checkpoints.failure and "step 2" in checkpoints.failure
                    assert not any(part.endswith(".part") for part in os.listdir(folder))
                    again = checkpoints.next_row, {"x": torch.arange(50.0)}
                    checkpoints.save(2, {"a": 2 * torch.ones(3)}, *again, wait=True)
                    assert load(folder) == new and checkpoints.failure is None  # when there is room again
    newest = next(tmp_path.glob("os.fsync3*/checkpoint-*2.pt"))
    newest.write_bytes(newest.read_bytes()[:-9])
    found = checkpoint.Checkpoints(str(newest.parent))
    assert load(newest.parent) == old and found.load() and "is damaged" in found.skipped[0]
    for path in newest.parent.glob("rows-*"):
        path.unlink()
    with pytest.raises(checkpoint.CorruptCheckpoint, match="intact"):
        found.load()


def saved(folder, *steps):
    """Checkpoints of these steps."""
    checkpoints = checkpoint.Checkpoints(str(folder))
    for step in steps:
        checkpoints.save(step, {"a": torch.ones(3)}, wait=True)
    return checkpoints


def test_a_save_holds_the_state_at_its_call_and_last_waits_for_it(tmp_path, monkeypatch):
    write, begin = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *given: (begin.wait(10), write(*given))[1])
    checkpoints, weights, rows = checkpoint.Checkpoints(str(tmp_path)), torch.ones(3), torch.ones(4)
    assert checkpoints.last() == "no checkpoint was saved"
    checkpoints.save(7000, {"a": weights}, 0, {"x": rows})
    assert checkpoints.step is None  # it is being written
    weights.fill_(7), rows.fill_(7)  # training continues meanwhile
    threading.Timer(0.1, begin.set).start()
    assert checkpoints.last() == "the last checkpoint is of step 7,000"
    found = checkpoint.Checkpoints(str(tmp_path))
    assert found.load()["a"].tolist() == [1] * 3 and [part["x"].tolist() for _, part in found.rows()] == [[1] * 4]


def test_a_resumed_run_keeps_two_checkpoints(tmp_path):
    saved(tmp_path, 1, 2)
    found = checkpoint.Checkpoints(str(tmp_path))
    found.load()
    found.save(3, {"a": torch.ones(3)}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000000000002.pt", "checkpoint-000000000003.pt"]


class Color(enum.IntEnum):
    RED = 1


class Name(str):
    pass


BAD_VALUES = {"float64": np.float64(0.5), "bool": np.bool_(True), "str_": np.str_("a"), "Name": Name("a"),
              "Color": Color.RED, "defaultdict": collections.defaultdict(int), "Size": torch.Size([1]),
              "ndarray": np.ones(2), "set": {1}, "Tensor": torch.ones(2).to_sparse()}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_the_safe_reader_refuses_are_refused_by_the_caller(name, tmp_path):
    """Two such saves once removed the last good checkpoint, and both reported success."""
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save(1, {"a": torch.ones(3)}, 0, {"x": torch.ones(4)}, wait=True)
    for step in (2, 3):
        with pytest.raises(TypeError, match=rf"state\['env'\]\[1\] is a .*{name}: a checkpoint holds"):
            checkpoints.save(step, {"env": [0, BAD_VALUES[name]]}, wait=True)
    with pytest.raises(TypeError, match="a key of state"):
        checkpoints.save(4, {Color.RED: 1}, wait=True)
    found = checkpoint.Checkpoints(str(tmp_path))
    assert found.load()["a"].tolist() == [1, 1, 1] and found.step == 1
    with pytest.raises(TypeError, match=name):
        checkpoint.write(str(tmp_path / "other.pt"), BAD_VALUES[name])
    assert not (tmp_path / "other.pt").exists()


def test_plain_values_of_every_kind_read_back_equal(tmp_path):
    """With tensors of every dtype, as no check by type can promise that PyTorch reads its own files."""
    dtypes = [torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    content = {"none": None, 1: True, 2.5: -3, "big": 2 ** 80, "nan": math.nan, "text": "\u00fc\ud800", None: 0,
               "empty": [(), {}, ""], "nested": [({"a": (1, [2])},)], "ordered": collections.OrderedDict(b=1, a=2),
               "parameter": torch.nn.Parameter(torch.ones(2)), "scalar": torch.tensor(1), "nothing": torch.zeros(0, 3),
               "transposed": torch.arange(6.0).view(2, 3).t()} | {str(d): torch.ones(2, 2).to(d) for d in dtypes}
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save(1, content, wait=True)
    assert checkpoints.failure is None
    found = checkpoint.Checkpoints(str(tmp_path)).load()
    assert repr(found) == repr(checkpoint.copy_to_cpu(content)) and list(found["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("error", [TypeError("a type"), MemoryError(), RuntimeError("cannot\nwrite"), KeyError("x")])
def test_every_error_of_the_writer_is_reported(error, tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def fails(*_):
        raise error
    monkeypatch.setattr(torch, "save", fails)
    checkpoints.save(2, {"a": torch.ones(3)}, wait=True)
    assert "step 2" in checkpoints.failure and "\n" not in checkpoints.failure
    assert os.listdir(tmp_path) == ["checkpoint-000000000001.pt"] and checkpoints.step == 1


@pytest.mark.parametrize("damage", ["content", "cut"])
def test_no_file_is_removed_for_one_that_does_not_read_back(damage, tmp_path, monkeypatch):
    """A disk that takes every byte and returns others. Three saves: two once sufficed to lose the last good one."""
    checkpoints = saved(tmp_path, 1)
    save = torch.save

    def damages(whole, file):
        save(whole | {"content": whole["content"] | {"step": -1}} if damage == "content" else whole, file)
        file.truncate(file.tell() - (9 if damage == "cut" else 0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", damages)
        for step in (2, 3, 4):
            checkpoints.save(step, {"a": torch.ones(3)}, wait=True)
            assert f"step {step} " in checkpoints.failure
        with pytest.raises(OSError, match="does not read back"):
            checkpoints.finish({"step": 4})
    assert os.listdir(tmp_path) == ["checkpoint-000000000001.pt"]
    assert checkpoint.Checkpoints(str(tmp_path)).load()["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_not_a_failed_save(call, code, tmp_path, monkeypatch):
    """Windows and some network file systems. An error of the disk itself still is one."""
    plain, checkpoints = getattr(os, call), checkpoint.Checkpoints(str(tmp_path))

    def fails(target, *rest):
        if target == str(tmp_path) if call == "open" else os.path.isdir(f"/dev/fd/{target}"):
            raise OSError(code, os.strerror(code))
        return plain(target, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        checkpoints.save(1, {"a": torch.ones(3)}, wait=True)
    assert (checkpoints.failure is None) == (code != errno.EIO) == (checkpoints.step == 1)
    assert checkpoint.Checkpoints(str(tmp_path)).load()["a"].tolist() == [1, 1, 1]


def test_files_that_cannot_be_removed_are_reported(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, 2)

    def refuses(path):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "remove", refuses)
    checkpoints.save(3, {"a": torch.ones(3)}, wait=True)
    assert checkpoints.step == 3 and "step 3" in checkpoints.failure
