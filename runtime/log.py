"""A run's folder: `config.json`, `eval.csv` and `train.csv`, flushed row by row; TensorBoard and W&B on request.

Guarantees: a run never overwrites another, and no two processes write one; a row is in the file when `write` returns,
and the file never holds part of a row; a full disk or a failing tracker stops nothing; rows written after a checkpoint
can be removed again, so that a resumed run continues the same table.

    log = RunLog("runs/walker-walk__seed=0", config={"seed": 0})
    log.start()
    log.write("eval", {"agent_step": 0, "env_frames": 0, "return": 31.5})
    where = log.positions()                                         # into a checkpoint
    log.write("eval", {"agent_step": 5000, "env_frames": 10000, "return": 71.5})
    log.close()                                                     # ... or a kill

    log = RunLog("runs/walker-walk__seed=0", config={"seed": 0}, resume=True)
    log.start(where)                                                # the second row is gone
"""

import csv
import errno
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two processes out of one folder
    fcntl = None

TABLES = ("eval", "train")

# Names of earlier versions: table -> (pattern of the whole old name, current name).
OLD_COLUMNS = {
    "eval": ((r"frames", "env_frames"), (r"([^/]+)/dormant(/.+)?", r"\1/dormant_ratio\2"),
             (r"([^/]+)/interference(_negative)?", r"\1/grad_cosine\2"), (r"([^/]+)/gradient_norm", r"\1/grad_norm"),
             (r"([^/]+)/srank_(.+)_cap", r"\1/srank_\2_max")),
    "train": ((r"frames", "env_frames"), (r"([^/]+)_density", r"\1/density"),
              (r"([^/]+)_grad_norm", r"\1/grad_norm"))}


def current_name(table, column):
    """The current name of a column of `<table>.csv` of any version. Current and unknown names do not change."""
    for pattern, name in OLD_COLUMNS[table]:
        if match := re.fullmatch(pattern, column):
            return match.expand(name)
    return column


class RunLocked(Exception):
    """Another process is writing this run."""


class RunFinished(Exception):
    """The run is complete: nothing is left to continue."""


class RunLog:
    """Makes the folder and writes into it.

    resume: use the folder if it exists. Every row of a table must have the columns of its first row.
    tensorboard: also write event files into the folder. wandb_project: also send rows to this Weights & Biases project;
    WANDB_MODE=offline, WANDB_DIR, WANDB_RUN_GROUP and WANDB_TAGS work as usual. Both are imported only on request.

    FileExistsError if the folder exists, RunFinished if its run is complete, RunLocked if another process writes it;
    OSError if it cannot be written; ImportError or ValueError, before it is made, if a tracker is not installed or W&B
    has no API key. `failures`: a line for each table or tracker that cannot be written now. A table's rows are kept and
    written later; a tracker that fails is dropped.
    """

    def __init__(self, folder, config, tensorboard=False, wandb_project=None, resume=False):
        self._tensorboard = _import("torch.utils.tensorboard", "tensorboard") if tensorboard else None
        self._wandb = _import("wandb", "wandb") if wandb_project else None
        if self._wandb:
            check_wandb(self._wandb)
        self.folder, self.config, self.project = folder, config, wandb_project
        self.tables, self.tensorboard, self.wandb, self._tracker_failures = {}, None, None, []
        try:
            os.makedirs(folder, exist_ok=resume)
        except FileExistsError:
            raise FileExistsError(f"{folder} exists: a run never overwrites another; continue it with --resume, choose "
                                  "another --name, or move it away") from None
        except OSError as error:
            raise OSError(f"{folder} cannot be made ({error.strerror}): set another folder with --runs") from None
        self._lock = lock(os.path.join(folder, "lock"))
        if os.path.exists(os.path.join(folder, "final.pt")):  # checked again now that no other process can write it
            raise RunFinished(folder)
        if not os.path.exists(os.path.join(folder, "config.json")):
            self._write_config(resume)

    def _write_config(self, resume):
        path = os.path.join(self.folder, "config.json")
        try:
            with open(f"{path}.part", "w") as file:
                json.dump(self.config, file, indent=2)
                file.write("\n")
            os.replace(f"{path}.part", path)
        except OSError as error:
            if not resume:  # a folder without a config would only be in the way of the next attempt
                for name in os.listdir(self.folder):
                    os.remove(os.path.join(self.folder, name))
                os.rmdir(self.folder)
            raise OSError(f"{path} cannot be written ({error.strerror})") from None

    def start(self, positions=None):
        """Before the first row: restores the tables to `positions`, or to nothing.

        ValueError, before any file changes, if a table has lost rows that it had at that time.
        """
        positions = positions or {}
        kept = {name: kept_part(self._path(name), positions[name]["end"]) for name in TABLES if name in positions}
        for name in TABLES:
            path = self._path(name)
            if name in kept:
                if kept[name] is not None:
                    with open(f"{path}.part", "wb") as file:
                        file.write(kept[name])
                    os.replace(f"{path}.part", path)
                self.tables[name] = self._open(name, **positions[name])
            elif os.path.exists(path):
                os.remove(path)
        if self._tensorboard:
            self._track("tensorboard", lambda: self._start_tensorboard(positions.get("step") or 0))
        if self._wandb:
            self._track("wandb", lambda: self._start_wandb(positions.get("wandb")))

    def _start_tensorboard(self, step):
        self.tensorboard = EventFile(self.folder, step)
        self.tensorboard.write(step, self._tensorboard.summary.hparams(_flat(self.config), {"eval/return": 0}))

    def _start_wandb(self, run_id):
        """Agent steps are the x axis of both tables. Runs that differ only in their seed form a group."""
        name = os.path.basename(os.path.normpath(self.folder))
        own = {"dir": ("WANDB_DIR", self.folder), "group": ("WANDB_RUN_GROUP", re.sub("__seed=[0-9]+$", "", name)),
               "tags": ("WANDB_TAGS", [self.config[key] for key in ("algo", "env") if key in self.config])}
        own = {key: value for key, (variable, value) in own.items() if variable not in os.environ}
        again = {"id": run_id, "resume": "allow"} if run_id else {}
        self.wandb = self._wandb.init(project=self.project, name=name, config=self.config, **own, **again)
        self.wandb.define_metric("agent_step")
        self.wandb.define_metric("*", step_metric="agent_step")

    def write(self, table, row):
        """One row of `<table>.csv`; the first one sets the columns. A row has its `agent_step`."""
        if table not in self.tables:
            self.tables[table] = self._open(table)
        self.tables[table].write(row)
        numbers = {f"{table}/{name}": value for name, value in row.items()
                   if name != "agent_step" and not isinstance(value, str)}
        if self.tensorboard:
            scalar = self._tensorboard.summary.scalar
            self._track("tensorboard", lambda: self.tensorboard.write(
                row["agent_step"], [scalar(name, value) for name, value in numbers.items()]))
        if self.wandb:
            self._track("wandb", lambda: self.wandb.log(numbers | {"agent_step": row["agent_step"]}))

    def _track(self, name, call):
        """An error of a tracker ends the tracker, not the run."""
        try:
            call()
        except Exception as error:  # each has its own kinds
            setattr(self, name, None)
            line = next(iter(str(error).splitlines()), "")
            self._tracker_failures.append(f"{name} failed ({type(error).__name__}: {line}) and is off from here on")

    @property
    def failures(self):
        return [*self._tracker_failures, *(table.failure for table in self.tables.values() if table.failure)]

    def positions(self, step=None):
        """Where each table stands, as plain values for `start`. Everything they refer to is on the disk or in them."""
        return {name: table.position() for name, table in self.tables.items()} | {"step": step} | (
            {"wandb": self.wandb.id} if self.wandb else {})

    def _open(self, table, **position):
        return Table(self._path(table), lambda column: current_name(table, column), **position)

    def _path(self, table):
        return os.path.join(self.folder, f"{table}.csv")

    def close(self):
        """OSError if the disk has still not taken all rows."""
        if self.tensorboard:
            self._track("tensorboard", self.tensorboard.file.close)
        if self.wandb:
            self._track("wandb", self.wandb.finish)
        for table in self.tables.values():
            table.close()


class EventFile:
    """TensorBoard's event file, written in the caller's thread: SummaryWriter's own thread ends at a full disk, and the
    next call then waits for it forever."""

    def __init__(self, folder, step):
        """step: where the run starts. What other files have after it is dropped: a resumed run writes that again."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        self.Event = event_pb2.Event
        name = f"events.out.tfevents.{int(time.time()):010}.{platform.node()}.{os.getpid()}"
        self.file = open(os.path.join(folder, name), "ab")
        self.records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step, summaries):
        for summary in summaries:
            self._add(step=step, summary=summary)
        self.file.flush()

    def _add(self, **event):
        self.records.write(self.Event(wall_time=time.time(), **event).SerializeToString())


class Table:
    """One CSV file of whole rows. Rows that are not certain to be on the disk are also kept in memory."""

    def __init__(self, path, rename=str, end=0, waiting=""):
        """end: bytes of the file that stay. waiting: rows after them, not yet written. rename: a column of the file's
        header -> the column of a row: a run keeps the header that it started with."""
        self.file, self.name = open(path, "r+b" if end else "wb", buffering=0), os.path.basename(path)
        # The file is certain up to `synced`; `kept` follows it, of which `written` bytes are in the file.
        self.synced, self.kept, self.written, self.failure = end, waiting.encode(), 0, None
        header = self.file.readline() if end else self.kept.split(b"\r\n")[0]
        self.continued = bool(header)
        self.columns = [rename(column) for column in next(csv.reader([header.decode()]))] if header else None
        self.file.truncate(end)
        self.file.seek(end)

    def write(self, row):
        if self.columns is None:
            self.columns = list(row)
            self.kept += _line(self.columns)
        if self.continued:  # columns that are newer than the run's header are not written
            row = {name: value for name, value in row.items() if name in self.columns}
        if row.keys() != set(self.columns):
            raise ValueError(f"a row must have the columns {', '.join(self.columns)}, not {', '.join(row)}")
        values = [row[name] for name in self.columns]
        self.kept += _line([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        self.flush()

    def flush(self):
        """Writes what is not in the file. Returns whether it is all there; `failure` says why not."""
        rest = self.kept[self.written:]
        try:
            if self.file.write(rest) < len(rest):  # the disk took a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.failure = f"{self.name} cannot be written ({error.strerror}): its rows are kept and written later"
            self.file.truncate(self.synced + self.written)  # never part of a row
            self.file.seek(self.synced + self.written)
            return False
        self.written, self.failure = len(self.kept), None
        return True

    def position(self):
        """`end` and `waiting` of a table that starts here."""
        try:
            os.fsync(self.file.fileno())
            self.synced, self.kept, self.written = self.synced + self.written, self.kept[self.written:], 0
        except OSError as error:  # such as a quota, on a network disk
            self.failure = f"{self.name} may be incomplete on the disk ({error.strerror}): its last rows are kept"
        return {"end": self.synced, "waiting": self.kept.decode()}

    def close(self):
        if not self.flush():
            raise OSError(self.failure)
        self.file.close()


def kept_part(path, end):
    """The first `end` bytes that were written to this CSV, if the file has them in another form: an editor or git may
    have changed its line ends. None if it has them as written. ValueError if rows are lost or changed."""
    content = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            content = file.read()
    rows = re.sub(rb"\r\n|\r|\n", b"\r\n", content)
    if end > len(rows):
        raise ValueError(f"{path} has {len(rows)} bytes, not the {end} of the checkpoint's time: rows are missing")
    if end and not rows[:end].endswith(b"\r\n"):
        raise ValueError(f"{path} has other rows than when the checkpoint was written: byte {end} is within a row")
    return None if content[:end] == rows[:end] else rows[:end]


def _line(values):
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue().encode()


def _flat(config, prefix=""):
    """{"modules": {"critic": {"regime": "dst"}}} -> {"modules.critic.regime": "dst"}: values that TensorBoard takes."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def lock(path):
    """An open file that no other process can lock until it is closed. RunLocked if another one has it."""
    try:
        file = open(path, "w")
    except OSError as error:
        raise OSError(f"{os.path.dirname(path)} cannot be written ({error.strerror})") from None
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(f"{os.path.dirname(path)} is being trained by another process") from None
        except OSError as error:  # some cluster file systems have no locks
            print(f"note: {path} cannot be locked ({error.strerror}): make sure that only one process trains this run")
    return file


RECORDED_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "CUDA_", "CUBLAS_", "TORCH_", "SLURM_JOB_ID")


def provenance():
    """What config.json needs besides the flags to repeat a run: command line, commit, versions, processor."""
    here = os.path.dirname(os.path.abspath(__file__))
    return {"command": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "commit": _commit(here),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in (
                "torch", "numpy", "dm_control", "mujoco", "gymnasium")},
            "system": platform.platform(), "processor": _processor(), "cores": os.cpu_count(),
            "environment": {name: value for name, value in sorted(os.environ.items())
                            if name.startswith(RECORDED_VARIABLES)}}


def _commit(folder):
    """The commit of this code, with "+changes" if a file differs from it; None without git or a repository."""
    try:
        git = lambda *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True,
                                            timeout=10).stdout.strip()
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line for line in file if line.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor()


def _import(module, package):
    try:
        found = __import__(module, fromlist=["_"])
        if hasattr(found, "__path__") and not getattr(found, "__file__", None):  # only a folder of this name
            raise ImportError
        return found
    except ImportError:
        raise ImportError(f"{package} is not installed: pip install {package}, or drop the flag") from None


def check_wandb(wandb):
    """ValueError, in one line, if W&B would have to ask for an API key, or refuses it."""
    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        raise ValueError(f"--wandb-project: {str(error).splitlines()[0]}; WANDB_MODE=offline needs no login") from None
    if not known:
        raise ValueError("--wandb-project: W&B has no API key: run `wandb login`, or set WANDB_API_KEY or "
                         "WANDB_MODE=offline")
