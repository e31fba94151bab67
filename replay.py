"""LAP replay buffer: prioritized subtrajectories, drawn on the training device without a host sync.

Guarantees: each observation is stored once (one million dog-run transitions take about 1.06 GB); no subtrajectory
crosses a time limit; draws follow the priorities exactly (sums in float64), even with a million rows; and neither
`sample` nor `update_priority` makes the host wait for a GPU.

Paper: Table 1 (LAP: α = 0.4, minimum priority 1; H_Enc = 5, H_Q = 3). LAP is Fujimoto et al., 2020. This file needs
torch and numpy; copy it into your project.

    import numpy as np
    from replay import ReplayBuffer, alive_discount

    buffer = ReplayBuffer(obs_dim=3, action_dim=1, capacity=1000, horizon=5)
    for t in range(200):
        obs, next_obs = np.full(3, t, np.float32), np.full(3, t + 1, np.float32)
        buffer.add(obs, np.zeros(1), 1.0, next_obs, terminated=False, truncated=(t + 1) % 50 == 0)
    batch = buffer.sample(batch_size=32, horizon=3)
    weight = alive_discount(batch.terminated, discount=0.99)          # (32, 4) γ^k, 0 after a termination
    returns = (batch.reward * weight[:, :-1]).sum(1)                  # (32,) and weight[:, -1] for the next value
    buffer.update_priority(batch.index, td_error=returns)
    print(batch.obs.shape, returns[0])                                # (32, 4, 3)
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 1024  # rows summed together before drawing; see `draw`


class Batch(NamedTuple):
    """Subtrajectories of H transitions. Steps after a termination belong to another episode: mask them out."""
    index: torch.Tensor  # (batch,) row of the first transition
    obs: torch.Tensor  # (batch, H + 1, *obs_shape) o_t ... o_{t+H}
    action: torch.Tensor  # (batch, H, action_dim)
    reward: torch.Tensor  # (batch, H)
    terminated: torch.Tensor  # (batch, H) 1.0 where the transition ended in a terminal state


class ReplayBuffer:
    """A ring of rows. Row i holds o_i and the transition from it; o_{i+1} is in row i + 1.

    An episode therefore takes its length + 1 rows.

    obs_dim: the length of an observation, or its shape. obs_dtype: its dtype in memory.
    capacity: number of rows. horizon: the longest subtrajectory that `sample` may return (MR.Q: H_Enc = 5).
    prioritized: LAP, or uniform draws over the same rows. alpha, min_priority: Table 1.
    Raises ValueError for a capacity or horizon that cannot work, MemoryError if the device cannot hold the buffer.

    A subclass may store observations in another way: it overrides the methods under "observations".
    """

    history = 0  # how many rows before row i the observation of row i also needs

    def __init__(self, obs_dim, action_dim, capacity=1_000_000, horizon=5, prioritized=True, alpha=0.4,
                 min_priority=1.0, device="cpu", obs_dtype=torch.float32):
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, not {horizon}")
        if capacity < (needed := 2 * horizon + 2 + self.history):
            raise ValueError(f"a buffer of {capacity} rows is too small for horizon {horizon}: use {needed} or more")
        self.obs_shape = tuple(obs_dim) if isinstance(obs_dim, (tuple, list)) else (obs_dim,)
        self.obs_dtype, self.action_dim = obs_dtype, action_dim
        self.capacity, self.horizon, self.device = capacity, horizon, torch.device(device)
        self.prioritized, self.alpha, self.min_priority = prioritized, alpha, min_priority
        padded = -(-capacity // BLOCK) * BLOCK  # priorities fill whole blocks
        self._check_memory(padded)
        self._allocate_obs()
        # The rest of a row, side by side, to be written and drawn in one operation: a, r, 1.0 if the transition ended
        # in a terminal state, and 1.0 if there is a transition at all (a row may hold only o_T).
        self.rows = torch.zeros(capacity, action_dim + 3, device=self.device)
        self.steps = torch.arange(horizon + 1, device=self.device)
        # 0: no subtrajectory may start here (an episode's end, the ring's head, an empty row). Stored in float64,
        # because sums are float64, and converting a million priorities takes longer than adding them.
        self.priority = torch.zeros(padded, dtype=torch.float64, device=self.device)
        # CUDA graphs: scalars on the device, so that a captured graph sees them change.
        self.max_priority = torch.full((), float(min_priority ** alpha), device=self.device)
        self.termination_seen = torch.zeros((), device=self.device)  # 1.0 from the first termination on
        self.position = 0  # rows taken so far, over all rounds of the ring: that of the current observation
        self.episode_length = 0  # transitions of the current episode so far
        # CPU copy of which rows are valid, so that `sample` can check for an empty buffer without a GPU sync.
        self._valid_cpu, self.num_valid = bytearray(capacity), 0

    def _check_memory(self, padded):
        needed = self.stored_bytes + 8 * padded
        if needed > (free := free_memory(self.device)):
            raise MemoryError(f"a buffer of {self.capacity:,} rows takes {needed / 1e9:.2f} GB, but {self.device} has "
                              f"{free / 1e9:.2f} GB: use a smaller one")

    @property
    def row(self):
        """The row of the current observation."""
        return self.position % self.capacity

    @property
    def stored_bytes(self):
        """Bytes of all rows: observations and the rest. Priorities are not part of it."""
        return self.capacity * (self._obs_bytes() + 4 * (self.action_dim + 3))

    action = property(lambda self: self.rows[:, :-3])  # views, (capacity, ...)
    reward = property(lambda self: self.rows[:, -3])
    terminated = property(lambda self: self.rows[:, -2])
    transition = property(lambda self: self.rows[:, -1])

    # ---- observations: what a subclass may store in another way ----

    def _obs_bytes(self):
        """Bytes that one row's observation takes."""
        return int(np.prod(self.obs_shape)) * self.obs_dtype.itemsize

    def _allocate_obs(self):
        self.obs = torch.zeros(self.capacity, *self.obs_shape, dtype=self.obs_dtype, device=self.device)

    def _write_obs(self, row, following, obs, next_obs):
        pair = np.empty((2, *self.obs_shape), obs.dtype)
        pair[0], pair[1] = obs, next_obs
        self._write(self.obs, row, following, pair)

    def _gather_obs(self, rows):
        """(...) rows -> (..., *obs_shape)"""
        return self.obs.index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def _saved(self):
        """Name -> tensor of `capacity` rows: what `rows_since` saves."""
        return {"obs": self.obs, "rows": self.rows}

    # ---- writing ----

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        """Stores one transition. obs must be the next_obs of the call before, unless that one ended an episode.

        obs, next_obs: obs_shape. action: (action_dim,). ValueError for any other shape.
        """
        obs, next_obs = self._checked("obs", obs, self.obs_shape), self._checked("next_obs", next_obs, self.obs_shape)
        action = self._checked("action", action, (self.action_dim,))
        row, following = self.row, (self.row + 1) % self.capacity
        if self.episode_length == 0:
            self._invalidate(row)
        self._invalidate(following)
        self._write_obs(row, following, obs, next_obs)
        pair = np.zeros((2, self.rows.shape[1]), np.float32)  # the second row has no transition until the next `add`
        pair[0, :-3], pair[0, -3:] = action, (reward, terminated, True)
        self._write(self.rows, row, following, pair)
        self.position += 1
        self.episode_length += 1

        if self.episode_length >= self.horizon:  # the subtrajectory that ends with this transition is complete
            self._make_valid((row - self.horizon + 1) % self.capacity)
        if terminated:
            # Later starts run past the end, but the loss masks what follows a termination: they may be drawn as well.
            self.termination_seen.fill_(1.0)
            for back in range(min(self.episode_length, self.horizon - 1)):
                self._make_valid((row - back) % self.capacity)
        if terminated or truncated:
            self.end_episode()

    def end_episode(self):
        """The next `add` starts an episode. Nothing happens if none is in progress.

        Without a termination, the last starts stay out: their subtrajectory would need steps that were never taken.
        """
        if self.episode_length:
            self.position += 1
            self.episode_length = 0

    def _checked(self, name, values, shape):
        values = np.asarray(values)
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}, but this buffer stores {shape}")
        return values

    def _write(self, tensor, row, following, pair):
        """Two neighboring rows in one copy that nothing waits for: `tensor[row] = number` would sync with a GPU."""
        pair = to_device(pair, self.device, tensor.dtype)
        if following:
            tensor[row:row + 2].copy_(pair)
        else:  # the ring closes between the two
            tensor[row].copy_(pair[0])
            tensor[0].copy_(pair[1])

    def _invalidate(self, row):
        """This row is about to be overwritten: nothing may start here, or where its observation is needed."""
        for row in range(row, row + 1 + self.history):
            row %= self.capacity
            self.priority[row].zero_()
            self.num_valid -= self._valid_cpu[row]
            self._valid_cpu[row] = 0

    def _make_valid(self, row):
        self.num_valid += 1 - self._valid_cpu[row]
        self._valid_cpu[row] = 1
        if self.prioritized:
            self.priority[row].copy_(self.max_priority)
        else:
            self.priority[row].fill_(1.0)

    # ---- drawing ----

    def sample(self, batch_size, horizon=None, ends=False):
        """Draws `batch_size` subtrajectories of `horizon` transitions (default: the longest) by priority."""
        return self.gather(self.draw(batch_size), horizon, ends)

    def draw(self, *shape):
        """First rows of subtrajectories, of this shape: (batch,), or (batches, batch) while no priority changes."""
        if not self.num_valid:
            raise ValueError(f"nothing to draw yet: the buffer holds no {self.horizon} transitions in a row")
        if len(shape) > 1:  # one running sum over the whole buffer, for all of them
            return _draw_from(self.priority, *shape)
        # First a block by its sum, then a row within it. Each sum is exact in float64 (a float32 running sum over a
        # million priorities is off by up to 25 %), and no running sum over the whole buffer is needed.
        blocks = self.priority.view(-1, BLOCK)
        block = _draw_from(blocks.sum(1), *shape)  # (batch,)
        return _draw_from(blocks[block], *shape, 1).squeeze(1).add(block, alpha=BLOCK)

    def gather(self, index, horizon=None, ends=False):
        """The subtrajectories that start at these rows; index: (batch,).

        ends: only the first and last observation, o_t and o_{t+H}, as `obs` (batch, 2, *obs_shape).
        """
        horizon = self.horizon if horizon is None else horizon
        if horizon > self.horizon:
            raise ValueError(f"this buffer keeps subtrajectories of {self.horizon} transitions, not {horizon}")
        rows = (index.unsqueeze(1) + self.steps[:horizon + 1]) % self.capacity  # (batch, H + 1)
        rest = self.rows[rows[:, :-1]]  # (batch, H, action_dim + 3)
        obs = self._gather_obs(rows[:, ::horizon] if ends else rows)
        return Batch(index, obs, rest[..., :-3], rest[..., -3], rest[..., -2])

    def update_priority(self, index, td_error):
        """p = max(|δ|, 1)^α for the drawn rows; td_error: (batch,), the larger of the two critics'.  Table 1, LAP

        A row that was overwritten since it was drawn keeps priority 0.
        """
        if not self.prioritized:
            return
        error = torch.nan_to_num(td_error.detach().abs(), nan=0.0, posinf=0.0)  # a NaN here would be drawn
        priority = error.clamp(min=self.min_priority).pow(self.alpha).to(self.priority.dtype)
        priority = priority.where(self.priority[index] > 0, 0.0)
        # A row drawn twice gets the larger of its two values: a plain write would leave either of them.
        self.priority.scatter_reduce_(0, index, priority, "amax", include_self=False)
        torch.maximum(self.max_priority, priority.max(), out=self.max_priority)

    def mean_absolute_reward(self):
        """r̄ of Eq. (11) over everything stored: a scalar on the device."""
        return self.reward.abs().sum(dtype=torch.float64).div(self.transition.sum()).float()

    # ---- saving ----

    def state_dict(self):
        """All but the rows: tensors (the live ones) and plain values."""
        return {"capacity": self.capacity, "position": self.position, "episode_length": self.episode_length,
                "priority": self.priority, "max_priority": self.max_priority, "termination_seen": self.termination_seen}

    def rows_since(self, first):
        """(first, name -> tensor) from row `first` to the current one, counted from the start as `position` is;
        from the oldest row that the ring still holds, if that is later."""
        first = max(first, self.position + 1 - self.capacity)
        index = torch.arange(first, self.position + 1, device=self.device) % self.capacity
        return first, {name: tensor[index.to(tensor.device)] for name, tensor in self._saved().items()}

    def load_rows(self, first, rows):
        """Restores what `rows_since` returned; call it for the oldest rows first, as later rows may replace them.

        ValueError for rows of other observations or actions, before anything changes.
        """
        own = self._saved()
        if "obs" in own and "obs" not in rows:  # saved by older code: o, a, r, terminated, transition side by side
            rows = dict(zip(("obs", "rows"), rows["rows"].tensor_split([-own["rows"].shape[1]], dim=1)))
        found = {name: tuple(tensor.shape[1:]) for name, tensor in rows.items()}
        expected = {name: tuple(tensor.shape[1:]) for name, tensor in own.items()}
        if found != expected:
            raise ValueError(f"the saved rows have shapes {found}, this buffer's have {expected}")
        count = len(rows["rows"])
        index = torch.arange(first, first + count, device=self.device)[-self.capacity:] % self.capacity
        for name, tensor in own.items():
            tensor[index.to(tensor.device)] = rows[name][-self.capacity:].to(tensor.device)

    def load_state_dict(self, state):
        """Restores what `state_dict` returned. ValueError, before anything changes, for another capacity.

        A larger buffer takes the state of a smaller one that has not wrapped around yet: its rows are the same.
        """
        priority = state["priority"].to(self.device)
        # Older code saved no capacity, only whole blocks of priorities: rows past this buffer's end mean a larger one.
        saved = state.get("capacity", self.capacity)
        grows = saved < self.capacity and state["position"] < saved and len(priority) <= len(self.priority)
        if grows:
            priority = F.pad(priority, (0, len(self.priority) - len(priority)))
        elif saved != self.capacity or priority.shape != self.priority.shape or priority[self.capacity:].any():
            size = f"{saved:,} rows" if saved != self.capacity else "another number of rows"
            raise ValueError(f"the saved buffer has {size}, this one {self.capacity:,}")
        self.position, self.episode_length = state["position"], state["episode_length"]
        self.priority.copy_(priority)
        for name in ("max_priority", "termination_seen"):
            getattr(self, name).copy_(state[name])
        valid = self.priority[:self.capacity] > 0
        self._valid_cpu, self.num_valid = bytearray(valid.cpu().numpy()), int(valid.sum())


def to_device(values, device, dtype=None):
    """numpy -> tensor there, without waiting: from unpinned memory, PyTorch would wait for the GPU's whole queue.

    dtype: by default float32, except that uint8 (images) stays uint8.
    """
    tensor = torch.as_tensor(np.asarray(values))
    tensor = tensor.to(dtype or (torch.uint8 if tensor.dtype == torch.uint8 else torch.float32))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def alive_discount(terminated, discount=1.0):
    """γ^k where no step before the k-th terminated, else 0, for k = 0 ... H: (batch, H) -> (batch, H + 1)"""
    weight = torch.rsub(terminated, discount, alpha=discount)  # γ - γ·terminated
    return F.pad(weight, (1, 0), value=1.0).cumprod(1)


def _draw_from(weights, *shape):
    """Indices with probability proportional to weight. weights, in float64: (n,), for draws of any shape, or (rows, n),
    for draws of shape (rows, ·), each from its own row."""
    sums = weights.cumsum(-1)
    total = sums[..., -1:].contiguous()
    target = torch.rand(shape, dtype=torch.float64, device=weights.device) * total
    # right=True: a draw of exactly 0 must not return index 0 if its weight is 0. The bound is the last index with a
    # weight above 0, which rounding could overstep.
    return torch.minimum(torch.searchsorted(sums, target, right=True), torch.searchsorted(sums, total))


def free_memory(device):
    """Bytes that are still available on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:  # what is left without swapping; droppable caches count as free
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):  # not Linux: let the allocation itself decide
        return float("inf")
