"""A run's folder: `config.json`, `eval.csv` and `train.csv`, flushed row by row; TensorBoard and W&B only if asked for.

What it claims: a run never overwrites another, and no two processes write one; what was written is on disk when the next
line of the program runs, in whole rows; a full disk stops nothing; and rows written after a checkpoint can be taken back.

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
from importlib.metadata import PackageNotFoundError, version

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes from one folder
    fcntl = None

TABLES = ("eval", "train")

# What earlier versions called a column: table -> (pattern of the whole old name, today's name).
OLD_COLUMNS = {
    "eval": ((r"frames", "env_frames"), (r"([^/]+)/dormant(/.+)?", r"\1/dormant_ratio\2"),
             (r"([^/]+)/interference(_negative)?", r"\1/grad_cosine\2"), (r"([^/]+)/gradient_norm", r"\1/grad_norm"),
             (r"([^/]+)/srank_(.+)_cap", r"\1/srank_\2_max")),
    "train": ((r"frames", "env_frames"), (r"([^/]+)_density", r"\1/density"), (r"([^/]+)_grad_norm", r"\1/grad_norm"))}


def current_name(table, column):
    """Today's name of a column of `<table>.csv`, whichever version wrote it; a current or unknown name comes back unchanged."""
    for pattern, name in OLD_COLUMNS[table]:
        if match := re.fullmatch(pattern, column):
            return match.expand(name)
    return column


class RunLocked(Exception):
    """Another process is writing this run."""


class RunFinished(Exception):
    """The run has ended, and there is nothing to continue."""


class RunLog:
    """Makes the folder (FileExistsError, in one line, if it is there already) and writes into it.

    resume: take the folder as it is, if it is there; RunFinished if its run has ended. RunLocked if another process holds it.
    Every row of a table must have the columns of its first row. tensorboard: write event files into the folder as well.
    wandb_project: also send rows to Weights & Biases under that project. Both are imported only then.
    `failure` is one line while the disk does not take the rows, which are kept and written with the next ones; else None.
    """

    def __init__(self, folder, config, tensorboard=False, wandb_project=None, resume=False):
        self._tensorboard = _import("torch.utils.tensorboard", "tensorboard") if tensorboard else None
        self._wandb = _import("wandb", "wandb") if wandb_project else None
        self.folder, self.config, self.project = folder, config, wandb_project
        self.tables, self.failure, self.tensorboard, self.wandb = {}, None, None, None
        try:
            os.makedirs(folder, exist_ok=resume)
        except FileExistsError:
            raise FileExistsError(f"{folder} exists: a run never overwrites another; continue it by --resume, choose "
                                  "another --name, or move it away") from None
        self._lock = lock(os.path.join(folder, "lock"))
        if os.path.exists(os.path.join(folder, "final.pt")):  # asked again now that nobody else can be writing it
            raise RunFinished(folder)
        if not os.path.exists(os.path.join(folder, "config.json")):
            with open(os.path.join(folder, "config.json.part"), "w") as file:
                json.dump(config, file, indent=2)
                file.write("\n")
            os.replace(os.path.join(folder, "config.json.part"), os.path.join(folder, "config.json"))

    def start(self, positions=None):
        """Before the first row: puts the tables back to where they stood in `positions`, or to nothing.

        ValueError, before anything is changed, if a table has lost rows that it held then.
        """
        positions = positions or {}
        for name in TABLES:
            path, end = self._path(name), positions.get(name, {"end": 0})["end"]
            if end > (size := os.path.getsize(path) if os.path.exists(path) else 0):
                raise ValueError(f"{path} has {size} bytes, and had {end} when the checkpoint was written: rows are missing")
        for name in TABLES:
            if name in positions:
                self.tables[name] = self._open(name, **positions[name])
            elif os.path.exists(self._path(name)):
                os.remove(self._path(name))
        if self._tensorboard:
            self.tensorboard = self._tensorboard.SummaryWriter(self.folder, purge_step=positions.get("step"))
        if self._wandb:
            self.wandb, again = self._wandb, {"id": positions["wandb"], "resume": "allow"} if "wandb" in positions else {}
            self.wandb.init(project=self.project, name=os.path.basename(self.folder), config=self.config, dir=self.folder,
                            **again)

    def write(self, table, row):
        """One row of `<table>.csv`; the first one sets the columns."""
        if table not in self.tables:
            self.tables[table] = self._open(table)
        try:
            self.tables[table].write(row)
            self.failure = None
        except OSError as error:
            self.failure = f"{table}.csv takes no more rows ({error.strerror}): they are kept, and written when it does"
        numbers = {f"{table}/{name}": value for name, value in row.items() if not isinstance(value, str)}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["agent_step"])
        if self.wandb:
            self.wandb.log(numbers)

    def positions(self, step=None):
        """How far each table has come, as plain values, for `start`. What they speak of is on the disk then."""
        return {name: table.position() for name, table in self.tables.items()} | {"step": step} | (
            {"wandb": self.wandb.run.id} if self.wandb else {})

    def _open(self, table, **position):
        return Table(self._path(table), lambda column: current_name(table, column), **position)

    def _path(self, table):
        return os.path.join(self.folder, f"{table}.csv")

    def close(self):
        """OSError if there are rows that the disk has still not taken."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        for table in self.tables.values():
            table.close()


class Table:
    """One CSV file that holds whole rows only: what the disk does not take is kept, for the next attempt."""

    def __init__(self, path, rename=str, end=0, waiting=""):
        """end: bytes already in the file that stay. waiting: rows that were kept. rename: a column of the file's header ->
        the column of a row that continues it: a run keeps the header that it started with."""
        self.file = open(path, "r+b" if end else "wb", buffering=0)
        header = next(csv.reader([self.file.readline().decode()])) if end else None
        self.columns = header and [rename(column) for column in header]
        self.waiting = waiting.encode()
        self.file.truncate(end)
        self.file.seek(end)

    def write(self, row):
        if self.columns is None:
            self.columns = list(row)
            self.waiting += _line(self.columns)
        if row.keys() != set(self.columns):
            raise ValueError(f"a row must have the columns {', '.join(self.columns)}, not {', '.join(row)}")
        values = [row[name] for name in self.columns]
        self.waiting += _line([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        self.flush()

    def flush(self):
        end = self.file.tell()
        try:
            if self.file.write(self.waiting) < len(self.waiting):  # the disk took a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.file.truncate(end)  # never half a row
            self.file.seek(end)
            raise
        self.waiting = b""

    def position(self):
        os.fsync(self.file.fileno())
        return {"end": self.file.tell(), "waiting": self.waiting.decode()}

    def close(self):
        self.flush()
        self.file.close()


def _line(values):
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue().encode()


def lock(path):
    """An open file that no other process can lock before this one closes it or ends; RunLocked if one holds it."""
    file = open(path, "w")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(f"{os.path.dirname(path)} is being trained by another process") from None
        except OSError as error:  # some cluster file systems have no locks
            print(f"note: {path} cannot be locked ({error.strerror}): see to it yourself that no two processes train one run")
    return file


def provenance():
    """What a run's config.json needs beside the flags to repeat it: command line, commit, versions, processor."""
    here = os.path.dirname(os.path.abspath(__file__))
    return {"command": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "commit": _commit(here),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in (
                "torch", "numpy", "dm_control", "mujoco")},
            "system": platform.platform(), "processor": _processor(), "cores": os.cpu_count(),
            "environment": {name: value for name, value in sorted(os.environ.items())
                            if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "CUDA_", "CUBLAS_", "TORCH_",
                                                "SLURM_JOB_ID"))}}


def _commit(folder):
    """The commit of this code, "+changes" where a file of it differs; None without git or a repository."""
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
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise ImportError(f"{package} is not installed: pip install {package}, or leave its flag away") from None
