"""Tests of aggregate."""

import math

import numpy as np
import pytest
import scipy.stats
from runtime import aggregate, results

from settings import run_name
from tests.helpers import flags_to_args, write_run


def strata(*tasks):
    """Tasks of one value a seed -> (1 point, seeds, 1 episode) each."""
    return [np.array(values, float).reshape(1, -1, 1) for values in tasks]


def test_interquartile_means_by_hand():
    assert aggregate.iqm(strata([9, 1, 2, 3, 4, 5, 6, 100]))[0] == [4.5]  # (3 + 4 + 5 + 6) / 4
    assert aggregate.iqm(strata([0, 3, 4, 8, 99]))[0] == [5.0]  # a quarter of five: one at each end
    # (10 + 11 + 20 + 21) / 4, all runs together
    assert aggregate.iqm(strata([0, 10, 20, 30], [1, 11, 21, 31]))[0] == [15.5]
    episodes = [np.array([[[0, 50, 60, 70], [61, 62, 63, 1000]]], float)]
    assert aggregate.iqm(episodes)[0] == [61.5]  # (60 + 61 + 62 + 63) / 4: two seeds of four episodes, pooled
    center, low, high = aggregate.mean_sd(strata([1, 3], [10, 18]))
    # variances within a task
    assert center == [8] and [high[0] - 8, 8 - low[0]] == [pytest.approx(math.sqrt((2 + 32) / 2))] * 2
    # one seed
    assert np.isnan(aggregate.iqm(strata([7]))[1:]).all() and np.isnan(aggregate.mean_sd(strata([7]))[1:]).all()
    for few in (strata([7, 9]), strata([7, 9], [1, 2])):
        # two have an interval
        assert not np.isnan(aggregate.iqm(few)).any() and not np.isnan(aggregate.mean_sd(few)).any()


def test_intervals_are_those_of_scipy_at_the_widened_level():
    values = np.random.default_rng(3).normal(100, 10, 8)
    center, low, high = (part[0] for part in aggregate.iqm(strata(values)))
    beyond = aggregate.tail([8])
    assert beyond == pytest.approx(scipy.stats.norm.sf(math.sqrt(8 / 7) * 2.364624), rel=1e-5)  # Student's t, 7 degrees
    assert aggregate.tail([8, 8]) == pytest.approx(scipy.stats.norm.sf(math.sqrt(8 / 7) * scipy.stats.t.ppf(0.975, 14)))
    theirs = scipy.stats.bootstrap((values,), lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
                                   method="percentile", n_resamples=20000, confidence_level=1 - 2 * beyond,
                                   rng=np.random.default_rng(0))
    assert center == pytest.approx(scipy.stats.trim_mean(values, 0.25))
    assert [low, high] == pytest.approx(list(theirs.confidence_interval), abs=0.8) and high - low > 10


@pytest.mark.parametrize("seeds, tasks", [(5, 1), (8, 1), (8, 2)])
def test_95_percent_intervals_cover_about_95_percent(seeds, tasks, monkeypatch):
    monkeypatch.setattr(aggregate, "RESAMPLES", 2000)
    rng = np.random.default_rng(seeds + tasks)
    points = 800
    _, low, high = aggregate.iqm([rng.normal(0, 1, (points, seeds, 1)) for _ in range(tasks)])  # every true IQM is 0
    assert 0.925 < ((low <= 0) & (0 <= high)).mean() < 0.985


def test_seeds_are_resampled_within_their_task():
    _, low, high = aggregate.iqm(strata([0, 1] * 4, [100, 101] * 4))
    assert high[0] - low[0] < 60  # pooled resampling would draw 12 of 16 from one task now and then: wider than 90
    clustered = np.repeat(np.random.default_rng(0).normal(0, 1, (1, 8, 1)), 50, 2)
    once, many = aggregate.iqm([clustered[:, :, :1]]), aggregate.iqm([clustered])
    assert many[2] - many[1] == pytest.approx(once[2] - once[1], rel=0.25)  # 50 equal episodes are no 400 seeds
    clustered[:, :, 0] = -9
    # ... and one odd episode does not matter
    assert np.concatenate(aggregate.iqm([clustered])[1:]) == pytest.approx(np.concatenate(many[1:]), abs=0.1)


def test_cut_and_repeated_rows(tmp_path):
    folder = write_run(tmp_path, flags_to_args(), [(5000, 20), (0, 1.5), (5000, 30), (10000, "x")],
                       tail="15000,30000,4")
    run = results.read_run(folder, ["return"])
    assert run.table["agent_step"].tolist() == [0, 5000] and run.table["return"].tolist() == [1.5, 30]
    assert run.last_step == 5000 and "skipped 2 malformed or truncated rows" in run.notes[0]  # "4" may have been "432"
    (folder / "eval.csv").write_text("")
    with pytest.raises(ValueError, match="it has no columns agent_step"):
        results.read_run(folder, ["return"])


@pytest.mark.slow
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_not_lost(tmp_path):
    wanted = {run_name(args): args
              for args in (flags_to_args("--seed", str(seed), "--total-steps", "20000") for seed in range(3))}
    broken, whole, _ = wanted
    write_run(tmp_path, wanted[whole], [(0, 1), (20000, 2)])
    write_run(tmp_path, wanted[broken], [])
    (tmp_path / broken / "eval.csv").write_text("step,value\n1,2\n")
    runs, wrong, told = results.gather(wanted, [str(tmp_path)], ["return"])
    assert list(runs) == [whole] and wrong == {broken: "not readable", max(wanted): "missing"} and len(told) == 1
    assert broken in told[0] and "it has no columns agent_step" in told[0] and told[0].endswith("left out")


def test_curves_count_the_seeds_that_are_there():
    def run(steps, values):
        return results.RunData("", {"agent_step": np.array(steps), "env_frames": 2.0 * np.array(steps),
                                    "m": np.array(values, float)})

    one, three = (run([0, 10, 20], [math.nan, *values]) for values in ((3, 5), (100, 7)))
    two = run([0, 10], [math.nan, 5])
    frames, center, low, high = aggregate.curve([[one, two, three]], ("m",), aggregate.mean_sd, False)
    # NaN at step 0: nothing to measure; then 3, then 2 seeds
    assert frames.tolist() == [20, 40] and center.tolist() == [36, 6]
    assert high - center == pytest.approx([np.std([3, 5, 100], ddof=1), math.sqrt(2)])
    assert aggregate.curve([[one], [run([0, 10], [math.nan] * 2)]], ("m",), aggregate.iqm, False) is None
    assert aggregate.curve([[one]], ("other",), aggregate.iqm, False) is None
    assert aggregate.final([[one, two, three]], ("m",), 20, aggregate.mean_sd, False)[0] == 6  # two is not finished
