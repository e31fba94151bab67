"""Stream AC(λ): ObGD, SparseInit, the hand-written backward pass, growth, exact zeros, a plain implementation."""

import copy
import importlib.util
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn

from base import ModuleConfig
from obgd import ObGD, sparse_init
from online import FastMLP, StreamMLP
from runtime import checkpoint
from settings import check, parse
from stream import RewardScale, RunningStats, StreamAC, StreamConfig, TimedEnv
from tests.helpers import in_process, refuses, timeless
from tests.naive_stream import Plain

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")


def modules(critic="dst", actor="sst", sparsity=0.8, width=0.125, **options):
    """Small modules of these regimes, whose topology changes every 100 updates."""
    options = {"update_interval": 100} | options
    return {"critic": ModuleConfig("stream", critic, width, 1.0, sparsity, sparse_options=options),
            "actor": ModuleConfig("stream", actor, width, 1.0, sparsity, sparse_options=options)}


def transitions(steps, obs_dim=5, action_dim=2, seed=0):
    """A made-up task: (obs, reward, next_obs, terminated, truncated) for an action, with both kinds of ending."""
    random = np.random.RandomState(seed)
    mix = random.randn(obs_dim, action_dim)
    obs, time = random.randn(obs_dim).astype(np.float32), 0

    def step(action):
        nonlocal obs, time
        time += 1
        next_obs = (0.9 * obs + 0.1 * mix @ np.clip(action, -1, 1) + 0.3 * random.randn(obs_dim)).astype(np.float32)
        next_obs[-1] = -0.5 + time / 40
        terminated = bool(random.rand() < 0.02)
        truncated = not terminated and time == 40
        result = obs, float(3.0 * next_obs[0] + 0.2), next_obs, terminated, truncated
        obs = next_obs
        if terminated or truncated:
            obs, time = random.randn(obs_dim).astype(np.float32), 0
            obs[-1] = -0.5
        return result

    return lambda: obs, step


def play(agent, steps, seed=0, each=None):
    """Trains the agent on `transitions`; calls each(step) after each step."""
    current, step = transitions(steps, agent.window["obs"].shape[1], agent.action_dim, seed)
    for number in range(1, steps + 1):
        obs = current()
        agent.update_obs_stats(obs)
        action = agent.act(obs, explore=True)
        seen, reward, next_obs, terminated, truncated = step(action)
        agent.add(obs, action, reward, next_obs, terminated, truncated)
        if each:
            each(number)


# ---- ObGD and SparseInit ----

def test_obgd_on_two_weights_by_hand():
    weights = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = ObGD([weights], kappa=2.0, decay=0.5)
    weights.grad = torch.tensor([0.3, -0.1], dtype=torch.float64)  # z is this, ‖z‖₁ = 0.4, M = 2·3·0.4 = 2.4
    optimizer.step(delta=-3.0)
    np.testing.assert_allclose(weights.detach(), [1.0 + 3.0 * 0.3 / 2.4, -2.0 - 3.0 * 0.1 / 2.4], rtol=1e-14)
    before = weights.detach().clone()
    weights.grad = torch.tensor([0.05, 0.05], dtype=torch.float64)  # z = (0.2, 0.0); M = 2·1·0.2 = 0.4: not bounded
    optimizer.step(delta=0.25, reset=True)
    expected = before - 0.25 * torch.tensor([0.2, 0.0], dtype=torch.float64)
    np.testing.assert_allclose(weights.detach(), expected, rtol=1e-14)
    assert optimizer.state[weights]["trace"].eq(0).all()  # the episode has ended
    with pytest.raises(FloatingPointError):
        optimizer.step(delta=math.nan)
    np.testing.assert_allclose(weights.detach(), expected, rtol=1e-14)


def test_obgd_trains_any_module_and_stays_tied_after_loading():
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    optimizer = ObGD(network.parameters(), kappa=2.0, decay=0.9)
    other = nn.Linear(3, 1)
    twin = ObGD(other.parameters(), kappa=2.0, decay=0.9)
    x = torch.randn(2, 3)
    for row in x:
        optimizer.zero_grad()
        (-network(row)).sum().backward()
        optimizer.step(0.7)
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, net in ((optimizer, network), (twin, other)):
        one.zero_grad()
        (-net(x[0])).sum().backward()
        one.step(-0.4, reset=True)
    np.testing.assert_array_equal(optimizer.weights, twin.weights)
    flat = torch.cat([p.detach().flatten() for p in other.parameters()]).numpy()
    np.testing.assert_array_equal(flat, twin.weights)  # parameters are still views
    with pytest.raises(ValueError, match="one dtype"):
        ObGD([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))], 1.0, 0.9)


@pytest.mark.parametrize("fan_in, zeros", [(6, 5), (10, 9), (24, 22), (128, 116), (190, 171)])
def test_sparse_init_counts_bounds_and_biases(fan_in, zeros):
    layer = nn.Linear(fan_in, 40)
    sparse_init(layer, 0.9)
    assert (layer.weight == 0).sum(1).eq(zeros).all()
    assert len({tuple(row) for row in (layer.weight == 0).tolist()}) > 1  # each unit draws its own
    assert 0.7 * fan_in ** -0.5 < layer.weight.abs().max() <= fan_in ** -0.5 and layer.bias.eq(0).all()
    sparse_init(layer, 0.0)
    assert layer.weight.ne(0).all()


# ---- the network by hand against autograd ----

@pytest.mark.parametrize("depth", [1, 2, 3])
def test_numpy_network_matches_autograd(depth):
    torch.manual_seed(depth)
    network = StreamMLP(7, [3, 3], 16, depth).double()
    optimizer = ObGD(network.parameters(), 2.0, 0.9)
    fast, x = FastMLP(network, optimizer.weights), torch.randn(7, dtype=torch.float64)
    outputs, tape = fast.forward(x.numpy())
    expected = network(x)
    for one, other in zip(outputs, expected):
        np.testing.assert_allclose(one, other.detach(), rtol=1e-10, atol=1e-12)
    grads = [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    torch.autograd.backward(expected, grads)
    factors = fast.backward(tape, [grad.numpy() for grad in grads])
    found = [part for d, x in factors for part in (np.outer(d, x), d)]
    for parameter, gradient in zip(network.parameters(), found, strict=True):
        np.testing.assert_allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-11)
    names = [type(layer).__name__ for layer in network.hidden[0]]
    assert names == ["Linear", "LayerNorm", "LeakyReLU"] and network.hidden[0][1].weight is None


# ---- statistics ----

def test_running_statistics_match_numpy():
    values, stats = np.random.RandomState(0).randn(500, 3) * [1, 5, 0.1] + [0, 2, -7], RunningStats(3)
    assert stats.std() == pytest.approx(1.0)
    for count, value in enumerate(values, 1):
        stats.update(value)
        if count == 1:
            assert stats.std() == pytest.approx(1.0)  # as published
        elif count in (2, 50, 500):
            np.testing.assert_allclose(stats.std(0.0), values[:count].std(0, ddof=1), rtol=1e-10)
            np.testing.assert_allclose(stats.mean, values[:count].mean(0), rtol=1e-10)


def test_reward_scale_over_episode_ends():
    rewards, ends = [1.0, 2.0, -1.0, 4.0, 0.5], [False, False, True, False, False]
    scale, u, trace = RewardScale(0.9, 10.0), 0.0, []
    for reward, over in zip(rewards, ends):
        u = (0.0 if over else 0.9 * u) + reward
        trace.append(u)
        variance = np.var(trace, ddof=1) if len(trace) > 1 else 1.0
        assert scale(reward, over) == pytest.approx(reward / math.sqrt(variance + 1e-8), rel=1e-9)


def test_first_reward_after_many_zeros_is_clipped():
    for clip, expected in ((10.0, 10.0), (math.inf, pytest.approx(100.0, rel=0.01))):
        scale = RewardScale(0.99, clip)
        for _ in range(10_000):
            assert scale(0.0, False) == 0.0
        assert scale(1.0, False) == expected


# ---- a second, plain implementation of whole steps ----

@pytest.mark.slow
@pytest.mark.parametrize("critic, actor, settings", [
    ("dense", "dense", {}),
    ("dst", "sst", {"time_limit": "bootstraps", "entropy_weight": 0.2, "discount": 0.95, "critic_kappa": 1.7}),
    ("s2d", "d2s", {"step_size": 0.3, "trace_decay": 0.5, "actor_kappa": 2.6, "sparse_init": 0.0, "reward_clip": 0.8})])
def test_agent_matches_a_plain_implementation_over_thousands_of_steps(critic, actor, settings):
    torch.manual_seed(1)
    agent = StreamAC(5, 2, modules(critic, actor, grow="gradient"), StreamConfig(**settings), 2000, seed=3,
                     dtype=torch.float64)
    plain, steps = Plain(agent), 2000
    current, step = transitions(steps)
    start = True
    for number in range(steps):
        obs = current()
        agent.update_obs_stats(obs)
        action = agent.act(obs, explore=True)
        _, reward, next_obs, terminated, truncated = step(action)
        agent.add(obs, action, reward, next_obs, terminated, truncated)
        delta = plain.add(obs, action, reward, next_obs, terminated, truncated, start)
        start = terminated or truncated
        assert delta == pytest.approx(agent.recent[number % len(agent.recent), 0].item(), rel=1e-6, abs=1e-8)
    for name, net in plain.nets().items():
        for one, other in zip(net.parameters(), agent.networks[name].parameters()):
            np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-6, atol=1e-9)
        flat = torch.cat([z.flatten() for z in plain.traces[name]])
        np.testing.assert_allclose(flat, agent.optimizers[name].traces, rtol=1e-6, atol=1e-9)
    bounded = agent.info["actor/bounded"].item()
    assert bounded > 0.5  # the bound is what sets the step


def test_growth_sums_match_a_dense_twin():
    """Σ δ·z̃ until the first change equals that of unmasked traces; the change grows the largest of them."""
    torch.manual_seed(0)
    agent = StreamAC(5, 2, modules("dst", "dst"), total_updates=1000, dtype=torch.float64)
    plain = Plain(agent)
    current, step = transitions(120)
    start = True
    for number in range(1, 121):
        obs = current()
        agent.update_obs_stats(obs)
        action = agent.act(obs, explore=True)
        _, reward, next_obs, terminated, truncated = step(action)
        old = {name: {key: mask.clone() for key, mask in sparse.masks.items()} for name, sparse in agent.sparse.items()}
        agent.add(obs, action, reward, next_obs, terminated, truncated)
        plain.add(obs, action, reward, next_obs, terminated, truncated, start)
        start = terminated or truncated
        if number == 99:
            for name, learner in agent.learners.items():
                sums = torch.cat([total.flatten() for total in plain.sums[name]])
                np.testing.assert_allclose(learner.scores, sums, rtol=1e-8, atol=1e-10)
                assert np.count_nonzero(learner.scores) > np.count_nonzero(learner.mask)  # pruned weights have scores
        if number == 100:
            for name, sparse in agent.sparse.items():
                keys = [key for key, _ in agent.networks[name].named_parameters()]
                for key, total in zip(keys, plain.sums[name]):
                    if key in sparse.masks and not sparse.masks[key].all():
                        grown = sparse.masks[key] & ~old[name][key]
                        never = ~sparse.masks[key] & ~old[name][key]
                        assert total[grown].abs().min() >= total[never].abs().max()
            assert not agent.learners["critic"].scores.any()  # they start again


# ---- exact zeros ----

@pytest.mark.parametrize("regime, grow, score", [*((regime, "gradient", "sum") for regime in REGIMES),
                                                 ("dst", "gradient", "last"), ("dst", "random", "sum")])
def test_pruned_weights_and_traces_are_exactly_zero(regime, grow, score):
    torch.manual_seed(0)
    networks = modules(regime, regime, grow=grow, update_interval=40)
    agent = StreamAC(5, 2, networks, StreamConfig(growth_score=score), 400)
    before = {name: {key: mask.clone() for key, mask in sparse.masks.items()} for name, sparse in agent.sparse.items()}
    densities, changes = [], 0

    def check(number):
        nonlocal changes
        for name, sparse in agent.sparse.items():
            for key, parameter in agent.networks[name].named_parameters():
                if key in sparse.masks:
                    mask, trace = sparse.masks[key], agent.optimizers[name].state[parameter]["trace"]
                    assert not parameter[~mask].any() and not trace[~mask].any()
                    grown = mask & ~before[name][key]
                    if grown.any():
                        changes += 1
                        assert not parameter[grown].any() and not trace[grown].any()  # starts at 0, without a trace
                        before[name][key] = mask.clone()
                    before[name][key] &= mask
        densities.append(agent.sparse["critic"].density())

    play(agent, 400, each=check)
    first, last = densities[0], densities[-1]
    expected = {"dense": (1.0, 1.0), "sst": (0.2, 0.2), "dst": (0.2, 0.2), "s2d": (0.2, 1.0), "d2s": (1.0, 0.2)}[regime]
    assert (first, last) == pytest.approx(expected, abs=3e-3)
    assert (changes > 5) == (regime in ("dst", "s2d"))  # here d2s drops more than ζ asks for, and grows nothing
    assert all(parameter.isfinite().all() for network in agent.networks.values() for parameter in network.parameters())


# ---- the agent's doors ----

def test_state_restores_the_agent_exactly():
    def agent():
        torch.manual_seed(0)
        return StreamAC(5, 2, modules(), total_updates=600)

    straight, first, second = agent(), agent(), agent()
    current, step = transitions(600)
    kept = []
    for number in range(600):
        if number == 333:
            state = copy.deepcopy(first.state_dict())
            torch.manual_seed(99)
            second = StreamAC(5, 2, modules(), total_updates=600, seed=0)
            second.load_state_dict(state)
        obs = current()
        generator = torch.get_rng_state()
        for one in (straight, first if number < 333 else second):
            torch.set_rng_state(generator)
            one.update_obs_stats(obs)
            action = one.act(obs, explore=True)
            kept.append(action)
        np.testing.assert_array_equal(*kept[-2:])
        _, reward, next_obs, terminated, truncated = step(action)
        for one in (straight, first if number < 333 else second):
            one.add(obs, action, reward, next_obs, terminated, truncated)
    for name in ("critic", "actor"):
        assert straight.optimizers[name].weights.tobytes() == second.optimizers[name].weights.tobytes()
        assert straight.optimizers[name].traces.tobytes() == second.optimizers[name].traces.tobytes()
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert straight.info.keys() == second.info.keys() and all(straight.info[k] == second.info[k] for k in straight.info)


def test_nothing_is_learned_from_the_metric_window_or_by_evaluating():
    def run(disturb):
        torch.manual_seed(0)
        agent = StreamAC(5, 2, modules(), total_updates=300)

        def each(number):
            if disturb:
                with torch.random.fork_rng():
                    for tensor in agent.window.values():
                        tensor.normal_()
                    agent.act(np.random.randn(4, 5).astype(np.float32), explore=False)
                    batch, ready = agent.metric_batch(32)
                    assert ready and agent.per_sample_losses(batch)["actor"].shape == (32,)

        play(agent, 300, each=each)
        return agent.optimizers["actor"].weights.tobytes() + agent.optimizers["critic"].weights.tobytes()

    assert run(False) == run(True)


def test_time_is_not_normalized_and_evaluation_is_frozen():
    torch.manual_seed(0)
    agent = StreamAC(5, 2, modules(), total_updates=300)
    play(agent, 100)
    obs = np.random.RandomState(0).randn(3, 5).astype(np.float32)
    same = agent.normalizer(obs) == obs
    assert same[:, -1].all() and not same[:, :-1].any()
    before = agent.normalizer.stats.state.clone()
    action = agent.act(obs, explore=False)
    assert torch.equal(before, agent.normalizer.stats.state)
    np.testing.assert_allclose(action[1], agent.act(obs[1], explore=False), rtol=1e-5, atol=1e-6)
    assert action.shape == (3, 2) and abs(action).max() <= 1


def test_each_observation_is_counted_once():
    agent = StreamAC(5, 2, modules(), total_updates=300)
    random, counts = np.random.RandomState(0), []
    for over in (False, False, True, False, True):
        obs, next_obs = random.randn(2, 5).astype(np.float32)
        agent.update_obs_stats(obs)
        agent.add(obs, agent.act(obs, True), 1.0, next_obs, over, False)
        counts.append(agent.normalizer.stats.count[0])
    assert counts == [2, 3, 4, 6, 7]  # each episode's first, and every next one


@pytest.mark.parametrize("bad", ["reward", "obs"])
def test_a_value_that_is_not_finite_stops_before_it_reaches_a_weight(bad):
    torch.manual_seed(0)
    agent = StreamAC(5, 2, modules(), total_updates=300)
    play(agent, 50)
    obs, reward, next_obs = np.zeros(5, np.float32), 1.0, np.zeros(5, np.float32)
    if bad == "obs":
        next_obs[2] = math.inf
    with pytest.raises(FloatingPointError), np.errstate(invalid="ignore"):
        agent.add(obs, np.zeros(2, np.float32), math.nan if bad == "reward" else reward, next_obs, False, False)
    assert agent.nonfinite_report() == ("the TD error or a trace", 50)
    assert all(np.isfinite(agent.optimizers[name].weights).all() for name in ("critic", "actor"))


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match="use --device cpu"):
        StreamAC(5, 2, device="cuda")


def test_timed_env_appends_the_time_and_restores():
    class Env:
        obs_dim, episode_steps, at = 2, 4, 0

        def reset(self, seed=None):
            self.at = 0
            return np.zeros(2, np.float32)

        def step(self, action):
            self.at += 1
            return np.full(2, self.at, np.float32), 1.0, False, self.at == 4

        def state(self):
            return self.at

        def restore(self, state):
            self.at = state
            return np.full(2, state, np.float32)

    env = TimedEnv(Env())
    assert env.obs_dim == 3 and env.reset().tolist() == [0, 0, -0.5]
    assert env.step(None)[0].tolist() == [1, 1, -0.25]
    state = env.state()
    assert env.step(None)[0].tolist() == [2, 2, 0]
    assert env.restore(state).tolist() == [1, 1, -0.25] and env.step(None)[0].tolist() == [2, 2, 0]


def test_first_reward_after_a_long_wait_does_not_explode():
    torch.manual_seed(0)
    agent = StreamAC(5, 2, modules(), total_updates=3000)
    current, step = transitions(1501)
    for number in range(1501):
        obs = current()
        agent.update_obs_stats(obs)
        action = agent.act(obs, explore=True)
        _, _, next_obs, terminated, truncated = step(action)
        agent.add(obs, action, float(number == 1500), next_obs, terminated, truncated)
    column = agent.RECORDED.index("scaled_reward")
    assert agent.recent[1500 % len(agent.recent), column] == agent.config.reward_clip < math.sqrt(1500) / 3
    assert abs(agent.optimizers["critic"].weights).max() < 2 and abs(agent.optimizers["actor"].weights).max() < 2


# ---- through train.py ----

@pytest.mark.parametrize("flags, words", [
    ("--buffer-size 1000", "--buffer-size has no effect"), ("--learning-starts 50", "--learning-starts has no effect"),
    ("--compile on", "--compile on: stream computes one sample"), ("--cuda-graphs on", "--cuda-graphs on"),
    ("--precision bf16", "--precision bf16"), ("--device cuda", "slower on a GPU"),
    ("--critic-type 6", "LayerNorm networks"), ("--encoder-regime sst", "stream has no encoder"),
    ("--sparse-init 1", "--sparse-init")])
def test_flags_without_a_meaning_are_refused(flags, words):
    refuses(lambda: check(parse(["--algo", "stream", *flags.split()])), words)


def test_a_batch_size_is_no_flag_of_stream(capsys):
    with pytest.raises(SystemExit):
        parse(["--algo", "stream", "--batch-size", "32"])
    assert "--batch-size" in capsys.readouterr().err


def flags_of(env, *more):
    return ["--algo", "stream", "--env", env, "--width-scale", "0.1", "--total-steps", "400", "--eval-every", "150",
            "--eval-episodes", "1", "--log-every", "50", "--save-every", "60", "--update-interval", "40",
            "--threads", "1", "--name", "run", *more]


has_gym = all(map(importlib.util.find_spec, ("gymnasium", "imageio")))
needs_gym = pytest.mark.skipif(not has_gym, reason="needs gymnasium[mujoco]")


@pytest.mark.slow
@pytest.mark.parametrize("env, regimes", [("cartpole-swingup", ("dst", "sst")),
                                          pytest.param("Hopper-v5", ("s2d", "dst"), marks=needs_gym)])
def test_stream_resume_after_kill_is_exact(env, regimes, tmp_path):
    flags = flags_of(env, "--critic-regime", regimes[0], "--actor-regime", regimes[1])
    log, killed = str(tmp_path / "output"), [*flags, "--runs", str(tmp_path / "killed"), "--resume"]
    assert in_process([*flags, "--runs", str(tmp_path / "whole")], log) == 0, open(log).read()
    for kill in (("a topology update", 9, 0, signal.SIGKILL), ("an evaluation", 1, 0, signal.SIGKILL)):
        assert in_process(killed, log, kill) == -signal.SIGKILL
    assert in_process(killed, log, ("a log row", 2, 0, signal.SIGTERM)) == 75
    assert in_process(killed, log) == 0, open(log).read()
    runs = [tmp_path / name / "run" for name in ("whole", "killed")]
    assert timeless(runs[0]) == timeless(runs[1])
    weights = [checkpoint.read(str(run / "final.pt"))[0]["networks"] for run in runs]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
    rows = timeless(runs[0])["train.csv"]
    assert [int(row["agent_step"]) for row in rows] == list(range(50, 401, 50)) and int(rows[-1]["env_frames"]) == 400


@needs_gym
@pytest.mark.slow
@pytest.mark.parametrize("env", ["Walker2d-v5", "Ant-v5"])
def test_gymnasium_tasks_train(env, tmp_path):
    log = str(tmp_path / "output")
    assert in_process([*flags_of(env, "--mst"), "--runs", str(tmp_path)], log) == 0, open(log).read()
    rows = timeless(tmp_path / "run")["train.csv"]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("delta", "entropy", "critic/step_size"))
    timed = StreamConfig.make_env(env)
    assert timed.reset()[-1] == -0.5 and timed.step(np.zeros(timed.action_dim))[0][-1] == pytest.approx(-0.499)


@pytest.mark.slow
def test_a_run_that_diverges_stops_in_one_line(tmp_path):
    log = str(tmp_path / "output")
    flags = flags_of("cartpole-swingup", "--critic-kappa", "1e-30", "--actor-kappa", "1e-30", "--step-size", "1e20")
    assert in_process([*flags, "--runs", str(tmp_path)], log) == 1
    text = open(log).read()
    assert "Traceback" not in text and "train.py: " in text.splitlines()[-1]
