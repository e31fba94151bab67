"""Tests of sweep."""

import contextlib
import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers import HERE

pytestmark = pytest.mark.slow
FAKE_TRAIN = '''
import fcntl, os, pathlib, signal, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
runs, name = pathlib.Path(flag("--runs")), flag("--name")
folder = runs / name
folder.mkdir(exist_ok=True)
lock, stop, saved = open(folder / "lock", "w"), [], folder / "saved"
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(76)
if (folder / "final.pt").exists():
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(number))
def note(*words):
    with open(runs / "record", "a") as file:
        print(name, *words, sep="|", file=file)
step = int(saved.read_text()) if saved.exists() else 0
variables = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
note("from", step, *[os.environ.get(name) for name in variables], *sys.argv[1:])
if os.environ.get("FAIL") == name:
    sys.exit("\\rstep 1\\rtrain.py: the actor has diverged\\n")
end = 10_000 if os.environ.get("LONG") == name and step == 0 else step + 10
while step < end and not stop:
    time.sleep(0.01)
    step += 1
if stop:
    saved.write_text(str(step))
    note("saved", step, *stop)
    sys.exit(75)
(folder / "final.pt").touch()
note("finished", step)
'''


GRID = ("fig11", "--smoke", "--seeds", "2")
DONE = "all 6 runs are finished, in runs/smoke\ndraw it: ./sweep.sh plot fig11 runs/smoke --smoke\n"


class Sweeps:
    """A folder with sweep.sh, the real grids, and a train.py that only takes note of what it is told."""

    def __init__(self, folder):
        self.folder, self.runs, self.processes = folder, folder / "runs/smoke", []
        self.env = {name: value
                    for name, value in os.environ.items() if not name.startswith(("OMP_", "CUDA_", "SLURM_"))}
        self.env |= {"PYTHON": sys.executable}
        for file in [HERE / "sweep.sh", *HERE.glob("*.py")]:
            shutil.copy(file, folder)
        for package in ("paper", "runtime"):
            shutil.copytree(HERE / package, folder / package)
        (folder / "train.py").write_text(FAKE_TRAIN)
        lines = subprocess.run([sys.executable, "-m", "paper.studies", "runs", *GRID], cwd=folder, text=True,
                               capture_output=True).stdout.splitlines()
        self.names, self.commands = zip(*(line.split("\t") for line in lines))
        assert len(self.names) == len(self.commands) == 6

    def start(self, *flags, **env):
        self.processes.append(subprocess.Popen(
            ["./sweep.sh", *flags], cwd=self.folder, env=self.env | env, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)))
        return self.processes[-1]

    def __call__(self, *flags, **env):
        """Exit status and output of one sweep, run to its end."""
        process = self.start(*flags, **env)
        output = process.communicate(timeout=120)[0]
        return process.returncode, output

    def record(self, word):
        """What the runs noted: (name, what follows the word) in order."""
        lines = (self.runs / "record").read_text().splitlines() if (self.runs / "record").exists() else []
        return [(line.split("|")[0], line.split("|")[2:]) for line in lines if line.split("|")[1] == word]

    def wait_for(self, condition, seconds=60):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end, (self.runs / "record").read_text()
            time.sleep(0.05)

    def check_continuous(self):
        """All runs are finished, each once, and each start went on where the last one of that run had saved."""
        assert sorted(name for name, _ in self.record("finished")) == sorted(self.names)
        for run in self.names:
            assert ([rest[0] for name, rest in self.record("from") if name == run]
                    == ["0"] + [rest[0] for name, rest in self.record("saved") if name == run])


@pytest.fixture
def sweep(tmp_path):
    if sys.platform != "linux":
        pytest.skip("sweep.sh is tested on Linux alone")
    sweeps = Sweeps(tmp_path)
    yield sweeps
    for process in sweeps.processes:
        if process.poll() is None:
            process.kill()


def test_a_sweep_runs_each_run_once_and_a_failure_neither_stops_nor_hides_the_rest(sweep, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho 'GPU 1: H100 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    sweep.env["PATH"] = f"{tmp_path}:{sweep.env['PATH']}"
    bad = sweep.names[1]
    status, output = sweep(*GRID, FAIL=bad)
    assert status == 1 and f"failed: {bad}: status 1, train.py: the actor has diverged" in output and "5 of 6" in output
    assert "2 at a time on 2 GPU(s)" in output  # the default: one run a GPU
    starts = sweep.record("from")
    assert sorted(name for name, _ in starts) == sorted(sweep.names)
    cores = len(os.sched_getaffinity(0))
    assert {tuple(rest[1:4]) for _, rest in starts} == {(str(max(1, cores // 2)), "passive", gpu)
                                                        for gpu in ("GPU-a", "GPU-b")}
    given = {name: rest[4:] for name, rest in starts}
    for name, command in zip(sweep.names, sweep.commands):
        assert given[name] == shlex.split(command) + ["--runs", "runs/smoke", "--name", name, "--resume"]

    # the failed one again, and only that
    status, output = sweep(*GRID, "--jobs", "9", "--", "--wandb-project", "two words")
    assert status == 0 and "6 of 6" in output and [name for name, _ in sweep.record("from")[6:]] == [bad]
    rest = sweep.record("from")[-1][1]
    assert rest[1] == "1" and rest[rest.index("--wandb-project") + 1] == "two words"
    assert sweep(*GRID) == (0, DONE)
    assert sorted(name for name, _ in sweep.record("finished")) == sorted(sweep.names)


def test_killed_sweeps_are_continued(sweep):
    first = sweep.start(*GRID, "--jobs", "2", LONG=sweep.names[0])
    sweep.wait_for(lambda: sweep.record("finished"))
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 75 and "saving" in output and "failed:" not in output
    saved = sweep.record("saved")
    # told once
    assert sweep.names[0] in dict(saved) and all(rest[1:] == [str(int(signal.SIGTERM))] for _, rest in saved)

    second = sweep.start(*GRID, "--jobs", "2", LONG=sweep.names[-1])
    sweep.wait_for(lambda: sweep.names[-1] in dict(sweep.record("from")))
    status, output = sweep(*GRID)  # a second sweep beside it
    assert status == 76 and "5 of 6 runs are finished, 0 failed, 1 run elsewhere" in output
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    sweep.wait_for(lambda: sweep.names[-1] in dict(sweep.record("saved")))  # Linux told it
    assert sweep(*GRID)[0] == 0
    sweep.check_continuous()


def test_two_sweeps_started_together_run_nothing_twice(sweep):
    together = [sweep.start(*GRID, "--jobs", "2") for _ in range(2)]
    assert {process.wait(60) for process in together} <= {0, 76}
    sweep.check_continuous()


def test_sweeps_refuse_in_one_line(sweep, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "paste", "mkdir", "sed", "nproc"):  # and no sbatch
        (tools / name).symlink_to(shutil.which(name))
    for flags, message in (
            ("fig99", "fig99"), ("fig11 --foo", "unknown option --foo"), ("fig11 --jobs 0", "--jobs must be"),
            ("--jobs", "--jobs needs a value"), ("--print", "which figure?"), ("fig11 --seeds x", "--seeds x"),
            ("fig11 --slurm", "no sbatch here"), ("fig11 -- --sparsity 7", "--sparsity must lie in")):
        status, output = sweep(*flags.split(), PATH=str(tools))
        assert status == 2 and message in output and len(output.splitlines()) == 1, output
    status, output = sweep("list", PYTHON="false")  # without the packages
    assert status == 2 and "false lacks" in output and len(output.splitlines()) == 1


def test_a_sweep_prints_plain_commands(sweep):
    for flags, more in (((), " --runs runs/smoke"), (("--runs", "some where"), r" --runs some\ where")):
        lines = sweep(*GRID, "--print", *flags)[1].splitlines()
        assert lines == [f"python train.py {command}{more}" for command in sweep.commands]
    assert not sweep.runs.exists()


def test_a_sweep_takes_the_gpus_that_it_is_given(sweep):
    for visible, found in (("3,5", ["3", "5"]), ("4,-1,5", ["4"]), ("-1", []), ("", [])):
        status, output = sweep(*GRID, "--seeds", "1", CUDA_VISIBLE_DEVICES=visible)
        assert status == 0 and f"{len(found)} GPU(s)" in output
        assert {rest[3] for _, rest in sweep.record("from")} == set(found or [visible])
        shutil.rmtree(sweep.runs)


# SLURM itself: authentication, a controller and one node of two cores on the loopback address, in their own folder.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
MaxArraySize=4
KillWait=5
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP
"""


@pytest.fixture
def slurm():
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # munged wants its socket within everybody's reach
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for port in sockets:
            port.bind(("127.0.0.1", 0))
        ports = [port.getsockname()[1] for port in sockets]
        for port in sockets:
            port.close()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, user=getpass.getuser(),
                                                             controller_port=ports[0], node_port=ports[1]))
        env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

        def ask(*command):
            return subprocess.run(command, env=os.environ | env, capture_output=True, text=True).stdout

        def daemon(*command):
            with open(folder / "log", "a") as log:
                process = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log,
                                           stdin=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        daemon("munged", "--foreground", f"--socket={folder}/munge.socket",
               *(f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")))
        daemon("slurmctld", "-D")
        daemon("slurmd", "-D", "-N", "localhost")
        def cancel():
            ask("scancel", "--user", getpass.getuser())
            for _ in range(100):  # slurmd leaves a job's processes behind when it goes first
                if not ask("squeue", "--noheader"):
                    break
                time.sleep(0.2)

        stack.callback(cancel)
        end = time.time() + 30
        while "idle" not in ask("sinfo", "--noheader", "--format", "%T"):
            assert time.time() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield env, ask


@pytest.mark.soak
def test_a_sweep_as_slurm_arrays(slurm, sweep):
    env, ask = slurm
    sweep.env |= env
    long, *_, bad = sweep.names
    # a minute, which is to be warned of at once: within 30 s
    flags = (*GRID, "--slurm", "--jobs", "2", "--time", "1", "--mem=1")
    status, output = sweep(*flags, LONG=long, FAIL=bad)
    assert status == 0 and "6 are submitted now" in output and [int(n) for n in re.findall(r": (\d) runs of",
                                                                                           output)] == [4, 2]
    assert "0 are submitted now" in sweep(*flags)[1]  # nothing is queued twice
    first, second = re.findall(r"job (\d+)", output)
    assert f"afterany:{first}_*" in ask("scontrol", "show", "job", second)  # the throttle holds over both arrays

    sweep.wait_for(lambda: len(sweep.record("finished")) == 3)  # the rest of the first array passes the long one
    status, output = sweep(*GRID, "--seeds", "1")
    assert status == 76 and "1 run elsewhere" in output  # a sweep here, beside the cluster's
    sweep.wait_for(lambda: sweep.record("saved"))
    assert sweep.record("saved")[0][0] == long and sweep.record("saved")[0][1][1:] == [str(int(signal.SIGUSR1))]
    sweep.wait_for(lambda: "BeginTime" in ask("squeue", "--noheader", "--format", "%r"))
    # or SLURM waits two minutes before it starts it again
    ask("scontrol", "update", f"JobId={first}_0", "StartTime=now")
    # Both: on a machine that is busy squeue may get no answer in time, and what it prints is empty, too.
    sweep.wait_for(lambda: len(sweep.record("finished")) == 5 and not ask("squeue", "--noheader"))
    assert max(len([1 for n, _ in sweep.record("from") if n == name]) for name in sweep.names[1:]) == 1
    assert "status 1" in "".join(file.read_text() for file in (sweep.runs / "slurm").glob("*.log"))

    status, output = sweep(*flags)
    assert "5 of 6 runs are finished, 0 are queued or running, 1 are submitted now" in output
    sweep.wait_for(lambda: (sweep.runs / bad / "final.pt").exists())
    assert sweep(*flags) == (0, DONE)


@pytest.mark.parametrize("early, end, requeued",
                         [("", "exit 75", True), ("", "kill -USR1 $$", True), ("", "exit 1", False),
                          ("", "kill -TERM $$", False), ("", "exit 0", False), ("kill -USR1 $PPID", "exit 0", True)])
def test_a_task_is_requeued_if_it_was_warned(early, end, requeued, tmp_path):
    """Warned while Python starts, it dies of the warning, and before that it does not begin: it must not be lost."""
    for name, lines in (("scontrol", f'echo "$@" >> {tmp_path}/asked'), ("python", end), ("hostname", early)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    for folder in ("slurm", "logs"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    (tmp_path / "runs/slurm/sweep.tsv").write_text("other\t--env x\nrun\t--env dog-run\n")
    env = os.environ | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1",
                        "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", HERE / "sweep.sh", "--task", tmp_path / "runs/slurm/sweep.tsv", HERE, tmp_path / "python"],
                   env=env)
    assert (tmp_path / "runs/logs/run.log").exists() != bool(early)
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "") == "requeue 7_1\n" * requeued
