"""Plasticity metrics: what goes wrong inside a network before its return does.

What it claims: each metric equals the definition it cites, for any `nn.Module`, ReLU or ELU, linear or convolution, at
any size, and a metric that found nothing to measure is NaN, never 0.

Paper: Figures 3, 7, 10 and 11 (SRank, dormant ratio) and Appendix A.1 (norms, gradient interference). This file needs
torch alone; copy it into your project.

    import torch
    import metrics

    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    x = torch.randn(256, 8)
    with metrics.record_activations(model) as activations:
        model(x)
    losses = model(x).square().mean(1)                                  # (256,): one loss a sample
    losses.mean().backward()
    print("srank", metrics.srank(activations["1"]), "dormant", metrics.dormant_ratio(activations))
    print("norms", metrics.parameter_norm(model), metrics.gradient_norm(model))
    gram = metrics.gradient_gram(model(x[:32]).square().mean(1), list(model.parameters()))
    print("interference", metrics.interference_summary(metrics.cosines(gram)))
"""

import contextlib

import torch
import torch.nn as nn

ACTIVATION_MODULES = (  # all of PyTorch's but the softmaxes, whose outputs are shares and not neurons
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold)
CONVOLUTION = nn.modules.conv._ConvNd
FEATURE_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)


@contextlib.contextmanager
def record_activations(module):
    """Within the block, fills a dict of layer name -> (rows, units): what left each activation of `module`.

    Units are what the layer before it counts: the channels of a convolution (each position is a row, then), the last
    dimension otherwise. Read after the activation, for ELU as for ReLU, and copied, as later layers may work in place.
    An activation that runs twice keeps its last output. Functions (`F.relu`) leave no trace: only modules do.
    """
    recorded, hooks = {}, []
    # Number of dimensions -> which are the units, by the latest layer to put out as many. By default: as in images.
    unit_dim = {4: 1, 5: 1}

    def note_units(layer, _, output):
        output = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(output):
            unit_dim[output.ndim] = -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTION) else -1

    for name, layer in module.named_modules():
        if isinstance(layer, (CONVOLUTION, *FEATURE_LAYERS)):
            hooks.append(layer.register_forward_hook(note_units))
        elif isinstance(layer, ACTIVATION_MODULES):
            def keep(_, __, output, name=name):
                units_last = torch.atleast_2d(output.detach().movedim(unit_dim.get(output.ndim, -1), -1))
                recorded[name] = units_last.flatten(0, -2).clone()  # (rows, units)
            hooks.append(layer.register_forward_hook(keep))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def srank(features, delta=0.01):
    """Stable rank: the smallest k whose k largest singular values reach 1 - δ of their sum (Kumar et al., 2021).

    features: (batch, features), uncentred. At most min(batch, features): report that cap beside it.
    Returns an int; 0 if all features are zero. NaN if there are none, or if one is not finite.
    """
    features = features.detach().double()
    if features.numel() == 0 or not torch.isfinite(features).all():
        return float("nan")
    largest = features.abs().max()
    if largest == 0:
        return 0
    # Of a matrix whose largest element is 1: singular values of 1e38 and their sum would overflow. By the eigenvalues of the
    # smaller Gram matrix, a third of an SVD's time and on a GPU less: in float64 the values err by 1e-8 of the largest.
    features = features / largest
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    shares = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cumsum(0)
    # The smallest k with cumsum_k / sum >= 1 - δ. The slack keeps a sum that meets the bound exactly.
    return int((shares / shares[-1] < 1.0 - delta - 1e-9).sum()) + 1


def dormant_ratio(activations, tau=0.025):
    """Share of τ-dormant neurons: mean |activation| over the batch at most τ times the layer's mean (Sokar et al., 2023).

    activations: dict of layer name -> (batch, units). A layer that is all zero is all dormant.
    Returns (pooled over all neurons, dict of layer name -> ratio). A layer is NaN if it has no neuron, saw no batch or
    holds an activation that is not finite; pooled is NaN if there is no neuron at all, or if a layer of them is NaN.
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
    """Euclidean norm of the gradients now in `.grad`; NaN if there is none."""
    return _norm([parameter.grad for parameter in module.parameters() if parameter.grad is not None])


def gradient_interference(gradients):
    """Cosines between per-sample gradients: (samples, parameters) -> (samples, samples). NaN where a gradient is zero."""
    return cosines(gradients.double() @ gradients.double().T)


def gradient_gram(losses, parameters, masks=None, group_size=2 ** 24):
    """Inner products between per-sample gradients, without ever holding all gradients.

    losses: (samples,) with their graph; parameters: the list to differentiate by; masks: for each parameter, a bool
    tensor of what is trained, or None. Parameters are taken in groups of about `group_size` elements: all 32 gradients
    at once would be 20 GB at 154 M parameters. A frozen parameter adds nothing.
    Returns (samples, samples) in float64: `gradient_interference` of it is `cosines(gram)`. NaN if no parameter has a
    gradient: all are frozen, there are none, or the losses do not depend on them.
    """
    masks = [None] * len(parameters) if masks is None else masks
    trained = [(parameter, mask) for parameter, mask in zip(parameters, masks) if parameter.requires_grad]
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64, device=losses.device)
    each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    found = False
    for group in _groups(trained, group_size):
        # All samples in one backward pass, each with a gradient of its own.
        gradients = torch.autograd.grad(losses, [parameter for parameter, _ in group], grad_outputs=each,
                                        retain_graph=True, allow_unused=True, is_grads_batched=True)
        for (_, mask), gradient in zip(group, gradients):  # (samples, *parameter's shape)
            if gradient is None:
                continue
            found = True
            rows = (gradient if mask is None else gradient.masked_fill(~mask, 0.0)).flatten(1)
            for part in rows.split(2 ** 16, dim=1):
                part = part.double()  # float32 may be multiplied as tf32 or bfloat16, and has no squares below 1e-38
                gram += part @ part.T
    return gram if found else gram.fill_(float("nan"))


def cosines(gram):
    """(samples, samples) inner products -> cosines. A zero gradient has no direction: its row and column are NaN."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    return gram / (norm.unsqueeze(0) * norm.unsqueeze(1))


def interference_summary(cosine):
    """(mean off-diagonal cosine, share of them below 0); samples without a gradient are left out; NaN if none is left."""
    off_diagonal = cosine[~torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)]
    off_diagonal = off_diagonal[off_diagonal.isfinite()]
    if off_diagonal.numel() == 0:
        return float("nan"), float("nan")
    return off_diagonal.mean().item(), (off_diagonal < 0).double().mean().item()


def module_metrics(module, features, activations, losses, masks=None):
    """Every metric of one module, by column name.

    features: name -> (batch, ·) for SRank; activations: as `record_activations` gives them; losses: (samples,) with their
    graph, for gradient interference; masks: parameter name -> bool tensor of what is trained, where that is not all.
    What a module does not have (parameters, gradients, features) is NaN.
    """
    row = {}
    for name, values in features.items():
        row[f"srank_{name}"] = srank(values)
        row[f"srank_{name}_max"] = min(values.shape)  # the rank that this batch could show at most
    row["dormant_ratio"], per_layer = dormant_ratio(activations)
    parameters = dict(module.named_parameters())
    gram = gradient_gram(losses, list(parameters.values()), [(masks or {}).get(name) for name in parameters])
    row["grad_cosine"], row["grad_cosine_negative"] = interference_summary(cosines(gram))
    row["parameter_norm"] = parameter_norm(module)
    # Of the mean loss, from the same inner products: |Σ g_i / n|² = Σ_ij g_i·g_j / n². Masked, and before clipping.
    row["grad_norm"] = gram.mean().clamp(min=0).sqrt().item()
    return row | {f"dormant_ratio/{layer}": ratio for layer, ratio in per_layer.items()}


def _norm(tensors):
    if not tensors:
        return float("nan")
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])).item()


def _groups(items, group_size):
    """Cuts (parameter, mask) pairs into runs of at most `group_size` elements; a larger parameter is a run of its own."""
    group, size = [], 0
    for item in items:
        if group and size + item[0].numel() > group_size:
            yield group
            group, size = [], 0
        group.append(item)
        size += item[0].numel()
    if group:
        yield group
