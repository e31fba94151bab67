"""The paper's claims at laptop size: which arms each compares, what is measured, and the verdict.

Guarantees: the comparisons were fixed before their runs finished, and every one is in the tables. A verdict says no
more than its 95 % interval: "supported" if the interval of the difference lies on the paper's side of 0, "contradicted"
if it lies on the other, "inconclusive" if it contains 0, "no data" if nothing was measured or nothing varies.

    ./sweep.sh claims                    # the verdicts, from paper/results/
    ./sweep.sh claims runs/              # from your own runs of ./sweep.sh fig11 --laptop

A run's score is the mean of its last three evaluations; an arm counts once all its seeds are finished. Beside published
runs, the score is the last evaluation, and a task counts once three seeds are finished. The interval is Welch's, for
the difference of two means over seeds, because spreads are unequal and seeds few. It is not corrected for the number
of comparisons.
"""

import csv
import os
from dataclasses import dataclass

import numpy as np

from paper.figures import ACTOR_DORMANT, CRITIC_DORMANT, CRITIC_SRANK, ENCODER_SRANK, RETURN
from paper.laptop import LAPTOP
from paper.studies import get_jobs
from runtime.aggregate import moments, welch
from runtime.results import gather

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
LAST = 3  # evaluations
MIN_SEEDS = 3  # of a task that stands beside published runs
ROLES = {(True, False): "supported", (False, True): "contradicted", (False, False): "inconclusive"}


@dataclass(frozen=True)
class Claim:
    """Arm `better` has a higher measure than arm `worse` (a lower one, for dormant neurons). An arm is given by its
    panel, series and x, as far as these are needed. The paper claims the return in each case, SRank and dormant neurons
    in some; all are tested in the same way."""
    figure: str
    better: tuple
    worse: tuple
    text: str
    measures: tuple = (RETURN,)


_CRITIC = (RETURN, CRITIC_SRANK, CRITIC_DORMANT)
_ENCODER = (RETURN, ENCODER_SRANK)


def _beats(figure, better, worse, prefix="", measures=(RETURN,), suffix=""):
    """A claim whose text is made of its arms: "critic: DST beats SST"."""
    name = lambda series: series.upper() if series in ("sst", "dst", "s2d", "d2s") else series
    return Claim(figure, (better,), (worse,), f"{prefix}{name(better)} beats {name(worse)}{suffix}", measures)


def _scaled(algo, dimension):
    arm = lambda series, x: (f"{algo}, {dimension}", series, x)
    for better, worse, text in ((("MST", "×4"), ("plain", "×4"), "MST beats plain"),
                                (("plain", "×1"), ("plain", "×4"), "plain ×1 beats ×4"),
                                (("MST", "×4"), ("MST", "×1"), "MST ×4 beats ×1")):
        at = " ×4" * (better[0] != worse[0])
        yield Claim("fig13", arm(*better), arm(*worse), f"{algo}, {dimension}{at}: {text}")


def _stream():
    """Whether sparsity helps a streaming agent, and what of that is its larger step: at both widths."""
    for units in ("128 units", "512 units"):
        for better, worse in (("dense", "dense, no SparseInit"), ("static", "static, no SparseInit"),
                              ("static, no SparseInit", "dense, no SparseInit"), ("static", "dense"), ("MST", "dense"),
                              ("MST", "static"), ("dense, larger step", "dense"), ("static", "dense, larger step"),
                              ("MST", "dense, larger step")):
            yield Claim("stream", (units, better), (units, worse), f"streaming, {units}: {better} beats {worse}")


CLAIMS = (
    Claim("quickstart", ("MST, 18,000 steps",), ("dense, 18,000 steps",), "quickstart, 18,000 steps: MST beats dense",
          _CRITIC),
    Claim("fig2", ("Type 4 LN, ELU",), ("Type 2 ELU",), "the encoder needs LayerNorm (ELU)", _ENCODER),
    Claim("fig2", ("Type 3 LN, ReLU",), ("Type 1 ReLU",), "the encoder needs LayerNorm (ReLU)", _ENCODER),
    Claim("fig2", ("Type 2 ELU",), ("Type 1 ReLU",), "encoder: ELU beats ReLU"),
    Claim("fig2", ("Type 4 LN, ELU",), ("Type 3 LN, ReLU",), "encoder: ELU beats ReLU (LN)"),
    *(_beats("fig6", "dst", other, "critic: ", _CRITIC) for other in ("dense", "sst", "s2d", "d2s")),
    Claim("fig8", ("Type 3 LN, ReLU",), ("Type 4 LN, ELU",), "actor: ReLU beats ELU (LN)"),
    Claim("fig8", ("Type 5 LN, ReLU, residual",), ("Type 6 LN, ELU, residual",),
          "actor: ReLU beats ELU (LN, residual)"),
    _beats("fig9", "sst", "dense", "actor: ", (RETURN, ACTOR_DORMANT)),
    *(_beats("fig9", "sst", other, "actor: ") for other in ("dst", "s2d", "d2s")),
    Claim("fig11", ("MR.Q + Res",), ("MR.Q",), "deep networks need residual connections", _CRITIC),
    Claim("fig11", ("MR.Q + Res + MST",), ("MR.Q + Res",), "MST beats residual connections only", _CRITIC),
    Claim("fig11", ("MR.Q + Res + MST",), ("MR.Q",), "MST beats MR.Q", _CRITIC),
    Claim("fig12", ("distribution", "MST (ER, RigL, 0.6)"), ("distribution", "uniform"), "ER beats uniform"),
    Claim("fig12", ("growth (critic)", "MST (ER, RigL, 0.6)"), ("growth (critic)", "SET"), "RigL beats SET"),
    *_scaled("SAC", "width"), *_scaled("SAC", "depth"), *_scaled("DDPG", "width"), *_scaled("DDPG", "depth"),
    *_stream(),
)

# Claims without a study here: their networks or lengths are out of reach for two cores.
NOT_STUDIED = (
    ("fig3", "SRank of an encoder without LayerNorm collapses during training", ENCODER_SRANK),
    ("fig4", "large encoders need residual connections, and no sparsity", RETURN),
    ("fig5", "critic, default size: regimes hardly differ", RETURN),
    ("fig12", "more sparsity helps large networks, up to a point", RETURN),
    ("fig14", "SAC at 207 M: dynamic critic and static actor beat the other pairings", RETURN),
    ("fig17", "residual connections before norm and activation beat those after", RETURN),
    ("fig26", "MST scales MR.SAC where plain scaling degrades", RETURN),
)

PUBLISHED = {"mrq": "MR.Q", "gym": "MR.Q", "simba": "SAC on SimBa networks"}  # studies that repeat published runs


def find_arm(figure, words):
    """The arm that these words describe. KeyError unless there is exactly one."""
    found = [arm for arm in LAPTOP[figure].arms if set(words) <= {arm.panel, arm.series, arm.x}]
    if len(found) != 1:
        raise KeyError(f"{figure} has {len(found)} arms {words}")
    return found[0]


def finished_runs(figure, arm, measure, paths, task=None, seeds=None):
    """The finished runs of an arm that have the measure, on all its tasks or on one; seeds: other ones than its own."""
    wanted = {job.name: job.args for job in get_jobs(LAPTOP[figure], task and [task], seeds) if job.arm == arm}
    runs, wrong, _ = gather(wanted, paths, list(measure.columns))
    return [run for name, run in runs.items() if name not in wrong and run.values(measure.columns) is not None]


def values(figure, arm, measure, paths, task=None, last=LAST):
    """One number per finished run, (seeds,): the mean of its last evaluations."""
    return np.array([run.values(measure.columns)[2][-last:].mean()
                     for run in finished_runs(figure, arm, measure, paths, task)])


def compare(this, that, smaller_is_better=False):
    """(difference, low, high, verdict) of "this beats that". this, that: (mean, sd, n) each."""
    difference, low, high = welch(this, that)
    if np.isnan(low):
        return difference, low, high, "no data"
    above, below = low > 0, high < 0
    return difference, low, high, ROLES[(below, above) if smaller_is_better else (above, below)]


def measure_claim(claim, paths):
    """measure's label -> both arms' values, (seeds,) each; empty as long as a seed is missing."""
    arms = [find_arm(claim.figure, words) for words in (claim.better, claim.worse)]
    found = {m.label: [values(claim.figure, arm, m, paths) for arm in arms] for m in claim.measures}
    seeds = len(LAPTOP[claim.figure].seed_list)
    return found if all(len(arm) == seeds for pair in found.values() for arm in pair) else {}


def verdict(label, pair):
    return compare(*map(moments, pair), smaller_is_better="dormant" in label)


# ---- published runs: summary figures only, in results/published.csv ----

def read_published(study, paths):
    """(task, agent step) -> {"runs", "mean", "sd", "min", "max"} of the published runs that a study repeats."""
    found = {}
    for path in paths:
        if os.path.exists(file := os.path.join(path, "published.csv")):
            with open(file, newline="") as table:
                for row in csv.DictReader(table):
                    if row["study"] == study:
                        found[row["env"], int(row["agent_step"])] = {
                            name: float(row[name]) for name in ("runs", "mean", "sd", "min", "max")}
    return found


def result_paths(paths=()):
    """The folders of runs, and the CSVs NAME-laptop.csv in them."""
    paths = list(paths) or [RESULTS]
    return paths + [os.path.join(path, name) for path in paths if os.path.isdir(path)
                    for name in sorted(os.listdir(path)) if name.endswith("-laptop.csv")]


if __name__ == "__main__":
    from paper.tables import main
    main()
