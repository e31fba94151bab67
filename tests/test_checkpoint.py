"""Tests of checkpoint."""

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
    return {"weights": {"a": torch.randn(20, 10, generator=generator), "b": torch.ones(3, dtype=torch.bool)},
            "step": 7, "nan": math.nan, "name": "x", "nothing": None, "scalar": torch.tensor(2.5), "pairs": [(0.9, 0.999)]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_in_it_runs(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, content, random = tmp_path / "a.pt", some_state(), Random(0)
    check = checkpoint.write(str(path), content)
    whole, refused = path.read_bytes(), 0
    assert checkpoint.read(str(path))[1] == check == checkpoint.digest(content)
    for _ in range(count):
        damaged(path, whole, random)
        try:
            # What is accepted is what was written: a byte of zip's padding may be anything.
            assert checkpoint.read(str(path))[1] == check
        except checkpoint.CorruptCheckpoint as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 0.8 * count and os.listdir(tmp_path) == ["a.pt"]  # no code has run, nothing was written
    path.write_bytes(whole.replace(b"format", b"farmat"))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="no checkpoint"):
        checkpoint.read(str(path))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path.write_bytes(whole)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="format 1, and this code reads format 2"):
        checkpoint.read(str(path))
    with pytest.raises(TypeError, match="not a Generator"):
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
def test_a_replay_buffer_comes_back_from_parts_as_it_was(capacity, tmp_path):
    rng = np.random.default_rng(0)
    buffer, checkpoints = ReplayBuffer(2, 1, capacity, horizon=3), checkpoint.Checkpoints(str(tmp_path))
    for step in range(1, 25):
        fill(buffer, int(rng.integers(0, 25)), rng)
        first, rows = buffer.rows_since(max(0, checkpoints.next_row - 1))
        assert len(rows["rows"]) <= min(capacity, 1 + buffer.position + 1 - checkpoints.next_row + 1)  # only what is new
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
    assert sum(name.startswith("rows") for name in names) <= (8 if capacity == 40 else 24)  # what has been overwritten is gone


@pytest.mark.slow
def test_what_is_said_of_the_last_save_waits_for_it(tmp_path, monkeypatch):
    write, slow = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *of: (slow.wait(10), write(*of))[1])
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    assert checkpoints.last() == "none"
    checkpoints.save(7000, {"a": torch.ones(3)})
    assert checkpoints.step is None  # it is being written
    threading.Timer(0.1, slow.set).start()
    assert checkpoints.last() == "of step 7,000"


@pytest.mark.slow
def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    """At each of the calls by which it touches the disk: full, or killed. Then the newest that reads whole is used."""
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
            for error, killed in ((OSError(28, "No space left on device"), False), (SystemError("killed"), True)):
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
                landed = (name, broken) == ("os.fsync", 3)  # everything is in place, and only the folder not synchronised
                assert load(folder) == (new if landed else old), (name, broken, killed)
                if not killed:
                    assert "No space left" in checkpoints.failure and "step 2" in checkpoints.failure
                    assert not any(part.endswith(".part") for part in os.listdir(folder))
                    checkpoints.save(2, {"a": 2 * torch.ones(3)}, checkpoints.next_row, {"x": torch.arange(50.0)}, wait=True)
                    assert load(folder) == new and checkpoints.failure is None  # when there is room again
    newest = next(tmp_path.glob("os.fsync3*/checkpoint-*2.pt"))
    newest.write_bytes(newest.read_bytes()[:-9])
    found = checkpoint.Checkpoints(str(newest.parent))
    assert load(newest.parent) == old and found.load() and "is damaged" in found.skipped[0]
    for path in newest.parent.glob("rows-*"):
        path.unlink()
    with pytest.raises(checkpoint.CorruptCheckpoint, match="no other checkpoint of this run is left whole"):
        found.load()


def test_what_is_saved_is_as_it_was_when_asked(tmp_path, monkeypatch):
    write, begin = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *of: (begin.wait(10), write(*of))[1])
    checkpoints, weights, rows = checkpoint.Checkpoints(str(tmp_path)), torch.ones(3), torch.ones(4)
    checkpoints.save(1, {"a": weights}, 0, {"x": rows})
    weights.fill_(7), rows.fill_(7)  # training goes on while the file is written
    begin.set(), checkpoints.wait()
    found = checkpoint.Checkpoints(str(tmp_path))
    assert found.load()["a"].tolist() == [1] * 3 and [part["x"].tolist() for _, part in found.rows()] == [[1] * 4]


def test_a_resumed_run_keeps_two_checkpoints(tmp_path):
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    for step in (1, 2):
        checkpoints.save(step, {"a": torch.ones(3)}, wait=True)
    found = checkpoint.Checkpoints(str(tmp_path))
    found.load()
    found.save(3, {"a": torch.ones(3)}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000000000002.pt", "checkpoint-000000000003.pt"]
