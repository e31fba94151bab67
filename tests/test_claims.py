"""Tests of claims."""

import argparse
import csv
import dataclasses
import math
import re
import shlex

import numpy as np
import pytest
import scipy.stats
from runtime import aggregate
from paper import claims
from paper import figures

from settings import parse, run_name
from tests.helpers import HERE, run_main


@pytest.mark.slow
def test_the_readme_has_the_table_of_figures_as_it_is(monkeypatch, capsys):
    told = run_main(figures, monkeypatch, capsys, "list", "--markdown")[1]
    readme = (HERE / "README.md").read_text()
    assert len(told) > 15 and all(line in readme for line in told)


def test_a_verdict_says_what_its_interval_says():
    """Welch's interval from its textbook formula, and the four ways in which it may lie."""
    this, that = np.array([3.0, 5, 4, 6, 4.5]), np.array([1.0, 2, 1.5])
    a, b = this.var(ddof=1) / 5, that.var(ddof=1) / 3
    half = scipy.stats.t.ppf(0.975, (a + b) ** 2 / (a ** 2 / 4 + b ** 2 / 2)) * math.sqrt(a + b)
    difference, low, high, said = claims.verdict(this, that, less=False)
    assert (difference, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half)) and said == "seen"
    same, none = np.full(5, 2.0), np.array([1.0, math.nan, 2])
    assert [claims.verdict(scale * one, scale * other, less)[3] for scale in (1, 0.01, 100) for one, other, less in (
        (this, that, False), (this, that, True), (that, this, False), (that, this, True), (this, this[::-1], False), (same, same, True), (same, same + 1, True),
        (none, this, False), (this, that[:1], False), (same, this, False), (same, this, True))] == [
        "seen", "reversed", "reversed", "seen", "not seen", *["cannot tell"] * 4, "reversed", "seen"] * 3


def test_a_number_in_a_table_keeps_what_tells_it_from_0():
    assert [claims.number(value) for value in (168.4, -57.21, 5.94, 0.1, 0.0076, -0.00071, 4e-4, 0)] == [
        "168", "-57.2", "5.9", "0.10", "0.0076", "-0.00071", "0.00", "0.00"]


@pytest.mark.slow
def test_claims_are_read_from_the_last_evaluations_of_their_own_arms(tmp_path, monkeypatch, capsys):
    """Every run of the laptop study has its own number, and nine that must not count before the last three evaluations."""
    expected, written = {}, {}
    for run in figures.runs(figures.LAPTOP["fig11"]):
        centre = {"MR.Q": 10, "MR.Q + Res": 10.5, "MR.Q + Res + MST": 50}[run.cell.series] + 2 * run.seed
        expected.setdefault(run.cell.series, []).append(centre)
        steps = np.arange(0.0, 12001, 1000)
        values = np.where(steps > 9000, centre + (steps - 11000) / 1000, 9e9)
        written[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": values,
                                                     "critic/srank_q1": values, "critic/srank_q2": values + 2, "critic/dormant": values})
    (tmp_path / "results").mkdir()
    columns = ["return", "critic/srank_q1", "critic/srank_q2", "critic/dormant"]
    aggregate.save(tmp_path / "results" / "fig11-laptop.csv", written.values(), columns)

    def tables():
        told = run_main(claims, monkeypatch, capsys, tmp_path / "results")[1]
        return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]] for table in "\n".join(told).strip().split("\n\n")[:3]]

    brief, rows, waiting = tables()
    by_claim = {tuple(row[1:3]): row[3:] for row in rows}
    res, mrq, mst = (np.mean(expected[series]) for series in ("MR.Q + Res", "MR.Q", "MR.Q + Res + MST"))
    assert len(rows) == 9 and all(row[0] == "fig11" and row[3] == "5" for row in rows)
    _, with_it, without, _, said = by_claim["deep networks need residual connections", "return"]
    assert (with_it, without, said) == (f"{res:.1f}", f"{mrq:.1f}", "not seen")
    _, with_it, without, difference, said = by_claim["MST beats residual connections alone", "SRank, critic"]
    assert (with_it, without, said) == (f"{mst + 1:.1f}", f"{res + 1:.1f}", "seen") and difference.startswith("39.5 [")
    assert by_claim["MST beats residual connections alone", "dormant ratio, critic"][-1] == "reversed"
    assert {row[0].split()[1] for row in waiting} == {claim.figure for claim in claims.CLAIMS} - {"fig11"}
    assert ["`./sweep.sh fig12 --laptop`", "ER beats uniform; RigL beats SET", "5 of 15", claims.hours("fig12")] in waiting  # Fig. 11's MST
    full = {row["figure"]: row["hours"] for row in figures.table(argparse.Namespace(
        smoke=False, laptop=False, tasks=None, seeds=None, steps=None, more=""), ["fig11", "fig3", "fig9", "fig6"])}
    for line in (["deep networks need residual connections", "not seen", *[by_claim["deep networks need residual connections", label][-1]
                  for label in ("SRank, critic", "dormant ratio, critic")], "`./sweep.sh fig11`", full["fig11"]],
                 ["MST beats residual connections alone", "seen", "seen", "reversed", "`./sweep.sh fig11`", full["fig11"]],
                 ["SRank of an encoder without LayerNorm collapses in the course of training", "", "no study", "", "`./sweep.sh fig3`", full["fig3"]],
                 ["actor: SST beats dense", "not run", "", "not run", "`./sweep.sh fig9`", full["fig9"]],
                 ["critic: DST beats SST", "not run", "not run", "not run", "`./sweep.sh fig6`", full["fig6"]]):
        assert line in brief
    assert len(brief) == len(claims.WHOLE) + sum(claim.figure != "first" for claim in claims.CLAIMS)

    written.pop(max(name for name in written if "mst" in name))  # seed 4: not there
    aggregate.save(tmp_path / "results" / "fig11-laptop.csv", written.values(), columns)
    _, rows, waiting = tables()
    assert {row[1] for row in rows} == {"deep networks need residual connections"}
    assert ["`./sweep.sh fig11 --laptop`", "MST beats residual connections alone; MST beats MR.Q", "14 of 15", claims.hours("fig11")] in waiting


@pytest.mark.slow
def test_the_readmes_first_command_is_the_study_that_tells_of_it(tmp_path, monkeypatch, capsys):
    readme = (HERE / "README.md").read_text()
    command = shlex.split(readme.partition("```bash\n")[2].partition("\n")[0])
    run, *_ = figures.runs(figures.LAPTOP["first"])
    assert run_name(parse(command[command.index("train.py") + 1:])) == run.name and run.cell.series == "MST"
    ends = {}
    for run in figures.runs(figures.LAPTOP["first"], seeds=[2, 0, 1]):
        steps = np.arange(0.0, run.args.total_steps + 1, 3000)
        returns = np.where(steps < 18000, steps / 1000, 100 + run.seed)
        ends[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": returns})
    aggregate.save(tmp_path / "first-laptop.csv", ends.values(), ["return"])
    (tmp_path / "random-policy.csv").write_text("env,episode,return\ncartpole-swingup,0,3\ncartpole-swingup,1,4.5\nwalker-walk,0,99\n")
    lines = []
    for arm, last in (("MST", 24000), ("MST, 30,000 steps", 30000), ("MST, 18,000 steps", 18000), ("dense, 18,000 steps", 18000),
                      ("MST, 10,000 random steps", 27000)):
        lines += [f"{arm}, at {step:,} steps, 3 seeds: {'0, 0, 0' if step == 0 else '9, 9, 9' if step == 9000 else '100, 101, 102'}"
                  for step in (0, 9000, 18000, 24000, 27000, 30000) if step <= last]
    lines += ["a random policy, 2 episodes: 4 on average"]
    command, *_ = ends.items()  # the same command on another processor: runs of the same names, told beside these
    steps = np.arange(0.0, 24001, 3000)
    elsewhere = [aggregate.Run(command[0], {"agent_step": steps, "frames": 2 * steps, "return": 1000 + steps / 1000})]
    aggregate.save(tmp_path / "first-amd.csv", elsewhere, ["return"])
    lines += [f"MST, on an AMD EPYC, at {1000 * thousands:,} steps, 1 seeds: {1000 + thousands}" for thousands in (0, 9, 18, 24)]
    assert run_main(claims, monkeypatch, capsys, tmp_path)[1][-len(lines):] == [f"- cartpole-swingup, {line}" for line in lines]


@pytest.mark.slow
def test_runs_stand_beside_the_published_ones_of_their_task_and_step(tmp_path, monkeypatch, capsys):
    written, published = {}, ["env,agent_step,seed,return"]
    for run in figures.runs(figures.LAPTOP["mrq"], tasks=("cartpole-swingup", "walker-walk")):
        steps = np.arange(0.0, 20001, 5000)
        written[run.name] = aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": np.where(
            steps == 20000, {"cartpole-swingup": 500, "walker-walk": 300}[run.task] + 10 * run.seed, 9e9)})
    for task, centre in (("cartpole-swingup", 510), ("walker-walk", 250)):
        published += [f"{task},{step},{seed},{centre + seed - 2 if step == 20000 else 9e9}" for step in (15000, 20000) for seed in range(5)]
    aggregate.save(tmp_path / "mrq-laptop.csv", written.values(), ["return"])
    (tmp_path / "published-mrq.csv").write_text("\n".join(published))
    (tmp_path / "published-simba.csv").write_text("env,agent_step,seed,return\nwalker-walk,20000,0,9e9\nwalker-walk,25000,0,700\nwalker-walk,25000,1,800\n")
    simba = {run.name: aggregate.Run(run.name, {"agent_step": np.array([25000.0]), "frames": np.array([50000.0]), "return": np.array([700.0 + run.seed])})
             for run in figures.runs(figures.LAPTOP["simba"])}
    aggregate.save(tmp_path / "simba-laptop.csv", simba.values(), ["return"])
    beside = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if line.startswith("| SAC on SimBa")]
    assert len(beside) == 1 and "| walker-walk | 25,000 | 700, 701, 702, 703, 704 | 750 (2 runs, 700 to 800) | -48.0 [" in beside[0]
    told = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if line.startswith("| MR.Q |")]
    _, low, high, _ = claims.verdict(np.arange(300, 350, 10), np.arange(248, 253), less=False)
    assert told == [told[0], f"| MR.Q | walker-walk | 20,000 | 300, 310, 320, 330, 340 | 250 (5 runs, 248 to 252) | 70.0 [{low:.1f}, {high:.1f}] | higher |"]
    assert "| MR.Q | cartpole-swingup | 20,000 | 500, 510, 520, 530, 540 | 510 (5 runs, 508 to 512) | 10.0 [" in told[0] and told[0].endswith("| no difference seen |")
    (tmp_path / "published-mrq.csv").write_text("env,agent_step,seed,return\nwalker-walk,20000,0,999\n")
    assert any(line.endswith("|  | cannot tell |") for line in run_main(claims, monkeypatch, capsys, tmp_path)[1])  # by one run
    for seeds in ("300, 310, 320, 330", "300, 310, 320", None):  # every finished seed is told, of three at least
        written.pop(max(written))
        aggregate.save(tmp_path / "mrq-laptop.csv", written.values(), ["return"])
        told = [line for line in run_main(claims, monkeypatch, capsys, tmp_path)[1] if "| MR.Q | walker" in line]
        assert bool(told) == bool(seeds) and all(f"| {seeds} | 999 (1 runs" in line for line in told)


def test_the_published_studies_run_as_the_published_ones_did():
    """The defaults, which Table 2 and SimBa's settings pin; and steps at which the published curves were evaluated."""
    for study in claims.PUBLISHED:
        cell, = figures.LAPTOP[study].cells
        assert set(cell.flags) <= {"algo", "total_steps"}
        with open(HERE / f"paper/results/published-{study}.csv", newline="") as file:
            ends = {row["env"] for row in csv.DictReader(file) if int(row["agent_step"]) == cell.flags["total_steps"]}
        assert ends == set(figures.LAPTOP[study].tasks)


@pytest.mark.slow
def test_the_readme_has_the_table_of_claims_as_the_results_have_it(monkeypatch, capsys):
    told = run_main(claims, monkeypatch, capsys, HERE / "paper/results")[1]
    brief, *tables, lines = "\n".join(told).split("\n\n")
    readme, details = ((HERE / name).read_text() for name in ("README.md", "paper/results/README.md"))
    assert brief in readme and len(tables) >= 1 and all(table in details for table in tables)
    assert len(lines.splitlines()) > 15 and all(line in readme + details for line in lines.splitlines())
    # And nothing that is no longer so: every row of the details, and every list of returns.
    assert all(line in told for line in details.splitlines() if line.startswith(("| ", "- ")))
    assert all(line in told for line in readme.splitlines() if " seeds: " in line)
    # And the README's one sentence of numbers about the published runs: how far the intervals reach.
    reach = {"dog": [], "humanoid": [], "other": []}
    for task, low, high in re.findall(r"\| ([a-z-]+) \| [\d,]+ \|[^|]+\|[^|]+\| \S+ \[(\S+), (\S+)\] \| no difference seen", details):
        kind = task.split("-")[0]
        reach[kind if kind in reach else "other"].append(max(-float(low), float(high)))
    others, dogs, humanoids = (" to ".join(f"{float(f'{bound(reach[kind]):.2g}'):g}" for bound in (min, max)) for kind in ("other", "dog", "humanoid"))
    assert (f"the intervals reach {others}, on the dogs {dogs}, and on the humanoids, where little is learnt yet by either, {humanoids}."
            in readme.replace("\n", " "))
    # Those that would differ are named there too, by how much.
    readme = readme.replace("\n", " ")
    differ = re.findall(r"\| (\S+)[^|]*\| ([a-z-]+) \| [\d,]+ \|[^|]+\|[^|]+\| \S+ \[(\S+), (\S+)\] \| (lower|higher)", details)
    assert ("Three tasks differed by their first three seeds, and none by five." in readme) == (not differ)
    for algo, task, low, high, said in differ:
        reaches = " to ".join(sorted(bound.lstrip("-") for bound in (low, high)))
        assert f"{algo}'s seeds on {task} ended {said}, by an interval of {reaches} of 1,000" in readme
    below = [float(less) for less in re.findall(r"\| humanoid-[a-z]+ \| [\d,]+ \|[^|]+\|[^|]+\| (\S+) \[", details)]
    assert ("All four humanoid means lie below the published ones." in readme) == (len(below) == 4 and max(below) < 0)


@pytest.mark.slow
def test_what_is_said_of_a_second_look_at_humanoid_walk_is_so():
    """Five policies evaluated again, and what the published fifteen are."""
    with open(HERE / "paper/results/simba-again.csv", newline="") as again:
        fresh = [(row["seed"], float(row["return"])) for row in csv.DictReader(again) if int(row["episode"]) >= 10]
    with open(HERE / "paper/results/published-simba.csv", newline="") as published:
        runs = {}  # env -> first return to three places -> last returns
        for row in csv.DictReader(published):
            if row["agent_step"] == "0":
                last = runs.setdefault(row["env"], {}).setdefault(f"{float(row['return']):.3f}", [])
            else:  # it follows its first
                last.append(float(row["return"]))
    assert all(sorted(map(len, runs[f"humanoid-{task}"].values())) == 5 * [1] + 5 * [2] for task in ("run", "walk"))
    theirs = np.concatenate(list(runs["humanoid-walk"].values()))
    once = np.array([np.mean(pair) for pair in runs["humanoid-walk"].values()])
    ours = np.array([np.mean([value for seed, value in fresh if seed == one]) for one in "01234"])
    assert len(fresh) == 5 * 140 and len(theirs) == 15
    cell, = figures.LAPTOP["simba"].cells
    first = claims.values("simba", cell, figures.RETURN, [str(HERE / "paper/results/simba-laptop.csv")], "humanoid-walk", last=1)
    assert len(first) == 5
    details = (HERE / "paper/results/README.md").read_text().replace("\n", " ")
    difference, low, high, _ = claims.verdict(ours, theirs, less=False)
    assert ("return {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} over 140 more episodes each (`simba-again.csv`, by `train.py --eval-only "
            "--eval-episodes 150`), {:.2f} below the published mean, by an interval of {:.2f} to {:.2f}.".format(*ours, -difference, low, high)) in details
    assert ("the difference on humanoid-walk is {:.2f}, by an interval of {:.2f} to {:.2f}.".format(
        *claims.verdict(first, once, less=False)[:3])) in details
    three = claims.verdict(first[:3], theirs, less=False)
    assert ("three seeds had ended lower, by an interval of {:.2f} to {:.2f}; two more were set before they were run and ended at "
            "{:.2f} and {:.2f}.".format(-three[2], -three[1], *first[3:])) in details


def test_an_unfinished_run_is_in_no_claim(tmp_path):
    steps = np.arange(0.0, 12001, 1000)
    written = {run.name: aggregate.Run(run.name, {"agent_step": steps, "frames": 2 * steps, "return": steps})
               for run in figures.runs(figures.LAPTOP["fig11"])}
    last = written[max(written)]
    last.table = {name: values[:-1] for name, values in last.table.items()}
    aggregate.save(tmp_path / "runs.csv", written.values(), ["return"])
    claim, paths = next(claim for claim in claims.CLAIMS if claim.says == "MST beats MR.Q"), [str(tmp_path / "runs.csv")]
    arms = [claims.arm("fig11", words) for words in (claim.this, claim.that)]
    assert sorted(len(claims.finished("fig11", arm, figures.RETURN, paths)) for arm in arms) == [4, 5]
    assert claims.tried(dataclasses.replace(claim, measures=(figures.RETURN,)), paths) == {}


def test_a_claim_compares_what_it_says():
    for claim in claims.CLAIMS:
        this, that = (claims.arm(claim.figure, words) for words in (claim.this, claim.that))
        better, _, worse = claim.says.partition(" beats ")
        if claim.figure == "fig13" and "×" in worse:  # one kind at two sizes
            assert this.x in better and that.x in worse and this.x != that.x and this.series == that.series and this.series in better
        elif claim.figure == "fig13":
            assert (this.series, this.x, that.series, that.x) == ("MST", "×4", "plain", "×4")
        elif this.series in figures.REGIMES:
            assert this.series in better.lower() and that.series in worse.lower()
        assert this.panel == that.panel


def test_a_claim_measures_the_module_that_its_figure_is_about():
    for claim in claims.CLAIMS:
        about = figures.LAPTOP[claim.figure].sized
        assert all(column == "return" or about in ("agent", column.split("/")[0]) for m in claim.measures for column in m.columns), claim.says


def test_the_better_arm_of_a_claim_is_the_one_that_it_names():
    for claim in claims.CLAIMS:
        this, that = (claims.arm(claim.figure, words).series for words in (claim.this, claim.that))
        better, _, worse = claim.says.partition(" beats ")
        word = better.split()[-1]
        if claim.figure == "fig12":
            assert (this, that) == ("MST (ER, RigL, 0.6)", worse)
        elif "needs LayerNorm" in better:
            assert "LN" in this and "LN" not in that and claim.says.split("(")[1][:-1] in this and claim.says.split("(")[1][:-1] in that
        elif claim.figure in ("fig2", "fig8"):
            assert word in this and word not in that and worse.split()[0] in that and ("LN" in this) == ("LN" in that) == ("LN" in worse)
        elif claim.figure in ("first", "fig11"):
            assert (word if word == "MST" else "Res") in this and (word if word == "MST" else "Res") not in that
