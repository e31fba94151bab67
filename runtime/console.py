"""What a run shows in the terminal: header, progress bar, errors in one line, signals before training starts.

Guarantees: a closed pipe or a full disk at the other end of stdout never stops a run; a user's error ends in one line,
a bug in a traceback.

It imports nothing slow at the top: `before_imports` runs before PyTorch is imported.
"""

import os
import shutil
import signal
import sys
import time

EXIT_FAILED, EXIT_STOPPED, EXIT_LOCKED = 1, 75, 76  # 75: stopped and saved; 76: another process trains this run
# Errors that a run's own settings or machine can cause; `error_message` puts them in one line.
USER_ERRORS = (ValueError, MemoryError, OSError, ImportError, RuntimeError, FloatingPointError)


def before_imports():
    """Call before PyTorch is imported: exits with one line on a signal, and keeps OpenMP's threads from spinning."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # respect nohup
            signal.signal(getattr(signal, name), exit_early)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's and scipy's: stream.py multiplies small matrices only
    # A thread that waits for another one spins. Without a limit, an agent step takes 15 to 70 times as long when
    # another process has one of two cores; with this one, 3 to 6 times. Alone it is as fast as before.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def exit_early(number, _):
    """Before the run is built there is nothing to save."""
    os.write(2, b"\ntrain.py: stopped before training began\n")
    os._exit(EXIT_FAILED if number == signal.SIGINT else EXIT_STOPPED)  # started again with --resume, it continues


class SafeStream:
    """An output stream that ignores closed pipes (`| head -1`) and full disks."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.stream = open(os.devnull, "w")

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def error_message(error):
    """The line to print for an error. Raises the error again if it is a bug, so that its traceback shows."""
    import torch
    # On a CPU, too little memory is a RuntimeError.
    memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if isinstance(error, RuntimeError) and not memory:
        raise error
    advice = ": choose a smaller --scale, --batch-size or --buffer-size" if memory else ""
    return next(iter(str(error).splitlines()), type(error).__name__) + advice


def describe(agent, modules, args, device, folder):
    """The run's header: what runs, sizes, densities, and where it writes."""
    from agents import count
    lines = [f"{args.algo} on {args.env}, seed {args.seed}, {args.total_steps:,} agent steps on {device}"]
    for name, network in agent.networks.items():
        whole, head = count(network)
        module = modules[name]
        size = f"{(whole - head) / 1e6:8.3f} M" + (f" + {head / 1e6:.2f} M head" if head else "")
        lines.append(f"  {name:8} type {module.arch_type}  {module.regime:5}  width ×{module.width_scale:g}, depth "
                     f"×{module.depth_scale:g}  {size}  density {agent.sparse[name].density():.3f}")
    collapsing = [name for name, module in modules.items()
                  if module.arch_type in (1, 2, 3, 4) and max(module.width_scale, module.depth_scale) >= 3]
    if collapsing:
        lines.append("  note: the paper shows that large networks without residual connections "
                     f"({', '.join(collapsing)}) collapse; --mst uses types 5 and 6, which have them")
    return "\n".join([*lines, f"  writes   {folder}"])


def describe_pixels(agent, env, renderer, started):
    """Lines on what is drawn, the memory of the frames, and the densities of the encoder's layers.

    started: the config of the run that is resumed, or None.
    """
    replay, sparse = agent.replay, agent.sparse["encoder"]
    gigabytes = replay.stored_bytes / 1e9
    lines = [f"  frames   {env.stack} of {env.size}×{env.size} pixels per observation, camera {env.camera}, "
             f"by {renderer}",
             f"  replay   {replay.capacity:,} frames, {gigabytes:.2f} GB when full, on {replay.frame_device}"]
    if sparse.masks:
        densities = ", ".join(f"{name.removesuffix('.weight')} {density:.2f}"
                              for name, density in sparse.layer_densities().items())
        lines.append(f"  density  of the encoder's layers: {densities}")
    if started and started.get("renderer") not in (None, renderer):
        lines.append(f"  note: earlier frames of this run were drawn by {started['renderer']}: "
                     "new ones may differ in bits")
    return lines


LARGE_SAVE = 1e9  # bytes; smaller checkpoints are not mentioned


def describe_saving(saved):
    """A line if the checkpoints are large, and another if the disk has no room for them."""
    one, buffer = saved.size()
    total, free = 3 * one + buffer, shutil.disk_usage(saved.log.folder).free  # two, and a third while it is written
    lines = []
    if total > LARGE_SAVE or total >= free:
        lines.append(f"  saves    every {saved.args.save_every:,} steps: up to {total / 1e9:.2f} GB (three checkpoints "
                     f"of {one / 1e9:.2f} GB and a replay buffer of {buffer / 1e9:.2f} GB)")
    if total >= free:
        lines.append(f"  note: the disk has {free / 1e9:.2f} GB free: checkpoints will not fit; training continues")
    return lines


class Bar:
    """The progress bar: the current activity, speed, last return, and time left.

    The time left is estimated from all modules' updates: random steps are cheap, and one step has 250 encoder updates.
    """

    def __init__(self, args, agent, start):
        from tqdm import tqdm
        self.agent, self.lines, self.format_interval = agent, {}, tqdm.format_interval
        learning_steps = args.total_steps - args.learning_starts
        self.all_updates = len(agent.updates) * learning_steps * (agent.updates_per_step or 1)
        self.bar = tqdm(total=args.total_steps, initial=start, dynamic_ncols=True,
                        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        self.interval = 0.5 if sys.stderr.isatty() else 60  # seconds between two drawings
        self.drawn, self.first, self.began = time.monotonic(), None, None
        self.step = start
        self.write, self.close = self.bar.write, self.bar.close

    def show(self, step, activity, **more):
        now, done = time.monotonic(), sum(self.agent.updates.values())
        if self.first is None and done:  # of this process
            self.first, self.began = done, now
        self.bar.n, self.lines = step, self.lines | more
        if now - self.drawn < self.interval:
            return
        left = "?"
        if self.first is not None and done > self.first and self.all_updates:
            left = self.format_interval((now - self.began) / (done - self.first) * max(0, self.all_updates - done))
        speed = (step - self.step) / (now - self.drawn)
        self.drawn, self.step = now, step
        self.bar.set_postfix_str(", ".join([f"{left} left", f"{speed:.3g} steps/s",
                                            *(f"{key} {value}" for key, value in self.lines.items()), activity]))
