"""LAP replay: prioritised subtrajectories, drawn on the training device without asking the host.

What it claims: each observation is stored once (one million dog-run transitions take about 1.06 GB); no subtrajectory
crosses a time limit; draws follow priorities exactly (in float64), even with a million of them; and nothing in
`sample` or `update_priority` makes the host wait for a GPU.

Paper: Table 1 (LAP: α = 0.4, minimum priority 1; H_Enc = 5, H_Q = 3). LAP is Fujimoto et al., 2020. This file needs
torch and numpy; copy it into your project.

    import numpy as np
    from replay import ReplayBuffer, multi_step_return

    buffer = ReplayBuffer(obs_dim=3, action_dim=1, capacity=1000, horizon=5)
    for t in range(200):
        obs, next_obs = np.full(3, t, np.float32), np.full(3, t + 1, np.float32)
        buffer.add(obs, np.zeros(1), 1.0, next_obs, terminated=False, truncated=(t + 1) % 50 == 0)
    batch = buffer.sample(batch_size=32, horizon=3)
    returns, bootstrap = multi_step_return(batch.reward, batch.terminated, discount=0.99)  # (32, 1) each
    buffer.update_priority(batch.index, td_error=returns.squeeze(1))
    print(batch.obs.shape, returns[0])                                                     # (32, 4, 3)
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 1024  # rows summed together before drawing; see `_draw`


class Batch(NamedTuple):
    """Subtrajectories of H transitions. After a termination the rows are of some other episode: mask them out."""
    index: torch.Tensor  # (batch,) row of the first transition
    obs: torch.Tensor  # (batch, H + 1, obs_dim) o_t ... o_{t+H}
    action: torch.Tensor  # (batch, H, action_dim)
    reward: torch.Tensor  # (batch, H)
    terminated: torch.Tensor  # (batch, H) 1.0 where the transition ended in a terminal state


class ReplayBuffer:
    """A ring of rows. Row i holds o_i and what was done there; o_{i+1} is row i + 1, so an episode takes length + 1 rows.

    capacity: rows. horizon: the longest subtrajectory that will be asked for (MR.Q: H_Enc = 5).
    prioritized: LAP, or plain uniform draws over the same rows. alpha, min_priority: Table 1.
    Raises MemoryError, in one line, if the device cannot hold it.
    """

    def __init__(self, obs_dim, action_dim, capacity=1_000_000, horizon=5, prioritized=True, alpha=0.4, min_priority=1.0,
                 device="cpu"):
        if capacity < 2 * horizon + 2:
            raise ValueError(f"a buffer of {capacity} rows is too small for a horizon of {horizon}")
        device = torch.device(device)
        padded = -(-capacity // BLOCK) * BLOCK  # rows for the priorities, up to a whole number of blocks
        bytes_needed = 4 * capacity * (obs_dim + action_dim + 3) + 8 * padded
        if bytes_needed > (free := free_memory(device)):
            raise MemoryError(f"a buffer of {capacity:,} rows takes {bytes_needed / 1e9:.2f} GB, but {device} has "
                              f"{free / 1e9:.2f} GB: ask for a smaller one")
        self.capacity, self.horizon, self.device = capacity, horizon, device
        self.prioritized, self.alpha, self.min_priority = prioritized, alpha, min_priority
        # All of a row side by side, to be written and drawn in one go: o, a, r, 1.0 if that ended in a terminal state, and
        # 1.0 if anything was done here at all (a row may be only an o_T). The columns have names below.
        self.rows = torch.zeros(capacity, obs_dim + action_dim + 3, device=device)
        self.columns = obs_dim, action_dim, 1, 1, 1
        self.steps = torch.arange(horizon + 1, device=device)
        # 0 says that no subtrajectory may start here: an episode's end, the ring's head, a row never written. In float64,
        # because sums must be: converting a million of them takes longer than adding them up.
        self.priority = torch.zeros(padded, dtype=torch.float64, device=device)
        # Device scalars, so that a captured graph sees them change.
        self.max_priority = torch.full((), float(min_priority ** alpha), device=device)
        self.termination_seen = torch.zeros((), device=device)  # 1.0 from the first termination on
        self.position = 0  # rows taken so far, over all rounds of the ring: the current observation's, counted from the start
        self.episode_length = 0  # transitions of the current episode so far
        # Which rows may be drawn, once more on the host, so that `sample` can tell an empty buffer without asking.
        self._valid_cpu, self.num_valid = bytearray(capacity), 0

    @property
    def row(self):
        """Where the current observation stands, or will stand."""
        return self.position % self.capacity

    obs, action, reward, terminated, transition = (
        property(lambda self, column=column: self._split(self.rows)[column]) for column in range(5))  # views, (capacity, ...)

    def _split(self, rows):
        """(..., all columns) -> o (..., obs_dim), a (..., action_dim), r, terminated, transition (...)"""
        obs, action, *numbers = rows.split(self.columns, -1)
        return obs, action, *(number.squeeze(-1) for number in numbers)

    # ---- writing ----

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        """Stores one transition. obs must be the next_obs of the call before, unless that one ended an episode."""
        row, following = self.row, (self.row + 1) % self.capacity
        if self.episode_length == 0:
            self._invalidate(row)
        self._invalidate(following)
        # Both rows in one copy that nobody waits for: `tensor[row] = number` makes the host wait for a GPU each time.
        pair = np.zeros((2, self.rows.shape[1]), np.float32)
        pair[0] = np.concatenate([np.ravel(obs), np.ravel(action), [reward, terminated, True]])
        pair[1, :len(np.ravel(next_obs))] = next_obs  # nothing is done there, until the next `add` says otherwise
        pair = to_device(pair, self.device)
        if following:
            self.rows[row:row + 2].copy_(pair)
        else:  # the ring closes between the two
            self.rows[row].copy_(pair[0])
            self.rows[0].copy_(pair[1])
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
            # After a time limit those starts stay out: their subtrajectory would need steps that were never taken.
            self.position += 1
            self.episode_length = 0

    def _invalidate(self, row):
        """No subtrajectory starts here any more."""
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

    def sample(self, batch_size, horizon=None):
        """Draws `batch_size` subtrajectories of `horizon` transitions (default: the longest), by priority."""
        return self.gather(self.draw(batch_size), horizon)

    def draw(self, *shape):
        """First rows of subtrajectories, of this shape: (batch,), or (batches, batch) while no priority changes."""
        if not self.num_valid:
            raise ValueError(f"nothing to draw yet: the buffer holds no {self.horizon} transitions in a row")
        if len(shape) > 1:  # one running sum over the whole buffer, for all of them
            return _draw_from(self.priority, *shape)
        # First a block by its sum, then a row within it. Each sum is exact in float64 (a float32 running sum over a
        # million priorities is off by up to 25 %), and the running sum over the whole buffer is never made.
        blocks = self.priority.view(-1, BLOCK)
        block = _draw_from(blocks.sum(1), *shape)  # (batch,)
        return _draw_from(blocks[block], *shape, 1).squeeze(1).add(block, alpha=BLOCK)

    def gather(self, index, horizon=None):
        """The subtrajectories that start at these rows; index: (batch,)."""
        horizon = self.horizon if horizon is None else horizon
        if horizon > self.horizon:
            raise ValueError(f"this buffer keeps subtrajectories of {self.horizon} transitions, not {horizon}")
        drawn = self.rows[(index.unsqueeze(1) + self.steps[:horizon + 1]) % self.capacity]  # (batch, H + 1, all columns)
        obs, action, reward, terminated, _ = self._split(drawn)
        return Batch(index, obs, action[:, :-1], reward[:, :-1], terminated[:, :-1])

    def update_priority(self, index, td_error):
        """p = max(|δ|, 1)^α for the drawn rows; td_error: (batch,), the larger of the two critics'.  Table 1, LAP"""
        if not self.prioritized:
            return
        error = torch.nan_to_num(td_error.detach().abs(), nan=0.0, posinf=0.0)  # never a NaN in here: it would be drawn
        priority = error.clamp(min=self.min_priority).pow(self.alpha).to(self.priority.dtype)
        # A row drawn twice gets the larger of its two values: a plain write would leave the last of an unknown order.
        self.priority.scatter_reduce_(0, index, priority, "amax", include_self=False)
        torch.maximum(self.max_priority, priority.max(), out=self.max_priority)

    def mean_absolute_reward(self):
        """r̄ of Eq. (11) over everything stored: a device scalar."""
        return self.reward.abs().sum(dtype=torch.float64).div(self.transition.sum()).float()

    # ---- saving ----

    def state_dict(self):
        """All but the rows: tensors, live ones, and plain values."""
        return {"position": self.position, "episode_length": self.episode_length, "priority": self.priority,
                "max_priority": self.max_priority, "termination_seen": self.termination_seen}

    def rows_since(self, first):
        """(first, {"rows": tensor}) from row `first` to the current one, counted from the start as `position` is;
        from the oldest that the ring still holds, if that is later."""
        first = max(first, self.position + 1 - self.capacity)
        index = torch.arange(first, self.position + 1, device=self.device) % self.capacity
        return first, {"rows": self.rows[index]}

    def load_rows(self, first, rows):
        """Puts back what `rows_since` gave; the oldest first, as later rows may stand where earlier ones stood."""
        index = torch.arange(first, first + len(rows["rows"]), device=self.device)[-self.capacity:] % self.capacity
        self.rows[index] = rows["rows"][-self.capacity:].to(self.device)

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave."""
        self.position, self.episode_length = state["position"], state["episode_length"]
        for name in ("priority", "max_priority", "termination_seen"):
            getattr(self, name).copy_(state[name])
        offered = self.priority[:self.capacity] > 0
        self._valid_cpu, self.num_valid = bytearray(offered.cpu().numpy()), int(offered.sum())


def to_device(values, device):
    """numpy -> float32 tensor there, without waiting: PyTorch would wait, for an ordinary copy to a GPU, until everything
    the GPU has been given is done; and memory that is not pinned can be copied in no other way."""
    tensor = torch.as_tensor(np.asarray(values, np.float32))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def multi_step_return(reward, terminated, discount):
    """Σ γ^k r_k up to the termination, its own reward included, and the weight of the value that follows.  Eq. (11)

    reward, terminated: (batch, H). Returns (batch, 1) twice: the return, and γ^H where no step terminated, else 0.
    """
    weight = alive_discount(terminated, discount)
    return (reward * weight[:, :-1]).sum(1, keepdim=True), weight[:, -1:]


def alive_discount(terminated, discount=1.0):
    """γ^k where no step before the k-th terminated, else 0, for k = 0 ... H: (batch, H) -> (batch, H + 1)"""
    return F.pad(torch.rsub(terminated, discount, alpha=discount), (1, 0), value=1.0).cumprod(1)  # rsub: γ - γ·terminated


def _draw_from(weights, *shape):
    """Indices with probability proportional to weight. weights: (n,), for draws of any shape, or (rows, n), for draws of
    shape (rows, ·): each from its own row. float64."""
    sums = weights.cumsum(-1)
    total = sums[..., -1:].contiguous()
    target = torch.rand(shape, dtype=torch.float64, device=weights.device) * total
    # right=True: a draw of exactly 0 must not return index 0 if its weight is 0. The bound is the last index with a
    # weight above 0, which rounding could overstep.
    return torch.minimum(torch.searchsorted(sums, target, right=True), torch.searchsorted(sums, total))


def free_memory(device):
    """Bytes that can still be had on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:  # what can be had without swapping, caches that would be dropped included
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):  # not Linux: let the allocation itself decide
        return float("inf")
