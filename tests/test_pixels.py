"""Tests of pixels: stacks against a plain queue, the shift by hand, the encoder against naive convolutions, masks."""

import dataclasses
import functools
import json
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import metrics
import pixels
from agents import build_agent, count_parameters, replay_rows
from networks import Encoder
from pixels import FrameReplayBuffer, PixelEncoder, PixelMRQ, PixelMRSAC, random_shift
from runtime import fast
from settings import check, diff_settings, from_config, parse, plan_notes, run_name
from sparsity import SparseTraining
from tests.helpers import layer_norm, naive_activation, property_test, refuses
from tests.naive import MOVING, UNEQUAL, Naive, Noise, between, double
from tools.bench_pixels import plain_shift

AGENTS = {"mrq": PixelMRQ, "mrsac": PixelMRSAC}


class Queue:
    """Frames as an environment stacks them; each frame is one number."""

    def __init__(self, stack):
        self.frames, self.count = deque(maxlen=stack), 0

    def frame(self):
        self.count += 1
        return np.full((3, 2, 2), self.count % 251, np.uint8)

    def reset(self):
        first = self.frame()
        self.frames.extend([first] * self.frames.maxlen)
        return np.concatenate(self.frames)

    def step(self):
        self.frames.append(self.frame())
        return np.concatenate(self.frames)


def play_frames(seed, capacity, horizon, steps, stack):
    """A buffer of random episodes, and the same episodes as plain lists: (row, obs, next_obs, terminated)."""
    rng, queue = np.random.RandomState(seed), Queue(stack)
    buffer = FrameReplayBuffer((3 * stack, 2, 2), 1, capacity, horizon, shift=0)
    episodes, row, obs = [[]], 0, queue.reset()
    for _ in range(steps):
        next_obs, terminated, truncated = queue.step(), rng.rand() < 0.08, rng.rand() < 0.08
        buffer.add(obs, [0], 0.0, next_obs, terminated, truncated)
        episodes[-1].append((row, obs, next_obs, terminated))
        row, obs = row + 1, next_obs
        if terminated or truncated:
            episodes.append([])
            row, obs = row + 1, queue.reset()
    return buffer, episodes


@property_test
@given(st.integers(0, 10**6), st.integers(24, 90), st.integers(1, 5), st.integers(1, 250), st.integers(1, 4))
def test_every_stack_equals_the_queue(seed, capacity, horizon, steps, stack):
    buffer, episodes = play_frames(seed, capacity, horizon, steps, stack)
    latest = max(step[0] for episode in episodes for step in episode) + 1
    expected = {}
    for episode in episodes:
        for start in range(len(episode)):
            part = episode[start:start + horizon]
            # Not overwritten, nor any frame of its first stack, whatever the length of its history.
            if (len(part) == horizon or part[-1][3]) and part[0][0] - (stack - 1) > latest - capacity:
                expected[part[0][0] % capacity] = part
    assert set(buffer.priority.nonzero().flatten().tolist()) == set(expected)
    if not expected:
        return
    batch = buffer.gather(torch.tensor(sorted(expected)), horizon)
    for number, row in enumerate(sorted(expected)):
        for t, (_, obs, next_obs, _) in enumerate(expected[row]):
            np.testing.assert_array_equal(batch.obs[number, t], obs)
            np.testing.assert_array_equal(batch.obs[number, t + 1], next_obs)


@pytest.mark.parametrize("steps", [60, 200])
def test_a_frame_buffer_comes_back_from_what_it_saved(steps):
    buffer, _ = play_frames(3, 90, 3, steps, 3)
    other = FrameReplayBuffer((9, 2, 2), 1, 90, 3, shift=0)
    other.load_rows(*buffer.rows_since(0))
    other.load_state_dict(buffer.state_dict())
    rows = buffer.priority.nonzero().flatten()
    assert len(rows) > 10
    for one, two in zip(buffer.gather(rows), other.gather(rows)):
        assert torch.equal(one, two)
    assert buffer.rows_since(buffer.position - 4)[1]["frames"].shape == (5, 3, 2, 2)  # only the new frames


def test_a_batch_of_ends_holds_the_first_and_the_last_stack():
    buffer, _ = play_frames(3, 90, 3, 60, 3)
    rows = buffer.priority.nonzero().flatten()
    whole, ends = buffer.gather(rows, 2), buffer.gather(rows, 2, ends=True)
    assert torch.equal(ends.obs, whole.obs[:, [0, 2]])
    assert all(torch.equal(one, two) for one, two in zip(ends[2:], whole[2:]))


def test_frames_are_stored_once_and_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(pixels, "free_memory", lambda device: 22e9)
    buffer = FrameReplayBuffer((9, 84, 84), 6, 1_000_000, device="meta")
    size = sum(value.numel() * value.element_size() for value in vars(buffer).values() if torch.is_tensor(value))
    assert 21.1e9 < buffer.stored_bytes < size < 21.3e9
    monkeypatch.setattr(pixels, "free_memory", lambda device: 1e9)
    with pytest.raises(MemoryError, match="1,000,000 frames of 84×84 takes 21.22 GB, but cpu has 1.00 GB: use"):
        FrameReplayBuffer((9, 84, 84), 6, 1_000_000)
    for free, place in ((28e9, "cpu"), (29e9, "cuda")):  # of 21.3 GB: a GPU needs memory for the updates, too
        monkeypatch.setattr(pixels, "free_memory", lambda device: free if device.type == "cuda" else 22e9)
        blank = object.__new__(FrameReplayBuffer)
        blank.capacity, blank.obs_shape, blank.action_dim = 1_000_000, (9, 84, 84), 6
        blank.device = torch.device("cuda")
        blank._check_memory(blank.capacity)
        assert blank.frame_device.type == place
    with pytest.raises(ValueError, match="not \\(8, 84, 84\\)"):
        FrameReplayBuffer((8, 84, 84), 6, 1000)


def test_shift_by_hand(monkeypatch):
    image = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5)
    for down, right, corner in ((0, 0, 0), (-2, -2, 0), (2, 2, 12), (2, -2, 10), (-2, 2, 2)):
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, device: torch.tensor([down, right]).view(shape))
        moved = random_shift(image, 2)
        padded = np.pad(image[0, 0].numpy(), 2, mode="edge")
        np.testing.assert_array_equal(moved[0, 0], padded[2 + down:7 + down, 2 + right:7 + right])
        assert moved[0, 0, 0, 0] == corner


@pytest.mark.parametrize("pad", [1, 4, 9])
def test_both_forms_of_the_shift_are_the_same(pad):
    images = torch.randint(0, 256, (50, 6, 8, 7), dtype=torch.uint8)
    shift = torch.randint(-pad, pad + 1, (2, 50))
    assert torch.equal(pixels.shift_by_copy(images, shift, pad), pixels.shift_by_index(images, shift, pad))


def test_the_shift_that_bench_compares_with_is_the_same(monkeypatch):
    obs = torch.randint(0, 256, (8, 5, 6, 20, 20), dtype=torch.uint8)
    corner = torch.randint(0, 9, (2, 40, 1))  # 4 is no shift
    monkeypatch.setattr(torch, "randint", lambda *of, **named: corner)
    moved = pixels.shift_by_copy(obs.flatten(0, 1), corner.squeeze(2) - 4, 4)
    torch.testing.assert_close(plain_shift(obs, 4).flatten(0, 1), moved.float(), rtol=0, atol=0.01)


def test_shift_moves_the_frames_of_a_stack_alike_and_stacks_apart():
    torch.manual_seed(0)
    frame = torch.randint(0, 256, (12, 12), dtype=torch.uint8)
    obs = frame.expand(40, 6, 9, 12, 12)
    moved = random_shift(obs, 4)
    assert moved.shape == obs.shape and moved.dtype == torch.uint8
    assert (moved == moved[:, :, :1]).all()
    found = {moved[i, t, 0].numpy().tobytes() for i in range(40) for t in range(6)}
    every = np.pad(frame.numpy(), 4, mode="edge")
    every = {np.ascontiguousarray(every[y:y + 12, x:x + 12]).tobytes() for y in range(9) for x in range(9)}
    assert found <= every and len(found) > 70  # of 81; 240 draws miss 4 on average
    assert random_shift(obs, 0) is obs


def naive_convolution(x, layer):
    """Loops over outputs. x: (channels, height, width) float64."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    stride, size = layer.stride[0], (x.shape[1] - 3) // layer.stride[0] + 1
    out = np.zeros((len(weight), size, size))
    for i in range(size):
        for j in range(size):
            out[:, i, j] = (weight * x[:, stride * i:stride * i + 3, stride * j:stride * j + 3]).sum((1, 2, 3)) + bias
    return out


@pytest.mark.parametrize("arch_type", [1, 2, 3, 4, 5, 6])
def test_encoder_against_naive_convolutions(arch_type):
    torch.manual_seed(0)
    encoder = PixelEncoder((6, 36, 36), 2, arch_type, width_scale=1 / 16)
    for layer in encoder.zs_mlp.convs[::2]:
        torch.nn.init.normal_(layer.bias)
    obs = torch.randint(0, 256, (2, 6, 36, 36), dtype=torch.uint8)
    config = pixels.arch_config(arch_type)
    activation = naive_activation(config)
    rows = []
    for image in obs:
        x = image.double().numpy() / 255 - 0.5
        for layer in encoder.zs_mlp.convs[::2]:
            x = activation(torch.from_numpy(naive_convolution(x, layer))).numpy()
        rows.append(x.ravel())
    x = torch.from_numpy(np.stack(rows)).float() @ encoder.zs_mlp.linear.weight.T + encoder.zs_mlp.linear.bias
    expected = activation(layer_norm(x) if config["use_layer_norm"] else x)
    torch.testing.assert_close(encoder.zs(obs), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # in pieces, with any leading shape, and of one observation
        many = obs.repeat(40, 1, 1, 1)
        torch.testing.assert_close(encoder.zs(many)[-2:], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.zs(many.unflatten(0, (8, 10)))[-1, -2:], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.zs(obs[0]), expected[0], rtol=1e-4, atol=1e-5)


def test_sizes():
    for scale, channels in ((1, 32), (3, 96), (0.5, 16), (1 / 512, 1)):
        encoder = PixelEncoder((9, 84, 84), 6, scale=scale)
        convs = encoder.zs_mlp.convs[::2]
        assert [layer.out_channels for layer in convs] == [channels] * 4
        assert encoder.zs_mlp.linear.in_features == 49 * channels
    plain, count = Encoder(1, 6), lambda module: sum(p.numel() for p in module.parameters())
    encoder = PixelEncoder((9, 84, 84), 6)
    stem = (9 * 9 + 1) * 32 + 3 * (9 * 32 + 1) * 32 + (1568 + 1) * 512
    assert count(encoder) == count(plain) - count(plain.zs_mlp) + stem
    for size in range(31, 130):  # the formula against PyTorch's own shapes
        x = torch.empty(1, 9, size, size, device="meta")
        assert encoder.zs_mlp.convs.to("meta")(x).shape[2:] == (pixels.conv_size(size),) * 2
    with pytest.raises(ValueError, match="at least 31 pixels"):
        PixelEncoder((9, 30, 30), 6)


def test_densities_of_the_published_er():
    """visual.md's figures, from the function that agrees with RigL's ERK: the first convolution stays dense at 0.8."""
    for sparsity, first, rest, linear in ((0.6, 1, 0.90, 0.31), (0.8, 1, 0.45, 0.15), (0.9, 0.54, 0.22, 0.08)):
        encoder = PixelEncoder((9, 84, 84), 6)
        sparse = SparseTraining(encoder, torch.optim.AdamW(encoder.parameters()), "sst", sparsity, total_steps=100)
        densities = sparse.layer_densities()
        found = [densities[f"zs_mlp.{name}.weight"] for name in ("convs.0", "convs.2", "linear")]
        assert found == pytest.approx([first, rest, linear], abs=0.006)


@pytest.mark.parametrize("regime", ["sst", "dst", "s2d", "d2s"])
def test_masked_convolutions_stay_zero(regime):
    torch.manual_seed(0)
    encoder = PixelEncoder((9, 36, 36), 2, arch_type=6, width_scale=1 / 16)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    sparse = SparseTraining(encoder, optimizer, regime, 0.9, total_steps=20, update_interval=3)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    obs, action = torch.randint(0, 256, (8, 9, 36, 36), dtype=torch.uint8), torch.randn(8, 2)
    convs = dict(encoder.zs_mlp.convs.named_children())
    for step in range(1, 16):
        optimizer.zero_grad()
        encoder.predict(encoder(encoder.zs(obs), action))[1].square().sum().backward()
        sparse.update_topology(step)
        sparse.mask_gradients()
        optimizer.step()
        for number in ("2", "4", "6"):
            pruned = ~sparse.masks[f"zs_mlp.convs.{number}.weight"]
            assert pruned.any() or regime in ("s2d", "d2s")
            assert not convs[number].weight[pruned].any() and not convs[number].weight.grad[pruned].any()
    assert regime == "s2d" or pruned.any()
    moved = any(not torch.equal(before[name], mask) for name, mask in sparse.masks.items() if "convs" in name)
    assert moved == (regime != "sst")


def test_dormant_channels_by_hand():
    encoder = PixelEncoder((9, 36, 36), 2, arch_type=1, width_scale=1 / 4)
    with torch.no_grad():
        encoder.zs_mlp.convs[0].weight[:3] = 0  # three channels of eight whose ReLU stays at 0
        encoder.zs_mlp.convs[0].bias[:3] = -1
        with metrics.record_activations(encoder) as activations:
            encoder.zs(torch.randint(0, 256, (70, 9, 36, 36), dtype=torch.uint8))
    assert activations["zs_mlp.convs.1"].shape == (70 * 17 * 17, 8)  # all images, not the last piece of 32
    assert metrics.dormant_ratio(activations)[1]["zs_mlp.convs.1"] >= 3 / 8


def tiny_agent(algo, seed=0, device="cpu", **modules):
    agent_class = AGENTS[algo]
    torch.manual_seed(seed)
    presets = agent_class.Config.presets["mst"]
    modules = {name: dataclasses.replace(m, width_scale=1 / 32, sparse_options={"update_interval": 3},
                                         **modules.get(name, {})) for name, m in presets.items()}
    config = agent_class.Config(batch_size=16, target_update_freq=4)
    agent = agent_class((9, 36, 36), 2, modules, config, 40, device, seed, buffer_size=200)
    fill_with_frames(agent, 60, seed)
    return agent


def fill_with_frames(agent, steps, seed):
    """Random frames, actions and rewards, in episodes of 20 steps. Returns the rewards."""
    rng, (channels, *size) = np.random.RandomState(seed), agent.replay.obs_shape
    obs, rewards = rng.randint(0, 256, (channels, *size), np.uint8), rng.rand(steps)
    for t, reward in enumerate(rewards):
        next_obs = np.concatenate([obs[3:], rng.randint(0, 256, (3, *size), np.uint8)])
        agent.add(obs, rng.randn(2), reward, next_obs, False, t % 20 == 19)
        obs = next_obs
    return rewards


@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.parametrize("regime", ["dense", "sst", "dst", "s2d", "d2s"])
def test_agents_learn_from_pixels(algo, regime):
    agent = tiny_agent(algo, encoder={"regime": regime})
    before = {name: parameter.clone() for name, parameter in agent.encoder.named_parameters()}
    for _ in range(9):
        agent.update()
    assert agent.nonfinite_report() is None
    assert all(not torch.equal(before[name], p) for name, p in agent.encoder.named_parameters() if "bias" not in name)
    if regime != "dense":
        for name, mask in agent.sparse["encoder"].masks.items():
            assert not dict(agent.encoder.named_parameters())[name][~mask].any()
    obs = np.random.RandomState(0).randint(0, 256, (3, 9, 36, 36), np.uint8)
    actions = agent.act(obs, explore=False)
    np.testing.assert_allclose(agent.act(obs[1], explore=False), actions[1], atol=1e-5)
    assert actions.shape == (3, 2) and np.abs(actions).max() <= 1


def built(*flags):
    """The agent of a command line, on a task with two action dimensions."""
    args = parse(["--width-scale", "0.05", "--total-steps", "400", "--learning-starts", "100", *flags])
    check(args)
    shape = (3 * args.pixel.frame_stack, args.pixel.image_size, args.pixel.image_size)
    return args, build_agent(args, shape, 2, torch.device("cpu"))


def test_every_flag_reaches_the_agent_and_the_name():
    base, usual = built("--pixels", "--algo", "mrsac", "--image-size", "40", "--encoder-regime", "sst")
    assert type(usual) is PixelMRSAC and type(built("--pixels")[1]) is PixelMRQ and usual.replay.shift == 4
    assert "__pixels__image-size=40" in run_name(base)
    for flag, value, read in (("--image-size", 36, lambda agent: agent.replay.obs_shape[1]),
                              ("--frame-stack", 2, lambda agent: agent.replay.stack),
                              ("--shift", 0, lambda agent: agent.replay.shift)):
        args, agent = built("--pixels", "--algo", "mrsac", "--image-size", "40", "--encoder-regime", "sst", flag,
                            str(value))
        assert read(agent) == value != read(usual) and f"{flag[2:]}={value}" in run_name(args)
        assert diff_settings(base, args).startswith(flag)
    counts = count_parameters(base, (9, 40, 40), 2)
    assert counts["encoder"] + sum(p.numel() for p in usual.encoder.model.parameters()) == sum(
        p.numel() for p in usual.encoder.parameters())
    assert from_config(json.loads(json.dumps(dataclasses.asdict(base)))) == base
    old = {name: value for name, value in dataclasses.asdict(parse([])).items() if name != "pixel"}
    assert from_config(old) == parse([])  # a run from before there were pixels


def test_flags_that_cannot_work_are_refused_or_noted():
    for algo in ("sac", "ddpg", "stream"):
        refuses(lambda: check(parse(["--algo", algo, "--pixels"])),
                f"--pixels: {algo} learns from states; mrq and mrsac")
    refuses(lambda: check(parse(["--pixels", "--image-size", "30"])), "--image-size must lie in [31, 1000], not 30")
    idle = parse(["--algo", "sac", "--image-size", "64", "--shift", "2"])
    check(idle)
    assert run_name(idle) == run_name(parse(["--algo", "sac"]))
    assert "note: --image-size, --shift changes nothing without --pixels" in plan_notes(idle)
    assert plan_notes(parse(["--pixels", "--image-size", "64"])) == []


def test_frames_on_the_host_are_not_captured(monkeypatch):
    captured = []
    monkeypatch.setattr(fast, "captured", captured.append)
    monkeypatch.setattr(fast, "resolve_speed", lambda *of: (False, True, []))
    for on_host, count in ((False, 1), (True, 1)):
        if on_host:
            check_memory = FrameReplayBuffer._check_memory

            def host(self, padded):
                check_memory(self, padded)
                self.frame_device = torch.device("cuda")  # another one than the agent's
            monkeypatch.setattr(FrameReplayBuffer, "_check_memory", host)
            monkeypatch.setattr(FrameReplayBuffer, "_allocate_obs", lambda self: None)
        built("--pixels", "--image-size", "40")
        assert len(captured) == count
    refuses(lambda: built("--pixels", "--image-size", "40", "--cuda-graphs", "on"),
            "--cuda-graphs: the frames do not fit")


def test_a_run_of_half_a_million_steps_takes_10_6_gigabytes():
    rows = replay_rows(parse(["--pixels"]), shortest_episode=250)  # half of an episode's 500 agent steps
    assert rows == 500_000 + 2_000 + 12 and 10.6e9 < rows * (84 * 84 * 3 + 8 + 4 * 9) < 10.67e9
    assert replay_rows(parse(["--pixels"])) == 1_000_000  # where episodes may end at any step
    assert replay_rows(parse(["--pixels", "--buffer-size", "7000"]), 250) == 7000


def test_training_shifts_and_metrics_do_not():
    agent = tiny_agent("mrq")
    rows = torch.arange(5)
    plain = agent.replay._stacks((rows.unsqueeze(1) + torch.arange(6)) % 200)
    assert not torch.equal(agent.replay.gather(rows).obs, plain)
    drawn, ready = agent.metric_batch(2048)
    assert ready and drawn.obs.shape == (256, 6, 9, 36, 36)
    assert torch.equal(drawn.obs, agent.replay._stacks((drawn.index.unsqueeze(1) + torch.arange(6)) % 200))
    assert agent.replay.shift == 4


class NaivePixels(Naive):
    """Convolutions as products: each output is a flattened patch times a flattened kernel."""

    def zs(self, encoder, obs, seen=None):
        config = pixels.arch_config(self.modules["encoder"].arch_type)
        activation, layers, x = naive_activation(config), encoder.zs_mlp, obs / 255 - 0.5
        for conv in layers.convs[::2]:
            size = (x.shape[-1] - 3) // conv.stride[0] + 1
            patches = torch.nn.functional.unfold(x, 3, stride=conv.stride)  # (batch, 9 · channels, positions)
            x = activation(conv.weight.flatten(1) @ patches + conv.bias.unsqueeze(1)).unflatten(2, (size, size))
        x = x.flatten(1) @ layers.linear.weight.T + layers.linear.bias
        return activation(layer_norm(x) if config["use_layer_norm"] else x)


@pytest.mark.parametrize("algo, regimes", [("mrq", ("dst", "d2s", "dst")), ("mrsac", ("d2s", "dst", "s2d"))])
def test_whole_pixel_update_against_a_second_implementation(algo, regimes, monkeypatch):
    """Weights, targets, masks and everything logged, over nine updates on shifted stacks."""
    config = AGENTS[algo].Config
    modules = {name: dataclasses.replace(module, regime=regime, width_scale=width / 64, sparse_options=MOVING)
               for (name, module), regime, width in zip(config.presets["mst"].items(), regimes, (4, 1.5, 2))}
    known = {spec.name for spec in dataclasses.fields(config)}
    config = config(encoder_horizon=2, q_horizon=3, **{key: value for key, value in UNEQUAL.items() if key in known})
    torch.manual_seed(3)
    agent = AGENTS[algo]((6, 33, 33), 2, modules, config, 9, seed=3, buffer_size=100, shift=2)
    for network in agent.networks.values():
        for parameter in network.parameters():  # biases that matter
            parameter.data += 0.1 * torch.randn_like(parameter) * (parameter != 0 if parameter.ndim > 1 else 1)
    rewards = fill_with_frames(agent, 60, seed=3)
    for network in (*agent.networks.values(), *agent.targets.values()):
        network.double()
    agent.bins = agent.bins.double()
    naive, noise, drawn, gather = NaivePixels(agent, modules, 9), Noise(monkeypatch), [], agent.replay.gather
    update_priority = agent.replay.update_priority

    def double_gather(index, horizon=None, ends=False):
        batch = double(gather(index, horizon, ends))
        drawn.append(between(batch) if ends else batch)
        return batch

    monkeypatch.setattr(agent.replay, "gather", double_gather)
    monkeypatch.setattr(agent.replay, "update_priority", lambda index, error: update_priority(index, error.float()))
    first_masks = {name: mask.clone() for name, mask in agent.sparse["encoder"].masks.items()}
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)
    for _ in range(9):
        drawn.clear()
        noise.calls = 0
        agent.update()
        noise.calls = 0
        naive.update(drawn, rewards, 0.0)
        assert {key: value.mean().item() for key, value in agent.info.items()} == pytest.approx(naive.info, rel=1e-5,
                                                                                               abs=1e-7)
        for name, network in naive.networks.items():
            close(list(agent.networks[name].parameters()), list(network.parameters()))
            close(list(agent.targets[name].parameters()), list(naive.targets[name].parameters()))
            assert all(torch.equal(mask, naive.masks[name][n]) for n, mask in agent.sparse[name].masks.items())
    assert any(not torch.equal(mask, first_masks[name]) for name, mask in agent.sparse["encoder"].masks.items()
               if "convs" in name)
