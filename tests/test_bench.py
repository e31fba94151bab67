"""Tests of the benchmark: `tools/bench.py`."""

import csv

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tools import bench
from runtime import fast

from envs import Env
from tests.helpers import run_main, tiny_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("algo", ["mrq", "ddpg"])
def test_table_and_csv_with_sizes_and_floor(algo, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    bench.run(bench.Args(algo=algo, env="cartpole-swingup", steps=1, scales=[0.05, 0.06], csv=str(path)),
              torch.device("cpu"))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 4  # one heading
    assert all(f" {phase} " in lines[0] for phase in bench.PHASES) and "16.0 bytes per weight" in out
    with open(path, newline="") as file:
        rows = [{name: float(value) if value[:1].isdigit() else value for name, value in row.items()}
                for row in csv.DictReader(file)]
    assert [(row["scale"], row["variant"]) for row in rows] == [
        (0.05, "dense"), (0.05, "mst"), (0.06, "dense"), (0.06, "mst")]
    ratios = [float(line.split("|")[-2]) for line in lines[2:]]  # to the first row of the same scale
    assert ratios == pytest.approx([1, rows[1]["update"] / rows[0]["update"], 1, rows[3]["update"] / rows[2]["update"]],
                                   abs=1e-3)
    dense, mst = rows[:2]
    assert mst["weights"] == dense["weights"] and mst["gflop"] == dense["gflop"] > 0  # masks save no arithmetic
    assert dense["mb_weights"] == pytest.approx(4e-6 * dense["weights"]) == dense["mb_gradients"]
    assert 0.9 * dense["mb_weights"] < dense["mb_targets"] <= dense["mb_weights"]  # DDPG's actor has none
    assert dense["mb_masks"] == 0 < mst["mb_masks"] <= 2e-6 * mst["weights"]  # one byte now, one for the first mask
    absent = ("encoder", "refresh") if algo == "ddpg" else ()
    assert all((row[phase] == "") if phase in absent else row[phase] > 0
               for row in rows for phase in ("update", *bench.PHASES) if phase not in ("masks", "topology"))
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
def test_phases_are_weighted_by_their_number_per_step(algo, monkeypatch):
    """With a clock on which everything takes a millisecond, a phase shows how often it happens per agent step."""
    products = set()  # the floor is measured by the agent's own kind of product
    monkeypatch.setattr(bench, "Clock", lambda device: lambda function: (function(), 1.0)[1])
    monkeypatch.setattr(torch, "mm", lambda a, b: products.add("mm"))
    monkeypatch.setattr(fast, "onednn_linear", lambda a, b: products.add("onednn"))
    monkeypatch.setattr(fast, "use_onednn", lambda: algo == "sac")
    (row,) = bench.bench_scale(0.05, bench.Args(algo=algo, variants=["mst"], env="cartpole-swingup", steps=3),
                               torch.device("cpu"))
    often = {"mrq": 1, "sac": 2}[algo]
    refresh, encoder = (1 / 250, 1) if algo == "mrq" else ("", "")
    assert row["update"] == 2 + (refresh or 0)  # two captures per step and a burst's beginning, or two updates
    assert [row[phase] for phase in bench.PHASES] == [refresh, often, encoder, often, often, often, often, often / 1000,
                                                      1, 1, 1, 1]
    assert products == {"onednn" if algo == "sac" else "mm"}
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
