"""Tests of fast."""

import copy
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from runtime import fast

import sparsity
import train
from replay import ReplayBuffer
from settings import parse, run_name
from sparsity import SparseTraining
from tests.helpers import REPLAY_AGENTS, regimes_dense, tiny_of


class NoSynchronization(TorchDispatchMode):
    """Fails on every operation that makes the host wait for the device: reading a value or a shape that depends on one,
    or a blocking copy between the two. `tolist` is not an operation, and passes."""
    FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
                 "aten::_unique2", "aten::bincount", "aten::repeat_interleave.Tensor",
                 "aten::kthvalue"}  # waits for nothing, but has one thread block a call: 0.7 s for 100 M elements

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        by_mask = function.name().startswith("aten::index") and any(
            torch.is_tensor(i) and i.dtype == torch.bool for i in (arguments[1] if len(arguments) > 1 and
                                                                   isinstance(arguments[1], (list, tuple)) else ()))
        assert function.name() not in self.FORBIDDEN and not by_mask, f"{function.name()} synchronizes"
        if function.name() in ("aten::copy_", "aten::_to_copy"):
            options = options or {}
            copies = function.name() == "aten::copy_"
            to = arguments[0].device if copies else options.get("device") or arguments[0].device
            waits = not (options.get("non_blocking") or arguments[2:3] == (True,))
            assert not (waits and to != arguments[copies].device), f"{function.name()} synchronizes"
        return function(*arguments, **(options or {}))


class NoNumbers(NoSynchronization):
    """... and on `tensor[row] = number`: on CUDA the number becomes a tensor of the host, whose copy is waited for."""
    FORBIDDEN = NoSynchronization.FORBIDDEN | {"aten::scalar_tensor"}


@pytest.mark.parametrize("algo, growth", [("mrq", "gradient"), ("mrq", "random"), ("sac", "gradient"),
                                          ("ddpg", "random"), ("mrsac", "gradient")])
@pytest.mark.slow
def test_an_update_never_reads_back_from_the_device(algo, growth, monkeypatch):
    modules = regimes_dense(algo, *(("s2d", "dst", "d2s") if algo in ("mrq", "mrsac") else ("dst", "d2s")))
    agent, buffer = tiny_of(algo, modules)
    for sparse in agent.sparse.values():
        sparse.grow = growth
    update_topology = SparseTraining.update_topology

    def watched(sparse, step, scores=None):  # it reads by `tolist`, of which the mode knows nothing on a CPU
        reads, due = [], sparse._is_due(step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparsity, "_read", lambda *flags: reads.append(step) or read(*flags))
            changed = update_topology(sparse, step, scores)
        assert due or not reads
        return changed

    read = sparsity._read
    monkeypatch.setattr(SparseTraining, "update_topology", watched)
    with NoSynchronization():  # bursts, targets, scales, topology updates and the fused optimizers among them
        for _ in range(9):
            agent.update()
        with pytest.raises(AssertionError, match="synchronizes"):
            agent.info["critic_loss"].mean().item()
        with pytest.raises(AssertionError, match="synchronizes"):
            buffer.priority[buffer.priority > 0]

    # Tensors on "meta" have no values at all: whoever asks for one, or mixes in a tensor of the host, fails.
    agent, _ = tiny_of(algo, modules, device="meta")
    buffer = ReplayBuffer(4, 2, 40, agent.config.horizon, agent.config.prioritized, device="meta")
    buffer.num_valid = 1
    agent.replay = buffer
    for optimizer in agent.optimizers.values():  # the fused kernel has no meta form; it was under watch above
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with NoSynchronization():  # the whole loop; the ring closes in it, and episodes end in both ways
        for step in range(60):
            with NoNumbers():
                agent.update_obs_stats(np.ones(4, np.float32))
            with pytest.raises(AssertionError, match="_to_copy synchronizes"):  # the action: all that is ever read
                agent.act(np.ones(4, np.float32), explore=True)
            if step < 9:
                agent.update()
            with NoNumbers():
                buffer.add(np.ones(4), np.ones(2), 0.5, np.ones(4), step % 50 == 19, step % 50 == 49)
        with NoNumbers(), pytest.raises(AssertionError, match="synchronizes"):
            buffer.reward[3] = 1.0
    with pytest.raises(RuntimeError):
        agent.info["critic_loss"].mean().item()
    assert agent.updates["critic"] == 9 and agent.info["critic_loss"].device.type == "meta"


class Operations(TorchDispatchMode):
    """Counts dispatched operations except views; an optimizer's step counts as one."""
    count, UNCOUNTED = 0, ("aten::_unsafe_view", "aten::_foreach_add_.Scalar", "aten::_foreach_sub_.List", "profiler::")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        views = any(result.alias_info is not None and not result.alias_info.is_write
                    for result in function._schema.returns)
        self.count += not views and not function.name().startswith((*self.UNCOUNTED, "aten::detach"))
        return function(*arguments, **(options or {}))


def test_an_update_launches_few_operations():
    """Each launch costs microseconds, on a GPU more than most operations take. The number depends on depth, not width.
    """
    agent = tiny_of("mrq")[0]
    agent.refresh_targets()
    agent.update()
    with Operations() as operations:
        agent.update_encoder()
        agent.update_critic_and_actor()
    assert 300 < operations.count <= 710


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_recorded_updates_equal_plain_ones(algo):
    """The host's side of graph capture, with a stand-in for the device's. Recording runs the function and then puts the
    device's state back; replaying runs it and puts the host's counts back, and writes where it was recorded."""
    (plain, *_), (agent, _), recordings = tiny_of(algo), tiny_of(algo), []
    buffers = [plain.replay, agent.replay]

    def counts():
        return dict(agent.updates), {name: sparse.last_step for name, sparse in agent.sparse.items()}

    def set_counts(updates, last_steps):
        agent.updates.update(updates)
        for name, step in last_steps.items():
            agent.sparse[name].last_step = step

    def record(function):
        recordings.append(function)
        state, tensors = copy.deepcopy(agent.state_dict()), copy.deepcopy(vars(buffers[1]))
        rng = torch.get_rng_state()
        function()
        advanced, recorded = counts(), agent.info
        agent.load_state_dict(state)
        vars(buffers[1]).update(tensors)
        torch.set_rng_state(rng)
        set_counts(*advanced)

        def replay_graph():
            before, info = counts(), agent.info
            agent.info = {}
            function()
            set_counts(*before)
            for name, value in agent.info.items():
                recorded[name].copy_(value)
            agent.info = info
        return replay_graph

    for name, modules in agent.graph_methods.items():
        setattr(agent, name, fast.CapturedUpdate(agent, getattr(agent, name), modules, record))
    for step in range(20):
        for one in (plain, agent):
            torch.manual_seed(step)
            one.update()
        assert plain.updates == agent.updates
        assert {n: s.last_step for n, s in plain.sparse.items()} == {n: s.last_step for n, s in agent.sparse.items()}
        assert {k: v.tolist() for k, v in plain.info.items()} == {k: v.tolist() for k, v in agent.info.items()}
    assert len(recordings) == len(agent.graph_methods)  # once each: topology changes did not record anew
    for kind in ("networks", "targets"):
        for name, network in getattr(plain, kind).items():
            assert all(torch.equal(a, b) for a, b in zip(network.parameters(), getattr(agent, kind)[name].parameters()))
    assert all(torch.equal(value, agent.tensors()[name]) for name, value in plain.tensors().items())
    assert all(sparse.last_step > 3 * 3 for sparse in plain.sparse.values())  # several of them were topology updates


@pytest.mark.skipif(not fast.onednn_available(), reason="this PyTorch or processor has no use for oneDNN's products")
def test_onednn_products_equal_pytorchs(monkeypatch):
    torch.manual_seed(0)
    calls, product = [], fast.onednn_linear
    monkeypatch.setattr(fast, "onednn_linear", lambda *arguments: (calls.append(1), product(*arguments))[1])
    for rows, inputs, outputs, bias in ((256, 128, 130, True), (3, 700, 40, False), (1, 200, 200, True)):
        layer, x = nn.Linear(inputs, outputs, bias), torch.randn(rows, 2 * inputs)[:, ::2].requires_grad_()  # with gaps
        expected, ours = layer(x), fast.onednn_forward(layer, x)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        # Whatever layout comes back: dense, expanded, with gaps.
        for factor in (torch.randn(rows, outputs), torch.ones(()), torch.randn(rows, 2 * outputs)[:, ::2]):
            gradients = [torch.autograd.grad((y * factor).sum(), [x, *layer.parameters()], retain_graph=True)
                         for y in (ours, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        calls.clear()
        fast.onednn_forward(layer, x.detach()).sum().backward()
        layer.requires_grad_(False)
        fast.onednn_forward(layer, x).sum().backward()
        assert x.grad is not None and len(calls) == 2 + 2  # no product for a gradient that is not needed
        assert torch.equal(fast.onednn_forward(layer, x[0]), F.linear(x[0], layer.weight, layer.bias))  # not a batch
        torch.testing.assert_close(fast.onednn_forward(layer.double(), x.double()), layer(x.double()))


def test_onednn_is_used_only_on_amd_with_avx512(monkeypatch):
    monkeypatch.setattr(fast, "onednn_available", lambda: True)
    said = {}
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(fast, "open", lambda path: io.StringIO(f"processor\t: 0\nvendor_id\t: {vendor}\n"),
                            raising=False)
        for capability in ("AVX512", "AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            said[vendor, capability] = fast.use_onednn.__wrapped__()
    assert [which for which, pays in said.items() if pays] == [("AuthenticAMD", "AVX512")]


@pytest.mark.skipif(not fast.onednn_available(), reason="this PyTorch or processor has no use for oneDNN's products")
@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_wide_layers_use_onednn_with_equal_updates(algo, monkeypatch):
    calls, product = [], fast.onednn_linear
    monkeypatch.setattr(fast, "use_onednn", lambda: True)  # whatever the processor
    monkeypatch.setattr(fast, "onednn_linear", lambda x, weight, bias=None: (
        calls.append(weight.shape), product(x, weight, bias))[1])
    monkeypatch.setattr(fast, "ONEDNN_MIN_WEIGHTS", 256)
    (plain, buffer), (agent, other) = tiny_of(algo), tiny_of(algo)
    layers = [layer for network in (*agent.networks.values(), *agent.targets.values()) for layer in network.modules()
              if isinstance(layer, nn.Linear)]
    assert any(layer.weight.numel() == fast.ONEDNN_MIN_WEIGHTS for layer in layers)
    fast.speed_up(agent, "fp32")
    assert all(("forward" in vars(layer)) == (layer.weight.numel() >= fast.ONEDNN_MIN_WEIGHTS) for layer in layers)
    for one, replay in ((plain, buffer), (agent, other)):
        torch.manual_seed(1)
        for _ in range(4):
            one.update()
    assert calls and all(shape.numel() >= 256 or 16 in shape for shape in calls)  # products of gradients have the batch
    for name, network in plain.networks.items():
        other = agent.networks[name]
        torch.testing.assert_close(list(network.parameters()), list(other.parameters()), rtol=1e-3, atol=1e-5)
    calls.clear()
    for precision, available in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr(fast, "use_onednn", lambda: available)
        agent, buffer = tiny_of(algo)
        fast.speed_up(agent, precision)
        agent.update()
        assert not calls


def test_devices_and_precisions_by_name(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast.resolve_device("auto") == fast.resolve_device("cpu") == cpu
    assert [fast.resolve_precision("auto", device) for device in (cpu, cuda)] == ["fp32", "tf32"]
    assert [fast.resolve_precision(name, cuda) for name in fast.PRECISIONS] == ["fp32", "tf32", "bf16"]
    with pytest.raises(ValueError, match="unknown precision"):
        fast.resolve_precision("fp16", cuda)
    chosen = []
    for name, answer in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, answer)
    assert fast.resolve_device("auto") == torch.device("cuda")
    assert fast.resolve_device("cuda:1") == cuda and chosen == [cuda]
    with pytest.raises(ValueError, match="there are 2 CUDA devices"):
        fast.resolve_device("cuda:2")
    for precision, setting in (("tf32", "high"), ("bf16", "highest"), ("fp32", "highest")):
        fast.set_precision(precision)
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_the_compiler_is_tried_on_the_device_itself(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: tried.append((x.device.type, function(x))))
    assert fast.compile_error(torch.device("meta")) is None and [device for device, _ in tried] == ["meta"]
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    for device, needed in (("cpu", r"C\+\+ compiler .* ZeroDivisionError"), ("cuda", "Triton")):
        assert re.search(needed, fast.compile_error(torch.device(device)))


@pytest.mark.slow
def test_compile_auto_on_cpu(monkeypatch):
    cpu, trouble = torch.device("cpu"), [None]
    monkeypatch.setattr(fast, "compile_error", lambda device: trouble[0])
    chosen = lambda *flags, begun=None: train.resolve_compile(parse([*flags]), cpu, begun)
    long, short = (("--total-steps", steps, "--learning-starts", "1000") for steps in ("11000", "10999"))
    for algo, pays in (("mrq", True), ("mrsac", True), ("sac", False), ("ddpg", False)):
        assert chosen("--algo", algo, *long)[0] == pays and not chosen("--algo", algo, *short)[0]
        assert chosen("--algo", algo, *short, "--compile", "on")[0]
        assert not chosen("--algo", algo, *long, "--compile", "off")[0]
    assert "--compile off" in "".join(chosen(*long)[1]) and chosen(*short)[1] == []
    # A resumed run keeps its choice, whatever "auto" would be now; old configs have none, and were not compiled.
    for begun, goes_on in (({"compiled": True}, True), ({"compiled": False}, False), ({"seed": 0}, False),
                           ({"compile": "auto"}, False), ({"compile": "on"}, True),
                           ({"compile": "on", "compiled": False}, False)):
        assert all(chosen(*flags, begun=begun)[0] == goes_on for flags in (long, short))
    assert chosen(*short, "--compile", "on", begun={"compiled": False})[0]
    trouble[0] = "no compiler"
    assert not chosen(*long)[0] and "not compiled" in "".join(chosen(*long)[1]) and chosen(*short)[1] == []
    with pytest.raises(ValueError, match="no compiler"):
        chosen(*short, "--compile", "on")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_compile_choice(tmp_path, monkeypatch):
    """From the flag to the agent, the config and the resumed run."""
    built, build_agent = [], train.build_agent
    monkeypatch.setattr(train, "build_agent", lambda args, *rest: (
        built.append(args.compile) or build_agent(args, *rest)))
    monkeypatch.setattr(fast, "compile_error", lambda device: None)
    args = parse(["--env", "cartpole-swingup", "--total-steps", "10100", "--learning-starts", "100",
                  "--width-scale", "0.05", "--runs", str(tmp_path), "--resume", "--device", "cpu"])
    folder = tmp_path / run_name(args)
    for compiled in (True, False):
        monkeypatch.setattr(train, "compiling_pays", lambda args: compiled)
        train.build(args)[-2].close()
        assert json.loads((folder / "config.json").read_text())["compiled"] is True
    assert built == ["on", "on"]


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_targets_are_masked_only_when_topology_changes(algo):
    agent, buffer = tiny_of(algo, interval=3, seed=2)
    assert sorted(sparse.seed for sparse in agent.sparse.values()) == [2000, 2001]  # the same masks in every version
    masked, apply_masks = [], agent.sparse["critic"].apply_masks
    agent.sparse["critic"].apply_masks = lambda module: masked.append(agent.updates["critic"]) or apply_masks(module)
    for _ in range(10):
        agent.update()
    assert masked == [3, 6, 9]


@pytest.mark.parametrize("proven", [False, True])
def test_compile_and_graphs_auto_on_cuda(proven, monkeypatch):
    monkeypatch.setattr(fast, "CUDA_TESTED", proven)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for flags, device, chosen, named in (
            (("auto", "auto"), cpu, [False, False], []), (("on", "off"), cuda, [True, False], []),
            (("auto", "auto"), cuda, [proven, proven], [] if proven else ["--compile", "--cuda-graphs"]),
            (("on", "auto"), cuda, [True, proven], [] if proven else ["--cuda-graphs"])):
        *told, notes = fast.resolve_speed(*flags, device)
        assert told == chosen and len(notes) == bool(named)
        assert all((flag in "".join(notes)) == (flag in named) for flag in ("--compile", "--cuda-graphs"))


@pytest.mark.parametrize("algo", ["mrq", "sac"])
def test_bfloat16_copies_follow_their_weights(algo):
    agent, other = tiny_of(algo)[0], tiny_of(algo, seed=9)[0]
    for one in (agent, other):
        fast.speed_up(one, "bf16")
    for _ in range(5):  # targets, a topology change
        agent.update()
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    checked = 0
    for one in (agent, other):
        for network in (*one.networks.values(), *one.targets.values()):
            for layer in network.modules():
                if isinstance(layer, nn.Linear) and layer not in one.float32_layers():
                    x = torch.randn(3, layer.in_features)
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        expected = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
                        assert torch.equal(layer(x), expected)
                    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # acting is not rounded
                    checked += 1
    assert checked > 20


def test_gradients_of_a_reused_weight_are_summed_in_float32():
    """300 equal parts: a bfloat16 sum stops growing at 256 times one of them."""
    layer = nn.Linear(8, 8)
    x, copies = torch.ones(2, 8, requires_grad=True), (layer.weight.bfloat16(), layer.bias.bfloat16())
    sum(fast.BFloat16Linear.apply(x, layer.weight, layer.bias, *copies).float().sum() for _ in range(300)).backward()
    assert (layer.weight.grad == 600).all() and (layer.bias.grad == 600).all()
    torch.testing.assert_close(x.grad, 300 * copies[0].float().sum(0).expand(2, 8), rtol=0.02, atol=0.02)


def test_the_opaque_product_reads_only_its_rows():
    """For a matrix within a wider one, as the compiler lays them out. On AMX PyTorch's own product gives NaN here."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 77).bfloat16(), torch.randn(48).bfloat16()
    wide = torch.full((256, 115), float("nan"), dtype=torch.bfloat16)
    x = wide[:, :77].copy_(torch.randn(256, 77))
    exact = x.double() @ weight.double().t()
    for given, b in ((x, bias), (x, None), (x.t().contiguous().t(), bias), (x.unflatten(0, (64, 4)), bias)):
        out = torch.ops.module_specific.linear(given, weight, b)
        expected = exact + (0.0 if b is None else b.double())
        assert out.dtype == torch.bfloat16 and out.shape == (*given.shape[:-1], 48)
        torch.testing.assert_close(out.flatten(0, -2).double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_bfloat16_rounds_products_and_nothing_else(algo):
    """Weights, gradients, moments and losses stay in float32, and so does the output of each head: every Q, targets
    included, and a Gaussian policy's mean and spread. The action of MR.Q and DDPG has no such head."""
    plain, agent = tiny_of(algo, seed=1)[0], tiny_of(algo, seed=1)[0]
    fast.speed_up(agent, "bf16")
    for one in (plain, agent):
        torch.manual_seed(0)
        one.update()
    losses = [name for name in agent.info if name.endswith("_loss") or name == "q"]
    assert {"critic_loss", "actor_loss"} < set(losses)
    for name in losses:
        value, exact = agent.info[name], plain.info[name]
        assert value.dtype == torch.float32 and (value != exact).any(), name
        assert value.mean().item() == pytest.approx(exact.mean().item(), rel=0.1, abs=0.1)
    for network, optimizer in zip(agent.networks.values(), agent.optimizers.values()):
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
        assert all(v.dtype == torch.float32 for state in optimizer.state.values() for v in state.values())
    kinds = (agent.networks, agent.targets)
    heads = [q.output for networks in kinds for q in networks["critic"].children()]
    if algo in ("sac", "mrsac"):
        heads += [getattr(networks["actor"], head) for networks in kinds if "actor" in networks
                  for head in ("output", "log_std")]
    assert set(heads) == set(agent.float32_layers())
    linear = [layer for networks in kinds for network in networks.values() for layer in network.modules()
              if isinstance(layer, nn.Linear)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {layer for layer in linear if layer(torch.randn(3, layer.in_features)).dtype == torch.float32}
    assert found == set(heads) and len(linear) > len(heads)


def compiled_pair(algo, precision, backend, monkeypatch, modules=None, methods=None):
    """A plain and a compiled agent, alike; with oneDNN's products among what is compiled, whatever the processor."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, dynamic, options=None: compile(
        function, backend=backend, fullgraph=fullgraph, dynamic=dynamic,
        options=options if backend == "inductor" else None))
    monkeypatch.setattr(fast, "use_onednn", fast.onednn_available)
    monkeypatch.setattr(fast, "ONEDNN_MIN_WEIGHTS", 256)
    plain, compiled = tiny_of(algo, modules)[0], tiny_of(algo, modules)[0]
    if methods:
        compiled.compiled_methods = methods
    fast.speed_up(plain, precision)
    fast.speed_up(compiled, precision, compile=True)
    return plain, compiled


def check_updates_alike(plain, compiled, precision, updates=7):
    """Across bursts and topology updates. bfloat16 may grow another weight, so its networks are compared by norm."""
    for step in range(updates):
        for agent in (plain, compiled):
            torch.manual_seed(step)
            agent.update()
    for name in plain.networks:
        for a, b in zip(plain.networks[name].parameters(), compiled.networks[name].parameters()):
            if precision == "bf16":
                assert (a - b).norm() <= 0.02 * b.norm() + 1e-3
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if precision == "fp32":
            masks, others = plain.sparse[name].masks, compiled.sparse[name].masks
            assert all(torch.equal(masks[layer], others[layer]) for layer in masks)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_compiled_losses_equal_plain_ones(algo, precision, monkeypatch):
    """Each loss is traced whole, without a break, and differentiated ahead of time; without the code generator, which
    takes minutes on a CPU."""
    plain, compiled = compiled_pair(algo, precision, "aot_eager", monkeypatch)
    assert compiled.mask_and_clip == type(compiled).mask_and_clip.__get__(compiled)  # plain on a CPU ...
    compiled.mask_and_clip = torch.compile(compiled.mask_and_clip, fullgraph=True, dynamic=False)  # ... not so on CUDA
    check_updates_alike(plain, compiled, precision)


@pytest.mark.slow
def test_masking_is_compiled_once_per_module():
    """Not anew at each update, which would fail at the compiler's limit."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds to import
    agent, compiled = tiny_of("mrq", interval=60, total_updates=3000)[0], CompileCounterWithBackend("eager")
    agent.mask_and_clip = torch.compile(agent.mask_and_clip, backend=compiled, fullgraph=True, dynamic=False)
    counts = []
    for _ in range(4):
        agent.update()
        counts.append(compiled.frame_count)
    assert counts == [3] * 4


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("algo, precision, methods", [("ddpg", "bf16", ("critic_loss",)),
                                                      *[pytest.param(algo, precision, None, marks=pytest.mark.soak)
                                                        for algo in REPLAY_AGENTS for precision in ("fp32", "bf16")]])
def test_losses_by_the_real_compiler_equal_plain_ones(algo, precision, methods, monkeypatch):
    """Dense, as rounding could make a topology update choose other weights."""
    pair = compiled_pair(algo, precision, "inductor", monkeypatch, regimes_dense(algo), methods)
    check_updates_alike(*pair, precision)


@pytest.mark.slow
@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_compiled_bfloat16_losses_use_the_opaque_product(algo, monkeypatch):
    plain, compiled = compiled_pair(algo, "bf16", "aot_eager", monkeypatch)
    heads = []  # every call of a last layer, which stays in float32 and PyTorch's own
    for layer in plain.float32_layers():
        layer.register_forward_hook(lambda *_: heads.append(1))
    for step in range(3):  # the last one's calls are counted: tracing makes some of its own
        calls = {}
        heads.clear()
        for agent in (plain, compiled):
            torch.manual_seed(step)
            with torch.profiler.profile() as profile:
                agent.update()
            calls[agent] = {event.key: event.count for event in profile.key_averages()}
    # All products of the compiled losses, forward and backward, except the heads': three per call at most. `encode` is
    # not compiled.
    count = lambda *names: sum(calls[compiled].get(name, 0) for name in names)
    products = count("module_specific::linear")
    assert 0 <= count("aten::mm", "aten::addmm") - products - count("BFloat16Linear") <= 3 * len(heads) < products
    assert "module_specific::linear" not in calls[plain]
