"""The tables of README.md and docs/ that come from data, written between markers.

Guarantees: what stands between `<!-- table:NAME -->` and `<!-- end -->` is what the results in paper/results/ give;
`--check` fails if a file is out of date or names an unknown table.

    ./sweep.sh claims                # print every table, from paper/results/
    ./sweep.sh claims runs/          # from your own runs
    ./sweep.sh claims --write        # fill the tables of README.md and docs/*.md
    ./sweep.sh claims --check        # exit status 1 if a table is out of date (CI)
"""

import argparse
import csv
import dataclasses
import functools
import glob
import inspect
import itertools
import os
import re
import sys
from typing import Literal, get_args, get_origin

import numpy as np

from agents import AGENTS, count_parameters
from networks import ARCH_CONFIGS
from paper.claims import (CLAIMS, MIN_SEEDS, NOT_STUDIED, PUBLISHED, compare, finished_runs, measure_claim,
                          read_published, result_paths, values, verdict)
from paper.figures import FIGURES, RETURN
from paper.laptop import LAPTOP
from paper.studies import SHAPES, add_options, get_jobs, hours, table_rows
from runtime.aggregate import moments
from runtime.results import error_line
from settings import defaults, format_value, parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_DIFFERENCE = "no significant difference"
MARKER = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def number(value):
    """At most three digits, and one decimal above 1; below 0.1 two digits, so that small values do not print as 0."""
    if 5e-4 <= abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def interval(difference, low, high):
    return "" if np.isnan(low) else f"{number(difference)} [{number(low)}, {number(high)}]"


def markdown(heading, rows):
    rows = (heading, ["---"] * len(heading), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


class Results:
    """What the tables are made of, read once."""

    def __init__(self, paths):
        self.paths = result_paths(paths)

    @functools.cached_property
    def claims(self):
        """Claim -> measure's label -> both arms' values, (seeds,) each; empty as long as runs are missing."""
        return {claim: measure_claim(claim, self.paths) for claim in CLAIMS}

    @property
    def of_the_paper(self):
        return {claim: found for claim, found in self.claims.items() if claim.figure.startswith("fig")}

    @functools.cached_property
    def random_returns(self):
        """task -> returns of a random policy, one per episode."""
        returns = {}
        for path in self.paths:
            if os.path.exists(file := os.path.join(path, "random-policy.csv")):
                with open(file, newline="") as rows:
                    for row in csv.DictReader(rows):
                        returns.setdefault(row["env"], []).append(float(row["return"]))
        return returns


# ---- the tables, by name ----

def summary(results):
    """Every verdict on a claim of the paper, one row each."""
    by_verdict = {"supported": [], "contradicted": [], "inconclusive": [], "no data": []}
    for claim, found in results.of_the_paper.items():
        for label, pair in found.items():
            by_verdict[verdict(label, pair)[3]].append((claim.text, label.split(",")[0].split(" of ")[0]))
    for said, comparisons in by_verdict.items():
        texts = {}
        for text, label in comparisons:
            texts.setdefault(text, []).append(label)
        named = "; ".join(f"{text} ({', '.join(labels)})" for text, labels in texts.items())
        of = dict.fromkeys(label for _, label in comparisons)
        counts = ", ".join(f"{sum(label == one for _, one in comparisons)} of {label}" for label in of)
        yield said, str(len(comparisons)), named if said in ("supported", "contradicted") else counts
    waiting = [claim.text for claim, found in results.of_the_paper.items() if not found]
    yield "not studied", str(len(NOT_STUDIED) + len(waiting)), "; ".join([text for _, text, _ in NOT_STUDIED] + waiting)


def readme(results):
    """The results in six rows."""
    for algorithm, rows in itertools.groupby(published(results), key=lambda row: row[0]):
        said = [row[-1] for row in rows]
        counts = "; ".join(f"{one} in {said.count(one)} of {len(said)}" for one in dict.fromkeys(said))
        yield f"{algorithm}: final return beside published runs", f"{len(said)} tasks", counts
    rows = {said: (count, which) for said, count, which in summary(results)}
    for said in ("supported", "contradicted", "inconclusive"):
        yield f"the paper's claims: {said}", *rows[said]
    rest = int(rows["no data"][0]) + int(rows["not studied"][0])
    yield "the paper's claims: no data, or not studied", str(rest), "see docs/results.md"


def claims_table(results):
    """One row per claim of the paper: its verdicts, and what its figure takes at full size."""
    rows = []
    for claim, found in results.of_the_paper.items():
        said = dict.fromkeys([measure.label for measure in claim.measures], "not run")
        said |= {label: verdict(label, pair)[3] for label, pair in found.items()}
        rows.append((claim.figure, claim.text, said))
    rows += [(figure, text, {measure.label: "not studied"}) for figure, text, measure in NOT_STUDIED]
    for figure, text, said in sorted(rows, key=lambda row: int(row[0].removeprefix("fig"))):
        words = (next((word for label, word in said.items() if kind in label), "")
                 for kind in ("return", "SRank", "dormant"))
        yield text, *words, f"`./sweep.sh {figure}`", full_hours(figure)


@functools.cache
def full_hours(figure):
    return hours(FIGURES[figure], get_jobs(FIGURES[figure]))


def verdicts(results):
    """One row per comparison: both arms' means, the difference, the verdict."""
    for claim, found in results.claims.items():
        for label, pair in found.items():
            difference, low, high, said = verdict(label, pair)
            yield (claim.figure, claim.text, label, str(len(pair[0])), number(pair[0].mean()), number(pair[1].mean()),
                   interval(difference, low, high), said)


def published(results):
    """One row per task of a study that repeats published runs: ours at the last step, theirs as summary figures."""
    for study, algorithm in PUBLISHED.items():
        theirs, (arm,) = read_published(study, results.paths), LAPTOP[study].arms
        step = arm.flags["total_steps"]
        for task in LAPTOP[study].tasks:
            ours, other = values(study, arm, RETURN, results.paths, task, last=1), theirs.get((task, step))
            if other is None or len(ours) < MIN_SEEDS:
                continue
            difference, low, high, said = compare(moments(ours), (other["mean"], other["sd"], other["runs"]))
            said = {"supported": "higher", "contradicted": "lower", "inconclusive": NO_DIFFERENCE}.get(said, said)
            yield (algorithm, task, f"{step:,}", ", ".join(map(number, sorted(ours))),
                   f"{number(other['mean'])} ({number(other['min'])} to {number(other['max'])}, "
                   f"{other['runs']:.0f} runs)",
                   interval(difference, low, high), said)


def spread(name, arms, steps, paths, seeds=None):
    """One row per arm and step: the least, median and greatest return over seeds."""
    for arm in LAPTOP[name].arms:
        runs = finished_runs(name, arm, RETURN, paths, seeds=seeds) if arm.series in arms else []
        for step in steps:
            found = sorted(run.table["return"][run.table["agent_step"] == step].item() for run in runs
                           if step in run.table["agent_step"])
            if found:
                yield arm.series, f"{step:,}", str(len(found)), *map(number, (found[0], np.median(found), found[-1]))


def random_policy(name, results):
    if returns := results.random_returns.get(LAPTOP[name].tasks[0]):
        found = map(number, (min(returns), np.median(returns), max(returns)))
        yield "random policy", "", f"({len(returns)} episodes)", *found


QUICKSTART_STEPS, QUICKSTART_GOOD = (0, 9000, 18000, 24000), 500


def quickstart_paths(results):
    """Processor -> where the runs of the README's MR.Q command on it are."""
    amd = [file for path in results.paths if os.path.exists(file := os.path.join(path, "quickstart-amd.csv"))]
    return {"Intel Xeon": results.paths, "AMD EPYC": amd}


def quickstart(results):
    """The README's MR.Q command, on both processors that it was run on; seeds 8 to 15 on one."""
    for processor, paths in quickstart_paths(results).items():
        for row in spread("quickstart", ("MST",), QUICKSTART_STEPS, paths, range(16)):
            yield processor, *row[1:]
    yield from random_policy("quickstart", results)


def quickstart_short(results):
    """The same for the README: one row per processor, and how many seeds end well."""
    for processor, seeds, *cells in side_by_side(quickstart(results), QUICKSTART_STEPS):
        paths = quickstart_paths(results).get(processor, [])
        ends = [run.table["return"][-1] for run in finished_runs(
            "quickstart", LAPTOP["quickstart"].arms[0], RETURN, paths, seeds=range(16))]
        good = f"{sum(end > QUICKSTART_GOOD for end in ends)} of {len(ends)}" if ends else ""
        yield processor, seeds, *cells, good


def side_by_side(rows, steps):
    """Rows of `spread`, one per step, as one row per label: a cell per step."""
    found = {}
    for label, _, seeds, *returns in rows:
        found.setdefault((label, seeds), []).append(" / ".join(returns))
    for (label, seeds), cells in found.items():
        yield label, seeds, *cells, *[""] * (len(steps) - len(cells))


STREAM_STEPS = (0, 50_000, 100_000, 200_000)


def quickstart_stream(results):
    """The README's streaming command."""
    rows = [("AMD EPYC", *row[1:]) for row in spread("stream_quickstart", ("MST",), STREAM_STEPS, results.paths)]
    yield from side_by_side([*rows, *random_policy("stream_quickstart", results)], STREAM_STEPS)


def quickstart_arms(results):
    arms = [arm.series for arm in LAPTOP["quickstart"].arms if arm.series != "MST"]
    yield from spread("quickstart", arms, (9000, 18000, 24000, 27000, 30000), results.paths)


def ball_in_cup(results):
    yield from spread("ball_in_cup", ("MST, SAC", "MST, DDPG"), (12000, 20000), results.paths)
    yield from random_policy("ball_in_cup", results)


def waiting(results):
    """One row per study whose comparisons wait for runs."""
    for name, figure in LAPTOP.items():
        texts = [claim.text for claim, found in results.claims.items() if claim.figure == name and not found]
        if texts:
            jobs = get_jobs(figure)
            there = {run.name for arm in figure.arms for run in finished_runs(name, arm, RETURN, results.paths)}
            done = f"{len(there)} of {len({job.name for job in jobs})}"
            yield f"`./sweep.sh {name} --laptop`", "; ".join(texts), done, hours(figure, jobs)


def figures_table(laptop):
    options = add_options(argparse.ArgumentParser()).parse_args(["--laptop"] * laptop)
    for row in table_rows(LAPTOP if laptop else FIGURES, options):
        yield f"`{row['figure']}`", *(row[key] for key in ("shows", "runs", "parameters", "hours", "columns"))


def sizes(_):
    """Trainable parameters, dense. The paper prints 2 / 37 / 154 M, 3 / 33 / 139 M and 1.3 / 16 / 69 M."""
    def at(module, scale, task, *more):
        encoder_scale = str(scale if module == "encoder" else 3)
        args = parse(["--env", task, "--encoder-scale", encoder_scale, f"--{module}-scale", str(scale), *more])
        return count_parameters(args, *SHAPES[task])[module] / 1e6

    for task in ("humanoid-run", "dog-run"):
        yield f"encoder, {task}", *(f"{at('encoder', scale, task):.2f} M" for scale in (1, 3, 5))
    yield "critic (both Q), scale-3 encoder", *(f"{at('critic', scale, 'humanoid-run'):.3f} M" for scale in (1, 3, 5))
    for task in ("humanoid-run", "dog-run"):
        yield f"actor, scale-3 encoder, {task}", *(f"{at('actor', scale, task):.3f} M" for scale in (1, 3, 5))


# ---- the flags of train.py ----

def help_texts(cls):
    """Field name -> the comment of its line, which is the flag's help text."""
    classes = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: text for base in classes
            for name, text in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.M)}


def flags(*groups):
    """One row per flag of these groups of settings.Args (None: its own): flag and choices, defaults, meaning."""
    for group in groups:
        owners = {algo: getattr(defaults(algo), group) if group else defaults(algo) for algo in AGENTS}
        known = {algo: {spec.name: spec for spec in dataclasses.fields(owner)} for algo, owner in owners.items()}
        texts = {}
        for owner in owners.values():
            texts |= {name: text for name, text in help_texts(type(owner)).items() if name not in texts}
        for name, text in texts.items():
            algos = ["mrq"] if name == "algo" else [algo for algo in AGENTS if name in known[algo]]
            by_default = {}
            for algo in algos:
                by_default.setdefault(default_text(getattr(owners[algo], name)), []).append(algo)
            everywhere = name == "algo" or [*by_default.values()] == [list(AGENTS)]
            default = "; ".join(value if everywhere else f"{value} ({', '.join(which)})"
                                for value, which in by_default.items())
            allowed = ", ".join(map(str, choices(known[algos[0]][name].type)))
            yield f"`--{name.replace('_', '-')}`" + (f": {allowed}" if allowed else ""), default, text


def choices(kind):
    """The values that a Literal allows, within a union too."""
    parts = get_args(kind)
    return parts if get_origin(kind) is Literal else [value for part in parts for value in choices(part)]


def default_text(value):
    if value is None or isinstance(value, bool):
        return {None: "", False: "off", True: "on"}[value]
    return f"{value:,}" if isinstance(value, int) else format_value(value)


def types(_):
    rows = {"activation": "activation", "LayerNorm": "use_layer_norm", "residual connections": "use_residual"}
    for heading, key in rows.items():
        said = {"relu": "ReLU", "elu": "ELU", True: "yes", False: ""}
        yield heading, *(said[config[key]] for config in ARCH_CONFIGS.values())


FIGURE_HEADING = ("figure", "shows", "runs", "parameters", "hours", "columns of eval.csv")
SPREAD_HEADING = ("steps", "seeds", "min", "median", "max")
FLAG_HEADING = ("flag", "default", "meaning")
TABLES = {
    "published": (("algorithm", "task", "agent steps", "this code, each seed", "published mean",
                   "difference [95 %]", ""), published),
    "summary": (("verdict", "comparisons", "which"), summary),
    "claims": (("the paper claims", "return", "SRank", "dormant neurons", "at full size", "hours"), claims_table),
    "verdicts": (("figure", "claim: A beats B", "measure", "seeds", "A", "B", "A - B [95 %]", "verdict"), verdicts),
    "quickstart": (("processor", *SPREAD_HEADING), quickstart),
    "quickstart-short": (("min / median / max return", "seeds", *(f"step {step:,}" for step in QUICKSTART_STEPS),
                          f"above {QUICKSTART_GOOD} at the end"), quickstart_short),
    "quickstart-stream": (("min / median / max return", "seeds", *(f"step {step:,}" for step in STREAM_STEPS)),
                          quickstart_stream),
    "quickstart-arms": (("arm", *SPREAD_HEADING), quickstart_arms),
    "ball_in_cup": (("arm", *SPREAD_HEADING), ball_in_cup),
    "figures": (FIGURE_HEADING, lambda _: figures_table(False)),
    "studies": (FIGURE_HEADING, lambda _: figures_table(True)),
    "sizes": (("trainable parameters, dense", "scale 1", "scale 3", "scale 5"), sizes),
    "waiting": (("study", "comparisons", "runs", "hours"), waiting),
    "readme": (("question", "comparisons", "answer"), readme),
    "flags": (FLAG_HEADING, lambda _: flags(None)),
    "flags-modules": (FLAG_HEADING, lambda _: flags("encoder", "critic", "actor")),
    "flags-sparsity": (FLAG_HEADING, lambda _: flags("sparse")),
    "flags-pixels": (FLAG_HEADING, lambda _: flags("pixel")),
    "flags-algorithms": (FLAG_HEADING, lambda _: flags("agent")),
    "types": (("type", *map(str, ARCH_CONFIGS)), types),
}


# ---- between the markers ----

def fill(text, results):
    """The text with every table between markers made anew. ValueError for an unknown table or a marker without end."""
    begun, whole = text.count("<!-- table:"), len(MARKER.findall(text))
    if begun != whole:
        raise ValueError(f"{begun} tables begin and {whole} are complete: <!-- table:NAME -->, then <!-- end -->")

    def table(match):
        if match[2] not in TABLES:
            raise ValueError(f"unknown table {match[2]!r}: choose one of {', '.join(TABLES)}")
        heading, rows = TABLES[match[2]]
        return f"{match[1]}\n{markdown(heading, rows(results))}\n\n{match[4]}"

    return MARKER.sub(table, text)


def documents():
    return sorted([os.path.join(ROOT, "README.md"), *glob.glob(os.path.join(ROOT, "docs", "*.md"))])


def main():
    parser = argparse.ArgumentParser(prog="sweep.sh claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="folders of runs, or CSVs of runs; default: paper/results")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="fill the tables of README.md and docs/*.md")
    mode.add_argument("--check", action="store_true", help="exit with status 1 if one of them is out of date")
    options = parser.parse_args()
    if options.paths and (options.write or options.check):
        parser.error("--write and --check use paper/results only")
    results, stale = Results(options.paths), []
    try:
        for path in documents() if options.write or options.check else ():
            with open(path) as file:
                before = file.read()
            try:
                after = fill(before, results)
            except ValueError as error:
                raise ValueError(f"{os.path.relpath(path, ROOT)}: {error}") from None
            if after != before:
                stale.append(os.path.relpath(path, ROOT))
                if options.write:
                    with open(path, "w") as file:
                        file.write(after)
        if options.write or options.check:
            outcome = "written" if options.write else "out of date: ./sweep.sh claims --write"
            print("\n".join(f"{path}: {outcome}" for path in stale) or "all tables are up to date")
            sys.exit(1 if stale and options.check else 0)
        for name in ("published", "summary", "claims", "verdicts", "waiting"):
            heading, rows = TABLES[name]
            if rows := list(rows(results)):
                print(f"{name}\n\n{markdown(heading, rows)}\n")
    except (ValueError, OSError) as error:
        sys.exit(f"sweep.sh: {error_line(error)}")


if __name__ == "__main__":
    main()
