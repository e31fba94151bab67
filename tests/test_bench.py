"""Tests of the benchmark: `tools/bench.py`."""

import csv
import io
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tools import bench
from runtime import fast

from envs import Env
from tests.helpers import run_main, tiny_of


@pytest.mark.parametrize("algo", ["mrq", "ddpg"])
@pytest.mark.slow
def test_sizes_counts_and_floor(algo, capsys):
    args = bench.Args(algo=algo, variants=["dense", "mst"], env="cartpole-swingup", steps=1)
    dense, mst = rows = bench.bench_scale(0.05, args, torch.device("cpu"))
    assert not capsys.readouterr().out  # PyTorch's own table of operations is not printed
    bench.show(rows)
    bench.show_sizes(rows)
    table = capsys.readouterr().out
    assert all(f" {phase} " in table for phase in bench.PHASES) and "16.0 bytes a weight" in table
    assert mst["weights"] == dense["weights"] and mst["gflop"] == dense["gflop"] > 0  # masks save no arithmetic
    assert dense["mb_weights"] == pytest.approx(4e-6 * dense["weights"]) == dense["mb_gradients"]
    assert 0.9 * dense["mb_weights"] < dense["mb_targets"] <= dense["mb_weights"]  # DDPG's actor has none
    assert dense["mb_masks"] == 0 < mst["mb_masks"] <= 2e-6 * mst["weights"]  # a byte per weight, and one for the first mask
    assert all(row[phase] > 0 for row in rows for phase in ("update", "sample", "critic", "actor", "optimiser"))
    assert (dense["encoder"] == "") == (dense["refresh"] == "") == (algo == "ddpg")
    assert all(row[phase] > 0 for row in rows for phase in ("act", "observe", "add"))
    traffic = 28 * dense["weights"]
    if algo == "ddpg":  # two updates, each with a soft target
        traffic = 2 * (traffic + 12 * dense["mb_targets"] / 4e-6)
    seconds = dense["gflop"] / dense["tflop_per_s"] / 1e3 + traffic / dense["gb_per_s"] / 1e9
    assert dense["floor"] == pytest.approx(1e3 * seconds)


@pytest.mark.parametrize("algo, phases", [("mrq", bench.mrq_phases), ("sac", bench.simba_phases)])
def test_each_phase_starts_without_gradients(algo, phases):
    agent, buffer = tiny_of(algo)
    for name, phase in phases(agent, buffer).items():
        if name in agent.networks:
            seen = []
            for _ in range(2):
                torch.manual_seed(0)
                phase()
                seen.append([p.grad.clone() for p in agent.networks[name].parameters()])
            torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize("algo", ["mrq", "sac"])
@pytest.mark.slow
def test_phases_are_weighted_by_their_number_per_step(algo, monkeypatch):
    """With a clock on which everything takes a millisecond, a phase shows how often it happens per agent step."""
    class Clock:
        def __init__(self, device):
            pass

        def __call__(self, function):
            function()
            return 1.0

    monkeypatch.setattr(bench, "Clock", Clock)
    monkeypatch.setattr(torch, "mm", lambda a, b: a), monkeypatch.setattr(fast, "onednn_linear", lambda a, b: a)
    (row,) = bench.bench_scale(0.05, bench.Args(algo=algo, variants=["mst"], env="cartpole-swingup", steps=3),
                               torch.device("cpu"))
    often = {"mrq": 1, "sac": 2}[algo]
    refresh, encoder = (1 / 250, 1) if algo == "mrq" else ("", "")
    assert row["update"] == 2 + (refresh or 0)  # two captures a step and a burst's beginning, or two updates
    assert [row[phase] for phase in bench.PHASES] == [refresh, often, encoder, often, often, often, often, often / 1000,
                                                      1, 1, 1, 1]
    env = Env("cartpole-swingup")
    agent = bench.plain_agent("mst", 0.05, env, torch.device("cpu"), bench.Args(algo=algo))
    updates = [agent.update] * 2 if algo == "sac" else [agent.update_encoder, agent.update_critic_and_actor]  # per step
    with FlopCounterMode(display=False) as counter:
        for update in updates:
            bench.filled_replay(env, agent, 20)
            update()
    assert row["gflop"] == counter.get_total_flops() / 1e9
    assert row["tflop_per_s"] == pytest.approx(2 * 2048 ** 3 / 1e-3 / 1e12)
    assert row["gb_per_s"] == pytest.approx(8 * 2 ** 25 / 1e-3 / 1e9)


@pytest.mark.slow
def test_table_and_csv(tmp_path, monkeypatch, capsys):
    """By default, dense and mst at scale 1; one table and one CSV file over all scales; milliseconds."""
    asked = []

    def rows_of(scale, args, device):
        asked.append((scale, args.variants))
        return [{"scale": scale, "variant": name, "update": 2.0 + scale * number, "floor": 1.0, "gflop": 1.0,
                 "weights": 1e6, "mb_weights": 4.0, "mb_gradients": 4.0, "mb_moments": 8.0,
                 "mb_peak": ""} | dict.fromkeys(bench.PHASES, 0.5) for number, name in enumerate(args.variants)]

    monkeypatch.setattr(bench, "bench_scale", rows_of)
    bench.run(bench.Args(), torch.device("cpu"))
    bench.run(bench.Args(scales=[1, 3], csv=str(tmp_path / "rows.csv")), torch.device("cpu"))
    assert asked == [(1, ["dense", "mst"])] * 2 + [(3, ["dense", "mst"])]
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 * 2 + 6  # two headings; 2 and 4 rows
    assert table[-3].endswith("| 1.500 |") and table[-1].endswith("| 2.500 |")  # beside the first row of its scale
    with open(tmp_path / "rows.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["scale"], row["variant"], row["update"]) for row in written] == [
        ("1", "dense", "2.0"), ("1", "mst", "3.0"), ("3", "dense", "2.0"), ("3", "mst", "5.0")]

    flushed = []
    monkeypatch.setattr(sys, "stdout", type("Out", (io.StringIO,),
                                            {"flush": lambda out: flushed.append(out.getvalue().count("\n"))})())
    bench.show(rows_of(1, bench.Args(), None), heading=False)
    assert flushed == [1, 2]  # a row is seen at once, in a pipe too

    seconds, called = iter([2.0, 2.5]), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(seconds))
    assert bench.Clock(torch.device("cpu"))(lambda: called.append(1)) == 500.0 and called


@pytest.mark.slow
@pytest.mark.parametrize("precision, pays, taken", [("fp32", True, "onednn"), ("fp32", False, "mm"),
                                                    ("bf16", True, "mm")])
def test_floor_uses_the_agents_own_product(precision, pays, taken, monkeypatch):
    used = set()
    monkeypatch.setattr(torch, "mm", lambda a, b: used.add("mm")), monkeypatch.setattr(fast, "onednn_linear", lambda a,
                                                                                       b: used.add("onednn"))
    monkeypatch.setattr(fast, "use_onednn", lambda: pays)
    bench.rates(torch.device("cpu"), precision)
    assert used == {taken}


@pytest.mark.slow
def test_bad_flags_are_refused_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench_scale", lambda *_: pytest.fail("timed before it was refused"))
    for flags, word in (("--variants sparse", "sparse"), ("--variants dense+bf16+tf32", "dense+bf16+tf32"),
                        ("--variants mst+graphs --device cpu", "CUDA"), ("--device foo", "--device"),
                        ("--variants mst mst", "twice"), ("--variants mst+bf16+bf16", "mst+bf16+bf16"),
                        ("--scales 1 -1", "scale"), ("--scales 1 5000", "--scale"),
                        ("--csv nowhere/x.csv", "nowhere/x.csv"), ("--steps 0", "--steps"),
                        (f"--csv {__file__}", "exists"), ("--env dog_run", "dog-run")):
        line = run_main(bench, monkeypatch, capsys, "--scales", "0.05", *flags.split())[0]
        assert isinstance(line, str) and word in line and "\n" not in line, flags


def test_scales_are_width_and_depth():
    for own, expected in (({"width_scale": 4, "depth_scale": 3}, (4, 3)), ({"depth_scale": 3}, (2, 3)), ({}, (2, 2))):
        assert {(m.width_scale, m.depth_scale) for m in bench.module_configs("mst", 2,
                                                                             bench.Args(**own)).values()} == {expected}
