"""Files that hold a run: complete or absent, verified when written and when read.

Guarantees: a kill or a full disk during a save leaves the previous checkpoint intact; a file is read back before it
replaces another one; a file that is truncated, has a flipped bit, or holds anything but tensors and plain values is
refused in one line, and no code in it runs; a save writes only the buffer rows that are new since the last one.

Not in the paper: its largest runs take a day, on machines that may be taken away.
This file needs only torch; copy it into your project.

    import tempfile
    import torch
    from runtime.checkpoint import Checkpoints

    model = torch.nn.Linear(4, 1)
    rows = torch.randn(1000, 4)                                         # a log that grows: rows 0 to 999 so far
    checkpoints = Checkpoints(tempfile.mkdtemp())
    checkpoints.save(1, {"model": model.state_dict()}, first=0, rows={"x": rows})
    rows = torch.cat([rows, torch.randn(500, 4)])
    checkpoints.save(2, {"model": model.state_dict()}, first=checkpoints.next_row, rows={"x": rows[1000:]}, wait=True)

    found = Checkpoints(checkpoints.folder)                             # in another process, after a kill
    state = found.load()                                                # of the newest intact checkpoint
    model.load_state_dict(state["model"])
    for first, part in found.rows():
        print(found.step, first, part["x"].shape)                       # 2 0 (1000, 4), then 2 1000 (500, 4)

Files are in `torch.save`'s format: `torch.load(path, weights_only=True)["content"]` reads them anywhere. PyTorch would
not notice a flipped bit, so a SHA-256 of the content is stored with it.
"""

import contextlib
import errno
import hashlib
import os
import threading
from collections import OrderedDict

import torch

FORMAT = 1  # of the files; files of another format are refused
PLAIN = (type(None), bool, int, float, str)
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class CorruptCheckpoint(ValueError):
    """A file that differs from what was written, or that another version wrote."""


# ---- one file ----

def write(path, content):
    """Writes tensors and plain values to a file that is complete or absent. Returns the SHA-256 of the content.

    The new file is read back before it takes its name. OSError if it cannot be written, or reads back differently.
    """
    beside, check = f"{path}.part", digest(content)
    try:
        with open(beside, "wb") as file:
            torch.save({"format": FORMAT, "sha256": check, "content": content}, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file under the final name
        verify(beside, check)
        os.replace(beside, path)
        sync_folder(os.path.dirname(path))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(beside)
        if isinstance(error, RuntimeError):  # PyTorch's writer reports a full disk in its own ways
            raise OSError("PyTorch's writer failed: is the disk full?") from None
        raise
    return check


def verify(path, check):
    """OSError if the file does not read back as content with this SHA-256. It is mapped, to take no more memory."""
    for mmap in (True, False):  # some file systems cannot map files
        with contextlib.suppress(CorruptCheckpoint, OSError):
            if read(path, mmap)[1] == check:
                return
    raise OSError("the file does not read back as written")


def read(path, mmap=False):
    """(content, its SHA-256). CorruptCheckpoint, in one line, for anything but an intact file of this format."""
    with open(path, "rb") as file:
        try:  # weights_only: tensors and plain values; runs no code
            whole = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # zip, pickle and PyTorch each raise their own errors for a damaged file
            raise CorruptCheckpoint(f"{path} is damaged, or is not a checkpoint ({type(error).__name__})") from None
    if not isinstance(whole, dict) or not whole.keys() >= {"format", "sha256", "content"}:
        raise CorruptCheckpoint(f"{path} is not a checkpoint of this code")
    if not isinstance(whole["format"], int) or whole["format"] != FORMAT:
        raise CorruptCheckpoint(f"{path} has format {whole['format']!r}; this code reads format {FORMAT}")
    try:
        check = digest(whole["content"])
    except Exception:  # a type or a kind of tensor that is never written
        check = None
    if check is None or not isinstance(whole["sha256"], str) or check != whole["sha256"]:
        raise CorruptCheckpoint(f"{path} is damaged: its content is not what was written")
    return whole["content"], check


def kind(value, where="the content"):
    """torch.Tensor, dict, list, tuple or None (a plain value), by exact type. TypeError, naming the place, otherwise.

    A subclass of a plain type (numpy.float64, an enum of strings) can be written, but the safe reader refuses it.
    """
    if type(value) in PLAIN:
        return None
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta:
        return torch.Tensor
    if type(value) in (dict, OrderedDict, list, tuple):
        return dict if type(value) is OrderedDict else type(value)
    raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds dense "
                    "tensors, dicts, lists, tuples, None, bool, int, float and str, and no subclasses of them")


def digest(content):
    """SHA-256 of nested dicts, lists, tuples, tensors and plain values. TypeError for anything else."""
    sha = hashlib.sha256()

    def feed(value, where):
        form = kind(value, where)
        if form is torch.Tensor:
            sha.update(f"{value.dtype} {tuple(value.shape)}:".encode())
            # The bytes in memory. `view` reads a scalar or a bool only through a flat tensor.
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif form is dict:
            sha.update(f"dict {len(value)}:".encode())
            for key, item in value.items():
                feed(key, f"a key of {where}"), feed(item, f"{where}[{key!r}]")
        elif form:
            sha.update(f"{form.__name__} {len(value)}:".encode())
            for place, item in enumerate(value):
                feed(item, f"{where}[{place}]")
        else:
            text = repr(value)
            sha.update(f"{type(value).__name__} {len(text)}:{text}".encode())
    feed(content, "the content")
    return sha.hexdigest()


def copy_to_cpu(content, where="the content"):
    """A copy in host memory that later training does not change; TypeError for what a file cannot hold. From CUDA
    through pinned memory, with one synchronization for all of it."""
    devices = set()

    def copy(value, where):
        form = kind(value, where)
        if form is torch.Tensor:
            if value.device.type != "cuda":
                return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            devices.add(value.device)
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return host.copy_(value.detach(), non_blocking=True)
        if form is dict:
            for key in value:
                if kind(key, f"a key of {where}"):
                    raise TypeError(f"a key of {where} is a {type(key).__name__}: keys must be plain values")
            return {key: copy(item, f"{where}[{key!r}]") for key, item in value.items()}
        return form(copy(item, f"{where}[{place}]") for place, item in enumerate(value)) if form else value
    content = copy(content, where)
    for device in devices:
        torch.cuda.synchronize(device)
    return content


def sync_folder(folder):
    """Makes a rename durable, where the system can: Windows and some network file systems cannot sync a folder."""
    try:
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise


# ---- a run's files ----

class Checkpoints:
    """The newest two checkpoints of a run, and the parts of a growing log that they need.

    A checkpoint is `checkpoint-<step>.pt`: a state, and the names of the `rows-<first>-<end>.pt` that belong to it.
    Rows are counted from the run's start, so that a ring buffer's parts stay valid when it wraps around. Old files are
    removed only when a new checkpoint is on the disk.

    `save` copies to host memory and writes in a thread. `failure` is one line if the last save failed, else None.
    """

    def __init__(self, folder):
        self.folder = folder
        self.step = None  # of the newest checkpoint on the disk
        self.next_row = 0  # the first row that no part holds
        self.parts = []  # [file, first, end, sha256] of what the newest checkpoint needs
        self.older = []  # files that the newest checkpoint needs, itself included; kept through the next save
        self.failure, self._thread = None, None

    def save(self, step, state, first=0, rows=None, oldest=0, wait=False):
        """rows: name -> tensor of the rows first, first + 1, ...; rows that were saved before are replaced.
        oldest: rows before this one are no longer needed. wait: return only when all is on the disk.

        TypeError, which names the place, for a value that a checkpoint cannot hold; earlier checkpoints stay.
        """
        self.wait()
        state, rows = copy_to_cpu(state, "state"), copy_to_cpu(rows or {}, "rows")
        self._thread = threading.Thread(target=self._write, args=(step, state, first, rows, oldest))
        self._thread.start()
        if wait:
            self.wait()

    def wait(self):
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step, state, first, rows, oldest):
        """In the thread: whatever it meets must be reported, since nobody sees an exception here."""
        try:
            parts = [part for part in self.parts if part[2] > oldest]
            end = first + (len(next(iter(rows.values()))) if rows else 0)
            if end > first:
                name = f"rows-{first:012}-{end:012}.pt"
                check = write(os.path.join(self.folder, name), {"first": first, "rows": rows})
                parts = [*parts, [name, first, end, check]]
            name = f"checkpoint-{step:012}.pt"
            write(os.path.join(self.folder, name), {"step": step, "state": state, "parts": parts, "next_row": end})
        except Exception as error:
            self.failure = f"the checkpoint of step {step:,} could not be written ({_reason(error)})"
            return
        needed, before = [name, *(part[0] for part in parts)], self.older
        self.step, self.next_row, self.parts, self.older, self.failure = step, end, parts, needed, None
        try:
            self._remove_all_but({*needed, *before})
        except Exception as error:
            self.failure = (f"the checkpoint of step {step:,} is saved, but older files cannot be removed "
                            f"({_reason(error)})")

    def load(self):
        """The state of the newest intact checkpoint, or None if there is no file at all. CorruptCheckpoint, naming the
        newest, if there are files but none is intact. `skipped` lists what was wrong with newer ones."""
        self.skipped = []
        for name in sorted(_ours(self.folder, "checkpoint-", ".pt"), reverse=True):
            try:
                content, _ = read(os.path.join(self.folder, name))
                for part in content["parts"]:
                    self._read_part(part)  # all of it is read before any of it is used
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                known = isinstance(error, (CorruptCheckpoint, OSError))
                self.skipped.append(str(error) if known else f"{name} is not a checkpoint of a run")
                continue
            self.step, self.next_row, self.parts = content["step"], content["next_row"], content["parts"]
            self.older = [name, *(part[0] for part in self.parts)]
            return content["state"]
        if self.skipped:
            raise CorruptCheckpoint(f"{self.skipped[0]}; no other checkpoint of this run is intact")
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
        """The newest checkpoint on the disk, in words."""
        self.wait()
        return "no checkpoint was saved" if self.step is None else f"the last checkpoint is of step {self.step:,}"

    def finish(self, state, keep=False):
        """The run is complete: writes `final.pt`, then removes the other files. OSError if it cannot be written.
        keep: the newest checkpoint stays."""
        self.wait()
        write(os.path.join(self.folder, "final.pt"), copy_to_cpu(state, "state"))
        self._remove_all_but(set(self.older) if keep else set())

    def _remove_all_but(self, needed):
        for name in _ours(self.folder, ("checkpoint-", "rows-"), (".pt", ".pt.part")):
            if name not in needed:
                os.remove(os.path.join(self.folder, name))


def _ours(folder, start, end):
    return [name for name in os.listdir(folder) if name.startswith(start) and name.endswith(end)]


def _reason(error):
    """An exception as part of a line."""
    text = getattr(error, "strerror", None) or str(error)
    return (text if isinstance(error, OSError) else f"{type(error).__name__}: {text}").split("\n")[0]
