"""Tests of settings."""

import copy
import dataclasses
import inspect
from typing import get_args

import numpy as np
import pytest
import torch

import networks
from agents import AGENTS, build_agent
from base import ModuleConfig
from settings import check, defaults, diff_settings, flag_names, module_configs, run_name
from sparsity import SparseTraining
from tests.helpers import REPLAY_AGENTS, flags_to_args, play


READ_ELSEWHERE = {"action_repeat", "eval_every", "eval_episodes", "metrics_every", "log_every", "buffer_size"}  # by the loop and what is built around it


IN_PLACES_OF_THEIR_OWN = {"mst", "reward_bins", "twin_critics", "precision"}  # everything else that shows in one module shows in all


def other_values(kind, value):
    """Values of the type that no setting has by default."""
    if type(None) in get_args(kind):
        return [other for part in get_args(kind) if part is not type(None) for other in other_values(part, value)]
    return {float: [0.0731, 2.731], int: [7, 1007], bool: [not value]}.get(kind) or [v for v in get_args(kind) if v != value]


def with_setting(args, group, name, value):
    return dataclasses.replace(args, **{group: dataclasses.replace(getattr(args, group), **{name: value})} if group else {name: value})


def what_it_builds(agent):
    """By module: its layers' widths and what they compute, its optimiser's options, its sparse training's settings."""
    built = {name: {"optimizer": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]}
             for name, optimizer in agent.optimizers.items()}
    for name, network in agent.networks.items():
        network = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.3 * torch.sin(1.0 + torch.arange(parameter.numel())).view_as(parameter))
            if name == "encoder":
                output = network(network.zs(torch.zeros(1, 4)), torch.zeros(1, 2))
            elif "encoder" in agent.networks:  # zeros: how wide another module is must not show here
                output = network(torch.zeros(1, agent.encoder.zs_dim))
            else:
                output = network(torch.zeros(1, 4), torch.zeros(1, 2)) if name == "critic" else network(torch.zeros(1, 4))
        output = output[1] if isinstance(output, tuple) else output
        built[name] |= {"widths": [(n, len(p)) for n, p in network.named_parameters()], "output": output.tolist(),
                        "sparse": {k: v for k, v in vars(agent.sparse[name]).items() if isinstance(v, (bool, int, float, str))}}
    return built


def what_it_does(agent):
    """What an update leaves in each module's moments, in the order of the updates; and what acting and two updates leave."""
    buffer = play(0, 400, agent.config.horizon, 120, obs_dim=4, action_dim=2, prioritized=agent.config.prioritized)[0]
    agent.replay = buffer
    obs = np.random.RandomState(0).randn(5, 4).astype(np.float32)
    for row in obs:
        agent.update_obs_stats(row)
    torch.manual_seed(0)
    actions = [agent.act(obs, explore=explore).tolist() for explore in (True, False)]
    agent.update()
    order = ("encoder", "critic", "actor", "temperature") if "encoder" in agent.networks else ("actor", "temperature", "critic")
    moments = {name: [value.sum().item() for state in agent.optimizers[name].state.values() for value in state.values()]
               for name in order if name in agent.optimizers}
    agent.update()  # by now the targets are not the networks themselves
    tensors = [value.sum().item() for network in agent.targets.values() for value in network.parameters()]
    rest = [value.tolist() for value in (*agent.tensors().values(), *agent.info.values())]
    return moments, (actions, tensors, rest, agent.updates, agent.updates_per_step, buffer.priority.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_every_setting_does_something_and_does_it_in_its_own_place(algo):
    """Changed alone, by its type alone, it shows in what is built or in what an update does; and in the run's name."""
    own = ("--twin-critics",) if algo in ("sac", "ddpg") else ("--encoder-regime", "s2d", "--target-update-freq", "4")
    base = flags_to_args("--algo", algo, "--mst", "--critic-regime", "d2s", "--scale", "0.05", "--total-steps", "60", "--learning-starts",
                         "20", "--batch-size", "12", "--update-interval", "3", "--schedule-start", "0.02", *own)
    build = lambda args: (torch.manual_seed(0), build_agent(args, 4, 2, torch.device("cpu")))[1]
    base_built, (base_moments, base_rest) = what_it_builds(build(base)), what_it_does(build(base))
    modules = list(module_configs(base))
    assert {sparse.total_steps for sparse in build(base).sparse.values()} == {(60 - 20) * base.agent.updates_per_step}
    for group, name in flag_names(base):
        if name == "algo":  # comes with settings of its own
            continue
        holder = getattr(base, group) if group else base
        spec = next(spec for spec in dataclasses.fields(holder) if spec.name == name)
        place, refusal, shown = name.split("_")[0], "", False
        for value in other_values(spec.type, getattr(holder, name)):
            args = with_setting(base, group, name, value)
            try:
                check(args)
                agent = None if name in READ_ELSEWHERE else build(args)
            except ValueError as error:
                refusal = str(error)
                continue
            assert run_name(args) != run_name(base), f"{name} is no part of the name {run_name(args)}"
            if agent is None:
                shown = True
                break
            built = what_it_builds(agent)
            places = [part for part in built if built[part] != base_built[part]]
            if places and place in built:
                assert places == [place], f"{name} shows in {places}"
            elif places:
                assert set(modules) <= set(places) or name in IN_PLACES_OF_THEIR_OWN, f"{name} shows in {places} alone"
            else:
                moments, rest = what_it_does(agent)
                places = [part for part in moments if moments[part] != base_moments[part]] + ["rest"] * (rest != base_rest)
                assert not places or place not in modules or places[0] == place, f"{name} shows first in {places}"
            shown = shown or bool(places)
            if shown:
                break
        # Else it must be one that this algorithm refuses, by name.
        assert shown or f"--{name.replace('_', '-')}" in refusal, f"{name} does nothing"


def test_a_schedule_may_be_a_single_step():
    check(flags_to_args("--schedule-start", "0.5", "--schedule-end", "0.5"))


def test_defaults_are_those_of_the_papers():
    tables = {  # Tables 1 and 2 of the paper, and what the published SimBa uses for DeepMind Control
        "mrq": {"batch_size": 256, "updates_per_step": 1, "discount": 0.99, "encoder_horizon": 5, "q_horizon": 3, "target_update_freq": 250, "dynamics_weight": 1,
                "reward_weight": 0.1, "terminal_weight": 0.1, "encoder_lr": 1e-4, "critic_lr": 3e-4, "actor_lr": 3e-4, "weight_decay": 1e-4,
                "critic_grad_clip": 20, "reward_bins": 65, "reward_symlog_limit": 10, "exploration_noise": 0.2, "target_noise": 0.2,
                "target_noise_clip": 0.3, "pre_activation_weight": 1e-5},
        "ddpg": {"batch_size": 256, "updates_per_step": 2, "discount": 0.99, "tau": 0.005, "actor_lr": 1e-4, "critic_lr": 1e-4, "weight_decay": 0.01,
                 "twin_critics": False, "target_q_reduce": "min", "actor_q_reduce": "min", "exploration_noise": 0.1}}
    temperature = {"initial_temperature": 0.01, "temperature_lr": 1e-4, "target_entropy": -0.5}
    policy = ("exploration_noise", "target_noise", "target_noise_clip", "pre_activation_weight")
    without = lambda algo: {name: value for name, value in tables[algo].items() if name not in policy}
    tables["sac"] = without("ddpg") | temperature
    tables["mrsac"] = without("mrq") | temperature | {"temperature_lr": 3e-4, "target_policy": "target", "target_q_reduce": "min", "actor_q_reduce": "min"}
    for algo, table in tables.items():
        args = defaults(algo)
        assert dataclasses.asdict(args.agent) == table
        with torch.device("meta"):
            agent = AGENTS[algo](4, 2, device="meta")  # built by hand, it has the schedule of a default run
        assert {sparse.total_steps for sparse in agent.sparse.values()} == {
            (args.total_steps - args.learning_starts) * agent.updates_per_step}
        assert (args.learning_starts, args.agent.updates_per_step, args.agent.horizon) == (
            (5000, 2, 1) if algo in ("sac", "ddpg") else (10_000, 1, 5))
        sparse = {"sparsity": 0.8 if algo in ("sac", "ddpg") else 0.6, "distribution": "er", "grow": "gradient", "update_interval": 1000,
                  "drop_fraction_start": 0.5, "drop_fraction_end": 0.0, "schedule_start": 0.2, "schedule_end": 0.8, "schedule_power": 2.0}
        assert dataclasses.asdict(args.sparse) == sparse
        # SparseTraining by itself has the same.
        own = {name: p.default for name, p in inspect.signature(SparseTraining).parameters.items() if p.default is not p.empty}
        assert sparse | {"sparsity": 0.6, "seed": None, "exclude": (), "include": ()} == {
            name: value for name, value in own.items() if name != "total_steps"}
    assert (args.total_steps, args.eval_every, args.eval_episodes, args.buffer_size, args.log_every, args.scale, args.seed, args.mst) == (
        500_000, 5000, 10, 1_000_000, 500, 1.0, 0, False)


def test_what_is_not_in_the_name_is_a_matter_of_the_machine_alone():
    args, own = defaults("mrq"), {name for _, name in flag_names(defaults("mrq"))}
    outside = {"env", "seed", "device", "threads", "compile", "cuda_graphs", "eval_workers", "runs", "name", "tensorboard", "wandb_project",
               "resume", "save_every", "keep_checkpoint", "extend"}
    for spec in dataclasses.fields(args):
        assert dataclasses.is_dataclass(getattr(args, spec.name)) or (spec.name in own) != (spec.name in outside), spec.name
    assert diff_settings(flags_to_args(), flags_to_args("--metrics-every", "2")) == "--metrics-every 1, not 2"


def test_numbers_that_differ_in_the_ninth_digit_have_two_names():
    assert len({run_name(flags_to_args("--critic-lr", rate)) for rate in ("0.00012345678", "0.00012345679", "0.000123457")}) == 3


def test_the_residual_is_read_where_a_type_has_one():
    for number, config in networks.ARCH_CONFIGS.items():
        assert (ModuleConfig(number, residual="post").canonical().residual == "post") == config["use_residual"]
        flags = flags_to_args("--actor-type", str(number), "--residual", "post")
        if config["use_residual"]:
            check(flags)
        else:
            with pytest.raises(ValueError, match="--residual post has no effect"):
                check(flags)
