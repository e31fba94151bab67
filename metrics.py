"""Plasticity metrics: what changes inside a network before its return drops.

Guarantees: each metric equals the definition it cites, for any `nn.Module`, ReLU or ELU, linear or convolution,
compiled or not, at any size; a metric with nothing to measure is NaN, never 0, and missing activations are reported.

Paper: Figures 3, 7, 10 and 11 (SRank, dormant ratio) and Appendix A.1 (norms, gradient interference). This file needs
only torch; copy it into your project.

    import torch
    import metrics

    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    x = torch.randn(256, 8)
    with metrics.record_activations(model) as activations:
        model(x)
    losses = model(x).square().mean(1)                                  # (256,): one loss per sample
    losses.mean().backward()
    print("srank", metrics.srank(activations["1"]), "dormant", metrics.dormant_ratio(activations))
    print("norms", metrics.parameter_norm(model), metrics.gradient_norm(model))
    gram = metrics.gradient_gram(model(x[:32]).square().mean(1), list(model.parameters()))
    print("interference", metrics.interference_summary(metrics.cosines(gram)))
"""

import contextlib
import sys
import warnings

import torch
import torch.nn as nn

ACTIVATION_MODULES = (  # all of PyTorch's except softmaxes, whose outputs are shares, not neurons
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold)
CONVOLUTION = nn.modules.conv._ConvNd
FEATURE_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)


@contextlib.contextmanager
def record_activations(module):
    """Within the block, fills a dict of layer name -> (rows, units): the outputs of `module`'s activation layers.

    Units are the channels after a convolution (each position is then a row), and the last dimension otherwise. Outputs
    are copied, since later layers may work in place. An activation that runs twice keeps its last output. Code that
    `torch.compile` made runs uncompiled within the block: compiled code does not call hooks that were set later.

    Functions (`F.relu`) cannot be recorded, only modules. A UserWarning if nothing was.
    """
    recorded, hooks = {}, []
    # Number of dimensions -> the units' dimension, by the latest layer whose output has as many. Default: as in images.
    unit_dim = {4: 1, 5: 1}

    def note_units(layer, _, output):
        output = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(output):
            unit_dim[output.ndim] = -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTION) else -1

    for name, layer in module.named_modules():
        name = name.replace("_orig_mod.", "")  # torch.compile's wrapper
        if isinstance(layer, (CONVOLUTION, *FEATURE_LAYERS)):
            hooks.append(layer.register_forward_hook(note_units))
        elif isinstance(layer, ACTIVATION_MODULES):
            def keep(_, __, output, name=name):
                units_last = torch.atleast_2d(output.detach().movedim(unit_dim.get(output.ndim, -1), -1))
                recorded[name] = units_last.flatten(0, -2).clone()  # (rows, units)
            hooks.append(layer.register_forward_hook(keep))
    # Without dynamo, which takes seconds to import, nothing is compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with eager:
            yield recorded
    finally:
        for hook in hooks:
            hook.remove()
    if not recorded:
        warnings.warn(f"no activation of this {type(module).__name__} was recorded, so its dormant ratio is NaN: it "
                      "did not run, or its activations are functions (F.relu) or scripted; use modules (nn.ReLU)",
                      stacklevel=3)


def srank(features, delta=0.01):
    """Stable rank: the smallest k whose k largest singular values reach 1 - δ of their sum (Kumar et al., 2021).

    features: (batch, features), not centered. Returns an int, at most min(batch, features): report that maximum beside
    it. 0 if all features are zero; NaN if there are none, or one is not finite.
    """
    features = features.detach().double()
    if features.numel() == 0 or not torch.isfinite(features).all():
        return float("nan")
    largest = features.abs().max()
    if largest == 0:
        return 0
    # Scaled to a largest element of 1, because the sum of singular values near 1e38 would overflow. The eigenvalues of
    # the smaller Gram matrix take a third of an SVD's time; in float64 their roots are exact to 1e-8 of the largest.
    features = features / largest
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    shares = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cumsum(0)
    # The smallest k with cumsum_k / sum >= 1 - δ. The slack keeps a sum that equals the bound.
    return int((shares / shares[-1] < 1.0 - delta - 1e-9).sum()) + 1


def dormant_ratio(activations, tau=0.025):
    """Share of τ-dormant neurons: mean |activation| over the batch <= τ times the layer's mean (Sokar et al., 2023).

    activations: dict of layer name -> (batch, units). A layer of zeros is all dormant.
    Returns (ratio over all neurons, dict of layer name -> ratio). A layer is NaN if it has no neuron or no batch, or if
    an activation is not finite; the first is NaN if there are no neurons, or if a layer with neurons is NaN.
    """
    dormant, per_layer, total = 0, {}, 0
    for name, activation in activations.items():
        score = activation.detach().abs().float().mean(0)  # (units,)
        count = int((score <= tau * score.mean()).sum())
        per_layer[name] = count / score.numel() if score.numel() and score.isfinite().all() else float("nan")
        if score.numel():
            dormant, total = dormant + per_layer[name] * score.numel(), total + score.numel()
    return (dormant / total if total else float("nan")), per_layer


def parameter_norm(module):
    """Euclidean norm of all parameters together; NaN for a module without any."""
    return _norm([parameter.detach() for parameter in module.parameters()])


def gradient_norm(module):
    """Euclidean norm of the current `.grad`s; NaN if there is none."""
    return _norm([parameter.grad for parameter in module.parameters() if parameter.grad is not None])


def gradient_interference(gradients):
    """Cosines of per-sample gradients: (samples, parameters) -> (samples, samples). NaN where a gradient is zero."""
    return cosines(gradients.double() @ gradients.double().T)


def gradient_gram(losses, parameters, masks=None, group_size=2 ** 24):
    """Inner products between per-sample gradients, without holding all gradients at once.

    losses: (samples,) with their graph. parameters: a list. masks: for each parameter a bool tensor, True where it is
    trained, or None. Parameters are processed in groups of about `group_size` elements: all 32 gradients at once would
    take 20 GB at 154 M parameters. Frozen parameters are skipped.
    Returns (samples, samples) in float64; `cosines` of it is the gradient interference. NaN if no parameter has a
    gradient: all are frozen, there are none, or the losses do not depend on them.
    """
    masks = [None] * len(parameters) if masks is None else masks
    trained = [(parameter, mask) for parameter, mask in zip(parameters, masks) if parameter.requires_grad]
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64, device=losses.device)
    each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    found = False
    for group in _groups(trained, group_size):
        # All samples in one backward pass, each with its own gradient.
        gradients = torch.autograd.grad(losses, [parameter for parameter, _ in group], grad_outputs=each,
                                        retain_graph=True, allow_unused=True, is_grads_batched=True)
        for (_, mask), gradient in zip(group, gradients):  # (samples, *parameter's shape)
            if gradient is None:
                continue
            found = True
            rows = (gradient if mask is None else gradient.masked_fill(~mask, 0.0)).flatten(1)
            for part in rows.split(2 ** 16, dim=1):
                part = part.double()  # float32 products may be tf32 or bfloat16, and squares underflow at 1e-38
                gram += part @ part.T
    return gram if found else gram.fill_(float("nan"))


def cosines(gram):
    """(samples, samples) inner products -> cosines. The row and column of a zero gradient are NaN."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    return gram / (norm.unsqueeze(0) * norm.unsqueeze(1))


def interference_summary(cosine):
    """(mean off-diagonal cosine, share below 0), without the samples whose gradient is zero; NaN if none is left."""
    off_diagonal = cosine[~torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)]
    off_diagonal = off_diagonal[off_diagonal.isfinite()]
    if off_diagonal.numel() == 0:
        return float("nan"), float("nan")
    return off_diagonal.mean().item(), (off_diagonal < 0).double().mean().item()


def module_metrics(module, features, activations, losses, masks=None):
    """Every metric of one module, by column name.

    features: name -> (batch, units), for SRank. activations: from `record_activations`. losses: (samples,) with their
    graph, for gradient interference. masks: parameter name -> bool tensor, True where a sparse parameter is trained.
    NaN for whatever the module lacks: parameters, gradients, features or activations.
    """
    row = {}
    for name, values in features.items():
        row[f"srank_{name}"] = srank(values)
        row[f"srank_{name}_max"] = min(values.shape)  # the largest rank that this batch can show
    row["dormant_ratio"], per_layer = dormant_ratio(activations)
    parameters = dict(module.named_parameters())
    gram = gradient_gram(losses, list(parameters.values()), [(masks or {}).get(name) for name in parameters])
    row["grad_cosine"], row["grad_cosine_negative"] = interference_summary(cosines(gram))
    row["parameter_norm"] = parameter_norm(module)
    # Of the mean loss, by the same inner products: |Σ g_i / n|² = Σ_ij g_i·g_j / n². Masked, before clipping.
    row["grad_norm"] = gram.mean().clamp(min=0).sqrt().item()
    return row | {f"dormant_ratio/{layer}": ratio for layer, ratio in per_layer.items()}


def _norm(tensors):
    if not tensors:
        return float("nan")
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])).item()


def _groups(items, group_size):
    """Splits (parameter, mask) pairs into groups of at most `group_size` elements; a larger one is its own group."""
    group, size = [], 0
    for item in items:
        if group and size + item[0].numel() > group_size:
            yield group
            group, size = [], 0
        group.append(item)
        size += item[0].numel()
    if group:
        yield group
