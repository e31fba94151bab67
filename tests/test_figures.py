"""Tests of figures."""

import argparse
import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from paper import claims
from paper import estimate
from paper import figures

import networks
import plot
from settings import canonical, module_configs, parse, run_name
from tests.helpers import HERE, run_main, simba


def modules_of(cell):
    """module -> (type, regime, width, depth), of a figure's cell."""
    return {name: (m.arch_type, m.regime, m.width_scale, m.depth_scale)
            for name, m in module_configs(figures.to_args(cell.flags, "dog-run", 0)).items()}


@pytest.mark.parametrize("name, varies, types, scales, still", [  # Section 3; Table 2 for what stands still
    ("fig2", "encoder", {1, 2, 3, 4, 5, 6}, {1}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig3", "encoder", {2, 4}, {1}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig4", "encoder", {2, 4, 6}, {1, 3, 5}, {"critic": (4, "dense", 1, 1), "actor": (3, "dense", 1, 1)}),
    ("fig5", "critic", {1, 2, 3, 4, 5, 6}, {1}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig6", "critic", {1, 2, 3, 4, 5, 6}, {1, 3, 5}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig7", "critic", {4, 6}, {5}, {"encoder": (6, "dense", 3, 3), "actor": (3, "dense", 1, 1)}),
    ("fig8", "actor", {1, 2, 3, 4, 5, 6}, {1}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)}),
    ("fig9", "actor", {1, 3, 5}, {1, 3, 5}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)}),
    ("fig10", "actor", {3, 5}, {5}, {"encoder": (6, "dense", 3, 3), "critic": (4, "dense", 1, 1)})])
def test_studies_of_one_module_hold_the_others_still(name, varies, types, scales, still):
    cells = figures.FIGURES[name].cells
    regimes = {"dense", "sst", "dst", "s2d", "d2s"}
    assert {modules_of(cell)[varies] for cell in cells} == {(t, r, s, s) for t in types for r in regimes for s in scales}
    for cell in cells:
        modules = modules_of(cell)
        arch_type, regime, scale, _ = modules.pop(varies)
        assert modules == still and cell.series == regime
        assert f"Type {arch_type}" in cell.panel + cell.x and (cell.x == f"×{scale:g}" or cell.panel == "" or len(scales) == 1)
        assert all(m.sparsity == 0.6 for m in module_configs(figures.to_args(cell.flags, "dog-run", 0)).values())


MST5 = {"encoder": (6, "dense", 5, 5), "critic": (6, "dst", 5, 5), "actor": (5, "sst", 5, 5)}


RES5 = {"encoder": (6, "dense", 5, 5), "critic": (6, "dense", 5, 5), "actor": (5, "dense", 5, 5)}


@pytest.mark.parametrize("name, panel, series, x, algo, modules, rest", [  # Section 4, Appendices B.2.2 and E
    ("fig11", "", "MR.Q", "", "mrq", {"encoder": (4, "dense", 5, 5), "critic": (4, "dense", 5, 5), "actor": (3, "dense", 5, 5)}, {}),
    ("fig11", "", "MR.Q + Res", "", "mrq", RES5, {}),
    ("fig11", "", "MR.Q + Res + MST", "", "mrq", MST5, {"distribution": "er", "grow": "gradient", "sparsity": 0.6}),
    ("fig12", "distribution", "uniform", "", "mrq", MST5, {"distribution": "uniform", "grow": "gradient"}),
    ("fig12", "growth (critic)", "SET", "", "mrq", MST5, {"distribution": "er", "grow": "random"}),
    ("fig12", "sparsity", "sparsity 0.9", "", "mrq", MST5, {"sparsity": 0.9}),
    ("fig12", "sparsity", "sparsity 0 (dense)", "", "mrq", RES5, {}),
    ("fig13", "SAC, width", "plain", "×4", "sac", simba("dense", "dense", 4, 1), {}),
    ("fig13", "SAC, depth", "MST", "×4", "sac", simba("dst", "sst", 1, 4), {"sparsity": 0.8}),
    ("fig13", "DDPG, width and depth", "MST", "×3", "ddpg", simba("dst", "sst", 3, 3), {"sparsity": 0.8}),
    ("fig13", "DDPG, depth", "plain", "×1", "ddpg", simba("dense", "dense", 1, 1), {}),
    ("fig14", "", "critic DST, actor SST (MST)", "", "sac", simba("dst", "sst", 4, 3), {"sparsity": 0.8}),
    ("fig14", "", "critic SST, actor DST", "", "sac", simba("sst", "dst", 4, 3), {}),
    ("fig14", "", "critic DST, actor DST", "", "sac", simba("dst", "dst", 4, 3), {}),
    ("fig14", "", "critic SST, actor SST", "", "sac", simba("sst", "sst", 4, 3), {}),
    ("fig17", "", "post-layer", "×3", "mrq", {"encoder": (6, "dense", 3, 3), "critic": (6, "dense", 3, 3), "actor": (5, "dense", 3, 3)},
     {"residual": "post"}),
    ("fig17", "", "pre-layer", "×1", "mrq", {"encoder": (6, "dense", 1, 1), "critic": (6, "dense", 1, 1), "actor": (5, "dense", 1, 1)},
     {"residual": "pre"}),
    ("fig26", "MR.SAC, width", "plain", "×5", "mrsac", {"encoder": (6, "dense", 5, 1), "critic": (6, "dense", 5, 1), "actor": (5, "dense", 5, 1)}, {}),
    ("fig26", "MR.SAC, width and depth", "MST", "×5", "mrsac", MST5, {"sparsity": 0.6})])
def test_arms_are_what_they_are_called(name, panel, series, x, algo, modules, rest):
    cell, = [c for c in figures.FIGURES[name].cells if (c.panel, c.series, c.x) == (panel, series, x)]
    args = figures.to_args(cell.flags, "dog-run", 0)
    assert args.algo == algo and modules_of(cell) == modules
    assert {**vars(args), **vars(args.sparse)}.items() >= rest.items()


@pytest.mark.parametrize("name, types, scales", [
    ("fig2", (1, 2, 3, 4, 5, 6), (1,)), ("fig3", (2, 4), (1,)), ("fig4", (2, 4, 6), (1, 3, 5)), ("fig5", (1, 2, 3, 4, 5, 6), (1,)),
    ("fig6", (1, 2, 3, 4, 5, 6), (1, 3, 5)), ("fig7", (4, 6), (5,)), ("fig8", (1, 2, 3, 4, 5, 6), (1,)), ("fig9", (1, 3, 5), (1, 3, 5)),
    ("fig10", (3, 5), (5,))])
def test_a_study_of_one_module_varies_that_module_alone(name, types, scales):
    figure, regimes = figures.FIGURES[name], ("dense", "sst", "dst", "s2d", "d2s")
    flags = [f"{figure.sized}_{part}" for part in ("type", "regime", "scale")]
    assert sorted(tuple(cell.flags[flag] for flag in flags) for cell in figure.cells) == sorted(itertools.product(types, regimes, scales))
    strong = {} if figure.sized == "encoder" else {"encoder_type": 6, "encoder_scale": 3}  # Section 3.2, and 3.3 after it
    assert all({flag: value for flag, value in cell.flags.items() if flag not in flags} == strong for cell in figure.cells)
    by_type = len({cell.panel for cell in figure.cells}) > 1
    assert all(f"Type {cell.flags[flags[0]]}" in (cell.panel if by_type else cell.x) for cell in figure.cells)
    assert by_type == (name not in ("fig2", "fig5", "fig8")) and all(cell.series == cell.flags[flags[1]] for cell in figure.cells)


@pytest.mark.parametrize("name, varied", [  # what the cells of a laptop study differ in
    ("first", {"mst": {True}, "encoder_type": {6}, "critic_type": {6}, "actor_type": {5}, "learning_starts": {1000, 10000},
               "total_steps": {18000, 24000, 27000, 30000}, "eval_every": {3000}}),
    ("cup", {"algo": {"sac", "ddpg"}, "mst": {True}, "learning_starts": {1000}, "total_steps": {20000}, "eval_every": {4000}}),
    ("fig2", {"encoder_type": {1, 2, 3, 4, 6}}), ("fig3", {"encoder_type": {1, 2, 3, 4, 6}}),
    ("fig8", {"encoder_type": {6}, "actor_type": {3, 4, 5, 6}, "actor_scale": {5}}),
    ("fig9", {"encoder_type": {6}, "actor_type": {5}, "actor_scale": {5}, "actor_regime": {"dense", "sst", "dst", "s2d", "d2s"}}),
    ("fig12", {"mst": {True}, "depth_scale": {5}, "distribution": {"uniform"}, "grow": {"random"}}),
    ("fig13", {"algo": {"sac", "ddpg"}, "width_scale": {0.125, 0.5}, "depth_scale": {4}, "mst": {True}})])
def test_a_laptop_study_varies_what_it_says(name, varied):
    figure = figures.LAPTOP[name]
    short = {"width_scale": {0.25}, "learning_starts": {2000}, "total_steps": {12000}, "eval_every": {1000}}
    assert {flag: {cell.flags[flag] for cell in figure.cells if flag in cell.flags} for cell in figure.cells for flag in cell.flags} == short | varied
    deep = "five times as deep" in figure.shows
    assert deep == any("_scale" in flag and 5 in values for flag, values in varied.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        figure.cells[0].x = "×9"  # cells are shared between figures
    for part, whole in (("fig3", "fig2"), ("fig7", "fig6"), ("fig10", "fig9")):  # drawn from the same runs
        assert list(figures.runs(figures.LAPTOP[part])) == list(figures.runs(figures.LAPTOP[whole]))
    assert "five times as deep" in figures.LAPTOP["fig10"].shows


@pytest.mark.slow
def test_figures_have_as_many_runs_as_the_text_says():
    eight, five = 8 * 2, 5 * 2  # seeds × tasks
    wanted = {"fig2": 6 * 5 * eight, "fig3": 2 * 5 * eight, "fig4": 3 * 5 * 3 * eight, "fig5": 480, "fig6": 6 * 5 * 3 * eight,
              "fig7": 2 * 5 * eight, "fig8": 480, "fig9": 3 * 5 * 3 * eight, "fig10": 2 * 5 * eight, "fig11": 3 * eight,
              "fig12": 7 * 8, "fig13": 2 * 2 * 7 * eight, "fig14": 4 * 8, "fig17": 4 * eight, "fig26": 2 * 7 * five}
    names = {name: [run.name for run in figures.runs(figure)] for name, figure in figures.FIGURES.items()}
    assert {name: len(set(of)) for name, of in names.items()} == wanted
    assert figures.FIGURES["fig12"].tasks == ("dog-run",) and figures.FIGURES["fig14"].tasks == ("humanoid-run",)
    distinct = set().union(*names.values())
    shared = (wanted["fig3"] + wanted["fig7"] + wanted["fig10"]  # parts of Figs. 2, 6 and 9
              + 15 * eight + 30 * eight + 15 * eight  # scale 1 of Figs. 4, 6 and 9: Figs. 2, 5 and 8
              + 2 * eight  # the default critic and actor on the Type 6 encoder at scale 3: Figs. 4, 5 and 8
              + 2 * 8)  # MST and + Res at scale 5 on dog-run: Figs. 11 and 12
    assert len(distinct) == sum(wanted.values()) - shared


@pytest.mark.parametrize("size", ["", "--smoke", "--laptop"])
@pytest.mark.slow
def test_a_run_of_several_figures_has_one_name(size):
    options = figures.options(argparse.ArgumentParser()).parse_args([size] if size else [])
    meant = {}
    for name, figure in figures.chosen(options).items():
        for run in figures.runs(figure, tasks=figure.tasks[:1], seeds=[0]):
            meant.setdefault(repr((run.task, canonical(run.args))), set()).add(run.name)
            assert run.name == run_name(run.args)
    assert all(len(names) == 1 for names in meant.values())
    assert len(set().union(*meant.values())) == len(meant)  # ... and no two runs share one
    for cell in [cell for figure in figures.chosen(options).values() for cell in figure.cells][::17]:
        args = figures.to_args(cell.flags, "dog-run", 3)
        assert run_name(parse(figures.arguments(args))) == run_name(args)


def test_small_forms_keep_what_a_cell_is_about():
    for smoke, laptop in ((False, False), (True, False), (False, True)):
        chosen = figures.chosen(argparse.Namespace(smoke=smoke, laptop=laptop))
        assert all(figure.kind in ("curves", "points") and len(figure.shows) > 20 for figure in chosen.values())
    assert figures.hours("fig2", [None] * 480, argparse.Namespace(smoke=True)) == 480 * 6 / 2 / 3600  # six seconds a run, two at a time
    for name, figure in figures.FIGURES.items():
        small = figures.smoke(figure)
        for cell, tiny in zip(figure.cells, small.cells, strict=True):
            own, shrunk = (module_configs(figures.to_args(c.flags, "dog-run", 0)) for c in (cell, tiny))
            for module in own:
                assert [getattr(own[module], part) == getattr(shrunk[module], part)
                        for part in ("arch_type", "regime", "depth_scale", "residual", "sparsity")] == [True] * 5
                assert shrunk[module].width_scale <= own[module].width_scale / 3
    mst, = [c for c in figures.LAPTOP["fig11"].cells if c.series == "MR.Q + Res + MST"]
    assert modules_of(mst) == {"encoder": (6, "dense", 0.25, 5), "critic": (6, "dst", 0.25, 5), "actor": (5, "sst", 0.25, 5)}
    critics = [modules_of(c) for c in figures.LAPTOP["fig7"].cells]
    assert [c["critic"] for c in critics] == [(6, regime, 0.25, 5) for regime in ("dense", "sst", "dst", "s2d", "d2s")]
    assert all(c["encoder"] == (6, "dense", 0.25, 3) and c["actor"] == (3, "dense", 0.25, 1) for c in critics)
    assert all(figure.tasks == (("walker-walk",) if name.startswith("fig") else figure.tasks) and figure.seeds >= (2 if name == "length" else 3 if name in claims.PUBLISHED else 5)
               for name, figure in figures.LAPTOP.items())


@pytest.mark.slow
def test_figures_print_commands_and_names_in_one_order(monkeypatch, capsys):
    narrowed = ("fig11", "fig12", "--tasks", "dog-run", "--seeds", "4,6", "--steps", "20000")
    _, commands, _ = run_main(figures, monkeypatch, capsys, "commands", *narrowed)
    _, names, _ = run_main(figures, monkeypatch, capsys, "names", *narrowed)
    assert "--env dog-run --total-steps 20000 --mst --scale 5 --seed 6" in commands
    assert len(set(commands)) == len(commands) == 2 * (3 + 5)  # three arms, and of Fig. 12's seven cells five more
    assert [run_name(parse(command.split())) for command in commands] == names
    _, commands, _ = run_main(figures, monkeypatch, capsys, "commands", "fig11", "--seeds", "1", "--more", "--precision bf16 --scale 3")
    assert "--env dog-run --precision bf16 --mst --scale 3 --seed 0" in commands and len(commands) == 6
    for apart in (("fish-swim,dog-trot",), ("fish-swim", "dog-trot")):
        _, names, _ = run_main(figures, monkeypatch, capsys, "names", "fig11", "--seeds", "1", "--tasks", *apart)
        assert [name.split("__")[0] for name in names] == ["fish-swim", "dog-trot"] * 3
    _, rows, _ = run_main(figures, monkeypatch, capsys, "list")
    assert all(any(row.split()[0] == name for row in rows[1:-2]) for name in figures.FIGURES) and "4,100 distinct" in rows[-1]
    assert any("1,440" in row and "critic 2.6 M / 33 M / 139 M" in row for row in rows)


@pytest.mark.parametrize("module", [figures, plot])
def test_every_option_says_what_it_is_for(module, monkeypatch):
    def looked_at(parser):
        assert all(action.help or action.choices for action in parser._actions)
        assert {action.dest: action.nargs for action in parser._actions if action.dest in ("smoke", "laptop", "figures", "paths")}.items() >= {
            ("smoke", 0), ("laptop", 0), ("figures", "*") if module is figures else ("paths", "*")}
        raise SystemExit("looked at")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", looked_at)
    with pytest.raises(SystemExit, match="looked at"):
        module.main()


@pytest.mark.parametrize("argv, message", [
    (("commands", "fig1"), "unknown figure 'fig1': choose one of fig2"), (("names", "fig14", "--laptop"), "no laptop study"),
    (("commands",), "name a figure"), (("commands", "fig2", "--seeds", "a"), "--seeds a"), (("names", "fig2", "--seeds", "0"), "--seeds 0"),
    (("commands", "fig2", "--steps", "50"), "--total-steps 50 trains nothing"), (("names", "fig2", "--more", "--seed 3"), "--more cannot hold"),
    (("names", "fig2", "--tasks", "dog-run,dog-rum"), "'dog-rum': did you mean dog-run"), (("names", "fig2", "--tasks", ","), "--tasks names no task")])
def test_figures_refuse_in_one_line(argv, message, monkeypatch, capsys):
    status, out, _ = run_main(figures, monkeypatch, capsys, *argv)
    assert message in status and "\n" not in status and not out


@pytest.mark.slow
def test_figures_and_plots_need_no_torch():
    subprocess.run([sys.executable, "-c", "import paper.figures, plot, sys; sys.exit('torch' in sys.modules)"], cwd=HERE, check=True)


def test_the_laptop_arms_of_fig13_are_what_they_are_called():
    sizes = {("width", "×1"): (0.125, 1), ("width", "×4"): (0.5, 1), ("depth", "×1"): (0.125, 1), ("depth", "×4"): (0.125, 4)}
    for cell in figures.LAPTOP["fig13"].cells:
        algo, dimension = cell.panel.split(", ")
        regimes = {"MST": ("dst", "sst"), "plain": ("dense", "dense")}[cell.series]
        assert cell.flags["algo"] == algo.lower() and modules_of(cell) == simba(*regimes, *sizes[dimension, cell.x])


@pytest.mark.slow
def test_sizes_are_those_of_the_networks():
    flags = {repr(cell.flags): cell.flags for figure in figures.FIGURES.values() for cell in figure.cells}
    counted = {}
    for task, cell in itertools.product(("dog-run", "humanoid-run"), flags.values()):
        args = figures.to_args(cell, task, 0)
        counted[repr((args.algo, task, [(m.width_scale, m.depth_scale) for m in module_configs(args).values()]))] = args
    for args in counted.values():
        (obs, action), modules = estimate.SHAPES[args.env], module_configs(args)
        with torch.device("meta"):
            if args.algo in ("sac", "ddpg"):
                sizes = {name: networks.scaled_size(1, m.width_scale, m.depth_scale, *networks.SIMBA_SIZES[name]) for name, m in modules.items()}
                actor = networks.SimbaGaussian if args.algo == "sac" else networks.SimbaMLP
                built = {"critic": networks.SimbaCritic(obs, action, *sizes["critic"]), "actor": actor(obs, action, *sizes["actor"])}
            else:
                encoder = networks.Encoder(obs, action, **modules["encoder"].size())
                actor = networks.GaussianActor if args.algo == "mrsac" else networks.Actor
                built = {"encoder": encoder, "critic": networks.Critic(encoder.zsa_dim, **modules["critic"].size()),
                         "actor": actor(encoder.zs_dim, action, **modules["actor"].size())}
                del encoder.model  # the prediction head is counted apart
        assert estimate.sizes(args) == {name: sum(p.numel() for p in network.parameters()) for name, network in built.items()}
    assert [estimate.millions(x) for x in (154.27, 16.56, 1.323, 0.2, 0.045)] == ["154 M", "17 M", "1.3 M", "0.2 M", "45 k"]


@pytest.mark.slow
def test_what_was_timed_is_what_the_readme_says():
    """TIMED: the README's milliseconds, at the sizes that they were timed with."""
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in (HERE / "README.md").read_text().splitlines()}
    for number, scale in enumerate((1, 3, 5)):
        sizes = estimate.sizes(parse(["--mst", "--scale", str(scale), "--env", "dog-run"]))  # bench.py's dense is MST's architecture
        for name, column in (("encoder", 2), ("critic", 3), ("actor", 4)):
            timed = sizes[name] / 1e6, float(rows[f"MR.Q, scale {scale}, dense"][column])
            assert estimate.TIMED[name][number] == pytest.approx(timed, rel=0, abs=0.006)
    for number, (label, flags) in enumerate((("SAC, 4.4 M, dense", ()), ("SAC, 208 M, dense", ("--width-scale", "4", "--depth-scale", "3")))):
        sizes = estimate.sizes(parse(["--algo", "sac", "--env", "humanoid-run", *flags]))
        assert estimate.TIMED["agent"][number] == pytest.approx((sum(sizes.values()) / 1e6, float(rows[label][0])), rel=0, abs=0.006)


@pytest.mark.slow
def test_estimates_pass_through_what_was_timed():
    assert estimate.step_ms(parse(["--scale", "3"])) == pytest.approx(595 + 267 + 191, rel=0.01)  # README, Speed
    assert estimate.step_ms(parse(["--algo", "sac", "--env", "humanoid-run"])) == pytest.approx(85, rel=0.01)
    assert 595 < estimate.step_ms(parse(["--encoder-scale", "4"])) < 2420 < estimate.step_ms(parse(["--encoder-scale", "6"]))
