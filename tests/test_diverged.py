"""A simulator that diverges within an episode: the step is discarded, and the run continues."""

import numpy as np
import pytest

import train
from envs import DMCEnv, PhysicsError
from stream import StreamAC
from tests.helpers import SHORT, flags_to_args, play

pytestmark = pytest.mark.slow


def diverge_at(monkeypatch, *frames):
    """Training environments raise PhysicsError at these frames of the run; evaluations do not."""
    plain = DMCEnv._step

    def step(env, control):
        if env.name == "cartpole-swingup" and env.seed == 3 and env.frames in frames and not env.evaluating:
            env.frames += 1  # else the same frame would diverge again after the reset
            raise PhysicsError(f"{env.name} diverged at frame {env.frames}")
        return plain(env, control)

    monkeypatch.setattr(DMCEnv, "evaluating", False, raising=False)
    monkeypatch.setattr(DMCEnv, "_step", step)


def trained(folder, *flags):
    args = flags_to_args(*SHORT, "--seed", "3", "--runs", str(folder), "--compile", "off", *flags)
    *parts, log, saved = train.build(args)
    for _, group in parts[3].groups:
        for env in group.envs:
            env.evaluating = True
    train.train(*parts, log, saved)
    return saved


def test_diverged_steps_are_discarded_and_counted(tmp_path, monkeypatch, capsys):
    diverge_at(monkeypatch, 40, 171)
    saved = trained(tmp_path)
    replay = saved.agent.replay
    assert saved.progress.discarded == 2 and "diverged at frame 41" in capsys.readouterr().out
    assert int(replay.transition.sum()) == 130 - 2  # every other step is stored
    assert replay.position == 130 - 2 + 2  # each of the two ended episodes keeps a row for its last observation
    starts = np.flatnonzero(replay.priority[:replay.capacity].numpy())
    ends = {int(row) for row in np.flatnonzero(replay.transition.numpy()[:-1] > replay.transition.numpy()[1:])}
    assert ends and all(not any(start <= end < start + 4 for end in ends) for start in starts)  # horizon 5


def test_an_ended_episode_in_replay_and_in_traces():
    buffer, _ = play(0, 400, 3, 50)
    buffer.end_episode()
    position = buffer.position
    buffer.end_episode()  # none is in progress
    assert buffer.position == position and buffer.episode_length == 0
    agent = StreamAC(3, 1, total_updates=20)
    obs = np.ones(3, np.float32)
    for _ in range(5):
        agent.update_obs_stats(obs)
        agent.add(obs, agent.act(obs, explore=True), 1.0, obs, False, False)
    assert all(learner.traces.any() for learner in agent.learners.values())
    agent.end_episode()
    assert not any(learner.traces.any() or agent.optimizers[name].traces.any()
                   for name, learner in agent.learners.items())
    assert not agent.reward_scale.array[0] and not agent.counted.any()
