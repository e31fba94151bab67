"""The fast path: matrix precision, faster products on AMD's processors, compiled losses, and updates captured as CUDA graphs.

What it claims: it wraps an agent's update and replaces none of it. Each part is a flag of its own, none is needed, and
the results are those of the plain path within rounding; masks included, since topology changes happen in place.

    speed_up(agent, precision="bf16", compile=True)
    update = captured(agent)            # on CUDA: agent.update, captured in one part or two
    update()

Precision, of matrix products and what lies between them; weights, gradients, moments, losses, and the last layers of Q
and of stochastic actors stay in float32:
    fp32   float32 throughout; by oneDNN on AMD's processors with AVX-512, up to twice as fast as PyTorch's choice
    tf32   float32 products rounded to 10 bits of mantissa, on CUDA since Ampere
    bf16   bfloat16 products through autocast, on CUDA and on processors with bf16 instructions
"""

import functools
import gc
import os
import platform
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

PRECISIONS = ("fp32", "tf32", "bf16")
ONEDNN_MIN_WEIGHTS = 2 ** 14  # weights from which a layer gains from oneDNN: measured, 128 x 128 at batch 256
CUDA_TESTED = False  # whether `pytest test_all.py -k cuda` has passed on a GPU: then "auto" compiles and captures there
WARM_UP = 3  # eager calls before a capture: allocators and autotuners settle; they are real updates, none is undone


def resolve_device(name):
    """The device of this name; "auto" is CUDA where there is any. ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown --device {name!r}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this PyTorch sees no CUDA device: use --device cpu, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and generators are those of the current device
    return device


def resolve_precision(name, device):
    """"auto" is tf32 on CUDA and fp32 elsewhere. ValueError for what the device does not have."""
    if name == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: choose auto, {', '.join(PRECISIONS)}")
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"tf32 is a precision of CUDA devices, and this run is on {device}: choose fp32 or bf16")
    return name


def resolve_speed(compile, graphs, device, pays=False):
    """(whether to compile, whether to capture, lines that the user should be told) of "auto", "on" or "off" each.
    pays: whether "auto" compiles on a CPU. ValueError for what cannot be here."""
    if graphs == "on" and device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a CUDA device, and this run is on {device}")
    auto = (CUDA_TESTED, CUDA_TESTED) if device.type == "cuda" else (pays, False)
    chosen = [default if flag == "auto" else flag == "on" for flag, default in zip((compile, graphs), auto)]
    unproven = [name for name, flag in (("--compile", compile), ("--cuda-graphs", graphs))
                if flag == "auto" and device.type == "cuda" and not CUDA_TESTED]
    notes = [f"  note: {' and '.join(unproven)} stay off until `pytest test_all.py -k cuda` has shown on a GPU that they change "
             "nothing; ask for them by `on`"] if unproven else []
    return *chosen, notes


def set_precision(precision):
    """The process's own setting, of float32 products; bf16 is a matter of autocast."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def speed_up(agent, precision="fp32", compile=False):
    """Sets the precision of the agent's losses, and compiles them, and on CUDA the masking of gradients, in place."""
    set_precision(precision)
    if precision == "fp32" and agent.device.type == "cpu" and use_onednn():
        for network in (*agent.networks.values(), *agent.targets.values()):
            for layer in network.modules():
                if isinstance(layer, nn.Linear) and layer.weight.numel() >= ONEDNN_MIN_WEIGHTS:
                    layer.forward = functools.partial(linear, layer)
    if compile:
        # One code object is compiled anew for every agent and module of the process; the default of 8 stops bench.py.
        torch._dynamo.config.recompile_limit = 100
        if agent.device.type == "cuda":  # masking rides on the passes that clipping makes; on a CPU plain ones are faster
            agent.mask_and_clip = torch.compile(agent.mask_and_clip, fullgraph=True, dynamic=False)
    if precision == "bf16":
        keep_copies(agent)
        for layer in agent.float32_layers():
            _keep_float32(layer, agent.device.type)
    for name in (*agent.compiled_methods, *agent.autocast_methods):
        function = getattr(agent, name)
        if compile and name in agent.compiled_methods:
            # One graph a loss: a break would bring back what compiling is for. Shapes never change. fallback_random:
            # random numbers come from PyTorch's own generator, so that a seed means what it means without.
            function = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})
        if precision == "bf16":
            function = _in_bfloat16(function, agent.device.type)
        setattr(agent, name, function)


def onednn_available():
    """Whether this PyTorch was built with oneDNN, for a processor whose float32 products it would give to MKL."""
    return (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@functools.cache
def use_onednn():
    """Whether oneDNN's float32 products are the faster ones: on AMD's processors with AVX-512, by twice; without it they cost
    0 to 6 % of an update, on Intel's 8 %. A rule, not a measurement: a run that is continued must take the same path again."""
    try:
        with open("/proc/cpuinfo") as file:
            processor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor and torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_available()


def product(x, weight, bias=None):
    """x Wᵀ + b by oneDNN, in full float32: (batch, in), (out, in), (out,) -> (batch, out). The operation that compiled models
    use. Each matrix must be dense, row after row or column after column: of a slice oneDNN makes a loop without vectors.
    """
    if torch.compiler.is_compiling():  # the compiler's own form of the operation wants weights that never change
        return torch.ops.module_specific.product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def bfloat16_product(x, weight, bias=None):
    """x Wᵀ + b of bfloat16: (..., in), (out, in), (out,) -> (..., out)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return torch.ops.module_specific.product(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(x, weight, bias):
    """What the compiler may not look into. It keeps parts of a matrix that is yet to be filled in place, and oneDNN's bfloat16
    product on AMX reads up to 31 numbers past a row's end, which the weights' padding cancels unless they are NaN
    (oneDNN#5717)."""
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x if x.mT.is_contiguous() else x.contiguous(), weight, bias)


# Not torch.library.custom_op, whose calls take four times as long.
_library = torch.library.Library("module_specific", "DEF")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("product", _product, "CPU")
torch.library.register_fake("module_specific::product", lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))


def linear(layer, x):
    """`layer(x)` by oneDNN; anything but a float32 batch goes PyTorch's own way."""
    if x.ndim == 2 and x.dtype == layer.weight.dtype == torch.float32:
        return OneDNNLinear.apply(x.contiguous(), layer.weight, layer.bias)
    return F.linear(x, layer.weight, layer.bias)


class OneDNNLinear(torch.autograd.Function):
    """PyTorch gives a float32 product to MKL, which on AMD's processors reaches half of oneDNN's speed (230 against 490
    GFLOP/s on two cores with AVX-512), and differentiates by the same three products; so does this."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad  # nothing is computed for who is frozen
        return (product(grad, weight.t()) if needs_x else None, product(grad.t(), x.t()) if needs_weight else None,
                grad.sum(0) if needs_bias else None)


def keep_copies(agent):
    """bfloat16 copies of the weights to multiply by, renewed whenever the weights change and not at each use: after an
    optimiser's step, after targets move (MR.Q's: once in 250 updates), after loading. In place: a graph reads them, too."""
    renew_target = {name: _give_copies(target, agent.float32_layers()) for name, target in agent.targets.items()}
    for name, network in agent.networks.items():
        agent.optimizers[name].register_step_post_hook(_give_copies(network, agent.float32_layers()))
    for mover in ("refresh_targets", "update_target"):
        if hasattr(agent, mover):
            setattr(agent, mover, _followed_by(getattr(agent, mover), list(renew_target.values())))


def _give_copies(network, heads):
    """Lets all linear layers but the heads multiply by copies; returns what renews these."""
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
    if not torch.is_autocast_enabled(x.device.type):  # acting, evaluation and metrics are in float32
        return F.linear(x, layer.weight, layer.bias)
    return BFloat16Linear.apply(x, layer.weight, layer.bias, weight, bias)


class BFloat16Linear(torch.autograd.Function):
    """A product of bfloat16 copies whose gradients are the float32 weights': autograd adds the parts of a weight that is
    used several times, as in the encoder's unroll, in the precision in which they come."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):
        x = x.bfloat16()
        ctx.save_for_backward(x, weight_copy)
        return bfloat16_product(x, weight_copy, bias_copy)

    @staticmethod
    def backward(ctx, grad):
        x, weight_copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (bfloat16_product(grad, weight_copy.t()) if needs_x else None,
                bfloat16_product(rows.t(), x.flatten(0, -2).t()).float() if needs_weight else None,
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
    """The agent's `update`, with what the agent names in `captures` captured as CUDA graphs."""
    for name, modules in agent.graph_methods.items():
        setattr(agent, name, CapturedUpdate(agent, getattr(agent, name), modules))
    return agent.update


class CapturedUpdate:
    """One update as one graph: recorded once, then replayed, with the host's bookkeeping done beside it.

    Load states before the first call: a graph holds on to the optimisers' tensors, and loading replaces them.
    modules: whose update counts one call advances. A call in which one of them changes its topology runs uncaptured,
    through the same function; as masks, weights and moments change in place, the graph goes on with the new ones.
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
                for name in self.modules:  # the graph has gradients of its own
                    agent.optimizers[name].zero_grad(set_to_none=True)
            return
        if self.replay_graph is None:
            before = dict(agent.updates)
            last_steps = {name: agent.sparse[name].last_step for name in self.modules}
            agent.info, everything = {}, agent.info
            self.replay_graph = self.record(self.function)
            self.info, agent.info = agent.info, everything  # the graph writes into these tensors from now on
            agent.updates.update(before)  # recording advanced the host's counts, but ran nothing
            for name, step in last_steps.items():
                agent.sparse[name].last_step = step
        self.replay_graph()
        for name in self.modules:
            agent.updates[name] += 1
            agent.sparse[name].update_topology(agent.updates[name])  # not due: notes the step, and does nothing else
        agent.info.update(self.info)

    def warm_up(self):
        """Runs on the stream that will record, as PyTorch asks; plainly where there are no streams."""
        if self.agent.device.type != "cuda":
            return self.function()
        self.stream = self.stream or torch.cuda.Stream()
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self.function()
        main.wait_stream(self.stream)

    def record_cuda_graph(self, function):
        """Records the kernels of `function` without running them; returns what runs them."""
        for optimizer in self.agent.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        gc.collect()  # a tensor that dies during the capture would break it
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):  # a memory pool of its own; registers the default generator
            function()
        return graph.replay


def usable_cores():
    """Cores that this process may use: what OMP_NUM_THREADS says, or else those it is bound to, or fewer where a container
    has a quota. More threads than that wait for one another."""
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
    """One line that says why torch.compile does not work here, or None: found before a run is begun, not at its first update."""
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Python headers
        needed = "a working C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton and a C compiler"
        return f"--compile needs {needed}: a trial failed with {type(error).__name__}"
