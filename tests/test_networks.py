"""Tests of MR.Q's networks: sizes, types, definitions, initialization."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from paper import figures

import networks
from tests.helpers import count, layer_norm, naive_block_mlp


@pytest.mark.parametrize("scale, encoder_humanoid, encoder_dog, head, critic, actor_humanoid, actor_dog", [
    (1, 2.01, 2.09, 0.30, 2.626, 1.323, 1.332), (3, 36.71, 36.97, 2.46, 33.055, 16.56, 16.58),
    (5, 154.27, 154.69, 6.73, 138.998, 69.55, 69.59)])
def test_sizes_match_the_paper(scale, encoder_humanoid, encoder_dog, head, critic, actor_humanoid, actor_dog):
    digits = lambda x: len(str(x).split(".")[1])
    same = lambda module_count, expected: round(module_count / 1e6, digits(expected)) == expected
    with torch.device("meta"):
        for arch_type in networks.ARCH_CONFIGS:  # all six types have the same counts
            for (obs, act), size, actor in (((67, 21), encoder_humanoid, actor_humanoid),
                                            ((223, 38), encoder_dog, actor_dog)):
                encoder = networks.Encoder(obs, act, arch_type, scale)
                assert same(count(encoder) - count(encoder.model), size) and same(count(encoder.model), head)
                assert same(count(networks.Actor(1536, act, arch_type, scale)), actor)
            assert same(count(networks.Critic(1536, arch_type, scale)), critic)


def test_default_networks_are_those_of_scale_1():
    """Table 2's types 4, 4 and 3, one block of 512; a scale multiplies both."""
    shapes = lambda network: {name: tuple(p.shape) for name, p in network.named_parameters()}
    for network, arguments, arch_type in ((networks.Encoder, (5, 2), 4), (networks.Critic, (512,), 4),
                                          (networks.Actor, (512, 2), 3), (networks.GaussianActor, (512, 2), 3)):
        plain, said = network(*arguments), network(*arguments, arch_type=arch_type, width_scale=1, depth_scale=1,
                                                   residual="pre")
        assert shapes(plain) == shapes(said) and str(plain) == str(said)
    assert shapes(networks.BlockMLP(3, 2, 8)) == shapes(networks.BlockMLP(3, 2, 8, True, "elu", 1))
    assert [networks.scaled_size(*size) for size in ((1,), (3,), (3, 0.5, 2))] == [(512, 1), (1536, 3), (256, 2)]


def test_agent_at_scale_5_has_371_million_parameters():
    with torch.device("meta"):
        encoder, critic = networks.Encoder(67, 21, 6, 5), networks.Critic(2560, 6, 5)
        actor = networks.Actor(2560, 21, 5, 5)
        total = count(encoder) - count(encoder.model) + count(critic) + count(actor)
        wide = networks.Critic(512, 6, 1, width_scale=2, depth_scale=3).q1
        narrow = networks.Encoder(10, 2, 6, 5, width_scale=0.25, depth_scale=1)
    assert round(total / 1e6, 1) == 370.7
    assert wide.projection.out_features == 1024 and len(wide.blocks) == 3
    assert narrow.zs_dim == 128 and narrow.za_linear.out_features == 64 and len(narrow.zsa_mlp.blocks) == 1


def test_six_types_match_the_paper():
    """Appendix C's table: what the other tests take from the code is pinned here."""
    relu, elu = {"activation": "relu"}, {"activation": "elu"}
    plain, norm, both = ({"use_layer_norm": n, "use_residual": r} for n,
                         r in ((False, False), (True, False), (True, True)))
    assert networks.ARCH_CONFIGS == {1: relu | plain, 2: elu | plain, 3: relu | norm, 4: elu | norm, 5: relu | both,
                                     6: elu | both}
    for number, config in networks.ARCH_CONFIGS.items():
        said = figures.TYPE_LABELS[number]
        assert (("LN" in said), ("residual" in said), "ELU" in said.replace("ReLU", "")) == (
            config["use_layer_norm"], config["use_residual"], config["activation"] == "elu")


@pytest.mark.parametrize("arch_type", networks.ARCH_CONFIGS)
@pytest.mark.parametrize("residual", ["pre", "post"])
def test_block_mlp_against_its_equations(arch_type, residual):
    torch.manual_seed(arch_type)
    config = networks.ARCH_CONFIGS[arch_type]
    model = networks.BlockMLP(5, 3, 16, num_blocks=3, residual=residual, **config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(7, 5).double()
    torch.testing.assert_close(model(x), naive_block_mlp(model, x, config, residual))


def test_modules_against_their_definitions():
    torch.manual_seed(0)
    for (arch_type, config), residual in itertools.product(networks.ARCH_CONFIGS.items(), ("pre", "post")):
        encoder = networks.Encoder(5, 2, arch_type, width_scale=1 / 32, depth_scale=2, residual=residual)
        act = getattr(F, config["activation"])
        obs, action = torch.randn(9, 5), torch.rand(9, 2)
        zs = naive_block_mlp(encoder.zs_mlp, obs, config, residual)
        zs = act(layer_norm(zs) if config["use_layer_norm"] else zs)  # no LayerNorm anywhere in types 1 and 2
        torch.testing.assert_close(encoder.zs(obs), zs)
        zsa = naive_block_mlp(encoder.zsa_mlp, torch.cat([zs, act(encoder.za_linear(action))], 1), config, residual)
        torch.testing.assert_close(encoder(zs, action), zsa)
        done, next_zs, reward = encoder.predict(zsa)
        torch.testing.assert_close(torch.cat([done, next_zs, reward], 1), encoder.model(zsa))
        assert done.shape == (9, 1) and next_zs.shape == (9, 16) and reward.shape == (9, 65)
        has_norm = any(isinstance(layer, nn.LayerNorm) for layer in encoder.modules())
        assert has_norm == config["use_layer_norm"]
    critic, actor = networks.Critic(16, 4, width_scale=1 / 32), networks.Actor(16, 3, 3, width_scale=1 / 32)
    torch.testing.assert_close(critic(zsa), torch.cat([critic.q1(zsa), critic.q2(zsa)], 1))
    assert not {id(p) for p in critic.q1.parameters()} & {id(p) for p in critic.q2.parameters()}
    action, pre_activation = actor(zs)
    torch.testing.assert_close(action, pre_activation.tanh())


def test_initialization_and_bad_arguments():
    torch.manual_seed(0)
    for module in (networks.Encoder(40, 30, 4), networks.Critic(512, 4), networks.Actor(512, 30),
                   networks.GaussianActor(512, 30)):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                bound = math.sqrt(2) * math.sqrt(6 / sum(layer.weight.shape))  # Xavier uniform with ReLU's gain
                assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any(), name
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be above 0"):
            networks.Critic(8, 4, scale=bad)
    with pytest.raises(ValueError, match="architecture type"):
        networks.Actor(8, 2, 7)


def test_scaled_sizes_are_rounded():
    assert networks.scaled_size(1, 0.3, 1.6) == (154, 2) and networks.scaled_size(1, 0.3, 0.8, 128, 2) == (38, 2)
    assert networks.scaled_size(0.0005) == (1, 1)
