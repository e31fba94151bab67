"""Statistics over seeds: interquartile means, bootstrap intervals, and Welch's interval of a difference.

Guarantees: intervals called 95 % cover about 95 %, also with five or eight seeds (tests/test_aggregate.py).

    frames, center, low, high = curve([list(runs.values())], ["return"], iqm, episodes=False)

The center is the interquartile mean (IQM) over seeds, for several tasks over all their runs (Agarwal et al., 2021). The
interval is a stratified percentile bootstrap, widened for few seeds (Hesterberg, 2015). `mean_sd` is the paper's mean
± one standard deviation. Runs: results.RunData.
"""

import math

import numpy as np
from scipy.stats import norm, t

RESAMPLES = 5000


def trimmed_mean(values):
    """Interquartile mean over the last axis: a quarter of the values cut off at each end, as scipy.stats.trim_mean."""
    count = values.shape[-1]
    cut = int(0.25 * count)
    return np.sort(values, -1)[..., cut:count - cut].mean(-1)


def tail(counts):
    """Share of resamples beyond each end of a 95 % interval, for strata of these sizes.

    A percentile bootstrap of n values is too narrow by √((n - 1) / n), and uses a normal quantile where Student's
    belongs: with five seeds its "95 %" covers 83 to 90 %. Hesterberg (2015), "What teachers should know about the
    bootstrap".
    """
    n = np.mean(counts)
    return norm.sf(np.sqrt(n / (n - 1)) * t.ppf(0.975, sum(counts) - len(counts)))


def iqm(strata):
    """(center, low, high), (points,) each. strata: one array per task, (points, seeds, episodes).

    Seeds are resampled within their task, each with all its episodes: episodes of one network are not independent.
    """
    flat = [stratum.reshape(len(stratum), -1) for stratum in strata]
    center = trimmed_mean(np.concatenate(flat, 1))
    counts = [stratum.shape[1] for stratum in strata]
    if min(counts) < 2:
        return center, np.full_like(center, np.nan), np.full_like(center, np.nan)
    generator = np.random.default_rng(0)
    chosen = [generator.integers(0, n, (RESAMPLES, n)) for n in counts]
    low, high = np.empty_like(center), np.empty_like(center)
    beyond = tail(counts)
    for point in range(len(center)):  # one at a time: all at once would not fit the cache
        resampled = np.concatenate([stratum[point][index].reshape(RESAMPLES, -1)
                                    for stratum, index in zip(strata, chosen)], 1)  # (resamples, values)
        low[point], high[point] = np.quantile(trimmed_mean(resampled), (beyond, 1 - beyond))
    return center, low, high


def mean_sd(strata):
    """Mean over all runs ± one standard deviation over the seeds of a task: differences of tasks are not noise."""
    runs = [stratum.mean(-1) for stratum in strata]  # (points, seeds)
    center = np.concatenate(runs, 1).mean(1)
    if min(run.shape[1] for run in runs) < 2:
        return center, np.full_like(center, np.nan), np.full_like(center, np.nan)
    spread = np.sqrt(np.mean([run.var(1, ddof=1) for run in runs], 0))
    return center, center - spread, center + spread


STATISTICS = {"iqm": (iqm, "IQM and 95 % bootstrap interval"), "mean-sd": (mean_sd, "Mean ± one standard deviation")}


def welch(this, that):
    """(difference of means, low, high): Welch's 95 % interval, for unequal spreads. this, that: (mean, sd, n).

    NaN for the interval if a sample has fewer than two values or neither has a spread.
    """
    (mean, sd, n), (other_mean, other_sd, other_n) = this, that
    difference = mean - other_mean
    if min(n, other_n) < 2:
        return difference, math.nan, math.nan
    a, b = sd ** 2 / n, other_sd ** 2 / other_n
    if not a + b > 0 or not math.isfinite(difference):
        return difference, math.nan, math.nan
    freedom = (a + b) ** 2 / (a ** 2 / (n - 1) + b ** 2 / (other_n - 1))
    half = t.ppf(0.975, freedom) * math.sqrt(a + b)
    return difference, difference - half, difference + half


def moments(values):
    """(mean, sd, n) of a sample, for `welch`."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else math.nan, len(values)


def curve(tasks, columns, statistic, episodes):
    """tasks: a list of runs per task. Returns frames and the statistic at every step, (points,) each; None for nothing.

    A step uses the seeds that have it: unfinished runs are drawn as far as they got.
    """
    read = [[run.values(columns, episodes) for run in runs] for runs in tasks]
    read = [[series for series in of_task if series is not None] for of_task in read]
    if not read or not all(read):
        return None
    steps = np.unique(np.concatenate([at for of_task in read for at, _, _ in of_task]))
    width = min(values.shape[1] for of_task in read for _, _, values in of_task)  # episodes
    strata, frames = [], np.full((sum(map(len, read)), len(steps)), np.nan)
    row = 0
    for of_task in read:
        stratum = np.full((len(steps), len(of_task), width), np.nan)
        for seed, (own_steps, own_frames, values) in enumerate(of_task):
            at = np.searchsorted(steps, own_steps)
            stratum[at, seed], frames[row, at] = values[:, :width], own_frames
            row += 1
        strata.append(stratum)
    there = [~np.isnan(stratum).any(-1) for stratum in strata]  # (steps, seeds): NaN means nothing was measured
    result = np.full((3, len(steps)), np.nan)
    pattern = np.concatenate(there, 1)
    for seeds in np.unique(pattern, axis=0):  # points that have the same seeds, at once
        points = (pattern == seeds).all(1)
        split = np.split(seeds, np.cumsum([mask.shape[1] for mask in there])[:-1])
        if all(part.any() for part in split):  # else a task has no seed here
            result[:, points] = statistic([stratum[points][:, part] for stratum, part in zip(strata, split)])
    kept = ~np.isnan(result[0])
    return (np.nanmean(frames[:, kept], 0), *result[:, kept]) if kept.any() else None


def final(tasks, columns, total_steps, statistic, episodes):
    """(center, low, high) of the last evaluation of the finished runs, or None."""
    strata = []
    for runs in tasks:
        values = [series[2][-1] for run in runs if run.last_step >= total_steps
                  and (series := run.values(columns, episodes)) is not None]
        width = min(map(len, values), default=0)
        strata.append(np.array([[value[:width] for value in values if not np.isnan(value).any()]]))
    if not strata or any(stratum.size == 0 for stratum in strata):
        return None
    return [value[0] for value in statistic(strata)]
