"""The fast path: matrix precision, faster products on AMD CPUs, compiled losses, and updates captured as CUDA graphs.

Guarantees: it wraps an agent's methods and replaces none of its mathematics. Each part has its own flag, and none is
required. Results equal the plain path's up to rounding, masks included.

    speed_up(agent, precision="bf16", compile=True)
    update = captured(agent)            # on CUDA: agent.update, captured in one part or two
    update()

Precision of matrix products and the activations between them. Weights, gradients, moments, losses, and the last layers
of Q and of stochastic actors stay in float32:
    fp32   float32 throughout; on AMD CPUs with AVX-512 by oneDNN, up to twice as fast as PyTorch's default
    tf32   float32 products rounded to 10 bits of mantissa, on CUDA since Ampere
    bf16   bfloat16 products through autocast, on CUDA and on CPUs with bf16 instructions

CUDA graphs. An update launches about 1,000 small operations, and a GPU finishes most of them faster than Python
launches the next. `CapturedUpdate` records the launches of one update, then replays them with a single call. A replay
runs the recorded kernels on the recorded memory addresses; no Python code runs again. So captured code must
1. keep every number that changes in a tensor that stays where it is: a Python number (reward scale, buffer size, Adam's
   step) would be frozen at its recorded value. Masks, weights, moments and targets change in place;
2. never read a tensor's value (`.item()`, `if tensor`, a shape that depends on values): during a capture this is an
   error, and otherwise the host would wait for the GPU;
3. report NaN without a read: `agent.nonfinite` latches on the device, AdamW's fused step skips on it, and the run looks
   at it when it logs or saves.
Comments that begin with "CUDA graph:" mark such lines. `CapturedUpdate` itself advances what Python must count at each
update (update counts, schedules), and a step that changes a topology runs uncaptured.
"""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

PRECISIONS = ("fp32", "tf32", "bf16")
ONEDNN_MIN_WEIGHTS = 2 ** 14  # smallest layer that gains from oneDNN: measured, 128 x 128 at batch 256
CUDA_TESTED = False  # whether `pytest test_all.py -k cuda` has passed on a GPU; then "auto" compiles and captures there
WARM_UP = 3  # plain updates before a capture, so that allocators and autotuners settle


def resolve_device(name):
    """The device of this name; "auto" is CUDA if available. ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown --device {name!r}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "install a CUDA build" if visible is None else f"set CUDA_VISIBLE_DEVICES, which is {visible!r}"
        raise ValueError(f"--device cuda, but PyTorch sees no CUDA device: use --device cpu, or {hint}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and generators belong to the current device
    return device


def resolve_precision(name, device):
    """"auto" is tf32 on CUDA and fp32 elsewhere. ValueError if the device does not support the precision."""
    if name == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: choose auto, {', '.join(PRECISIONS)}")
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"tf32 needs a CUDA device, and this run uses {device}: choose fp32 or bf16")
    return name


def resolve_speed(compile, graphs, device, pays=False):
    """(whether to compile, whether to capture, notes for the user). compile, graphs: "auto", "on" or "off".
    pays: whether "auto" compiles on a CPU. ValueError if the device does not support it."""
    if graphs == "on" and device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a CUDA device, and this run uses {device}")
    auto = (CUDA_TESTED, CUDA_TESTED) if device.type == "cuda" else (pays, False)
    chosen = [default if flag == "auto" else flag == "on" for flag, default in zip((compile, graphs), auto)]
    unproven = [name for name, flag in (("--compile", compile), ("--cuda-graphs", graphs))
                if flag == "auto" and device.type == "cuda" and not CUDA_TESTED]
    notes = [f"  note: {' and '.join(unproven)} are off by default, because this code has not been tested on a GPU; "
             "`on` turns them on"] if unproven else []
    return *chosen, notes


def set_precision(precision):
    """The process-wide setting for float32 products and convolutions; bf16 is set by autocast."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # PyTorch's default is True


def speed_up(agent, precision="fp32", compile=False):
    """Sets the precision of the agent's losses and compiles them, in place; on CUDA also the masking of gradients."""
    set_precision(precision)
    if precision == "fp32" and agent.device.type == "cpu" and use_onednn():
        for network in (*agent.networks.values(), *agent.targets.values()):
            for layer in network.modules():
                if isinstance(layer, nn.Linear) and layer.weight.numel() >= ONEDNN_MIN_WEIGHTS:
                    layer.forward = functools.partial(onednn_forward, layer)
    if compile:
        # Each agent and module of the process compiles the same code object again; the default of 8 stops bench.py.
        torch._dynamo.config.recompile_limit = 100
        if agent.device.type == "cuda":  # fuses masking with clipping; on a CPU the plain passes are faster
            agent.mask_and_clip = torch.compile(agent.mask_and_clip, fullgraph=True, dynamic=False)
    if precision == "bf16":
        keep_copies(agent)
        for layer in agent.float32_layers():
            _keep_float32(layer, agent.device.type)
    for name in (*agent.compiled_methods, *agent.autocast_methods):
        function = getattr(agent, name)
        if compile and name in agent.compiled_methods:
            # fullgraph: one graph per loss. dynamic: shapes never change. fallback_random: random numbers come from
            # PyTorch's generator, so that a seed gives the same numbers as without compiling.
            function = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})
        if precision == "bf16":
            function = _in_bfloat16(function, agent.device.type)
        setattr(agent, name, function)


def onednn_available():
    """Whether this PyTorch has oneDNN, on a CPU whose float32 products it would otherwise give to MKL."""
    return (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@functools.cache
def use_onednn():
    """Whether oneDNN's float32 products are faster: twice as fast on AMD CPUs with AVX-512; elsewhere they cost up to
    8 % of an update. A fixed rule, not a measurement, so that a resumed run takes the same path."""
    try:
        with open("/proc/cpuinfo") as file:
            processor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor and torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_available()


def onednn_linear(x, weight, bias=None):
    """x Wᵀ + b by oneDNN in float32: (batch, in), (out, in), (out,) -> (batch, out). Compiled models use the same
    operation. Matrices must be contiguous or transposed contiguous: for a slice, oneDNN falls back to a scalar loop.
    """
    if torch.compiler.is_compiling():  # the compiler's own form of the operation expects weights that never change
        return torch.ops.module_specific.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def bfloat16_linear(x, weight, bias=None):
    """x Wᵀ + b in bfloat16: (..., in), (out, in), (out,) -> (..., out)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return torch.ops.module_specific.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _uncompiled_linear(x, weight, bias):
    """A product that the compiler must not look into. It lays out matrices within wider, partly uninitialized ones, and
    oneDNN's bfloat16 product on AMX reads up to 31 numbers past a row's end. Padding cancels them unless they are NaN
    (oneDNN#5717)."""
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x if x.mT.is_contiguous() else x.contiguous(), weight, bias)


# torch.library.custom_op would take four times as long per call.
_library = torch.library.Library("module_specific", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _uncompiled_linear, "CPU")
torch.library.register_fake("module_specific::linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))


def onednn_forward(layer, x):
    """`layer(x)` by oneDNN; by PyTorch's default for anything but a float32 batch."""
    if x.ndim == 2 and x.dtype == layer.weight.dtype == torch.float32:
        return OneDNNLinear.apply(x.contiguous(), layer.weight, layer.bias)
    return F.linear(x, layer.weight, layer.bias)


class OneDNNLinear(torch.autograd.Function):
    """A linear layer and its gradients by oneDNN. PyTorch's default for float32 products is MKL, which on AMD CPUs with
    AVX-512 is half as fast (230 and 490 GFLOP/s on two cores)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad  # frozen parameters cost nothing
        return (onednn_linear(grad, weight.t()) if needs_x else None,
                onednn_linear(grad.t(), x.t()) if needs_weight else None,
                grad.sum(0) if needs_bias else None)


def keep_copies(agent):
    """Gives linear layers bfloat16 copies of their weights. The copies are refreshed when the weights change, not at
    each use: after an optimizer step, after targets move (in MR.Q every 250 updates), after loading. In place, for
    CUDA graphs."""
    renew_target = {name: _give_copies(target, agent.float32_layers()) for name, target in agent.targets.items()}
    for name, network in agent.networks.items():
        agent.optimizers[name].register_step_post_hook(_give_copies(network, agent.float32_layers()))
    for mover in ("refresh_targets", "update_target"):
        if hasattr(agent, mover):
            setattr(agent, mover, _followed_by(getattr(agent, mover), list(renew_target.values())))


def _give_copies(network, heads):
    """Lets all linear layers except `heads` multiply by copies. Returns the function that refreshes them."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear) and layer not in heads]
    weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    copies = [weight.detach().bfloat16() for weight in weights]
    for layer, *copy in zip(layers, copies[::2], copies[1::2]):
        layer.forward = functools.partial(_linear_by_copy, layer, *copy)

    @torch.no_grad()
    def renew(*_):
        torch._foreach_copy_(copies, weights)
    network.register_load_state_dict_post_hook(renew)
    return renew


def _followed_by(function, others):
    def wrapped(*arguments, **options):
        function(*arguments, **options)
        for other in others:
            other()
    return wrapped


def _linear_by_copy(layer, weight, bias, x):
    if not torch.is_autocast_enabled(x.device.type):  # acting, evaluation and metrics stay in float32
        return F.linear(x, layer.weight, layer.bias)
    return BFloat16Linear.apply(x, layer.weight, layer.bias, weight, bias)


class BFloat16Linear(torch.autograd.Function):
    """A product of bfloat16 copies whose gradients go to the float32 weights. A weight that is used several times, as
    in the encoder's unroll, then sums its gradients in float32: autograd sums in the precision of the parts."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):
        x = x.bfloat16()
        ctx.save_for_backward(x, weight_copy)
        return bfloat16_linear(x, weight_copy, bias_copy)

    @staticmethod
    def backward(ctx, grad):
        x, weight_copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (bfloat16_linear(grad, weight_copy.t()) if needs_x else None,
                bfloat16_linear(rows.t(), x.flatten(0, -2).t()).float() if needs_weight else None,
                rows.sum(0).float() if needs_bias else None, None, None)


def _in_bfloat16(function, device_type):
    def wrapped(*arguments):
        with torch.autocast(device_type, dtype=torch.bfloat16):
            return function(*arguments)
    return wrapped


def _keep_float32(layer, device_type):
    plain = layer.forward

    def forward(x):
        with torch.autocast(device_type, enabled=False):
            return plain(x.to(layer.weight.dtype))
    layer.forward = forward


def captured(agent):
    """The agent's `update`, with its `graph_methods` captured as CUDA graphs. Load states before the first call."""
    for name, modules in agent.graph_methods.items():
        setattr(agent, name, CapturedUpdate(agent, getattr(agent, name), modules))
    return agent.update


class CapturedUpdate:
    """One update as one CUDA graph: recorded once, then replayed. The module's docstring explains the mechanism.

    Load states before the first call: loading replaces the optimizers' tensors, and a graph keeps using the old ones.
    modules: those whose update counts one call advances. A call in which one of them changes its topology runs plainly,
    through the same function. Masks, weights and moments change in place, so the graph remains valid.
    """

    def __init__(self, agent, function, modules, record=None):
        self.agent, self.function, self.modules = agent, function, modules
        self.record = record or self.record_cuda_graph
        self.calls, self.replay_graph, self.info, self.stream = 0, None, None, None

    def __call__(self):
        self.calls += 1
        agent = self.agent
        if self.calls <= WARM_UP:
            self.warm_up()
            return
        if any(agent.sparse[name].is_update_step(agent.updates[name] + 1) for name in self.modules):
            self.function()
            if self.replay_graph is not None:
                for name in self.modules:  # the graph has its own gradients
                    agent.optimizers[name].zero_grad(set_to_none=True)
            return
        if self.replay_graph is None:
            before = dict(agent.updates)
            last_steps = {name: agent.sparse[name].last_step for name in self.modules}
            agent.info, everything = {}, agent.info
            self.replay_graph = self.record(self.function)
            self.info, agent.info = agent.info, everything  # the graph writes into these tensors from now on
            agent.updates.update(before)  # recording advanced Python's counts, but no kernel ran
            for name, step in last_steps.items():
                agent.sparse[name].last_step = step
        self.replay_graph()
        for name in self.modules:
            agent.updates[name] += 1
            agent.sparse[name].update_topology(agent.updates[name])  # no update step: only notes the count
        agent.info.update(self.info)

    def warm_up(self):
        """Runs on the stream that will record, as PyTorch requires; plainly without CUDA."""
        if self.agent.device.type != "cuda":
            return self.function()
        self.stream = self.stream or torch.cuda.Stream()
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self.function()
        main.wait_stream(self.stream)

    def record_cuda_graph(self, function):
        """Records the kernels of `function` without running them. Returns the function that runs them."""
        for optimizer in self.agent.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        gc.collect()  # freeing a tensor during the capture would break it
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # With its own memory pool; registers the default generator. thread_local: a checkpoint may be being written in
        # another thread, whose calls to CUDA (it frees pinned memory) must not break the capture.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


def keep_freed_memory():
    """Large blocks are reused: glibc returns them to the system, and taking new pages costs as much as the arithmetic
    on images. Without effect in other C libraries."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD: only larger blocks have pages of their own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def usable_cores():
    """Cores that this process may use: OMP_NUM_THREADS if set, else its affinity, or a container's quota if smaller.
    More threads than that wait for one another."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no quota ("max")
        return cores


def compile_error(device):
    """Why torch.compile does not work here, in one line, or None. Found before a run starts, not at its first update.
    """
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Python headers
        needed = "a working C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton and a C compiler"
        return f"--compile needs {needed}: a trial failed with {type(error).__name__}"
