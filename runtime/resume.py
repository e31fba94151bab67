"""A run that may be stopped or killed at any moment, and resumes exactly.

Guarantees: what `state` returns is all of a run, to the last random generator, so that one resumed from it writes the
same CSV files, byte for byte on a CPU, timing columns aside, as one that was never stopped; and a signal to stop is answered
at the next safe point: between two agent steps, between two updates of an encoder burst, or within an evaluation, which
is then played anew.

    saved = SavedRun(Checkpoints(folder), args, device, agent, env, log)
    obs = saved.restore(differs)            # None for a new run; saved.progress says where the loop is
    saved.save_if_due()                     # between two steps; StopSignals.check says when to stop, and save at once

Not in the paper. `checkpoint.py` is about the files; this is about what belongs into them, and when.
"""

import dataclasses
import math
import os
import signal
import time

import numpy as np
import torch

from runtime.log import current_name

KEPT_BYTES = 1e8  # a finished run keeps its last checkpoint up to this size
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGUSR1: what SLURM is usually asked to warn by


class Stopped(Exception):
    """A signal asked the run to stop, and here it can."""


class StopSignals:
    """Notes a signal that asks to stop; `check` raises Stopped at the next safe point. A second Ctrl-C ends the process at
    once, as a kill would: the last checkpoint stays what it was."""

    def __init__(self):
        self.name = None
        for name in SIGNALS:
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # respect nohup
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number, _):
        if number == signal.SIGINT and self.name:
            os.write(2, b"\ntrain.py: stopped at once, without saving; --resume goes on from the last checkpoint\n")
            os._exit(1)
        self.name = self.name or signal.Signals(number).name

    def check(self):
        if self.name:
            raise Stopped(self.name)


@dataclasses.dataclass
class Progress:
    """Where the training loop stands, in a few values."""
    step: int = 0  # agent steps that are done
    action: np.ndarray | None = None  # of step `step`, if it has been chosen: then the run stands within that step's update
    episode_return: float = 0.0  # of the current episode so far
    last_return: float = math.nan  # of the last whole one
    logged_step: int = 0  # where the last row of train.csv was written
    logged_seconds: float = 0.0
    seconds: float = 0.0  # that the run has taken, over all its processes


class SavedRun:
    """All parts of a run together: what a checkpoint holds, when it is written, and the way back."""

    def __init__(self, checkpoints, args, device, agent, env, log):
        self.checkpoints, self.args, self.device = checkpoints, args, device
        self.agent, self.env, self.log = agent, env, log
        self.progress, self._began, self.kept = Progress(), time.time(), False

    def seconds(self):
        """How long the run has taken, over all its processes."""
        return self.progress.seconds + time.time() - self._began

    # ---- saving ----

    def state(self):
        """Tensors, live ones, and plain values: all of the run but the rows of its replay buffer."""
        run = dataclasses.asdict(self.progress) | {"seconds": self.seconds()}
        run["action"] = None if run["action"] is None else run["action"].tolist()
        return {"config": dataclasses.asdict(self.args), "progress": run,
                "agent": self.agent.state_dict(), "info": dict(self.agent.info), "replay": self.agent.replay.state_dict(),
                "env": self.env.state(), "log": self.log.positions(self.progress.step),
                "random": {"cpu": torch.get_rng_state()} | (
                    {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})}

    def save(self, wait=False):
        """FloatingPointError instead, if the run has broken: the checkpoints that there are stay."""
        self.check_health()
        # The current row is written in part: it is saved, and saved again with the next ones.
        first, rows = self.agent.replay.rows_since(max(0, self.checkpoints.next_row - 1))
        oldest = self.agent.replay.position + 1 - self.agent.replay.capacity
        self.checkpoints.save(self.progress.step, self.state(), first, rows, oldest, wait)

    def save_if_due(self):
        step = self.progress.step
        if step and step % self.args.save_every == 0 and step != self.checkpoints.step:  # else: just resumed from it
            self.save()

    def save_for_extension(self):
        """The last checkpoint, if it is to be kept: `train.py --extend` continues from it, before the final evaluation."""
        one, buffer = self.size()
        if self.args.keep_checkpoint == "on" or self.args.keep_checkpoint == "auto" and one + buffer <= KEPT_BYTES:
            self.kept = True
            self.save(wait=True)

    def check_health(self):
        """FloatingPointError if a loss or gradient was not finite. Waits for the device."""
        if fault := self.agent.nonfinite_report():
            raise FloatingPointError(f"{fault[0]} was not finite at agent step {self.args.learning_starts + fault[1]:,}; "
                                     f"stopped. All rows up to here are in {self.log.folder}")

    def finish(self):
        """`final.pt`: networks and masks, written last. It replaces the checkpoints, unless the last one is kept."""
        state = self.agent.state_dict()
        self.checkpoints.finish({"config": dataclasses.asdict(self.args), "step": self.progress.step,
                                 "networks": state["networks"], "tensors": state["tensors"],
                                 "masks": {name: sparse["masks"] for name, sparse in state["sparse"].items()}},
                                keep=self.kept and not self.checkpoints.failure)

    # ---- the way back ----

    def restore(self, differs=lambda config: ""):
        """Puts the newest whole checkpoint into all parts; returns the observation where the run stands, or None for a run
        that has none. Before anything is captured as a CUDA graph: a graph would hold on to the tensors of before.

        ValueError, in one line, for a checkpoint of another configuration or one that does not fit. Nothing on the disk is
        changed before all of it is read.
        """
        state = self.checkpoints.load()
        if state is None:
            self.log.start()
            return None
        where = f"the checkpoint of step {self.checkpoints.step:,} in {self.checkpoints.folder}"
        try:
            if difference := differs(state["config"]):
                raise ValueError(f"it belongs to another run: {difference}")
            self.agent.load_state_dict(state["agent"])
            self.agent.info = {current_name("train", name): value.to(self.device) for name, value in state["info"].items()}
            for first, rows in self.checkpoints.rows():
                self.agent.replay.load_rows(first, rows)
            self.agent.replay.load_state_dict(state["replay"])
            obs = self.env.restore(state["env"])
            self.progress = run = Progress(**state["progress"])
            run.action = None if run.action is None else np.array(run.action, np.float32)
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where} does not fit ({type(error).__name__}): {str(error).splitlines()[0]}") from None
        self.log.start(state["log"])
        return obs

    def size(self):
        """Bytes on the disk: (one checkpoint, the whole replay buffer)."""
        agent, replay = self.agent, self.agent.replay
        count = lambda modules: sum(p.numel() for module in modules.values() for p in module.parameters())
        masks = sum(mask.numel() for sparse in agent.sparse.values() for mask in sparse.masks.values())
        # Weights and two moments, targets, a byte a mask, and all priorities.
        one = 12 * count(agent.networks) + 4 * count(agent.targets) + masks + 8 * len(replay.priority)
        return one, replay.stored_bytes
