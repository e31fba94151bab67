"""A run can be stopped or killed at any moment, and resumes exactly.

Guarantees: `state` holds all of a run, including every random generator. On a CPU, a run resumed from it writes the
same CSV files as an uninterrupted one, byte for byte except for times. A signal to stop takes effect at the next safe
point: between two agent steps, between two encoder updates, or within an evaluation, which is then repeated.

    saved = SavedRun(Checkpoints(folder), args, device, agent, env, log)
    obs = saved.restore(differs)            # None for a new run; saved.progress says where the loop is
    saved.save_if_due()                     # between two steps; when StopSignals.check raises Stopped, call save

Not in the paper. `checkpoint.py` writes and reads the files; this file decides what they contain and when.
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
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGUSR1: the usual choice for SLURM's warning


class Stopped(Exception):
    """A signal asked the run to stop. Raised only at a safe point."""


class StopSignals:
    """Records a signal to stop; `check` raises Stopped at the next safe point. A second Ctrl-C exits unsaved."""

    def __init__(self):
        self.name = None
        for name in SIGNALS:
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # respect nohup
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number, _):
        if number == signal.SIGINT and self.name:
            os.write(2, b"\ntrain.py: stopped at once, without saving; --resume continues from the last checkpoint\n")
            os._exit(1)
        self.name = self.name or signal.Signals(number).name

    def check(self):
        if self.name:
            raise Stopped(self.name)


@dataclasses.dataclass
class Progress:
    """The state of the training loop."""
    step: int = 0  # completed agent steps
    action: np.ndarray | None = None  # of step `step`, if already chosen: the run was stopped during that step's update
    episode_return: float = 0.0  # of the current episode so far
    last_return: float = math.nan  # of the last complete one
    logged_step: int = 0  # where the last row of train.csv was written
    logged_seconds: float = 0.0
    discarded: int = 0  # steps that the simulator could not finish
    seconds: float = 0.0  # duration of the run, over all its processes


class SavedRun:
    """All parts of a run: what a checkpoint holds, when it is written, and how it is restored."""

    def __init__(self, checkpoints, args, device, agent, env, log):
        self.checkpoints, self.args, self.device = checkpoints, args, device
        self.agent, self.env, self.log = agent, env, log
        self.progress, self._began, self.kept = Progress(), time.time(), False

    def seconds(self):
        """Duration of the run, over all its processes."""
        return self.progress.seconds + time.time() - self._began

    # ---- saving ----

    def state(self):
        """All of the run except the rows of its replay buffer: live tensors and plain values."""
        run = dataclasses.asdict(self.progress) | {"seconds": self.seconds()}
        run["action"] = None if run["action"] is None else run["action"].tolist()
        return {"config": dataclasses.asdict(self.args), "progress": run, "agent": self.agent.state_dict(),
                "info": dict(self.agent.info), "replay": self.agent.replay.state_dict(),
                "env": self.env.state(), "log": self.log.positions(self.progress.step),
                "random": {"cpu": torch.get_rng_state()} | (
                    {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})}

    def save(self, wait=False):
        """FloatingPointError, before anything is written, if a loss or gradient was not finite."""
        self.check_health()
        # The current row is incomplete: it is saved now, and again with the next rows.
        first, rows = self.agent.replay.rows_since(max(0, self.checkpoints.next_row - 1))
        oldest = self.agent.replay.position + 1 - self.agent.replay.capacity
        self.checkpoints.save(self.progress.step, self.state(), first, rows, oldest, wait)

    def save_if_due(self):
        step = self.progress.step
        if step and step % self.args.save_every == 0 and step != self.checkpoints.step:  # not just resumed from it
            self.save()

    def save_for_extension(self):
        """Keeps the last checkpoint, if wanted: `train.py --extend` continues from it."""
        one, buffer = self.size()
        if self.args.keep_checkpoint == "on" or self.args.keep_checkpoint == "auto" and one + buffer <= KEPT_BYTES:
            self.kept = True
            self.save(wait=True)

    def check_health(self):
        """FloatingPointError if a loss or gradient was not finite. Waits for the device."""
        if fault := self.agent.nonfinite_report():
            what, step = fault[0], self.args.learning_starts + fault[1]
            raise FloatingPointError(f"{what} was not finite at agent step {step:,}; stopped. "
                                     f"All rows up to here are in {self.log.folder}")

    def finish(self):
        """`final.pt`: networks and masks, written last. It replaces the checkpoints, unless the last one is kept."""
        state = self.agent.state_dict()
        self.checkpoints.finish({"config": dataclasses.asdict(self.args), "step": self.progress.step,
                                 "networks": state["networks"], "tensors": state["tensors"],
                                 "masks": {name: sparse["masks"] for name, sparse in state["sparse"].items()}},
                                keep=self.kept and not self.checkpoints.failure)

    # ---- restoring ----

    def restore(self, differs=lambda config: ""):
        """Loads the newest whole checkpoint into all parts. Returns the current observation, or None without one.

        Call it before capturing CUDA graphs, which keep the tensors they were captured with. ValueError, in one line,
        for a checkpoint of other settings or one that does not fit. Nothing on disk changes before all of it is read.
        """
        state = self.checkpoints.load()
        if state is None:
            self.log.start()
            return None
        where = f"the checkpoint of step {self.checkpoints.step:,} in {self.checkpoints.folder}"
        try:
            if difference := differs(state["config"]):
                raise ValueError(f"it belongs to another run: {difference}")
            if self.args.extend:  # the schedules follow the new length
                for sparse in state["agent"]["sparse"].values():
                    sparse.pop("schedule", None)
            self.agent.load_state_dict(state["agent"])
            self.agent.info = {current_name("train", name): value.to(self.device)
                               for name, value in state["info"].items()}
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
        masks = sum(mask.numel() for sparse in agent.sparse.values() for mask in (*sparse.masks.values(),
                                                                                  *sparse.first_masks.values()))
        # Weights and two moments, targets, one byte per mask entry, and all priorities.
        one = 12 * count(agent.networks) + 4 * count(agent.targets) + masks + 8 * len(replay.priority)
        return one, replay.stored_bytes
