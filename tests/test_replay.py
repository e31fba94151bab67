"""Tests of replay."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import replay
from replay import ReplayBuffer, alive_discount
from tests.helpers import play, property_test


@property_test
@given(st.integers(0, 10**6), st.integers(24, 90), st.integers(1, 5), st.integers(1, 250))
def test_every_subtrajectory_is_real_and_every_complete_one_is_offered(seed, capacity, horizon, steps):
    buffer, episodes = play(seed, capacity, horizon, steps)
    expected = {}
    for episode in episodes:
        for start in range(len(episode)):
            part = episode[start:start + horizon]
            complete = len(part) == horizon or part[-1][5]  # runs its full length, or ends in a terminal state
            if complete and part[0][0] > latest_row(episodes) - capacity:  # not yet overwritten
                expected[part[0][0] % capacity] = part
    assert set(buffer.priority.nonzero().flatten().tolist()) == set(expected)
    stored = [abs(step[3]) for episode in episodes for step in episode if step[0] > latest_row(episodes) - capacity]
    assert buffer.mean_absolute_reward().item() == pytest.approx(np.mean(stored), rel=1e-5)
    assert buffer.termination_seen.item() == any(step[5] for episode in episodes for step in episode)
    if not expected:
        return
    batch = buffer.gather(torch.tensor(sorted(expected)), horizon)
    assert torch.equal(buffer.gather(batch.index, horizon, ends=True).obs, batch.obs[:, [0, -1]])
    for row, part in enumerate(expected[index] for index in sorted(expected)):
        n = len(part)
        for name, column in (("obs", 1), ("action", 2), ("reward", 3)):
            np.testing.assert_allclose(getattr(batch, name)[row, :n], np.array([step[column] for step in part]),
                                       rtol=1e-6)
        np.testing.assert_allclose(batch.obs[row, n], part[-1][4], rtol=1e-6)
        assert batch.terminated[row, :n].bool().tolist() == [step[5] for step in part]


def latest_row(episodes):
    """The row of the latest observation written, one past the latest step: what stood there before is gone."""
    return max(step[0] for episode in episodes for step in episode) + 1


@pytest.mark.parametrize("shape", [(1000,), (10, 100)])  # batch by batch, or a burst at once
@pytest.mark.slow
def test_draws_follow_the_priorities(shape):
    buffer = ReplayBuffer(1, 1, 5000, horizon=1)
    rng = np.random.RandomState(0)
    for t in range(4000):
        buffer.add([t], [0], 0.0, [t + 1], False, (t + 1) % 100 == 0)
    weights = torch.zeros(len(buffer.priority)).double()
    rows = buffer.priority.nonzero().flatten()
    weights[rows] = torch.tensor(rng.choice([1.0, 2.0, 50.0], len(rows)))
    buffer.priority.copy_(weights)
    torch.manual_seed(0)
    counts = torch.bincount(torch.cat([buffer.draw(*shape).flatten() for _ in range(400)]),
                            minlength=len(weights)).double()
    assert not counts[weights == 0].any()
    for value in (1.0, 2.0, 50.0):
        expected = value / weights.sum() * 400_000 * (weights == value).sum()
        assert abs(counts[weights == value].sum() - expected) < 5 * expected.sqrt()
    p = weights[rows] / weights.sum() * 400_000
    chi2 = ((counts[rows] - p) ** 2 / p).sum()
    assert abs(chi2 - len(rows)) < 6 * math.sqrt(2 * len(rows))


def test_a_draw_of_zero_or_one_never_takes_a_row_without_priority(monkeypatch):
    buffer, _ = play(1, 60, 3, 100)
    for value in (0.0, 1.0):  # the ends of the interval, and what rounding could make of it
        monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(tuple(shape), value, **kw))
        assert (buffer.priority[buffer.draw(8)] > 0).all() and (buffer.priority[buffer.draw(2, 8)] > 0).all()


def test_float32_sums_would_distort_a_million_priorities(monkeypatch):
    buffer = ReplayBuffer(1, 1, 2**20, horizon=1)
    buffer.priority.fill_(1.0)
    # a float32 sum that begins so cannot see the million ones after it
    buffer.priority[0], buffer.num_valid = 2.0**36, 1
    for row in (1, 5000, 700_000, 2**20 - 1):
        share = (2.0**36 + row - 0.5) / (2.0**36 + 2**20 - 1)  # the draw that falls on this row's block
        monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(tuple(shape), share, **kw))
        assert buffer.draw(2)[0].item() // 1024 == row // 1024
        assert buffer.draw(1, 2)[0, 0].item() == row  # a single running sum knows the row itself


def test_priorities_after_an_update():
    buffer, _ = play(3, 60, 3, 50)
    rows = buffer.priority.nonzero().flatten()[:3]
    index = torch.stack([rows[0], rows[1], rows[0], rows[2]])
    buffer.update_priority(index, torch.tensor([7.0, 0.2, 9.0, -4.0]))
    expected = [9.0 ** 0.4, 1.0, 4.0 ** 0.4]  # the larger of two; at least 1; |δ|
    np.testing.assert_allclose(buffer.priority[rows], expected, rtol=1e-6)
    buffer.update_priority(rows[:1], torch.tensor([2.0]))
    assert buffer.priority[rows[0]].item() == pytest.approx(2.0 ** 0.4)  # it can fall as well
    assert buffer.max_priority.item() == pytest.approx(9.0 ** 0.4)  # the largest so far, not the largest now
    if buffer.episode_length:  # begin an episode of its own
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False, True)
    row = buffer.row
    for _ in range(3):
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False, False)
    assert buffer.priority[row % 60].item() == pytest.approx(9.0 ** 0.4)  # new transitions get it
    uniform, _ = play(3, 60, 3, 50, prioritized=False)
    before = uniform.priority.clone()
    uniform.update_priority(index, torch.tensor([7.0, 0.2, 9.0, -4.0]))
    assert torch.equal(before, uniform.priority) and set(before.tolist()) == {0.0, 1.0}


def test_discounts_after_a_termination_by_hand():
    terminated = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert alive_discount(terminated, 0.5).tolist() == [
        [1.0, 0.5, 0.25, 0.125], [1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.25, 0.0]]  # the terminating step's reward counts
    assert alive_discount(terminated).tolist() == [[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_a_million_dog_run_transitions_fit_and_what_cannot_fit_is_refused(monkeypatch):
    buffer = ReplayBuffer(223, 38, 1_002_000, device="meta")  # with the 2,000 last observations of 500-step episodes
    size = sum(value.numel() * value.element_size() for value in vars(buffer).values() if torch.is_tensor(value))
    assert 1.0e9 < size <= 1.3e9
    with pytest.raises(MemoryError, match="GB"):
        ReplayBuffer(223, 38, 10**11)
    monkeypatch.setattr(replay, "free_memory", lambda device: size)
    ReplayBuffer(223, 38, 1_002_000, device="meta")  # what is there is enough
    monkeypatch.setattr(replay, "free_memory", lambda device: 0.999 * size)
    with pytest.raises(MemoryError, match=r"1,002,000 rows.* 1.\d\d GB.* 1.\d\d GB"):
        ReplayBuffer(223, 38, 1_002_000)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nothing to draw"):
        ReplayBuffer(2, 1, 100).sample(4)
    buffer = ReplayBuffer(1, 1, 12, horizon=5)
    for t in range(5):
        buffer.add([0], [0], 0.0, [0], False, t == 4)
    buffer.sample(4)
    for t in range(30):  # episodes too short to offer anything, until the one that did is overwritten
        buffer.add([0], [0], 0.0, [0], False, t % 3 == 2)
    assert not buffer.priority.any()
    with pytest.raises(ValueError, match="nothing to draw"):
        buffer.sample(4)


def test_free_memory_is_what_can_be_had(monkeypatch):
    monkeypatch.setattr("builtins.open",
                        lambda *of: io.StringIO("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable: 70 kB\n"))
    free = replay.free_memory(torch.device("cpu"))
    monkeypatch.undo()
    assert free == 70 * 1024


# ---- misuse ----

def test_unusable_sizes_are_refused():
    for horizon in (1, 5):
        ReplayBuffer(2, 1, 2 * horizon + 2, horizon)
        with pytest.raises(ValueError, match=f"{2 * horizon + 1} rows.* use {2 * horizon + 2}"):
            ReplayBuffer(2, 1, 2 * horizon + 1, horizon)
    with pytest.raises(ValueError, match="horizon must be at least 1, not 0"):
        ReplayBuffer(2, 1, 100, 0)
    buffer, _ = play(0, 60, 3, 50)
    assert buffer.sample(4).reward.shape == buffer.sample(4, 3).reward.shape == (4, 3)
    with pytest.raises(ValueError, match="subtrajectories of 3 transitions, not 4"):
        buffer.sample(4, 4)


@pytest.mark.parametrize("name, wrong", [("obs", (1,)), ("obs", (2, 2)), ("next_obs", (5,)), ("next_obs", (1,)),
                                         ("next_obs", (2, 2)), ("action", ()), ("action", (1, 3))])
def test_wrong_shapes_are_refused_and_nothing_is_written(name, wrong):
    buffer, _ = play(0, 60, 3, 50, obs_dim=4, action_dim=3)
    before = [buffer.obs.clone(), buffer.rows.clone(), buffer.priority.clone()]
    shapes = {"obs": (4,), "action": (3,), "next_obs": (4,)} | {name: wrong}
    values = {key: np.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(ValueError) as error:
        buffer.add(values["obs"], values["action"], 9.0, values["next_obs"], False, False)
    assert str(error.value).startswith(f"{name} has shape {wrong}")
    assert all(torch.equal(*pair) for pair in zip(before, (buffer.obs, buffer.rows, buffer.priority)))


@pytest.mark.parametrize("shape, dtype", [((3, 4), torch.float32), ((2, 3, 3), torch.uint8), ((), torch.float32)])
def test_observations_of_any_shape_and_dtype(shape, dtype):
    buffer = ReplayBuffer(shape, 2, 40, horizon=2, obs_dtype=dtype)
    obs = np.random.RandomState(0).randint(0, 255, (100, *shape))
    for t in range(99):
        buffer.add(obs[t], [t, -t], 0.5 * t, obs[t + 1], False, False)
    rows = buffer.priority.nonzero().flatten()
    batch = buffer.gather(rows)
    assert len(rows) == 38 and batch.obs.shape == (38, 3, *shape) and batch.obs.dtype == dtype
    for number, row in enumerate(rows.tolist()):
        t = row + 80 if row + 80 < 99 else row + 40  # the ring went round twice
        np.testing.assert_array_equal(batch.obs[number], obs[t:t + 3])
        assert batch.action[number].tolist() == [[t, -t], [t + 1, -t - 1]]
        assert batch.reward[number].tolist() == [0.5 * t, 0.5 * t + 0.5]
    item = torch.empty((), dtype=dtype).element_size() * math.prod(shape)
    assert buffer.stored_bytes == 40 * (item + 4 * 5) == sum(part.nbytes for part in (buffer.obs, buffer.rows))


def test_late_priorities_do_not_revive_overwritten_rows():
    buffer, _ = play(5, 60, 3, 200)
    drawn = buffer.sample(64).index.unique()
    for t in range(20):
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False, True)
    before = buffer.priority > 0
    gone = drawn[~before[drawn]]
    assert 0 < len(gone) < len(drawn)
    buffer.update_priority(drawn, torch.full((len(drawn),), 50.0))
    assert torch.equal(buffer.priority > 0, before)
    np.testing.assert_allclose(buffer.priority[drawn[before[drawn]]], 50.0 ** 0.4, rtol=1e-6)
    buffer.update_priority(gone, torch.full((len(gone),), 50.0))  # a batch of nothing else
    assert torch.equal(buffer.priority > 0, before) and buffer.max_priority.item() == pytest.approx(50.0 ** 0.4)


# ---- saving ----

def test_the_state_of_another_capacity_is_refused():
    small, _ = play(0, 60, 3, 50)
    position = small.position
    for capacity in (61, 900, 2000):  # 61 and 900 round up to the same block of priorities as 60
        large, _ = play(0, capacity, 3, 3 * capacity)
        with pytest.raises(ValueError, match=f"{capacity:,} rows.* 60"):
            small.load_state_dict(large.state_dict())
        old = {name: value for name, value in large.state_dict().items() if name != "capacity"}
        with pytest.raises(ValueError, match="rows.* 60"):
            small.load_state_dict(old)
    assert small.position == position
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        small.load_rows(0, play(0, 60, 3, 50, obs_dim=3)[0].rows_since(0)[1])


@pytest.mark.parametrize("steps", [50, 130])
def test_a_saved_buffer_loads_and_so_does_one_of_older_code(steps):
    buffer, _ = play(4, 60, 3, steps)
    first, rows = buffer.rows_since(0)
    older = {"rows": torch.cat([rows["obs"], rows["rows"]], 1)}  # o, a, r, terminated, transition
    state = buffer.state_dict()
    for saved, part in ((state, rows), ({key: value for key, value in state.items() if key != "capacity"}, older)):
        other = ReplayBuffer(2, 1, 60, 3)
        other.load_rows(first, part)
        other.load_state_dict(saved)
        for name in ("obs", "rows", "priority", "max_priority", "termination_seen", "position", "episode_length",
                     "num_valid", "_valid_cpu"):
            one, two = getattr(buffer, name), getattr(other, name)
            assert torch.equal(one, two) if torch.is_tensor(one) else one == two, name
