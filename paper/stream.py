"""The streaming study: does sparsity help a streaming agent as it gets wider, beyond the larger step that it brings?

    python -m paper.stream --list                        # the commands
    python -m paper.stream --runs runs/stream            # runs them one after the other; continues where it was stopped

ObGD's step is always at its bound, and the bound counts active weights. Pruning 80 to 90 % therefore makes the step about three
times as large, and going from 128 to 512 units makes it six times as small. The last arm separates the two effects: it is dense,
and its κ is divided by the ratio of the sparse and the dense arm's median steps (in trials of 15,000 steps on walker-walk: 2.7 for
the actor and 3.0 for the critic at width 128; 3.2 and 2.9 at width 512). All settings were fixed before the first run.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

TASK, STEPS, SEEDS = "walker-walk", 500_000, 5
SPARSITY = {1: 0.8, 4: 0.9}  # by width scale
KAPPA = {1: ("1.1", "0.67"), 4: ("0.93", "0.69")}  # actor, critic, of the dense arm with the sparse arm's median step
STATIC = ("--critic-regime", "sst", "--actor-regime", "sst")


def arms(width):
    """Name -> flags of the six arms at this width scale (128 units each)."""
    sparsity = ("--sparsity", str(SPARSITY[width]))
    actor, critic = KAPPA[width]
    return {"dense": (), "dense, no SparseInit": ("--sparse-init", "0"),
            "static": (*STATIC, *sparsity), "static, no SparseInit": (*STATIC, *sparsity, "--sparse-init", "0"),
            "mst": ("--mst", *sparsity, "--update-interval", "10000", "--drop-fraction-start", "0.3"),
            "dense, larger step": ("--actor-kappa", actor, "--critic-kappa", critic)}


def commands():
    """Flags of every run: all arms of one seed before the next seed, so that a part of the study compares all arms."""
    return [("--algo", "stream", "--env", TASK, "--total-steps", str(STEPS), "--width-scale", str(width), *flags,
             "--seed", str(seed)) for seed in range(SEEDS) for width in SPARSITY for flags in arms(width).values()]


@dataclass
class Args:
    runs: str = "runs/stream"  # folder for the runs
    list: bool = False  # print the commands, and run nothing


def main():
    args = tyro.cli(Args, description=__doc__)
    for flags in commands():
        command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), *flags, "--runs", args.runs, "--resume"]
        if args.list:
            print(" ".join(["python train.py", *flags]))
        elif subprocess.run(command).returncode == 75:  # stopped by a signal
            return sys.exit(75)


if __name__ == "__main__":
    main()
