"""Tests of flags, their checks, names of runs, and configs of earlier versions."""

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn as nn

import networks
from agents import AGENTS, build_agent
from base import ModuleConfig
from mrq import MRQConfig
from sac import DDPGConfig, SACConfig
from settings import (CONFIGS, NOT_IN_NAME, OLD_FLAGS, check, defaults, diff_settings, flag_names, from_config,
                      module_configs, parse, plan_notes, run_name, unused_flag_notes)
from sparsity import REGIMES, SparseTraining
from tests.helpers import REPLAY_AGENTS, args_with, backward, flags_to_args, play, refuses


NOT_READ_BY_AGENTS = {"action_repeat", "eval_every", "eval_episodes", "metrics_every", "log_every", "buffer_size"}
IN_SOME_MODULES = {"mst", "reward_bins", "twin_critics", "precision"}  # other settings change one module or all


def other_values(kind, value):
    """Values of the type that no setting has by default."""
    if type(None) in get_args(kind):
        return [other for part in get_args(kind) if part is not type(None) for other in other_values(part, value)]
    numbers = {float: [0.0731, 2.731], int: [7, 1007], bool: [not value]}
    return numbers.get(kind) or [other for other in get_args(kind) if other != value]


def with_setting(args, group, name, value):
    holder = dataclasses.replace(getattr(args, group or "encoder"), **{name: value} if group else {})
    return dataclasses.replace(args, **{group: holder} if group else {name: value})


def what_it_builds(agent):
    """By module: its layers' widths and output, its optimizer's options, its sparse training's settings."""
    built = {name: {"optimizer": [{k: v for k, v in group.items() if k != "params"}
                                  for group in optimizer.param_groups]} for name, optimizer in agent.optimizers.items()}
    for name, network in agent.networks.items():
        network = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.3 * torch.sin(1.0 + torch.arange(parameter.numel())).view_as(parameter))
            if name == "encoder":
                output = network(network.zs(torch.zeros(1, 4)), torch.zeros(1, 2))
            elif name == "critic" and "encoder" not in agent.networks:
                output = network(torch.zeros(1, 4), torch.zeros(1, 2))
            elif "encoder" in agent.networks:  # zeros: the width of another module must not show here
                output = network(torch.zeros(1, agent.encoder.zs_dim))
            else:
                output = network(torch.zeros(1, 4))
        output = output[1] if isinstance(output, tuple) else output
        built[name] |= {"widths": [(n, len(p)) for n, p in network.named_parameters()], "output": output.tolist(),
                        "sparse": {k: v for k, v in vars(agent.sparse[name]).items()
                                   if isinstance(v, (bool, int, float, str))}}
    return built


def what_it_does(agent):
    """Each module's moments after an update, in the order of the updates; and all else that learning changes."""
    agent.replay = buffer = play(0, 400, agent.config.horizon, 120, obs_dim=4, action_dim=2,
                                 prioritized=agent.config.prioritized)[0]
    obs = np.random.RandomState(0).randn(5, 4).astype(np.float32)
    for row in obs:
        agent.update_obs_stats(row)
    torch.manual_seed(0)
    actions = [agent.act(obs, explore=explore).tolist() for explore in (True, False)]
    agent.update()
    order = ("actor", "temperature", "critic") if "encoder" not in agent.networks else (
        "encoder", "critic", "actor", "temperature")
    moments = {name: [value.sum().item() for state in agent.optimizers[name].state.values() for value in state.values()]
               for name in order if name in agent.optimizers}
    agent.update()  # by now the targets differ from the networks
    tensors = [value.sum().item() for network in agent.targets.values() for value in network.parameters()]
    rest = [value.tolist() for value in (*agent.tensors().values(), *agent.info.values())]
    return moments, (actions, tensors, rest, agent.updates, agent.updates_per_step, buffer.priority.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("algo", REPLAY_AGENTS)
def test_every_setting_has_its_own_effect(algo):
    """A setting that is changed, by its type only, changes what is built or what an update does, and the run's name."""
    own = ("--twin-critics",) if algo in ("sac", "ddpg") else ("--encoder-regime", "s2d", "--target-update-freq", "4")
    base = flags_to_args("--algo", algo, "--mst", "--critic-regime", "d2s", "--scale", "0.05", "--total-steps", "60",
                         "--learning-starts", "20", "--batch-size", "12", "--update-interval", "3", "--schedule-start",
                         "0.02", *own)
    build = lambda args: (torch.manual_seed(0), build_agent(args, 4, 2, torch.device("cpu")))[1]
    base_built, (base_moments, base_rest) = what_it_builds(build(base)), what_it_does(build(base))
    modules = list(module_configs(base))
    assert {sparse.total_steps for sparse in build(base).sparse.values()} == {(60 - 20) * base.agent.updates_per_step}
    for group, name in flag_names(base):
        if name == "algo" or group == "pixel":  # has its own settings; tests/test_pixels.py
            continue
        holder = getattr(base, group) if group else base
        spec = next(spec for spec in dataclasses.fields(holder) if spec.name == name)
        place, refusal, shown = name.split("_")[0], "", False
        for value in other_values(spec.type, getattr(holder, name)):
            args = with_setting(base, group, name, value)
            try:
                check(args)
                agent = None if name in NOT_READ_BY_AGENTS else build(args)
            except ValueError as error:
                refusal = str(error)
                continue
            assert run_name(args) != run_name(base), f"{name} is not part of the name {run_name(args)}"
            if agent is None:
                shown = True
                break
            built = what_it_builds(agent)
            places = [part for part in built if built[part] != base_built[part]]
            if places and place in built:
                assert places == [place], f"{name} shows in {places}"
            elif places:
                assert set(modules) <= set(places) or name in IN_SOME_MODULES, f"{name} shows only in {places}"
            else:
                moments, rest = what_it_does(agent)
                places = [part for part in moments if moments[part] != base_moments[part]]
                places += ["rest"] * (rest != base_rest)
                assert not places or place not in modules or places[0] == place, f"{name} shows first in {places}"
            shown = shown or bool(places)
            if shown:
                break
        # Else this algorithm must refuse it, by name.
        assert shown or f"--{name.replace('_', '-')}" in refusal, f"{name} does nothing"


# ---- defaults and presets ----

def test_defaults_match_the_papers():
    tables = {  # Tables 1 and 2 of the paper, and the published SimBa's settings for DeepMind Control
        "mrq": {"batch_size": 256, "updates_per_step": 1, "discount": 0.99, "encoder_horizon": 5, "q_horizon": 3,
                "target_update_freq": 250, "dynamics_weight": 1, "reward_weight": 0.1, "terminal_weight": 0.1,
                "encoder_lr": 1e-4,
                "critic_lr": 3e-4, "actor_lr": 3e-4, "weight_decay": 1e-4, "critic_grad_clip": 20, "reward_bins": 65,
                "reward_symlog_limit": 10, "exploration_noise": 0.2, "target_noise": 0.2, "target_noise_clip": 0.3,
                "pre_activation_weight": 1e-5},
        "ddpg": {"batch_size": 256, "updates_per_step": 2, "discount": 0.99, "tau": 0.005, "actor_lr": 1e-4,
                 "critic_lr": 1e-4,
                 "weight_decay": 0.01, "twin_critics": False, "target_q_reduce": "min", "actor_q_reduce": "min",
                 "exploration_noise": 0.1}}
    temperature = {"initial_temperature": 0.01, "temperature_lr": 1e-4, "target_entropy": -0.5}
    policy = ("exploration_noise", "target_noise", "target_noise_clip", "pre_activation_weight")
    without = lambda algo: {name: value for name, value in tables[algo].items() if name not in policy}
    tables["sac"] = without("ddpg") | temperature
    tables["mrsac"] = without("mrq") | temperature | {"temperature_lr": 3e-4, "target_policy": "target",
                                                      "target_q_reduce": "min", "actor_q_reduce": "min"}
    for algo, table in tables.items():
        simba, args = algo in ("sac", "ddpg"), defaults(algo)
        assert dataclasses.asdict(args.agent) == table
        with torch.device("meta"):
            agent = AGENTS[algo](4, 2, device="meta")  # built by hand, it has the schedule of a default run
        assert {sparse.total_steps for sparse in agent.sparse.values()} == {
            (args.total_steps - args.learning_starts) * agent.updates_per_step}
        assert (args.learning_starts, agent.config.horizon) == ((5000, 1) if simba else (10_000, 5))
        sparse = {"sparsity": 0.8 if simba else 0.6, "distribution": "er", "grow": "gradient", "update_interval": 1000,
                  "drop_fraction_start": 0.5, "drop_fraction_end": 0.0, "schedule_start": 0.2, "schedule_end": 0.8,
                  "schedule_power": 2.0}
        assert dataclasses.asdict(args.sparse) == sparse
        own = {name: p.default for name, p in inspect.signature(SparseTraining).parameters.items()
               if p.default is not p.empty}
        assert sparse | {"sparsity": 0.6, "seed": None, "exclude": (), "include": ()} == {
            name: value for name, value in own.items() if name != "total_steps"}
        assert (args.total_steps, args.eval_every, args.eval_episodes, args.buffer_size, args.log_every, args.scale,
                args.seed, args.mst) == (500_000, 5000, 10, 1_000_000, 500, 1.0, 0, False)


def test_presets_and_flags_reach_the_modules():
    def modules(line=""):
        return [(m.arch_type, m.regime, m.width_scale, m.depth_scale, m.sparsity)
                for m in module_configs(flags_to_args(*line.split())).values()]

    assert modules() == [(4, "dense", 1, 1, 0.6), (4, "dense", 1, 1, 0.6), (3, "dense", 1, 1, 0.6)]  # Table 2
    assert modules("--mst --scale 5") == [(6, "dense", 5, 5, 0.6), (6, "dst", 5, 5, 0.6), (5, "sst", 5, 5, 0.6)]
    assert modules("--mst --critic-regime s2d --actor-type 6 --sparsity 0.8 --critic-sparsity 0.5 --scale 3 "
                   "--encoder-scale 1 --depth-scale 2") == [
        (6, "dense", 1, 2, 0.8), (6, "s2d", 3, 2, 0.5), (6, "sst", 3, 2, 0.8)]
    assert modules("--critic-regime dst --scale 5")[1] == (4, "dst", 5, 5, 0.6)
    assert modules("--algo sac --mst --width-scale 4 --depth-scale 3") == [
        ("simba", "dst", 4, 3, 0.8), ("simba", "sst", 4, 3, 0.8)]
    assert modules("--algo ddpg --actor-regime dst --critic-sparsity 0.5 --scale 2") == [
        ("simba", "dense", 2, 2, 0.5), ("simba", "dst", 2, 2, 0.8)]  # Fig. 14 swaps the regimes
    assert modules("--mst --algo=mrsac")[0][:2] == (6, "dense")
    values = {"distribution": "uniform", "grow": "random", "update_interval": 7, "drop_fraction_start": 0.3,
              "drop_fraction_end": 0.1, "schedule_start": 0.25, "schedule_end": 0.75, "schedule_power": 3.0}
    assert module_configs(args_with(**values))["critic"].sparse_options == values
    for algo, agent in (("mrq", MRQConfig()), ("sac", SACConfig()), ("ddpg", DDPGConfig())):
        assert flags_to_args("--algo", algo).agent == agent


# ---- refusals ----

def test_bad_flags_are_refused_by_name():
    """Each command line is refused in one line that names its first flag, or the word given with it."""
    for line in ("--algo sac --encoder-regime dst: --encoder-regime", "--algo=ddpg --encoder-scale 2: --encoder-scale",
                 "--algo sac --critic-type 6: --critic-type", "--algo ddpg --residual post: --residual",
                 "--algo sac --target-q mean: --target-q-reduce", "--algo ddpg --actor-q-reduce mean: --twin-critics",
                 "--encoder-scale 3 --width-scale 1 --depth-scale 2: --encoder-scale",
                 "--scale 3 --width-scale 1 --depth-scale 2: --scale", "--residual post: --residual",
                 "--schedule-start 0.9: --schedule-end", "--total-steps 10000: --learning-starts",
                 "--total-steps 5e3: trains nothing", "--learning-starts 5: at least 6",
                 "--algo ddpg --learning-starts 1: at least 2", "--name ../../x: --name", "--name ..: --name",
                 "--name .: --name", "--name=: --name", "--name a\\b: --name", "--eval-only: evaluate.py",
                 "--checkpoint runs/x: evaluate.py", "--video=a.mp4: evaluate.py"):
        flags, word = line.rsplit(": ", 1)
        refuses(lambda: check(parse(flags.split())), word)
    for line in ("--schedule-start 0.5 --schedule-end 0.5", "--learning-starts 6", "--algo ddpg --learning-starts 2",
                 "--algo sac --twin-critics --target-q-reduce mean", "--total-steps 10001",
                 "--width-scale 1 --depth-scale 2", "--scale 3 --width-scale 1", "--mst --residual post"):
        check(parse(line.split()))


INTERVALS = {"[0, 1)": "sparsity encoder_sparsity critic_sparsity actor_sparsity sparse_init", "(0, 1]": "discount tau",
             "[0, 1]": "drop_fraction_start drop_fraction_end schedule_start schedule_end trace_decay",
             "(0, 1e4]": "scale width_scale depth_scale encoder_scale critic_scale actor_scale", "[0, 1024]": "threads",
             "(0, inf)": "initial_temperature critic_grad_clip schedule_power step_size actor_kappa critic_kappa",
             "(-inf, inf)": "target_entropy", "(0, inf]": "reward_clip", "(0, 80]": "reward_symlog_limit",
             "[0, 4294967295]": "seed", "[0, 1000]": "eval_workers shift", "[1, 10000]": "eval_episodes",
             "[1, 1000]": "updates_per_step", "[31, 1000]": "image_size", "[1, 100]": "frame_stack",
             "[2, 100000]": "reward_bins", "[1, 500]": "encoder_horizon q_horizon", "[0, 1e12]": "learning_starts"}


@pytest.mark.parametrize("algo", AGENTS)
def test_every_number_has_a_range(algo):
    """Both ends, one step beyond them, and NaN: a number outside its range is refused by the flag's name."""
    intervals = {name: interval for interval, names in INTERVALS.items() for name in names.split()}
    checked = [*flag_names(defaults(algo)), *((None, name)
                                              for name in ("seed", "eval_workers", "threads", "save_every"))]
    for group, name in checked:
        holder = getattr(defaults(algo), group) if group else defaults(algo)
        kind = next(spec.type for spec in dataclasses.fields(holder) if spec.name == name)
        whole, real = int in (kind, *get_args(kind)), float in (kind, *get_args(kind))
        if not (whole or real) or name.endswith("_type"):  # the types have choices instead
            continue
        interval = intervals.get(name, "[1, 1e12]" if whole else "[0, inf)")
        low, high = (float(end) for end in interval[1:-1].split(","))
        step = (lambda x, to: int(x) + (1 if to > x else -1)) if whole else math.nextafter
        inside = [low if interval[0] == "[" else step(low, math.inf), high if interval[-1] == "]"
                  else step(high, -math.inf)]
        outside = [low if interval[0] == "(" else step(low, -math.inf), high if interval[-1] == ")" else None
                   if high == math.inf else step(high, math.inf), None if whole else math.nan]
        for value, allowed in [*((v, True) for v in inside), *((v, False) for v in outside if v is not None)]:
            args = args_with(algo, **{name: int(value) if whole else value})
            try:
                check(args)
                said = ""
            except ValueError as error:
                said = str(error)
            assert (f"--{name.replace('_', '-')} must lie in" not in said) == allowed, (name, value, said)


VALUES = ["0", "1", "-1", "0.5", "5", "1e9", "1e-3", "nan", "inf", "-inf", "9" * 30, "", " ", "x", "None", "True",
          "../..", "a/b", "é", "\0", "dog-run", "walker-wlk", "cpu", "cuda", "mst", "dst", "dense", "er", "6", "7",
          "1e400", "0x10", "min", "a.mp4"]


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_random_flags_are_accepted_or_refused_in_one_line(count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random, outcomes = Random(0), {"accepted": 0, "refused by tyro": 0, "refused in one line": 0}
    flags = {algo: sorted("--" + name.replace("_", "-")
                          for name in {*NOT_IN_NAME, *OLD_FLAGS, *(n for _, n in flag_names(defaults(algo)))})
             for algo in CONFIGS}
    for _ in range(count):
        algo = random.choice(list(CONFIGS))
        line = ["--algo", algo] if random.random() < 0.9 else []
        for flag in random.sample(flags[algo], random.randrange(1, 5)):
            alone = {"--mst", "--resume", "--compile", "--cuda-graphs", "--tensorboard", "--twin-critics"}
            line += [flag] if flag in alone or random.random() < 0.05 else [flag, random.choice(VALUES)]
        try:
            args = parse(line)
            check(args)
        except SystemExit as stop:
            assert stop.code in (0, 2), line
            outcomes["refused by tyro"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error), (line, error)
            outcomes["refused in one line"] += 1
        else:
            outcomes["accepted"] += 1
            name = run_name(args)
            assert len(name.encode()) <= 200 and "/" not in name and ("\0" not in name or "\0" in args.env), line
            again = from_config(json.loads(json.dumps(dataclasses.asdict(args))))  # as config.json keeps it
            assert again == args and diff_settings(again, args) == "", line
        assert "Traceback" not in capsys.readouterr().err, line
    assert min(outcomes.values()) >= count / 100 and not os.listdir(tmp_path), outcomes


# ---- notes ----

def test_flags_without_effect_are_noted():
    note = lambda **values: " ".join(unused_flag_notes(args_with(**values)))
    assert note() == note(mst=True, sparsity=0.8) == note(encoder_type=4) == ""
    for flags, values in (("--sparsity, --grow", {"sparsity": 0.9, "grow": "random"}),
                          ("--critic-sparsity", {"critic_sparsity": 0.9}),
                          ("--schedule-end", {"critic_regime": "dst", "schedule_end": 0.9}),
                          ("--scale", {"scale": 3.0, "encoder_scale": 1.0, "critic_scale": 1.0, "actor_scale": 1.0})):
        assert f"note: {flags} " in note(**values)


def test_plans_that_cannot_work_are_noted():
    note = lambda **values: " ".join(plan_notes(args_with(learning_starts=100, **values)))
    dst = {"critic_regime": "dst", "update_interval": 50}
    assert not note(total_steps=150, **dst) and "critic's topology never changes" in note(total_steps=149, **dst)
    assert not note(total_steps=125, updates_per_step=2, **dst) and not note(total_steps=149)
    assert not note(buffer_size=501) and "--buffer-size 500 " in note(buffer_size=500)
    assert "one episode" not in note(buffer_size=255) and "one batch (256)" in note(buffer_size=255)


# ---- names ----

def test_two_settings_share_a_name_if_and_only_if_they_mean_the_same():
    """300 random settings, against the definition: what the modules are, and the discount."""
    rng = np.random.RandomState(0)
    choices = {"mst": (True,), "scale": (1.0, 3.0), "critic_scale": (1.0, 3.0), "width_scale": (1.0, 3.0),
               "critic_type": (4, 6), "critic_regime": ("dense", "sst", "dst", "d2s"), "sparsity": (0.6, 0.8),
               "critic_sparsity": (0.6, 0.8), "grow": ("gradient", "random"), "schedule_power": (2.0, 3.0),
               "residual": ("pre", "post"), "discount": (0.99, 0.9)}
    meanings = {}
    for _ in range(300):
        args = args_with(**{name: values[rng.randint(len(values))] for name, values in choices.items()
                            if rng.rand() < 0.5})
        modules = {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale, m.arch_type > 4 and m.residual,
                          m.regime != "dense" and m.sparsity, m.regime in ("dst", "d2s") and m.sparse_options["grow"],
                          m.regime == "d2s" and m.sparse_options["schedule_power"])
                   for name, m in module_configs(args).items()}
        meanings.setdefault(run_name(args), set()).add(str((modules, args.agent.discount)))
    assert len(meanings) > 100 and all(len(same) == 1 for same in meanings.values())
    assert len(set().union(*meanings.values())) >= 0.97 * len(meanings)  # two scales may spell the same sizes


@pytest.mark.parametrize("regime", REGIMES)
def test_a_sparse_flag_is_in_the_name_if_and_only_if_it_changes_a_mask(regime):
    def masks(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.ELU(), nn.Linear(20, 4))
        sparse = SparseTraining(model, torch.optim.AdamW(model.parameters(), lr=0.01), regime,
                                **({"sparsity": 0.6, "update_interval": 3, "seed": 1} | options), total_steps=30)
        seen = []
        for step in range(1, 31):
            backward(model, 6)
            sparse.update_topology(step)
            sparse.mask_gradients()
            sparse.optimizer.step()
            seen.append(torch.cat([torch.ones(1), *(mask.flatten() for mask in sparse.masks.values())]))
        return torch.stack(seen)

    base, plain = {"critic_regime": regime, "update_interval": 3}, masks()
    for name, value in (("sparsity", 0.7), ("distribution", "uniform"), ("grow", "random"), ("update_interval", 5),
                        ("drop_fraction_start", 0.8), ("drop_fraction_end", 0.4), ("schedule_start", 0.4),
                        ("schedule_end", 0.6), ("schedule_power", 4.0)):
        moved = not torch.equal(masks(**{name: value}), plain)
        named = run_name(args_with(**base | {name: value})) != run_name(args_with(**base))
        assert named == moved, f"{name} with {regime}: in the name {named}, changes masks {moved}"


def test_long_names_and_close_numbers_stay_apart():
    numbers = dict.fromkeys(("critic_lr", "actor_lr", "encoder_lr", "weight_decay", "reward_weight", "terminal_weight",
                             "dynamics_weight", "exploration_noise", "target_noise", "target_noise_clip",
                             "reward_symlog_limit"), 0.0123456)
    names = {run_name(args_with(**numbers, discount=discount, seed=seed)) for discount in (0.9, 0.91)
             for seed in (0, 1)}
    assert len(names) == 4 and all(len(name) == 200 and name.startswith("dog-run__") for name in names)
    assert sum(name.endswith("__seed=1") for name in names) == 2
    assert len({run_name(args_with(critic_lr=rate)) for rate in (0.00012345678, 0.00012345679, 0.000123457)}) == 3
    for start in ("", "a"):  # cut between characters
        name, whole = run_name(args_with(env=start + "ü" * 300, seed=7)), f"{start}{'ü' * 300}__seed=7"
        assert len(name.encode()) <= 255 and name.startswith(start + "ü" * 50)  # the same name in every version:
        assert name.endswith(f"__{hashlib.sha256(whole.encode()).hexdigest()[:12]}__seed=7")


def test_what_is_not_in_the_name_does_not_change_results():
    args, own = defaults("mrq"), {name for _, name in flag_names(defaults("mrq"))}
    outside = {"env", "seed", "device", "threads", "compile", "cuda_graphs", "eval_workers", "runs", "name",
               "tensorboard", "wandb_project", "resume", "save_every", "keep_checkpoint", "extend"}
    for spec in dataclasses.fields(args):
        group = dataclasses.is_dataclass(getattr(args, spec.name))
        assert group or (spec.name in own) != (spec.name in outside), spec.name
    assert diff_settings(args, args_with(metrics_every=2)) == "--metrics-every 1, not 2"
    assert diff_settings(args, args_with(device="cpu", save_every=7)) == ""


def test_the_residual_counts_only_where_a_type_has_one():
    for number, config in networks.ARCH_CONFIGS.items():
        assert (ModuleConfig(number, residual="post").canonical().residual == "post") == config["use_residual"]
        args = args_with(actor_type=number, residual="post")
        check(args) if config["use_residual"] else refuses(lambda: check(args), "--residual")


# ---- earlier versions, other spellings ----

def test_old_flags_and_old_names():
    given = {"growth": "random", "drop_initial": 0.4, "drop_final": 0.1, "reward_range": 8.0}
    flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    args = parse(["--critic-regime=dst", "--target_noise=0.3", *flags])
    assert args == args_with(critic_regime="dst", target_noise=0.3,
                             **{OLD_FLAGS[name]: value for name, value in given.items()})
    assert run_name(args) == ("dog-run__critic-regime=dst__grow=random__drop-fraction-start=0.4__"
                              "drop-fraction-end=0.1__reward-symlog-limit=8__target-noise=0.3__seed=0")
    assert run_name(args, old=True) == ("dog-run__critic-regime=dst__growth=random__drop-initial=0.4__drop-final=0.1__"
                                        "reward-range=8__target-noise=0.3__seed=0")
    sac = parse("--algo sac --mst --scale 5 --twin-critics --target-rate=0.01 --target-q mean --actor-q=mean".split())
    assert run_name(sac, old=True) == (
        "dog-run__sac__mst__scale=5__target-rate=0.01__twin-critics__target-q=mean__actor-q=mean__seed=0")
    assert (sac.agent.tau, sac.agent.target_q_reduce, sac.agent.actor_q_reduce) == (0.01, "mean", "mean")
    assert set(OLD_FLAGS) == {*given, "target_rate", "target_q", "actor_q"}


def test_whole_numbers_may_be_written_as_powers_of_ten():
    args = parse(["--total-steps", "1e6", "--eval-every=2.5E+3", "--critic-lr", "1e-3", "--name", "1e6",
                  "--learning-starts", "7"])
    assert (args.total_steps, args.eval_every, args.agent.critic_lr, args.name,
            args.learning_starts) == (10 ** 6, 2500, 1e-3, "1e6", 7)
    assert isinstance(args.total_steps, int)


def test_configs_of_other_versions_are_read_or_refused():
    args = args_with(mst=True, critic_lr=0.01, metrics_every=3, grow="random", reward_symlog_limit=8.0)
    config = json.loads(json.dumps(dataclasses.asdict(args)))
    del config["metrics_every"], config["agent"]["q_horizon"], config["agent"]["updates_per_step"]  # newer than the run
    spelling = {new: old for old, new in OLD_FLAGS.items()}
    for group in ("sparse", "agent"):  # as earlier versions spelled them
        config[group] = {spelling.get(name, name): value for name, value in config[group].items()}
    assert {"growth", "drop_initial", "drop_final"} <= config["sparse"].keys() and "reward_range" in config["agent"]
    again = from_config(config | {"command": ["train.py"], "eval_only": False, "checkpoint": None, "video": None})
    assert again == dataclasses.replace(args, metrics_every=1)
    for broken, word in ((config | {"sparse": {"density": 0.5}}, "density"), (config | {"agent": 3}, "agent"),
                         ([], "algorithm"), ({"algo": "ppo"}, "algorithm")):
        refuses(lambda: from_config(broken), word)
