"""The networks of the paper: six architecture types, MR.Q's three modules, and how they scale.

Guarantees: parameter counts equal the sizes the paper prints, at every scale; all six types have the same count.

    type   activation   LayerNorm   residual
    1      ReLU         no          no
    2      ELU          no          no
    3      ReLU         yes         no
    4      ELU          yes         no
    5      ReLU         yes         yes
    6      ELU          yes         yes

Paper: Section 2.2, Figure 1, Appendices B.2 and C, Table 2. This file needs only torch; copy it into your project.

    import torch
    from networks import Actor, Critic, Encoder

    encoder = Encoder(obs_dim=67, action_dim=21, arch_type=6, scale=1)
    critic = Critic(encoder.zsa_dim, arch_type=6, scale=1)
    actor = Actor(encoder.zs_dim, action_dim=21, arch_type=5, scale=1)
    zs = encoder.zs(torch.randn(256, 67))              # (256, 512)
    action, pre_activation = actor(zs)                 # (256, 21) each; the action lies in [-1, 1]
    q = critic(encoder(zs, action))                    # (256, 2): one column per critic
    print(q.shape, sum(p.numel() for p in critic.parameters()))
"""

import torch
import torch.nn as nn

ARCH_CONFIGS = {  # Appendix C
    1: {"use_layer_norm": False, "activation": "relu", "use_residual": False},  # vanilla MLP
    2: {"use_layer_norm": False, "activation": "elu", "use_residual": False},
    3: {"use_layer_norm": True, "activation": "relu", "use_residual": False},  # + LayerNorm
    4: {"use_layer_norm": True, "activation": "elu", "use_residual": False},
    5: {"use_layer_norm": True, "activation": "relu", "use_residual": True},  # + residual connections
    6: {"use_layer_norm": True, "activation": "elu", "use_residual": True},
}
ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU}  # Eqs. (3) and (4), α = 1
RESIDUALS = ("pre", "post")
WIDTH = 512  # Table 2, hidden dim, and the size of z_s and z_sa, at scale 1
ACTION_WIDTH = 256  # Table 2, z_a dim


def norm_activation(dim, use_layer_norm, activation):
    """LayerNorm, if the type has one, then the activation.

    The LayerNorm has no parameters (as in the published MR.Q), so all six types have equal counts. Each activation is a
    separate module, so a hook on it sees the units of one layer only.
    """
    norm = [nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)] if use_layer_norm else []
    return nn.Sequential(*norm, ACTIVATIONS[activation]())


def init_weights(layer):
    """Table 2: Xavier uniform, biases 0. The gain is ReLU's, √2, for both activations, as in the published MR.Q."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("relu"))
        nn.init.zeros_(layer.bias)


class BaseMLPBlock(nn.Module):
    """Two linear layers of equal width, each after LayerNorm and activation.  Appendix C, BaseMLPBlock"""

    def __init__(self, hidden_dim, use_layer_norm, activation):
        super().__init__()
        self.activation1 = norm_activation(hidden_dim, use_layer_norm, activation)
        self.linear1 = nn.Linear(hidden_dim, hidden_dim)
        self.activation2 = norm_activation(hidden_dim, use_layer_norm, activation)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x, skip=None):
        """x: (..., hidden). skip: None, "pre" (Eq. 5) or "post" (Eq. 6). Returns the same shape."""
        y = self.activation1(x)  # F'(x) of Eq. (6)
        out = self.linear2(self.activation2(self.linear1(y)))
        if skip is None:
            return out
        return out + (x if skip == "pre" else y)


class BlockMLP(nn.Module):
    """Linear projection, blocks, LayerNorm and activation, linear output.  Appendix C, BlockMLP

    residual: "pre", y = F(x) + x, Eq. (5), the paper's choice; "post", y = G(F'(x)) + F'(x), Eq. (6), for Fig. 17.
    It matters only with `use_residual`.
    """

    def __init__(self, input_dim, output_dim, hidden_dim, use_layer_norm=True, activation="elu", num_blocks=1,
                 use_residual=False, residual="pre"):
        super().__init__()
        if residual not in RESIDUALS:
            raise ValueError(f"unknown residual {residual!r}: choose one of {', '.join(RESIDUALS)}")
        self.skip = residual if use_residual else None
        self.projection = nn.Linear(input_dim, hidden_dim)
        self.blocks = nn.ModuleList(
            BaseMLPBlock(hidden_dim, use_layer_norm, activation) for _ in range(num_blocks))
        self.activation = norm_activation(hidden_dim, use_layer_norm, activation)
        self.output = nn.Linear(hidden_dim, output_dim)
        self.apply(init_weights)

    def features(self, x):
        """(..., input) -> (..., hidden): the penultimate features, used for SRank."""
        x = self.projection(x)
        for block in self.blocks:
            x = block(x, self.skip)
        return self.activation(x)

    def forward(self, x):
        return self.output(self.features(x))


def arch_config(arch_type):
    """The row of ARCH_CONFIGS; ValueError for a type that is not 1 to 6."""
    if arch_type not in ARCH_CONFIGS:
        raise ValueError(f"unknown architecture type {arch_type!r}: choose 1 to 6")
    return ARCH_CONFIGS[arch_type]


def scaled_size(scale, width_scale=None, depth_scale=None, width=WIDTH, depth=1):
    """(hidden width, number of blocks). scale multiplies both; width_scale or depth_scale replaces it for one.

    The paper scales "hidden dimensions and block numbers" by 3 and 5. Fractions shrink the width for small machines;
    the number of blocks is rounded, and is at least one.
    """
    width_scale = scale if width_scale is None else width_scale
    depth_scale = scale if depth_scale is None else depth_scale
    for name, value in (("width", width_scale), ("depth", depth_scale)):
        if not 0 < value < float("inf"):
            raise ValueError(f"a {name} scale must be above 0, not {value}")
    return max(1, round(width * width_scale)), max(1, round(depth * depth_scale))


class Encoder(nn.Module):
    """f_ω and g_ω of MR.Q, and the linear head m that predicts the next step.  Eq. (7)

    z_s, z_a and z_sa scale with the encoder: the paper's printed sizes (2, 37 and 154 M) require it. z_sa has no
    activation. Shapes: obs (..., obs_dim), action (..., action_dim), z_s (..., zs_dim), z_sa (..., zsa_dim).
    """

    def __init__(self, obs_dim, action_dim, arch_type=4, scale=1, width_scale=None, depth_scale=None, residual="pre",
                 num_bins=65):
        super().__init__()
        config = arch_config(arch_type)
        hidden, blocks = scaled_size(scale, width_scale, depth_scale)
        self.zs_dim = self.zsa_dim = hidden
        self.num_bins = num_bins
        za_dim = max(1, hidden * ACTION_WIDTH // WIDTH)
        norm, activation = config["use_layer_norm"], config["activation"]
        self.zs_mlp = BlockMLP(obs_dim, self.zs_dim, hidden, num_blocks=blocks, residual=residual, **config)
        self.zs_activation = norm_activation(self.zs_dim, norm, activation)
        self.za_linear = nn.Linear(action_dim, za_dim)
        self.za_activation = norm_activation(za_dim, False, activation)
        self.zsa_mlp = BlockMLP(self.zs_dim + za_dim, self.zsa_dim, hidden, num_blocks=blocks, residual=residual,
                                **config)
        self.model = nn.Linear(self.zsa_dim, 1 + self.zs_dim + num_bins)  # m of Eq. (7)
        self.za_linear.apply(init_weights)
        self.model.apply(init_weights)

    def zs(self, obs):
        """z_s = f_ω(s)"""
        return self.zs_activation(self.zs_mlp(obs))

    def za(self, action):
        """z_a, (..., za_dim)"""
        return self.za_activation(self.za_linear(action))

    def forward(self, zs, action):
        """z_sa = g_ω(z_s, a)"""
        return self.zsa_mlp(torch.cat([zs, self.za(action)], -1))

    def predict(self, zsa):
        """The next step's done (..., 1), z_s (..., zs_dim), reward logits (..., bins): linear in z_sa.  Eq. (7)"""
        return self.model(zsa).split([1, self.zs_dim, self.num_bins], -1)

    def unroll(self, zs, actions):
        """`predict` along real actions, each step from the z_s that the previous step predicted.  Eq. (7)

        zs: (batch, zs_dim). actions: (batch, H, action_dim). Returns the three with H as their second dimension.
        """
        predictions = []
        for za in self.za(actions).unbind(1):  # one product for all z_a: they do not depend on predictions
            predictions.append(self.predict(self.zsa_mlp(torch.cat([zs, za], -1))))
            zs = predictions[-1][1]
        return [torch.stack(steps, 1) for steps in zip(*predictions)]


class Critic(nn.Module):
    """Twin Q_θ on z_sa, with nothing shared. Type 4 at scale 1 is the published MR.Q critic.  Eq. (11)"""

    def __init__(self, zsa_dim, arch_type=4, scale=1, width_scale=None, depth_scale=None, residual="pre"):
        super().__init__()
        hidden, blocks = scaled_size(scale, width_scale, depth_scale)
        self.q1, self.q2 = (BlockMLP(zsa_dim, 1, hidden, num_blocks=blocks, residual=residual, **arch_config(arch_type))
                            for _ in range(2))

    def forward(self, zsa):
        """(..., zsa_dim) -> (..., 2)"""
        return torch.cat([self.q1(zsa), self.q2(zsa)], -1)


class Actor(nn.Module):
    """π_φ on z_s: a deterministic action tanh(z_π), and its pre-activation z_π.  Eq. (12)"""

    def __init__(self, zs_dim, action_dim, arch_type=3, scale=1, width_scale=None, depth_scale=None, residual="pre"):
        super().__init__()
        hidden, blocks = scaled_size(scale, width_scale, depth_scale)
        self.mlp = BlockMLP(zs_dim, action_dim, hidden, num_blocks=blocks, residual=residual, **arch_config(arch_type))

    def features(self, zs):
        return self.mlp.features(zs)

    def forward(self, zs):
        """(..., zs_dim) -> action in [-1, 1] and pre-activation, (..., action_dim) each"""
        pre_activation = self.mlp(zs)
        return torch.tanh(pre_activation), pre_activation


class GaussianHeads:
    """Separate heads for mean and raw log-std: ER would give one joint layer a different density."""

    def forward(self, x):
        """(..., input) -> (..., 2·action_dim)"""
        features = self.features(x)
        return torch.cat([self.output(features), self.log_std(features)], -1)


class GaussianActor(GaussianHeads, BlockMLP):
    """MR.SAC's policy on z_s: the same MLP as `Actor`, with two heads."""

    def __init__(self, zs_dim, action_dim, arch_type=3, scale=1, width_scale=None, depth_scale=None, residual="pre"):
        hidden, blocks = scaled_size(scale, width_scale, depth_scale)
        super().__init__(zs_dim, action_dim, hidden, num_blocks=blocks, residual=residual, **arch_config(arch_type))
        self.log_std = nn.Linear(hidden, action_dim)
        self.log_std.apply(init_weights)
