"""Tests of plot."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.text import Text
from runtime import aggregate
from paper import figures

import plot
from tests.helpers import HERE, flags_to_args, run_main, write_run


@pytest.mark.slow
def test_a_figure_shows_its_runs_and_names_the_rest(tmp_path, monkeypatch, capsys):
    options = ("fig11", tmp_path / "runs", "--laptop", "--out", tmp_path, "--seeds", "3")
    columns = ["return", "critic/srank_q1", "critic/srank_q2", "critic/dormant", "actor/dormant"]
    kept = {}
    for run in figures.runs(figures.LAPTOP["fig11"], seeds=range(3)):
        cell, seed, args = run.cell, run.seed, run.args
        rows = [(step, step / 100 + 10 * seed + len(cell.series), 50, 60 + seed, 0.1, 0.2) for step in (0, 6000, 12000)]
        if (cell.series, seed) == ("MR.Q + Res", 2):
            rows = rows[:2]  # unfinished
        if (cell.series, seed) != ("MR.Q", 1):  # missing
            kept[cell.series, seed] = write_run(tmp_path / "runs", args, rows, columns)
    config = json.loads((kept["MR.Q", 2] / "config.json").read_text())
    config["critic"]["critic_regime"] = "dst"
    (kept["MR.Q", 2] / "config.json").write_text(json.dumps(config))
    with open(kept["MR.Q + Res + MST", 0] / "eval.csv", "a") as file:
        file.write("13000,26")

    pages = []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    status, out, told = run_main(plot, monkeypatch, capsys, *options, "--save", tmp_path / "fig11.csv")
    assert not status and (tmp_path / "fig11-laptop.png").stat().st_size > 10_000 and (tmp_path / "fig11-laptop.pdf").exists()
    page, = pages
    first = page.axes[0]
    (x, y), = [line.get_data() for line in first.get_lines() if line.get_color() == plot.STYLES["MR.Q + Res + MST"][0]]
    assert list(x) == [0, 12000, 24000] and list(y) == [26, 86, 146]  # the IQM of three is their mean: 16 + 10 + step / 100
    (x, y), = [line.get_data() for line in page.axes[1].get_lines() if line.get_color() == plot.STYLES["MR.Q"][0]]
    assert list(y) == [55.0, 55.0, 55.0]  # both Q's SRank, of seed 0 alone
    assert first.get_ylim()[0] < 0 and first.get_ylim()[1] > 150  # no marker is cut
    assert first.get_xlabel() == "environment frames" and "return" in first.get_ylabel()
    assert [text.get_text() for text in page.legends[0].get_texts()] == ["MR.Q", "MR.Q + Res", "MR.Q + Res + MST"]
    said = page.texts[-1].get_text().replace("\n", " ")
    assert all(part in said for part in ("δ = 0.01", "τ = 0.025", "batch of 2,048", "interval, up to 3 seeds a task", "3 of 9 runs",
                                         "missing: MR.Q, walker-walk, seed 1", "of other settings: MR.Q, walker-walk, seed 2", "unfinished: MR.Q + Res, walker-walk, seed 2"))
    assert any("config.json says --critic-regime dst" in line for line in told) and any("1 row cut short" in line for line in told)

    *_, again = run_main(plot, monkeypatch, capsys, options[0], tmp_path / "fig11.csv", *options[2:], "--statistic", "mean-sd")[2], pages[1]
    assert [list(line.get_ydata()) for line in again.axes[0].get_lines()] == [list(line.get_ydata()) for line in first.get_lines()]


def check_layout(page, blank=0.4):
    """No text leaves the page, none lies on another; the blanks between the parts are small, the panels large enough."""
    page.canvas.draw()
    inch = page.dpi
    beyond = {label for axes in page.axes for axis in (axes.xaxis, axes.yaxis)  # ticks that are not drawn
              for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs())
              if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())}
    texts = [text for text in page.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond]
    boxes = [text.get_window_extent() for text in texts]
    outside = [t.get_text() for t, b in zip(texts, boxes) if b.x0 < 0 or b.y0 < 0 or b.x1 > page.bbox.x1 or b.y1 > page.bbox.y1]
    crossing = [(s.get_text(), t.get_text()) for (s, a), (t, b) in itertools.combinations(zip(texts, boxes), 2) if a.overlaps(b)]
    over = [t.get_text() for t, b in zip(texts, boxes) for axes in page.axes if axes is not t.axes and b.overlaps(axes.get_window_extent())]
    assert not outside and not crossing and not over
    assert all(text.get_fontsize() < 10 for text in texts)  # points, on a page of 7 to 14 inches
    legend, caption = page.legends[0].get_window_extent(), page.texts[-1].get_window_extent()
    assert abs(legend.x0 + legend.x1 - page.bbox.x1) < 0.1 * inch and caption.x0 < 0.2 * inch  # in the middle; at the left
    tight = [axes.get_tightbbox() for axes in page.axes]
    assert min(box.y0 for box in tight) - caption.y1 < blank * inch and legend.y0 - max(box.y1 for box in tight) < 0.3 * inch
    assert all(1.5 < axes.get_window_extent().width / inch < 7 and 1.5 < axes.get_window_extent().height / inch < 4 for axes in page.axes)
    assert page.bbox.x1 - max(box.x1 for box in tight) < 0.3 * inch


def check_drawing(page):
    """What is drawn looks as the legend says, lies within its axes and fills them."""
    def look(line):
        return line.get_color(), line.get_marker(), line.get_linestyle(), line._unscaled_dash_pattern  # a style of one's own is "--" to all

    told = {look(handle) for handle in page.legends[0].legend_handles}
    across, scales = all(axes.get_title() for axes in page.axes), {}
    for axes in page.axes:
        spec = axes.get_subplotspec()
        ours = [container.lines[0] for container in axes.containers] or list(axes.get_lines())
        assert ours and {look(line) for line in ours} <= told and len(told) == len(page.legends[0].legend_handles)
        assert all(1 <= line.get_linewidth() <= 2 and 4 <= line.get_markersize() <= 5 for line in ours if line.get_color() != "black")
        for band in axes.collections:
            if isinstance(band, PolyCollection):
                assert band.get_alpha() <= 0.2 and set(band.get_linewidth()) == {0}  # a curve stays visible under another's band
        for container in axes.containers:
            (whiskers,), caps = container.lines[2], container.lines[1]
            assert whiskers.get_linewidth()[0] < container.lines[0].get_linewidth() and caps
        low, high = axes.dataLim.y0, axes.dataLim.y1
        assert axes.get_ylim()[0] < low and axes.get_ylim()[1] > high > axes.get_ylim()[0] + 0.6 * np.ptp(axes.get_ylim())
        (left, right), ticks = axes.get_xlim(), axes.get_xticks()
        if axes.containers:
            assert [left, right] == [-0.5, len(ticks) - 0.5]
        else:
            last = max(line.get_xdata()[-1] for line in ours)
            assert -0.1 * last < left < 0 and last < right < 1.1 * last
        under = [other for other in map(Axes.get_subplotspec, page.axes)
                 if other.colspan.start == spec.colspan.start and other.rowspan.start > spec.rowspan.start]
        assert bool(axes.get_xlabel()) == (not under)
        assert axes.xaxis.get_tick_params()["labelbottom"] == (across or not under)
        place = (spec.rowspan.start, axes.get_title()) if across else spec.rowspan.start  # a task each, with its own
        label = axes.get_ylabel().split("\n")[-1] or label  # without one, the panel before has it
        scales.setdefault((place, label), set()).add(axes.get_ylim())
    assert all(len(limits) == 1 for limits in scales.values())


@pytest.mark.parametrize("name, seeds, more", [
    ("fig2", 1, ()), ("fig4", 1, ()), ("fig7", 1, ()), ("fig11", 2, ()), ("fig12", 1, ()), ("fig14", 2, ()),
    ("fig2", 1, ("dog-walk", "dog-trot")), ("fig14", 2, ("dog-walk", "dog-trot")), ("fig14", 2, ("dog-walk", "dog-trot", "dog-run"))])
@pytest.mark.slow
def test_every_layout_fits_its_page(name, seeds, more, monkeypatch, tmp_path):
    """Figures of every kind, drawn from made-up runs of which three are missing."""
    def made_up(wanted, paths, columns):
        steps = np.arange(0, 500001, 50000)
        draw = np.random.default_rng(0).uniform
        return {run: aggregate.Run(run, {"agent_step": steps, "frames": 2.0 * steps} | {
            column: (1e-6 if "dormant" in column else 1e-3) * steps * draw(0.9, 1.0) for column in columns}) for run in list(wanted)[:-3]}, \
            dict.fromkeys(list(wanted)[-3:], "missing"), []

    monkeypatch.setattr(plot, "gather", made_up), monkeypatch.setattr(aggregate, "RESAMPLES", 50)
    figure = figures.FIGURES[name]
    names = [*figure.tasks, *more]
    page, _ = plot.draw_figure(name, plot.command_line().parse_args(
        [name, "runs", "--seeds", str(seeds), "--tasks", *names, "--out", str(tmp_path)]))
    check_layout(page)
    check_drawing(page)
    panels, tasks = len({cell.panel for cell in figure.cells}) * len(figure.measures), len(names) + (len(names) > 1)
    across = panels == 1
    assert len(page.axes) == panels * tasks
    shape = [len({getattr(axes.get_subplotspec(), span).start for axes in page.axes}) for span in ("rowspan", "colspan")]
    assert shape == ({1: [1, 1], 3: [1, 3], 4: [2, 2], 5: [2, 3]}[tasks] if across else [tasks, panels])
    for axes in page.axes:
        column = axes.get_subplotspec().colspan.start
        if axes.get_title() and not across:  # the measure, where there are several
            assert axes.get_title().endswith(figure.measures[column % len(figure.measures)].label) == (len(figure.measures) > 1)
        if axes.get_ylabel():
            assert ("\n" in axes.get_ylabel()) == (column == 0 and not across)  # the task, once a row
        if axes.containers:  # points: a line through sizes, none through types
            sizes = figure.cells[0].x.startswith("×")
            assert all((container.lines[0].get_linestyle() == "None") != sizes for container in axes.containers)
            assert axes.get_xlabel() in ("", f"scale, and parameters of the {figure.sized}" if sizes else f"architecture of the {figure.sized}")
        lines = [container.lines[0].get_xdata() for container in axes.containers]
        for place in axes.get_xticks() if lines else ():  # the points of a place stand around its tick, apart from one another
            beside = np.sort(np.concatenate(lines)[np.abs(np.concatenate(lines) - place) < 0.5])
            assert np.ptp(beside) < 0.7 and (np.diff(beside) > 0.05).all()
            assert beside.mean() == pytest.approx(place) or len(beside) < len(axes.containers)  # some are missing
            assert axes.get_xlim()[0] < beside[0] - 0.1 and beside[-1] + 0.1 < axes.get_xlim()[1]
    plot.plt.close(page)


@pytest.mark.slow
def test_a_study_beside_published_curves_has_no_panel_of_all_tasks(tmp_path, monkeypatch, capsys):
    """Nothing is published of all tasks together; a file of other tasks changes nothing."""
    pages, warned = [], []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    for theirs in ({"cheetah-run": 20000}, {"walker-walk": 20000, "cartpole-swingup": 2000}):
        (tmp_path / "theirs.csv").write_text("env,agent_step,seed,return\n" + "".join(
            f"{task},{step},0,7\n" for task, every in theirs.items() for step in range(0, 20001, every)))
        status, _, told = run_main(plot, monkeypatch, capsys, "mrq", HERE / "paper/results/mrq-laptop.csv", "--laptop", "--tasks", "cartpole-swingup",
                                   "walker-walk", "--reference", tmp_path / "theirs.csv", "--out", tmp_path)
        warned.append(any("left out" in line for line in told))
        assert not status
        check_layout(pages[-1], blank=0.25)
    assert [[axes.get_title() for axes in page.axes] for page in pages] == [["all tasks", "cartpole-swingup", "walker-walk"], ["cartpole-swingup", "walker-walk"]]
    assert [[[text.get_text() for text in legend.get_texts()] for legend in page.legends] for page in pages] == [[["this code"]], [["this code", "published"]]]
    assert ["all tasks" in "".join(text.get_text() for text in page.texts) for page in pages] == warned == [True, False]
    theirs = [[tuple(line.get_ydata()) for line in axes.get_lines() if line.get_color() == "black"] for axes in pages[1].axes]
    assert theirs == [[(7,) * 11], [(7, 7)]]
    dots = [[dots.get_offsets().tolist() for dots in axes.collections if isinstance(dots, PathCollection)] for axes in pages[1].axes]
    assert dots == [[], [[[0, 7], [40000, 7]]]]  # few points are told from a curve


@pytest.mark.slow
def test_any_runs_compared_with_published_ones(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        for flags in ((), ("--critic-regime", "dst")):
            write_run(tmp_path / "runs", flags_to_args(*flags, "--seed", str(seed)), [(0, 1), (5000, 3 + seed)])
    points = [(task, step, seed, step / 1000 + seed) for task in ("dog-run", "dog-trot") for step in (0, 5000, 9000) for seed in (0, 2)]
    (tmp_path / "reference.csv").write_text("env,agent_step,seed,return\n" + "".join("{},{},{},{}\n".format(*point) for point in points))
    (tmp_path / "two.csv").write_text("env,algo,env_step,seed,return\n" + "".join(  # a frame a step, and of two algorithms
        f"{task},{algo},{2 * step},{seed},{value + plus}\n" for algo, plus in (("A", 0), ("B", 1)) for task, step, seed, value in points))
    pages = []
    monkeypatch.setattr(plot.plt, "close", pages.append)
    status, _, told = run_main(plot, monkeypatch, capsys, "curves", *(tmp_path / "runs").iterdir(), tmp_path / "none", "--out", tmp_path,
                               "--reference", tmp_path / "reference.csv")
    page, = pages
    curves = {tuple(line.get_ydata()) for line in page.axes[0].get_lines()}
    assert not status and curves == {(1, 6), (1, 3.5)} and "none" in told[0]  # the reference no further than our 10,000 frames
    assert {text.get_text() for text in page.legends[0].get_texts()} == {"default", "critic-regime=dst", "published"}
    check_layout(page, blank=0.25)
    assert not run_main(plot, monkeypatch, capsys, "curves", *(tmp_path / "runs").iterdir(), "--out", tmp_path, "--reference", tmp_path / "two.csv")[0]
    check_layout(pages[1])
    check_drawing(pages[1])
    published = [tuple(line.get_ydata()) for line in pages[1].axes[0].get_lines() if line.get_color() == "black"]
    assert sorted(published) == [(1, 6), (2, 7)]
    assert [text.get_text() for text in pages[1].legends[0].get_texts()][2:] == ["published A", "published B"]


@pytest.mark.slow
@pytest.mark.parametrize("argv, message", [
    (("fig1", "."), "unknown figure 'fig1'"), (("fig6", "empty"), "none of the 1440 runs of fig6 is there"), (("fig6", "no"), "no: no such folder"),
    (("fig6", __file__), "is no file that --save wrote"), (("curves", "no"), "no/eval.csv: No such file")])
def test_plots_refuse_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, out, told = run_main(plot, monkeypatch, capsys, *argv)
    assert status == 1 and not out and len(told) == 1 and message in told[0]


def test_intervals_are_drawn_from_low_to_high():
    _, (left, right) = plot.plt.subplots(1, 2)
    x = np.arange(3.0)
    plot.draw_curves(left, [("MST", 0, 0, x, x + 50, x + 10, x + 70)], [])
    assert set(left.collections[0].get_paths()[0].vertices[:, 1]) == {10, 11, 12, 70, 71, 72}
    plot.draw_points(right, [("MST", 0, 0, 50.0, 10.0, 70.0)], ["a"], False, 1)
    whisker, = right.containers[0].lines[2][0].get_segments()
    assert whisker[:, 1].tolist() == [10, 70]


@pytest.mark.slow
def test_the_statistic_and_the_episodes_that_were_asked_for_are_drawn(tmp_path):
    def heights(*flags):
        options = plot.command_line().parse_args(list(flags))
        page, _ = plot.draw_runs(options) if flags[0] == "curves" else plot.draw_figure("fig11", options)
        return {tuple(line.get_ydata()) for line in page.axes[0].get_lines()}

    for run in figures.runs(figures.LAPTOP["fig11"], seeds=range(4)):  # over four seeds, an iqm is no mean
        first = [1, 2, 3, 100][run.seed]
        folder = write_run(tmp_path, run.args, [(0, first, f"1 2 3 {4 * first - 6}"), (12000, 5, "2 3 4 11")], ("return", "returns"))
    of_four = ("fig11", str(tmp_path), "--laptop", "--seeds", "4")
    assert heights(*of_four) == {(2.5, 5)} and heights(*of_four, "--statistic", "mean-sd") == {(26.5, 5)}
    assert heights(*of_four[:-1], "3,2", "--episodes") == {(2.5, 3.5)}  # the middle half of eight episodes
    assert heights("curves", str(folder)) == {(100, 5)} and heights("curves", str(folder), "--episodes") == {(2.5, 3.5)}
