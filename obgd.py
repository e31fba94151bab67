"""ObGD and SparseInit, the parts of streaming RL that any network can use.

Guarantees: no step overshoots by more than the bound allows; a TD error or a trace that is not finite changes no
weight; weights and traces are views of two vectors, also after loading a state.

Paper: Elsayed, Vasan and Mahmood, 2024, "Streaming Deep Reinforcement Learning Finally Works", Algorithms 1 and 3. This
file needs torch, numpy and scipy, and nothing else from this project:

    import torch
    from obgd import ObGD, sparse_init

    network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.LeakyReLU(), torch.nn.Linear(64, 1))
    sparse_init(network)
    optimizer = ObGD(network.parameters(), kappa=2.0, decay=0.99 * 0.8)          # γλ
    for step in range(100):
        value, next_value = network(torch.randn(3)), network(torch.randn(3)).detach()
        delta = (1.0 + 0.99 * next_value - value).item()                         # the TD error
        optimizer.zero_grad()
        (-value).sum().backward()                                                # of -V(s), or of -log π(a|s)
        optimizer.step(delta, reset=step % 50 == 49)                             # reset: the episode ends here
    print(delta, optimizer.last_step)
"""

import math

import torch
import torch.nn as nn
from scipy.linalg import get_blas_funcs


class ObGD(torch.optim.Optimizer):
    """Gradient descent with eligibility traces and a bound on the overshoot (Algorithm 3).

        z <- decay·z + gradient;   M = κ·α·max(|δ|, 1)·‖z‖₁;   w <- w - α/max(M, 1)·δ·z

    All weights move into one vector, all traces into another; parameters and `state[p]["trace"]` are views of them. So
    a bound over the whole network is two calls, and numpy code may work on `weights` and `traces`. CPU only, one dtype.
    """

    def __init__(self, params, kappa, decay, step_size=1.0):
        super().__init__(params, {"kappa": kappa, "decay": decay, "step_size": step_size})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = {(parameter.dtype, parameter.device.type) for parameter in parameters}
        if len(self.param_groups) > 1 or kinds != {(parameters[0].dtype, "cpu")}:
            raise ValueError("ObGD bounds one step for all weights: it takes one group, of one dtype, on the CPU")
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        traces = torch.zeros_like(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, weight, trace in zip(parameters, flat.split(sizes), traces.split(sizes)):
            parameter.data = weight.view(parameter.shape)
            self.state[parameter]["trace"] = trace.view(parameter.shape)
        self.weights, self.traces = flat.numpy(), traces.numpy()
        self._asum, self._axpy = get_blas_funcs(("asum", "axpy"), (self.weights,))
        self.trace_norm, self.last_step = 0.0, 0.0  # ‖z‖₁ and the step size of the last step, for the log

    @torch.no_grad()
    def step(self, delta, reset=False):
        """delta: the TD error, a number. reset: the episode has ended, so the traces become 0 after the step."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter]["trace"].mul_(self.param_groups[0]["decay"]).add_(parameter.grad)
        self.move(delta, reset)

    def move(self, delta, reset=False):
        """The step with the traces as they are. FloatingPointError, and no step, if δ or the traces are not finite."""
        group = self.param_groups[0]
        self.trace_norm = float(self._asum(self.traces))
        if not math.isfinite(delta * self.trace_norm):
            raise FloatingPointError(f"the TD error is {delta}, and the traces' L1 norm {self.trace_norm}")
        bound = group["kappa"] * group["step_size"] * max(abs(delta), 1.0) * self.trace_norm  # M
        self.last_step = group["step_size"] / max(bound, 1.0)
        self._axpy(self.traces, self.weights, a=-self.last_step * delta)
        if reset:
            self.traces.fill(0.0)

    @torch.no_grad()
    def load_state_dict(self, state):
        """In place: parameters and traces stay views of the two vectors."""
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter]["trace"].copy_(state["state"][index]["trace"])


@torch.no_grad()
def sparse_init(module, sparsity=0.9):
    """SparseInit: uniform in ±1/√fan_in; then ⌈sparsity·fan_in⌉ weights of each unit and all biases are 0.

    All weights stay trainable. Each unit keeps at least one weight: the published formula leaves none below 10 inputs,
    and a task with 6 would start without any input.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            fan_in = layer.in_features
            layer.weight.uniform_(-fan_in ** -0.5, fan_in ** -0.5)
            zeros = min(math.ceil(sparsity * fan_in - 1e-9), fan_in - 1)  # 0.9·190 is 171.00000000000003
            layer.weight.scatter_(1, torch.rand_like(layer.weight).argsort(1)[:, :zeros], 0.0)
            layer.bias.zero_()
