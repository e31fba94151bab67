"""Files that hold a run: written whole or not at all, checked when read, and cheap however large the replay buffer is.

What it claims: a kill or a full disk while saving leaves the previous checkpoint as it was; a file that is cut short, has
a bit flipped, or holds anything but tensors and plain values is refused in one line, and nothing in it is run; and of a
buffer only the rows that are new since the last save are written.

Not in the paper: its largest runs take a day on machines that get taken away. This file needs torch and numpy; copy it into
your project.

    import os, tempfile
    import torch
    from runtime.checkpoint import Checkpoints

    model = torch.nn.Linear(4, 1)
    rows = torch.randn(1000, 4)                                         # a log that grows: rows 0 to 999 so far
    checkpoints = Checkpoints(tempfile.mkdtemp())
    checkpoints.save(1, {"model": model.state_dict()}, first=0, rows={"x": rows})
    rows = torch.cat([rows, torch.randn(500, 4)])
    checkpoints.save(2, {"model": model.state_dict()}, first=checkpoints.next_row, rows={"x": rows[1000:]}, wait=True)

    found = Checkpoints(checkpoints.folder)                             # in another process, after a kill
    state = found.load()                                                # of the newest that reads whole
    model.load_state_dict(state["model"])
    for first, part in found.rows():
        print(found.step, first, part["x"].shape)                       # 2 0 (1000, 4), then 2 1000 (500, 4)

A file is `torch.save`'s, so that `torch.load(path, weights_only=True)["content"]` reads it anywhere. PyTorch itself would not
notice a flipped bit: beside the content stands its SHA-256.
"""

import hashlib
import os
import threading

import torch

FORMAT = 1  # of the files: one of another number is refused


class CorruptCheckpoint(ValueError):
    """A file that is not what was written, or was written by another version."""


# ---- one file ----

def write(path, content):
    """Tensors and plain values into a file that is there whole or not at all. Returns the SHA-256 of the content."""
    beside, check = f"{path}.part", digest(content)
    try:
        with open(beside, "wb") as file:
            torch.save({"format": FORMAT, "sha256": check, "content": content}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name is: a power cut must not leave an empty file
        os.replace(beside, path)
        sync_folder(os.path.dirname(path))
    except (OSError, RuntimeError) as error:  # a full disk, which PyTorch's writer reports as it likes
        if os.path.exists(beside):
            os.remove(beside)
        if isinstance(error, OSError):
            raise
        raise OSError("PyTorch's writer failed: is the disk full?") from None
    return check


def read(path):
    """(content, SHA-256 of it). CorruptCheckpoint, in one line, for anything but a whole file of this format."""
    with open(path, "rb") as file:
        try:
            whole = torch.load(file, map_location="cpu", weights_only=True)  # tensors and plain values; runs no code
        except Exception as error:  # zip, pickle and PyTorch each have errors of their own for a broken file
            raise CorruptCheckpoint(f"{path} is damaged, or no checkpoint ({type(error).__name__})") from None
    if not isinstance(whole, dict) or not whole.keys() >= {"format", "sha256", "content"}:
        raise CorruptCheckpoint(f"{path} is no checkpoint of this code")
    if not isinstance(whole["format"], int) or whole["format"] != FORMAT:
        raise CorruptCheckpoint(f"{path} is a checkpoint of format {whole['format']!r}, and this code reads format {FORMAT}")
    try:
        check = digest(whole["content"])
    except Exception:  # a type that is never written, or a tensor that is no plain one
        check = None
    if check is None or not isinstance(whole["sha256"], str) or check != whole["sha256"]:
        raise CorruptCheckpoint(f"{path} is damaged: its content is not what was written")
    return whole["content"], check


def digest(content):
    """SHA-256 of nested dicts, lists, tuples, tensors and plain values. TypeError for anything else."""
    sha = hashlib.sha256()

    def feed(value):
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}:".encode())
            # The bytes as they lie in memory; `view` reads a scalar or a bool only through a flat tensor.
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            sha.update(f"dict {len(value)}:".encode())
            for key, item in value.items():
                feed(key), feed(item)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{type(value).__name__} {len(value)}:".encode())
            for item in value:
                feed(item)
        elif value is None or isinstance(value, (bool, int, float, str)):
            text = repr(value)
            sha.update(f"{type(value).__name__} {len(text)}:{text}".encode())
        else:
            raise TypeError(f"a checkpoint holds tensors and plain values, not a {type(value).__name__}")
    feed(content)
    return sha.hexdigest()


def copy_to_cpu(content):
    """A copy of the content in host memory, which training may go on without. From CUDA through pinned memory, waiting
    once for all of it."""
    devices = set()

    def copy(value):
        if isinstance(value, torch.Tensor):
            if value.device.type != "cuda":
                return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            devices.add(value.device)
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return host.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return type(value)(copy(item) for item in value) if isinstance(value, (list, tuple)) else value
    content = copy(content)
    for device in devices:
        torch.cuda.synchronize(device)
    return content


def sync_folder(folder):
    """A renamed file's new name is on the disk only when its folder is."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- a run's files ----

class Checkpoints:
    """The newest two checkpoints of a run, and the parts of a growing log that they need.

    A checkpoint is `checkpoint-<step>.pt`: a state, and which `rows-<first>-<end>.pt` belong to it. Rows are counted
    from the run's start and never anew, so a ring buffer's parts keep their meaning as it goes round. What is no longer
    needed goes only when a new checkpoint is on the disk.

    A save copies to host memory and writes in a thread. Of one that failed, `failure` tells afterwards: one line, or None.
    """

    def __init__(self, folder):
        self.folder = folder
        self.step = None  # of the newest checkpoint that is on the disk
        self.next_row = 0  # the first row that no part holds
        self.parts = []  # [file, first, end, sha256] of what the newest checkpoint needs
        self.older = []  # files that the one before it needs, itself included
        self.failure, self._thread = None, None

    def save(self, step, state, first=0, rows=None, oldest=0, wait=False):
        """rows: name -> tensor of the rows first, first + 1, ...; may overlap what was saved before, and replaces it.
        oldest: rows before this one are needed no longer. wait: return only when all is on the disk."""
        self.wait()
        content = copy_to_cpu({"state": state, "rows": rows or {}})
        self._thread = threading.Thread(target=self._write, args=(step, content["state"], first, content["rows"], oldest))
        self._thread.start()
        if wait:
            self.wait()

    def wait(self):
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step, state, first, rows, oldest):
        try:
            parts = [part for part in self.parts if part[2] > oldest]
            end = first + (len(next(iter(rows.values()))) if rows else 0)
            if end > first:
                name = f"rows-{first:012}-{end:012}.pt"
                parts = [*parts, [name, first, end, write(os.path.join(self.folder, name), {"first": first, "rows": rows})]]
            name = f"checkpoint-{step:012}.pt"
            write(os.path.join(self.folder, name), {"step": step, "state": state, "parts": parts, "next_row": end})
        except OSError as error:
            self.failure = f"the checkpoint of step {step:,} could not be written ({error.strerror or error})"
            return
        needed = [name, *(part[0] for part in parts)]
        self._remove_all_but({*needed, *self.older})
        self.step, self.next_row, self.parts, self.older, self.failure = step, end, parts, needed, None

    def load(self):
        """The state of the newest checkpoint that reads whole, or None if there is no file at all. CorruptCheckpoint, naming the
        newest, if there are files and none reads whole. `skipped` then says what was wrong with newer ones."""
        self.skipped = []
        for name in sorted(_ours(self.folder, "checkpoint-", ".pt"), reverse=True):
            try:
                content, _ = read(os.path.join(self.folder, name))
                for part in content["parts"]:
                    self._read_part(part)  # all of it is read before any of it is used
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                self.skipped.append(str(error) if isinstance(error, (CorruptCheckpoint, OSError)) else f"{name} is no checkpoint of a run")
                continue
            self.step, self.next_row, self.parts = content["step"], content["next_row"], content["parts"]
            self.older = [name, *(part[0] for part in self.parts)]
            return content["state"]
        if self.skipped:
            raise CorruptCheckpoint(f"{self.skipped[0]}; no other checkpoint of this run is left whole")
        return None

    def rows(self):
        """(first row, name -> tensor) of each part that the loaded checkpoint needs, the oldest first."""
        for part in self.parts:
            yield part[1], self._read_part(part)

    def _read_part(self, part):
        name, first, _, expected = part
        content, check = read(os.path.join(self.folder, name))
        if check != expected:
            raise CorruptCheckpoint(f"{os.path.join(self.folder, name)} belongs to another checkpoint")
        return content["rows"]

    def last(self):
        """The newest checkpoint that is on the disk, in words."""
        self.wait()
        return "none" if self.step is None else f"of step {self.step:,}"

    def finish(self, state, keep=False):
        """The run is done: `final.pt`, and when that is on the disk no other file is needed. OSError if it cannot be.
        keep: the newest checkpoint stays."""
        self.wait()
        write(os.path.join(self.folder, "final.pt"), copy_to_cpu(state))
        self._remove_all_but(set(self.older) if keep else set())

    def _remove_all_but(self, needed):
        for name in _ours(self.folder, ("checkpoint-", "rows-"), (".pt", ".pt.part")):
            if name not in needed:
                os.remove(os.path.join(self.folder, name))


def _ours(folder, start, end):
    return [name for name in os.listdir(folder) if name.startswith(start) and name.endswith(end)]
