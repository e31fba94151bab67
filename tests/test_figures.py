"""Tests of the paper's figures, the laptop studies, and grids of one's own."""

import argparse
import itertools
import json
import shlex

import pytest

from paper import figures, studies
from paper.laptop import LAPTOP
from runtime import grid
from settings import canonical, module_configs, parse, run_name
from tests.helpers import refuses, run_main

pytestmark = pytest.mark.slow
FIGURES = figures.FIGURES
OPTIONS = studies.add_options(argparse.ArgumentParser())


def modules_of(arm):
    """module -> (type, regime, width, depth)"""
    return {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale)
            for name, m in module_configs(grid.to_args(arm.flags, "dog-run", 0)).items()}


E, C, A = (4, "dense", 1, 1), (4, "dense", 1, 1), (3, "dense", 1, 1)
STRONG = (6, "dense", 3, 3)


@pytest.mark.parametrize("name, module, types, scales, fixed", [  # Section 3; Table 2 for what is fixed
    ("fig2", "encoder", (1, 2, 3, 4, 5, 6), (1,), {"critic": C, "actor": A}),
    ("fig3", "encoder", (2, 4), (1,), {"critic": C, "actor": A}),
    ("fig4", "encoder", (2, 4, 6), (1, 3, 5), {"critic": C, "actor": A}),
    ("fig5", "critic", (1, 2, 3, 4, 5, 6), (1,), {"encoder": STRONG, "actor": A}),
    ("fig6", "critic", (1, 2, 3, 4, 5, 6), (1, 3, 5), {"encoder": STRONG, "actor": A}),
    ("fig7", "critic", (4, 6), (5,), {"encoder": STRONG, "actor": A}),
    ("fig8", "actor", (1, 2, 3, 4, 5, 6), (1,), {"encoder": STRONG, "critic": C}),
    ("fig9", "actor", (1, 3, 5), (1, 3, 5), {"encoder": STRONG, "critic": C}),
    ("fig10", "actor", (3, 5), (5,), {"encoder": STRONG, "critic": C})])
def test_one_module_studies(name, module, types, scales, fixed):
    arms = FIGURES[name].arms
    assert sorted(modules_of(arm)[module] for arm in arms) == sorted(
        (t, r, s, s) for t, r, s in itertools.product(types, figures.REGIMES, scales))
    assert FIGURES[name].module == module
    for arm in arms:
        modules = modules_of(arm)
        arch_type, regime, scale, _ = modules.pop(module)
        assert modules == fixed and arm.series == regime
        assert f"Type {arch_type}" in arm.panel + arm.x and (arm.x == f"×{scale:g}" or not arm.panel
                                                             or len(scales) == 1)


MST5 = {"encoder": (6, "dense", 5, 5), "critic": (6, "dst", 5, 5), "actor": (5, "sst", 5, 5)}
simba = lambda critic, actor, *size: {"critic": ("simba", critic, *size), "actor": ("simba", actor, *size)}
dense = lambda types, *size: {m: (t, "dense", *size) for m, t in zip(("encoder", "critic", "actor"), types)}
STREAM = lambda critic, actor, width: {"critic": ("stream", critic, width, 1), "actor": ("stream", actor, width, 1)}
RES = lambda *size: dense((6, 6, 5), *size)


@pytest.mark.parametrize("name, panel, series, x, algo, modules, rest", [  # Section 4, Appendices B.2.2 and E
    ("fig11", "", "MR.Q", "", "mrq", dense((4, 4, 3), 5, 5), {}),
    ("fig11", "", "MR.Q + Res", "", "mrq", RES(5, 5), {}),
    ("fig11", "", "MR.Q + Res + MST", "", "mrq", MST5, {"distribution": "er", "grow": "gradient", "sparsity": 0.6}),
    ("fig12", "distribution", "uniform", "", "mrq", MST5, {"distribution": "uniform", "grow": "gradient"}),
    ("fig12", "growth (critic)", "SET", "", "mrq", MST5, {"distribution": "er", "grow": "random"}),
    ("fig12", "sparsity", "sparsity 0.9", "", "mrq", MST5, {"sparsity": 0.9}),
    ("fig12", "sparsity", "sparsity 0 (dense)", "", "mrq", RES(5, 5), {}),
    ("fig13", "SAC, width", "plain", "×4", "sac", simba("dense", "dense", 4, 1), {}),
    ("fig13", "SAC, depth", "MST", "×4", "sac", simba("dst", "sst", 1, 4), {"sparsity": 0.8}),
    ("fig13", "DDPG, width and depth", "MST", "×3", "ddpg", simba("dst", "sst", 3, 3), {"sparsity": 0.8}),
    ("fig14", "", "critic DST, actor SST (MST)", "", "sac", simba("dst", "sst", 4, 3), {"sparsity": 0.8}),
    ("fig14", "", "critic SST, actor DST", "", "sac", simba("sst", "dst", 4, 3), {}),
    ("fig17", "", "post-layer", "×3", "mrq", RES(3, 3), {"residual": "post"}),
    ("fig17", "", "pre-layer", "×1", "mrq", RES(1, 1), {"residual": "pre"}),
    ("fig26", "MR.SAC, width", "plain", "×5", "mrsac", RES(5, 1), {}),
    ("fig26", "MR.SAC, width and depth", "MST", "×5", "mrsac", MST5, {"sparsity": 0.6}),
    ("visual", "", "dense", "×3", "mrq", RES(3, 3), {}),
    ("visual", "", "static, all modules", "×1", "mrq", {"encoder": (6, "sst", 1, 1), "critic": (6, "sst", 1, 1),
                                                        "actor": (5, "sst", 1, 1)}, {"sparsity": 0.6}),
    ("visual", "", "static, critic and actor", "×1", "mrq", {"encoder": (6, "dense", 1, 1), "critic": (6, "sst", 1, 1),
                                                             "actor": (5, "sst", 1, 1)}, {}),
    ("visual", "", "MST", "×5", "mrq", MST5, {}),
    ("stream", "", "dense", "×1", "stream", STREAM("dense", "dense", 1),
     {"sparse_init": 0.9, "actor_kappa": 3, "critic_kappa": 2}),
    ("stream", "", "static, no SparseInit", "×4", "stream", STREAM("sst", "sst", 4),
     {"sparse_init": 0, "sparsity": 0.9}),
    ("stream", "", "MST", "×2", "stream", STREAM("dst", "sst", 2),
     {"sparse_init": 0.9, "sparsity": 0.8, "actor_kappa": 3}),
    ("stream", "", "dense, larger step", "×8", "stream", STREAM("dense", "dense", 8),
     dict(zip(("actor_kappa", "critic_kappa"), figures.STREAM_KAPPA[8])))])
def test_arms_match_their_labels(name, panel, series, x, algo, modules, rest):
    arm, = [a for a in FIGURES[name].arms if (a.panel, a.series, a.x) == (panel, series, x)]
    args = grid.to_args(arm.flags, "dog-run", 0)
    assert args.algo == algo and modules_of(arm) == modules
    assert {**vars(args), **vars(args.sparse), **vars(args.agent)}.items() >= rest.items()


@pytest.mark.parametrize("name, varied", [
    ("fig2", {"encoder_type": {1, 2, 3, 4, 6}}),
    ("fig8", {"encoder_type": {6}, "actor_type": {3, 4, 5, 6}, "actor_scale": {5}}),
    ("fig9", {"encoder_type": {6}, "actor_type": {5}, "actor_scale": {5}, "actor_regime": {*figures.REGIMES}}),
    ("fig12", {"mst": {True}, "depth_scale": {5}, "distribution": {"uniform"}, "grow": {"random"}}),
    ("visual", {"encoder_type": {6}, "critic_type": {6}, "actor_type": {5}, "mst": {True}, "encoder_regime": {"sst"},
                "critic_regime": {"sst"}, "actor_regime": {"sst"}, "pixels": {True}, "image_size": {64},
                "batch_size": {64}, "width_scale": {0.5}, "learning_starts": {1000}, "total_steps": {30000},
                "eval_every": {3000}, "eval_episodes": {3}}),
    ("fig13", {"algo": {"sac", "ddpg"}, "width_scale": {0.125, 0.5}, "depth_scale": {4}, "mst": {True}})])
def test_laptop_studies_vary_what_they_name(name, varied):
    arms = LAPTOP[name].arms
    short = {"width_scale": {0.25}, "learning_starts": {2000}, "total_steps": {12000}, "eval_every": {1000}}
    assert {flag: {arm.flags[flag] for arm in arms if flag in arm.flags} for arm in arms
            for flag in arm.flags} == short | varied


def test_a_part_of_a_study_compares_all_arms():
    """Panel by panel, and all arms of one seed before the next seed."""
    for name, panels, arms in (("stream", 2, 6), ("fig12", 2, 2)):
        jobs = studies.get_jobs(LAPTOP[name])
        assert [job.seed for job in jobs] == [seed for _ in range(panels) for seed in range(5) for _ in range(arms)]
        series = {arm.series for arm in LAPTOP[name].arms if arm.panel == jobs[0].arm.panel}
        assert {job.arm.series for job in jobs[:arms]} == series
        assert len({job.arm.panel for job in jobs[:5 * arms]}) == 1


def test_number_of_runs():
    eight = 8 * 2  # seeds × tasks
    wanted = {"fig2": 30 * eight, "fig3": 10 * eight, "fig4": 45 * eight, "fig5": 480, "fig6": 90 * eight,
              "fig7": 10 * eight, "fig8": 480, "fig9": 45 * eight, "fig10": 10 * eight, "fig11": 3 * eight,
              "fig12": 7 * 8, "fig13": 28 * eight, "fig14": 4 * 8, "fig17": 4 * eight, "fig26": 14 * 10,
              "stream": 6 * 4 * 3 * 8, "visual": 4 * 3 * eight}
    names = {name: {job.name for job in studies.get_jobs(figure)} for name, figure in FIGURES.items()}
    assert {name: len(of) for name, of in names.items()} == wanted
    # Parts of Figs. 2, 6 and 9; scale 1 of Figs. 4, 6 and 9; ...
    shared = (wanted["fig3"] + wanted["fig7"] + wanted["fig10"] + 60 * eight
              + 2 * eight + 2 * 8)  # ... the default critic and actor in Figs. 4, 5 and 8; Figs. 11 and 12 on dog-run
    assert len(set().union(*names.values())) == sum(wanted.values()) - shared


@pytest.mark.parametrize("size", [(), ("--smoke",), ("--laptop",)])
def test_names_and_commands_of_every_arm(size):
    options, meant = OPTIONS.parse_args([*size]), {}
    for name, figure in studies.all_figures(options).items():
        for job in studies.get_jobs(figure, figure.tasks[:1], [3]):
            meant.setdefault(repr((job.task, canonical(job.args))), set()).add(job.name)
        assert run_name(parse(job.command)) == job.name == run_name(job.args)
    assert all(len(names) == 1 for names in meant.values()) and len(set().union(*meant.values())) == len(meant)


def test_smoke_keeps_everything_but_width_and_length():
    for figure in FIGURES.values():
        for arm, tiny in zip(figure.arms, figures.smoke(figure).arms, strict=True):
            for (name, own), small in zip(modules_of(arm).items(), modules_of(tiny).values()):
                assert own[:2] + own[3:] == small[:2] + small[3:] and small[2] <= own[2] / 3, name


def test_filters_steps_and_further_flags(monkeypatch, capsys):
    def runs(*words):
        lines = run_main(studies, monkeypatch, capsys, "runs", *words)[1]
        return [(name, shlex.split(command)) for name, command in (line.split("\t") for line in lines)]

    found = runs("fig11", "fig12", "--tasks", "dog-run", "--seeds", "4,6", "--steps", "20000", "--more", "--device cpu")
    assert len(found) == len(dict(found)) == 2 * (3 + 5)  # three arms, and five more of Fig. 12
    assert all(run_name(parse(command)) == name and command[-4:-2] == ["--device", "cpu"] for name, command in found)
    assert {parse(command).total_steps for _, command in found} == {20000}
    assert {parse(command).seed for _, command in runs("fig11", "--tasks", "dog-run", "--seeds", "4,")} == {4}
    assert runs("cup", "--laptop") == runs("ball_in_cup", "--laptop")  # an old name


def test_refusals(monkeypatch, capsys):
    for argv, message in (("fig1", "unknown figure 'fig1': choose one of fig2"), ("fig14 --laptop", "no laptop study"),
                          ("quickstart", "add --laptop"), ("", "name a figure"), ("fig2 --seeds a", "--seeds a"),
                          ("fig2 --seeds 0", "--seeds 0"), ("fig2 --steps 50", "--total-steps 50"),
                          ("fig2 --more '--seed 3'", "--more cannot hold"), ("fig2 --tasks ,", "--tasks names no task"),
                          ("none.toml", "none.toml: No such file")):
        status, out, _ = run_main(studies, monkeypatch, capsys, "runs", *shlex.split(argv))
        assert message in str(status) and "\n" not in status and not out


# ---- a grid of one's own ----

GRID = {"tasks": ["walker-walk", "cheetah-run"], "seeds": [0, 5], "flags": {"total-steps": 50000},
        "arms": {"dense": {}, "dst": {"critic-regime": "dst", "growth": "random"},
                 "sac": {"algo": "sac", "precision": "bf16"}}}


def test_a_grid_file(tmp_path):
    (tmp_path / "grid.json").write_text(json.dumps(GRID))
    own = grid.read_grid(str(tmp_path / "grid.json"))
    jobs = list(grid.make_jobs(own.arms, own.tasks, own.seeds))
    assert [(j.arm.series, j.task, j.seed)
            for j in jobs] == list(itertools.product(GRID["arms"], GRID["tasks"], GRID["seeds"]))
    wanted = [parse(["--total-steps", "50000", *flags]) for flags in (
        (), ("--critic-regime", "dst", "--grow", "random"), ("--algo", "sac", "--precision", "bf16"))]
    assert [canonical(job.args) for job in jobs[::4]] == [canonical(args) for args in wanted]
    assert all(run_name(parse(job.command)) == job.name for job in jobs)


def test_grid_files_that_are_refused(tmp_path):
    for change, message in (({"arms": {}}, "no arms"), ({"tasks": "walker-walk"}, "tasks must be a list"),
                            ({"seeds": -1}, "seeds must be"), ({"sed": 1}, "unknown key 'sed'"),
                            ({"arms": {"a": {"critic-regim": "dst"}}},
                             "arm 'a': mrq has no flag critic-regim: did you mean critic-regime?"),
                            ({"arms": {"a": {"critic-regime": "ds"}}}, "arm 'a': invalid choice 'ds'"),
                            ({"arms": {"a": {"seed": 1}}}, "arm 'a': seed"),
                            ({"arms": {"a": {}, "b": {}}}, "arms a and b have the same flags")):
        (tmp_path / "grid.json").write_text(json.dumps(GRID | change))
        refuses(lambda: grid.read_grid(str(tmp_path / "grid.json")), "grid.json: ", message)
