"""Tests of claims and of the tables in the documents."""

import math

import numpy as np
import pytest
import scipy.stats

from paper import claims, tables
from paper.figures import RETURN
from paper.laptop import LAPTOP
from paper.studies import get_jobs
from runtime import results
from runtime.aggregate import moments, welch
from tests.helpers import run_main

pytestmark = pytest.mark.slow


def test_verdicts_follow_from_welchs_interval():
    this, that = np.array([3.0, 5, 4, 6, 4.5]), np.array([1.0, 2, 1.5])
    theirs = scipy.stats.ttest_ind(this, that, equal_var=False).confidence_interval()
    assert welch(moments(this), moments(that)) == pytest.approx((3.0, theirs.low, theirs.high))
    same, none = np.full(5, 2.0), np.array([1.0, math.nan, 2])
    for scale in (0.01, 1, 100):
        said = [claims.compare(moments(scale * a), moments(scale * b), smaller)[3]
                for a, b, smaller in ((this, that, False), (this, that, True), (that, this, False), (that, this, True),
                                      (this, this[::-1], False), (same, same + 1, True), (none, this, False),
                                      (this, that[:1], False), (same, this, False), (same, this, True))]
        assert said == ["supported", "contradicted", "contradicted", "supported", "inconclusive", *["no data"] * 3,
                        "contradicted", "supported"]


def test_numbers_in_tables():
    assert [tables.number(value) for value in (168.4, -57.21, 5.94, 0.1, 0.0076, -0.00071, 4e-4, 0)] == [
        "168", "-57.2", "5.9", "0.10", "0.0076", "-0.00071", "0.00", "0.00"]


def test_claims_name_their_arms():
    for claim in claims.CLAIMS:
        better, worse = (claims.find_arm(claim.figure, words) for words in (claim.better, claim.worse))
        assert better != worse and better.panel == worse.panel
        about = LAPTOP[claim.figure].module
        assert all(column == "return" or about in ("agent", column.split("/")[0]) for m in claim.measures
                   for column in m.columns)


def write(path, jobs, end, value, steps=6):
    """A CSV of runs: value(job) at each of the last three evaluations, 9e9 before."""
    runs = []
    for job in jobs:
        at = np.linspace(0, end, steps)
        runs.append(results.RunData(job.name, {"agent_step": at, "env_frames": 2 * at, "return": np.where(
            np.arange(steps) >= steps - 3, value(job) + np.arange(steps) - (steps - 2), 9e9)}))
    results.save(path, runs, ["return"])


def test_a_claim_uses_the_last_evaluations_of_finished_arms(tmp_path):
    jobs = get_jobs(LAPTOP["fig12"])
    center = {"MST (ER, RigL, 0.6)": 10, "uniform": 50, "SET": 9.5}
    value = lambda job: center[job.arm.series] + 2 * job.seed
    write(tmp_path / "fig12-laptop.csv", jobs, 12000, value)
    found = tables.Results([str(tmp_path)])
    rows = {row[1]: row for row in tables.verdicts(found)}
    assert rows["ER beats uniform"][3:6] == ("5", "14.0", "54.0") and rows["ER beats uniform"][7] == "contradicted"
    assert rows["RigL beats SET"][5] == "13.5" and rows["RigL beats SET"][7] == "inconclusive" and len(rows) == 2
    write(tmp_path / "fig12-laptop.csv", [job for job in jobs if (job.arm.series, job.seed) != ("SET", 4)], 12000,
          value)
    assert [row[1] for row in tables.verdicts(tables.Results([str(tmp_path)]))] == ["ER beats uniform"]


def test_runs_beside_published_summary_figures(tmp_path):
    write(tmp_path / "mrq-laptop.csv", get_jobs(LAPTOP["mrq"], ["walker-walk"], range(3)), 20000,
          lambda job: 300 + 10 * job.seed)
    (tmp_path / "published.csv").write_text("study,env,agent_step,runs,mean,sd,min,max,source,license\n"
                                            "mrq,walker-walk,20000,5,250,1.5811388,248,252,x,y\n"
                                            "mrq,walker-walk,15000,5,9e9,1,0,9,x,y\nmrq,dog-run,20000,5,9,1,0,9,x,y\n")
    row, = tables.published(tables.Results([str(tmp_path)]))
    ours = np.array([301.0, 311, 321])  # the last evaluation only
    theirs = scipy.stats.ttest_ind(ours, np.arange(248.0, 253), equal_var=False).confidence_interval()
    assert row == ("MR.Q", "walker-walk", "20,000", "301, 311, 321", "250 (248 to 252, 5 runs)",
                   tables.interval(61.0, theirs.low, theirs.high), "higher")


def test_published_studies_use_default_settings():
    for study in claims.PUBLISHED:
        arm, = LAPTOP[study].arms
        assert set(arm.flags) <= {"algo", "total_steps"}
        published = claims.read_published(study, [claims.RESULTS])
        assert {task for task, step in published if step == arm.flags["total_steps"]} == set(LAPTOP[study].tasks)


def test_unfinished_runs_do_not_count(tmp_path):
    jobs = get_jobs(LAPTOP["fig12"])
    write(tmp_path / "fig12-laptop.csv", jobs, 11000, lambda job: 1)
    assert not claims.finished_runs("fig12", jobs[0].arm, RETURN, [str(tmp_path / "fig12-laptop.csv")])


def test_tables_between_markers(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "one", (("a", "b"), lambda results: [("1", results)]))
    text = "before\n<!-- table:one -->\nold\n<!-- end -->\nafter"
    filled = tables.fill(text, "2")
    new = text.replace("old", "\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert filled == new and tables.fill(filled, "2") == filled
    for wrong, message in ((text.replace("one", "two"), "unknown table 'two'"),
                           (text.replace("<!-- end -->", ""), "begin")):
        with pytest.raises(ValueError, match=message):
            tables.fill(wrong, "2")


def test_documents_are_up_to_date(monkeypatch, capsys):
    assert run_main(tables, monkeypatch, capsys, "--check")[:2] == (0, ["all tables are up to date"])
