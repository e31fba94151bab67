"""Tests of the terminal: header, progress bar, early signals, broken pipes, errors in one line."""

import argparse
import dataclasses
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm

from base import ModuleConfig
from mrq import MR_DEFAULT, MR_MST
from runtime import console
from tests.helpers import HERE, args_with, count, tiny_of


@pytest.mark.parametrize("updates, total, terminal, expected", [
    # 200 updates in the 100 seconds since the first that it saw, and 1,300 of 2 x 800 to come; a line per minute
    (1, 1600, False, [(5, "? left, 0.0833 steps/s, learning"),
                      (400, "10:50 left, 2.82 steps/s, return 2.5, learning"),
                      (460, "00:00 left, 0.5 steps/s, return 2.5, learning")]),
    # 2,900 of 2 x 2 x 800 to come; twice per second
    (2, 3200, True, [(1, "? left, 0.0169 steps/s, learning"), (5, "? left, 4 steps/s, learning"),
                     (300, "? left, 7.38 steps/s, return 2.5, learning"),
                     (400, "24:10 left, 1 steps/s, return 2.5, learning"),
                     (450, "30:12 left, 0.847 steps/s, return 2.5, learning"),
                     (460, "00:00 left, 0.164 steps/s, return 2.5, learning")])])
def test_bar_shows_activity_speed_and_time_left(updates, total, terminal, expected, monkeypatch):
    drawn, now = [], [0.0]
    agent = argparse.Namespace(updates={"encoder": 0, "critic": 0}, updates_per_step=updates)
    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", lambda bar, text: drawn.append((bar.n, text)))
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys, "stderr", type("Stream", (io.StringIO,), {"isatty": lambda self: terminal})())
    bar = console.Bar(args_with(total_steps=1000, learning_starts=200), agent, 0)
    assert bar.all_updates == total
    for now[0], step, done, more in ((59, 1, 0, {}), (60, 5, 0, {}), (100, 300, 100, {"return": "2.5"}),
                                     (200, 400, 300, {}), (259, 450, 350, {}),
                                     (320, 460, 5000, {})):  # a short run makes a whole period of encoder updates
        agent.updates["critic"] = done
        bar.show(step, "learning", **more)
    assert drawn == expected


def test_header_matches_the_networks():
    agent, modules = tiny_of("mrq")[0], {name: dataclasses.replace(m, width_scale=1 / 32) for name, m in MR_MST.items()}
    lines = console.describe(agent, modules, args_with(seed=4, total_steps=12345), "cpu", "folder").splitlines()
    assert lines[0] == "mrq on dog-run, seed 4, 12,345 agent steps on cpu" and lines[-1].split() == ["writes", "folder"]
    head = count(agent.encoder.model)
    sizes = (count(agent.encoder) - head, count(agent.critic), count(agent.actor))
    assert len(lines) == 5
    for line, (name, network), weights in zip(lines[1:], agent.networks.items(), sizes):
        density = np.mean(np.concatenate([mask.flatten() for mask in agent.sparse[name].masks.values()] or [[1]]))
        assert line.split() == [
            name, "type", str(modules[name].arch_type), modules[name].regime, "width", "×0.03125,", "depth", "×1",
            f"{weights / 1e6:.3f}", "M", *(["+", f"{head / 1e6:.2f}", "M", "head"] if name == "encoder" else []),
            "density", f"{density:.3f}"]


def test_large_networks_without_residuals_are_noted():
    agent = tiny_of("mrq")[0]
    header = lambda modules: console.describe(agent, modules, args_with(), "cpu", "folder")
    large = {name: ModuleConfig(m.arch_type, width_scale=5, depth_scale=5) for name, m in MR_DEFAULT.items()}
    assert "--mst" in header(large) and "--mst" not in header(MR_MST)
    for arch_type, width, depth in itertools.product(range(1, 7), (1, 3), (2.9, 3)):
        one = MR_MST | {"critic": ModuleConfig(arch_type, width_scale=width, depth_scale=depth)}
        assert ("(critic)" in header(one)) == (arch_type < 5 and 3 in (width, depth))


def test_disk_without_room_for_checkpoints_is_noted(monkeypatch):
    saved = argparse.Namespace(log=argparse.Namespace(folder="here"), args=args_with(save_every=5000))
    for one, free, lines in ((2e9, 9e9 + 1, 1), (2e9, 9e9, 2), (1e8, 1e12, 0), (4e8, 1e12, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=free))
        saved.size = lambda: (one, 1.5 * one)  # needs three of the first: one while it is written
        text = console.describe_saving(saved)
        assert len(text) == lines and (lines == 0 or f"5,000 steps: up to {4.5 * one / 1e9:.2f} GB" in text[0])


def test_closed_pipes_and_full_disks_stop_nothing():
    for method in ("write", "flush"):
        class Broken(io.StringIO):
            def fail(self, *_):
                raise BrokenPipeError
        setattr(Broken, method, Broken.fail)
        stream = console.SafeStream(Broken())
        for _ in range(2):
            print("text", file=stream, flush=True)
    stream = console.SafeStream(io.StringIO())
    stream.write("text")
    assert stream.getvalue() == "text"


def test_user_errors_become_one_line_and_bugs_a_traceback():
    for error in (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate"),
                  torch.OutOfMemoryError("CUDA out of memory\nmore")):
        line = console.error_message(error)
        assert "--scale" in line and "\n" not in line
    assert console.error_message(ValueError("first\nsecond")) == "first"
    assert console.error_message(MemoryError()).startswith("MemoryError")  # it has no text
    with pytest.raises(RuntimeError, match="shape"):
        console.error_message(RuntimeError("a wrong shape"))


@pytest.mark.slow
@pytest.mark.parametrize("own, spins", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                        ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_waiting_threads_do_not_spin(own, spins):
    """What the OpenMP library itself reports when PyTorch has loaded it: our setting, or the user's."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run([sys.executable, HERE / "train.py", "--help"],
                          env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | own, capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("PyTorch is built on another OpenMP library here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signal_before_training_ends_in_one_line(number, status, tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--runs", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text()).group(1), 16)
    while not caught() >> (signal.SIGUSR1 - 1) & 1:  # the last of them that train.py takes
        time.sleep(0.005)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].startswith("\ntrain.py: stopped") and process.returncode == status
    assert not os.listdir(tmp_path)
