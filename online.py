"""A network that learns from one sample at a time: the PyTorch module, and its forward, backward and update in numpy.

Guarantees: the numpy code works on the PyTorch weights' own memory and agrees with autograd to rounding; pruned weights
and their traces are exactly zero after every update.

With one sample, the gradient of a layer is an outer product, so an update is a handful of vector operations, and the
overhead of calling them decides the speed. numpy and BLAS calls cost a microsecond or less, several times less than
PyTorch's. stream.py is the agent; one may read it without this file.
"""

import math

import numpy as np
import torch
import torch.nn as nn
from scipy.linalg import get_blas_funcs

NORM_EPS, LEAK = 1e-5, 0.01  # of LayerNorm and LeakyReLU


class StreamMLP(nn.Module):
    """Hidden layers of Linear, LayerNorm without parameters, LeakyReLU; then one or more linear heads.

    input_dim; output_dims: one size per head. Returns a list of (..., output) tensors.
    """

    def __init__(self, input_dim, output_dims, hidden, depth):
        super().__init__()
        self.hidden = nn.Sequential(*[nn.Sequential(
            nn.Linear(hidden if layer else input_dim, hidden),
            nn.LayerNorm(hidden, eps=NORM_EPS, elementwise_affine=False),
            nn.LeakyReLU(LEAK)) for layer in range(depth)])
        self.heads = nn.ModuleList([nn.Linear(hidden, output_dim) for output_dim in output_dims])

    def features(self, x):
        """(..., input) -> (..., hidden): what SRank is read from."""
        return self.hidden(x)

    def forward(self, x):
        x = self.features(x)
        return [head(x) for head in self.heads]


class FastMLP:
    """A StreamMLP's forward and backward pass for one sample, on the vector of weights of its ObGD."""

    def __init__(self, network, weights):
        self.shapes = [tuple(parameter.shape) for parameter in network.parameters()]
        depth, layers = len(network.hidden), self.views(weights)
        self.hidden, self.heads = layers[:depth], layers[depth:]
        self.ones = np.ones(len(self.hidden[0][1]), weights.dtype)
        self._dot, self._axpy, self._gemv = get_blas_funcs(("dot", "axpy", "gemv"), (weights,))

    def views(self, vector):
        """One vector -> [(weight, bias), ...], the hidden layers first."""
        parts = np.split(vector, np.cumsum([math.prod(shape) for shape in self.shapes])[:-1])
        parts = [part.reshape(shape) for part, shape in zip(parts, self.shapes)]
        return list(zip(parts[::2], parts[1::2]))

    def _linear(self, weight, bias, x):
        return self._gemv(1.0, weight.T, x, 1.0, bias, trans=1)

    def forward(self, x):
        """(input,) -> ([(output,) of each head], tape)"""
        tape, size, dot = [], len(self.ones), self._dot
        for weight, bias in self.hidden:
            y = self._linear(weight, bias, x)
            y -= dot(y, self.ones) / size
            scale = 1.0 / math.sqrt(dot(y, y) / size + NORM_EPS)
            y *= scale  # LayerNorm
            tape.append((x, y, scale))
            x = np.maximum(y, LEAK * y)  # LeakyReLU
        tape.append(x)
        return [self._linear(weight, bias, x) for weight, bias in self.heads], tape

    def backward(self, tape, output_gradients):
        """Each layer's gradient as (d, x): d ⊗ x of the weight, d of the bias. output_gradients: (output,) each."""
        x, size, dot = tape[-1], len(self.ones), self._dot
        gradient = sum(output @ weight for output, (weight, _) in zip(output_gradients, self.heads))
        factors = [(output, x) for output in output_gradients]
        for layer in reversed(range(len(self.hidden))):
            x, y, scale = tape[layer]
            gradient = np.where(y > 0, gradient, LEAK * gradient)  # of LeakyReLU
            mean = dot(gradient, self.ones) / size
            self._axpy(y, gradient, a=-dot(gradient, y) / size)  # of LayerNorm: y has mean 0, variance 1 - ε'
            gradient -= mean
            gradient *= scale
            factors.insert(0, (gradient, x))
            if layer:
                gradient = gradient @ self.hidden[layer][0]
        return factors


class Learner:
    """One module's streaming update: traces, growth scores, topology, masks, ObGD.

    Growth: one step's gradient has rank one, so its largest entries lie in a few rows and columns. `--grow gradient`
    therefore ranks by |Σ δ·z̃| since the last change, with z̃ the trace of all weights, also pruned ones: the move
    that a weight would have made in that time, up to the step size, like the batch gradient with a replay buffer.
    """

    def __init__(self, network, optimizer, sparse, growth_score):
        self.optimizer, self.sparse = optimizer, sparse
        self.fast = FastMLP(network, optimizer.weights)
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters = list(network.parameters())
        self.ranked = sparse.dynamic and sparse.grow == "gradient"  # whether growth needs scores
        self.summed = self.ranked and growth_score == "sum"
        size = optimizer.weights.size if self.summed else 0
        self.tensors = {"dense_traces": torch.zeros(size, dtype=self.parameters[0].dtype),
                        "scores": torch.zeros(size, dtype=self.parameters[0].dtype)}
        # z̃ where growth sums it, else the traces themselves
        self.traces = self.tensors["dense_traces"].numpy() if self.summed else optimizer.traces
        self.scores = self.tensors["scores"].numpy()
        self.mask = np.ones_like(optimizer.weights) if sparse.masks else None  # of all parameters, 1 or 0
        self.refresh_mask()
        self._axpy, self._ger = get_blas_funcs(("axpy", "ger"), (optimizer.weights,))
        self.trace_views = [(weight.T, bias) for weight, bias in self.fast.views(self.traces)]  # transposed for BLAS

    def refresh_mask(self):
        if self.mask is not None:
            for name, part in zip(self.names, self._by_parameter(self.mask)):
                if name in self.sparse.masks:
                    part[...] = self.sparse.masks[name].numpy()

    def _by_parameter(self, vector):
        return [part for pair in self.fast.views(vector) for part in pair]

    def update(self, number, tape, output_gradients, delta, over):
        """Update `number` (1, 2, ...) with the gradients of the loss by the outputs that `tape` belongs to."""
        optimizer, factors = self.optimizer, self.fast.backward(tape, output_gradients)
        self.traces *= optimizer.param_groups[0]["decay"]  # z <- γλz + gradient
        for (weight, bias), (d, x) in zip(self.trace_views, factors):
            self._ger(1.0, x, d, a=weight, overwrite_a=True)
            bias += d
        if self.summed:
            self._axpy(self.traces, self.scores, a=delta)
        if self.mask is not None:
            np.multiply(self.traces, self.mask, out=optimizer.traces)
        if self.sparse.is_update_step(number):
            self.change_topology(number, factors)
        optimizer.move(delta, reset=over)
        if over and self.summed:
            self.traces.fill(0.0)

    def change_topology(self, number, factors):
        """A weight that grows starts at 0 and without a trace, in z̃ as well."""
        before, scores = self.mask.copy(), None
        if self.summed:
            scores = self._by_parameter(self.scores)
        elif self.ranked:
            scores = [part for d, x in factors for part in (np.outer(d, x), d)]
        self.sparse.update_topology(number, scores and dict(zip(self.names, map(torch.from_numpy, scores))))
        self.refresh_mask()
        if self.summed:
            self.scores.fill(0.0)
            self.traces[self.mask > before] = 0.0
        np.multiply(self.traces, self.mask, out=self.optimizer.traces)

    def end_episode(self):
        """The traces must not reach into the next episode."""
        self.traces.fill(0.0)
        self.optimizer.traces.fill(0.0)
