"""Tests on a GPU: `pytest test_all.py -k cuda`, some minutes. Once they pass on yours, you may set fast.CUDA_TESTED."""

import copy
import warnings

import numpy as np
import pytest
import torch

from runtime import fast
from tests.helpers import REPLAY_AGENTS, tiny_of
from tests.test_pixels import tiny_agent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(algo, precision="tf32", compile=False, captured=True):
    """An agent on the GPU whose topology moves every 60 updates, and its buffer."""
    agent, buffer = tiny_of(algo, device="cuda", interval=60, total_updates=3000)
    fast.speed_up(agent, precision, compile)
    if captured:
        fast.captured(agent)
    return agent, buffer


def weights_of(agent):
    return [p for network in (*agent.networks.values(), *agent.targets.values()) for p in network.parameters()]


def moved_by_updates(agent, buffer):
    """Every tensor that an update writes."""
    moments = [value for optimizer in agent.optimizers.values() for state in optimizer.state.values()
               for value in state.values()]
    masks = [mask for sparse in agent.sparse.values() for mask in sparse.masks.values()]
    return [*weights_of(agent), *moments, *masks, *agent.tensors().values(), buffer.priority, buffer.max_priority]


def distance(one, other):
    return torch.cat([(a.detach() - b.detach()).flatten() for a, b in zip(one, other, strict=True)]).norm().item()


def test_cuda_pixel_updates_equal_those_of_a_cpu():
    """The encoder's loss on the same frames without shifts, and captured updates with them."""
    agent, other = tiny_agent("mrq"), tiny_agent("mrq", device="cuda")
    for name, network in agent.networks.items():
        other.networks[name].load_state_dict(network.state_dict())
        other.targets[name].load_state_dict(agent.targets[name].state_dict())
    losses = []
    for one in (agent, other):
        one.replay.shift = 0
        batch = one.replay.gather(torch.arange(12, device=one.device))
        losses.append(one.encoder_loss(batch, one.replay.termination_seen)[0].detach().cpu())
        one.replay.shift = 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)
    fast.captured(other)
    for _ in range(12):
        other.update()
    assert other.nonfinite_report() is None and other.updates["critic"] == 12


@pytest.mark.parametrize("precision, compile", [("fp32", False), ("tf32", False), ("bf16", False), ("tf32", True),
                                                ("bf16", True)])
@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_cuda_captured_updates_equal_eager_ones(algo, precision, compile):
    """1,000 updates with 16 topology changes, in rounds of 50 that start alike, so that rounding does not add up.
    With a frozen generator (the same draws at every update) they would end 0.5 to 2 times a round's distance apart."""
    (eager, one), (graphed, other) = on_gpu(algo, precision, captured=False), on_gpu(algo, precision, compile)
    for number in range(20):
        before = [weight.detach().clone() for weight in weights_of(eager)]
        for agent, buffer in ((eager, one), (graphed, other)):
            torch.manual_seed(number)
            for _ in range(50):
                agent.update()
        assert eager.updates == graphed.updates and eager.nonfinite_report() is None is graphed.nonfinite_report()
        way = distance(before, weights_of(eager))
        assert 0 < way and distance(weights_of(eager), weights_of(graphed)) <= (0.3 if compile else 1e-3) * way
        with torch.no_grad():
            for theirs, ours in zip(moved_by_updates(graphed, other), moved_by_updates(eager, one), strict=True):
                theirs.copy_(ours)


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_cuda_loop_waits_for_nothing_but_the_action(algo):
    """Unless a topology change is due."""
    agent, buffer = on_gpu(algo)
    obs = np.ones(4, np.float32)
    for _ in range(10):
        agent.update()  # warmed up and recorded
    agent.act(obs, explore=True)
    try:
        for step in range(130):  # topology changes, bursts, ends of both kinds
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                action = agent.act(obs, explore=True)
            assert sum("synchronizing" in str(wait.message) for wait in waits) == 1
            torch.cuda.set_sync_debug_mode("error")
            agent.update_obs_stats(obs)
            # Once per interval the masks are checked and may change, which reads from the device.
            due = (agent.updates["critic"] + 1) % 60 == 0
            torch.cuda.set_sync_debug_mode("default" if due else "error")
            agent.update()
            torch.cuda.set_sync_debug_mode("error")
            buffer.add(obs, action, 0.5, obs, step % 50 == 19, step % 50 == 49)
        with pytest.raises(RuntimeError, match="synchronizing"):
            agent.info["critic_loss"].mean().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_cuda_memory_stands_still(algo):
    agent, buffer = on_gpu(algo)
    seen = []
    for _ in range(4):
        for _ in range(120):
            agent.update()
        torch.cuda.synchronize()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert seen[1] == seen[2] == seen[3]


@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_cuda_resume_and_evaluation_between_replays_change_nothing(algo):
    (plain, one), (watched, other) = on_gpu(algo), on_gpu(algo)
    for step in range(70):
        for agent, buffer in ((plain, one), (watched, other)):
            torch.manual_seed(step)
            agent.update()
        watched.act(np.ones((10, 4), np.float32), explore=False)
        watched.compute_features(other.gather(torch.arange(8, device="cuda")))
    assert distance(weights_of(plain), weights_of(watched)) == 0
    resumed, third = on_gpu(algo, captured=False)[0], copy.deepcopy(one)
    resumed.load_state_dict(copy.deepcopy(plain.state_dict()))
    resumed.replay = third
    fast.captured(resumed)  # after loading, which replaces the optimizers' tensors
    before = [weight.detach().clone() for weight in weights_of(plain)]
    for agent, buffer in ((plain, one), (resumed, third)):
        torch.manual_seed(1)
        for _ in range(60):
            agent.update()
    assert distance(weights_of(plain), weights_of(resumed)) <= 1e-3 * distance(before, weights_of(plain))
