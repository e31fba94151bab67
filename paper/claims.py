"""The paper's claims at laptop size: which runs each compares, what is read from them, and what came of it.

What it claims: every comparison of a figure stands here before two of its arms can be compared, every one is in the tables,
and a verdict says no more than its interval. "seen": the 95 % interval of the difference lies on the paper's side of 0;
"reversed": on the other; "not seen": it holds 0, which decides nothing; "cannot tell": nothing was measured, or all alike.

    python claims.py                     # the tables of README.md and results/README.md, from results/
    python claims.py runs                # from your own runs of ./sweep.sh fig11 --laptop

A run counts by the mean of its last three evaluations, an arm once all its seeds are there; beside published runs, where each
seed is printed, by its last evaluation, and a task once three seeds are there. The interval is Welch's, of the difference of
two means over seeds, as spreads are unequal and seeds few; it is not corrected for the number of comparisons. It needs no
PyTorch.
"""

import argparse
import csv
import functools
import os
import sys
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_ind

from paper import figures
from runtime.aggregate import gather, plainly

LAST = 3  # evaluations
FEWEST = 3  # seeds of a task that stands beside published runs
RETURN, CRITIC_SRANK, CRITIC_DORMANT = figures.RETURN, figures.CRITIC_SRANK, figures.CRITIC_DORMANT
ACTOR_DORMANT, ENCODER_SRANK = figures.ACTOR_DORMANT, figures.ENCODER_SRANK


@dataclass(frozen=True)
class Claim:
    """That `this` arm's measure lies above `that` one's; below it for dormant neurons. An arm: its cell's panel, series and
    x, as far as they are needed to tell it from the figure's others. The paper speaks of the return in each case, of SRank
    and dormant neurons in some; they are tried alike."""
    figure: str
    says: str
    this: tuple
    that: tuple
    measures: tuple = (RETURN,)


def _critic(this, that):
    return this, that, (RETURN, CRITIC_SRANK, CRITIC_DORMANT)


def _scaled(algo, dimension):
    plain, mst = ((f"{algo}, {dimension}", series) for series in ("plain", "MST"))
    yield Claim("fig13", f"{algo}, {dimension} ×4: MST beats plain", (*mst, "×4"), (*plain, "×4"))
    yield Claim("fig13", f"{algo}: plain {dimension} ×1 beats ×4", (*plain, "×1"), (*plain, "×4"))
    yield Claim("fig13", f"{algo}: MST at {dimension} ×4 beats ×1", (*mst, "×4"), (*mst, "×1"))


CLAIMS = (
    Claim("first", "MST beats dense networks in a shorter first command (not the paper's)",
          *_critic(("MST, 18,000 steps",), ("dense, 18,000 steps",))),
    Claim("fig11", "deep networks need residual connections", *_critic(("MR.Q + Res",), ("MR.Q",))),
    Claim("fig11", "MST beats residual connections alone", *_critic(("MR.Q + Res + MST",), ("MR.Q + Res",))),
    Claim("fig11", "MST beats MR.Q", *_critic(("MR.Q + Res + MST",), ("MR.Q",))),
    Claim("fig2", "the encoder needs LayerNorm (ELU)", ("Type 4 LN, ELU",), ("Type 2 ELU",), (RETURN, ENCODER_SRANK)),
    Claim("fig2", "the encoder needs LayerNorm (ReLU)", ("Type 3 LN, ReLU",), ("Type 1 ReLU",), (RETURN, ENCODER_SRANK)),
    Claim("fig2", "encoder: ELU beats ReLU", ("Type 2 ELU",), ("Type 1 ReLU",)),
    Claim("fig2", "encoder: ELU beats ReLU (LN)", ("Type 4 LN, ELU",), ("Type 3 LN, ReLU",)),
    Claim("fig6", "critic: DST beats dense", *_critic(("dst",), ("dense",))),
    *(Claim("fig6", f"critic: DST beats {other.upper()}", *_critic(("dst",), (other,))) for other in ("sst", "s2d", "d2s")),
    *_scaled("SAC", "width"), *_scaled("SAC", "depth"), *_scaled("DDPG", "width"), *_scaled("DDPG", "depth"),
    Claim("fig8", "actor: ReLU beats ELU (LN)", ("Type 3 LN, ReLU",), ("Type 4 LN, ELU",)),
    Claim("fig8", "actor: ReLU beats ELU (LN, residual)", ("Type 5 LN, ReLU, residual",), ("Type 6 LN, ELU, residual",)),
    Claim("fig9", "actor: SST beats dense", ("sst",), ("dense",), (RETURN, ACTOR_DORMANT)),
    *(Claim("fig9", f"actor: SST beats {other.upper()}", ("sst",), (other,)) for other in ("dst", "s2d", "d2s")),
    Claim("fig12", "ER beats uniform", ("distribution", "MST (ER, RigL, 0.6)"), ("distribution", "uniform")),
    Claim("fig12", "RigL beats SET", ("growth (critic)", "MST (ER, RigL, 0.6)"), ("growth (critic)", "SET")),
)

# What the paper says where no study here has a comparison: of networks or lengths that two cores cannot reach.
WHOLE = (
    ("fig3", "SRank of an encoder without LayerNorm collapses in the course of training", ENCODER_SRANK),
    ("fig4", "large encoders need residual connections, and no sparsity", RETURN),
    ("fig5", "critic, default size: regimes hardly differ", RETURN),
    ("fig12", "more sparsity helps large networks, until it is excessive", RETURN),
    ("fig14", "SAC at 207 M: critic dynamic and actor static beats the other pairings", RETURN),
    ("fig17", "residual connections before norm and activation beat those after", RETURN),
    ("fig26", "MST scales MR.SAC where plain scaling degrades", RETURN),
)

# Studies that repeat published runs: those of results/published-NAME.csv.
PUBLISHED = {"mrq": "MR.Q", "simba": "SAC on SimBa networks"}


def arm(figure, wanted):
    """The cell that these words describe. KeyError unless it is one."""
    found = [cell for cell in figures.LAPTOP[figure].cells if set(wanted) <= {cell.panel, cell.series, cell.x}]
    if len(found) != 1:
        raise KeyError(f"{figure} has {len(found)} arms {wanted}")
    return found[0]


def finished(figure, cell, measure, paths, task=None):
    """The finished runs of an arm that have the measure, on all its tasks or on this one."""
    wanted = {run.name: run.args for run in figures.runs(figures.LAPTOP[figure], task and [task]) if run.cell == cell}
    runs, wrong, _ = gather(wanted, paths, list(measure.columns))
    return [run for name, run in runs.items() if name not in wrong and run.measure(measure.columns) is not None]


def values(figure, cell, measure, paths, task=None, last=LAST):
    """One number a finished run, (seeds,): the mean of its last evaluations."""
    return np.array([run.measure(measure.columns)[-last:].mean() for run in finished(figure, cell, measure, paths, task)])


def verdict(this, that, less):
    """(difference of means, low, high, what it says). this, that: (seeds,) each; less: whether the claim is that `this` is
    the smaller one."""
    difference = this.mean() - that.mean()
    if not np.isfinite(difference) or min(len(this), len(that)) < 2 or np.ptp(this) == np.ptp(that) == 0:
        return difference, np.nan, np.nan, "cannot tell"  # no spread is no certainty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one arm without spread: the other has some
        interval = ttest_ind(this, that, equal_var=False).confidence_interval()
    low, high = interval.low, interval.high
    claimed, against = (high < 0, low > 0) if less else (low > 0, high < 0)
    return difference, low, high, "seen" if claimed else "reversed" if against else "not seen"


@functools.cache
def hours(figure, laptop=True):
    """Estimated, of two CPU cores, for all of its runs, two digits."""
    found = {run.name: run for run in figures.runs((figures.LAPTOP if laptop else figures.FIGURES)[figure])}.values()
    return f"{float(f'{figures.hours(figure, found, argparse.Namespace(smoke=False, laptop=laptop)):.2g}'):,g}"


def number(value):
    """Three digits, and no more than one behind the point above 1; two where two places would round them away."""
    if 5e-4 <= abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def span(difference, low, high):
    return "" if np.isnan(low) else f"{number(difference)} [{number(low)}, {number(high)}]"


def tried(claim, paths):
    """measure's label -> both arms' values, (seeds,) each; nothing as long as a seed is missing."""
    cells = [arm(claim.figure, words) for words in (claim.this, claim.that)]
    found = {m.label: [values(claim.figure, cell, m, paths) for cell in cells] for m in claim.measures}
    whole = figures.LAPTOP[claim.figure].seeds
    return found if all(len(arm) == whole for arms in found.values() for arm in arms) else {}


def rows(found):
    """A row a claim and measure that is tried: figure, claim, measure, seeds, both arms' means, difference, verdict."""
    for claim, arms in found.items():
        for label, (this, that) in arms.items():
            difference, low, high, said = verdict(this, that, "dormant" in label)
            yield (claim.figure, claim.says, label, f"{len(this)}", number(this.mean()), number(that.mean()),
                   span(difference, low, high), said)


def summary(found):
    """A row a claim of the paper's: what was seen of it at laptop size, and what its figure takes at full size."""
    rows = [(claim.figure, claim.says, dict.fromkeys([measure.label for measure in claim.measures], "not run") | {
        label: verdict(*both, "dormant" in label)[3] for label, both in arms.items()}) for claim, arms in found.items()]
    rows += [(figure, says, {measure.label: "no study"}) for figure, says, measure in WHOLE]
    for figure, says, said in sorted(rows, key=lambda row: int(row[0].removeprefix("fig"))):
        words = (next((word for label, word in said.items() if kind in label), "") for kind in ("return", "SRank", "dormant"))
        yield says, *words, f"`./sweep.sh {figure}`", hours(figure, laptop=False)


def untried(found, paths):
    """A row a study that lacks runs: its command, comparisons that wait for them, runs that are there, hours for all."""
    for name, figure in figures.LAPTOP.items():
        if waiting := [claim.says for claim, arms in found.items() if claim.figure == name and not arms]:
            there = {run.name for cell in figure.cells for run in finished(name, cell, RETURN, paths)}
            count = f"{len(there)} of {len({run.name for run in figures.runs(figure)})}"
            yield f"`./sweep.sh {name} --laptop`", "; ".join(waiting), count, hours(name)


def beside_published(study, paths):
    """A row a task of a study whose runs are set as a published curve's: ours at their last step, every finished seed, and
    theirs."""
    figure, rows = figures.LAPTOP[study], []
    for path in paths:
        if os.path.exists(file := os.path.join(path, f"published-{study}.csv")):
            with open(file, newline="") as table:
                rows += csv.DictReader(table)
    cell, = figure.cells
    for task in figure.tasks:
        ours = values(study, cell, RETURN, paths, task, last=1)
        step = cell.flags["total_steps"]
        theirs = [float(row["return"]) for row in rows if (row["env"], int(row["agent_step"])) == (task, step)]
        if len(ours) >= FEWEST and theirs:
            difference, low, high, said = verdict(ours, np.array(theirs), less=False)
            yield (PUBLISHED[study], task, f"{step:,}", ", ".join(number(value) for value in sorted(ours)),
                   f"{number(np.mean(theirs))} ({len(theirs)} runs, {number(min(theirs))} to {number(max(theirs))})",
                   span(difference, low, high),
                   {"seen": "higher", "reversed": "lower", "not seen": "no difference seen"}.get(said, said))


def ends(name, steps, paths, where=""):
    """What every seed of a study got at these steps, a line an arm and step, and what a random policy gets."""
    figure, random = figures.LAPTOP[name], []
    task, = figure.tasks
    for cell in figure.cells:
        runs = finished(name, cell, RETURN, paths)
        for step in steps if runs else ():
            if step not in runs[0].table["agent_step"]:  # beyond a short arm's end
                continue
            returns = sorted(run.table["return"][run.table["agent_step"] == step].item() for run in runs)
            yield (f"{task}, {cell.series}{where}, at {step:,} steps, {len(returns)} seeds: "
                   f"{', '.join(f'{value:.0f}' for value in returns)}")
    for path in paths:
        if os.path.exists(file := os.path.join(path, "random-policy.csv")):
            with open(file, newline="") as rows:
                random += [float(row["return"]) for row in csv.DictReader(rows) if row["env"] == task]
    if random:
        yield f"{task}, a random policy, {len(random)} episodes: {np.mean(random):.0f} on average"


def main():
    paths = sys.argv[1:] or [os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")]
    paths += [os.path.join(path, name) for path in paths if os.path.isdir(path) for name in sorted(os.listdir(path))
              if name.endswith("-laptop.csv")]
    lines = []
    try:
        found = {claim: tried(claim, paths) for claim in CLAIMS}
        papers = {claim: arms for claim, arms in found.items() if claim.figure in figures.FIGURES}
        tables = ((("the paper says", "return", "SRank", "dormant neurons", "at full size", "hours"), summary(papers)),
                  (("figure", "comparison: A beats B", "measure", "seeds", "A", "B", "A - B [95 %]", "verdict"), rows(found)),
                  (("study", "comparisons", "runs", "hours"), untried(found, paths)),
                  (("algorithm", "task", "agent steps", "this code, each seed", "published", "difference of means [95 %]", ""),
                   (row for study in PUBLISHED for row in beside_published(study, paths))))
        for heading, table in tables:
            if table := list(table):
                lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *table)] + [""]
        again = [file for path in paths if os.path.isfile(file := os.path.join(path, "first-amd.csv"))]  # the first command alone
        for line in (*ends("first", (0, 9000, 18000, 24000, 27000, 30000), paths),
                     *ends("first", (0, 9000, 18000, 24000), again, ", on an AMD EPYC"), *ends("cup", (12000, 20000), paths)):
            lines.append(f"- {line}")
    except (OSError, ValueError) as error:
        sys.exit(f"claims.py: {plainly(error)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
