"""Tests of drawing: the paper's figures, any runs, and tables."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
from matplotlib.text import Text

import plot
from paper import draw, studies
from paper.laptop import LAPTOP
from runtime import results
from tests.helpers import HERE, flags_to_args, run_main, write_run

pytestmark = pytest.mark.slow
RESULTS = HERE / "paper/results"


@pytest.fixture
def pages(monkeypatch):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    return drawn


def test_a_figure_shows_its_runs_and_names_the_rest(tmp_path, monkeypatch, capsys, pages):
    columns, kept = ["return", "critic/srank_q1", "critic/srank_q2", "critic/dormant", "actor/dormant"], {}
    for job in studies.get_jobs(LAPTOP["fig11"], seeds=range(3)):
        series, seed = job.arm.series, job.seed
        rows = [(step, step / 100 + 10 * seed + len(series), 50, 60 + seed, 0.1, 0.2) for step in (0, 6000, 12000)]
        if (series, seed) != ("MR.Q", 1):  # missing
            kept[series, seed] = write_run(tmp_path / "runs", job.args,
                                           rows[:2] if (series, seed) == ("MR.Q + Res", 2) else rows, columns)
    config = json.loads((kept["MR.Q", 2] / "config.json").read_text())
    config["critic"]["critic_regime"] = "dst"
    (kept["MR.Q", 2] / "config.json").write_text(json.dumps(config))
    options = ("--laptop", "--out", tmp_path, "--seeds", "3")
    status, _, notes = run_main(draw, monkeypatch, capsys, "fig11", tmp_path / "runs", *options, "--save",
                                tmp_path / "fig11.csv")
    assert not status and all((tmp_path / f"fig11-laptop.{kind}").stat().st_size > 5000 for kind in ("png", "pdf"))
    lines = {line.get_color(): line.get_data() for line in pages[0].axes[0].get_lines()}
    x, y = lines[plot.STYLES["MR.Q + Res + MST"][0]]
    # the IQM of three is their mean: 16 + 10 + step / 100
    assert list(x) == [0, 12000, 24000] and list(y) == [26, 86, 146]
    caption = pages[0].texts[-1].get_text().replace("\n", " ")
    assert all(part in caption for part in ("3 of 9 runs", "missing: MR.Q, walker-walk, seed 1",
                                            "has other settings: MR.Q, walker-walk, seed 2",
                                            "unfinished: MR.Q + Res, walker-walk, seed 2"))
    assert any("config.json says --critic-regime dst" in note for note in notes)
    run_main(draw, monkeypatch, capsys, "fig11", tmp_path / "fig11.csv", *options)
    again, drawn = ([list(line.get_ydata()) for line in page.axes[0].get_lines()] for page in (pages[1], pages[0]))
    assert again == drawn


def check_layout(page):
    """No text leaves the page, and none lies on another or on a foreign panel; panels are large enough."""
    page.canvas.draw()
    hidden = {label for axes in page.axes for axis in (axes.xaxis, axes.yaxis)  # ticks that are not drawn
              for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs())
              if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())}
    boxes = [(text, text.get_window_extent()) for text in page.findobj(Text)
             if text.get_visible() and text.get_text().strip() and text not in hidden]
    panels = [(axes, axes.get_window_extent()) for axes in page.axes]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.bbox.x1 and box.y1 <= page.bbox.y1, text
        assert not any(box.overlaps(other) for axes, other in panels if axes is not text.axes), text
    crossing = [(s, t) for (s, a), (t, b) in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert not crossing and all(1.5 * page.dpi < min(panel.width, panel.height) for _, panel in panels)
    assert all(panel.width < 7 * page.dpi and panel.height < 4 * page.dpi for _, panel in panels)


@pytest.mark.parametrize("name", ["fig11", "fig13", "mrq"])
def test_layouts_fit_their_page(name, monkeypatch, capsys, pages, tmp_path):
    status, *_ = run_main(draw, monkeypatch, capsys, name, RESULTS / f"{name}-laptop.csv", "--laptop", "--out",
                          tmp_path)
    assert not status
    check_layout(pages[0])


def test_intervals_are_drawn_from_low_to_high():
    _, (left, right) = plot.plt.subplots(1, 2)
    x = np.arange(3.0)
    plot.draw_curves(left, [(plot.STYLES["MST"], 0, 0, x, x + 50, x + 10, x + 70)], [])
    assert set(left.collections[0].get_paths()[0].vertices[:, 1]) == {10, 11, 12, 70, 71, 72}
    plot.draw_points(right, [(plot.STYLES["MST"], 0, 0, 50.0, 10.0, 70.0)], ["a"], False, 1)
    whisker, = right.containers[0].lines[2][0].get_segments()
    assert whisker[:, 1].tolist() == [10, 70]


@pytest.mark.parametrize("names", [("dense", "critic-dst", "mst"),
                                   ("dst", "MST"), ("plain", "a", "b"), ("a", "d2s"), tuple("abcdefgh")])
def test_no_two_arms_share_a_color(names):
    looks = plot.styles(list(names))
    assert len({color for color, *_ in looks.values()}) == len(looks) == len(names)
    assert looks[names[0]] == plot.STYLES.get(names[0], looks[names[0]])


def test_more_arms_than_colors_have_other_markers():
    assert len(set(plot.styles([str(number) for number in range(20)]).values())) == 20
    assert len(plot.styles([str(number) for number in range(70)])) == 70


# ---- any runs ----

def write_arms(folder, *more):
    for seed in range(3):
        for number, flags in enumerate(((), ("--critic-regime", "dst"))):
            args = flags_to_args("--env", "walker-walk", "--total-steps", "20000", *flags, "--seed", str(seed), *more)
            write_run(folder, args, [(0, 1, 0), (20000, 3 + seed * (1 + number), 0.5)], ("return", "critic/dormant"))
    return folder


def test_any_runs_are_arms_labeled_by_flag_and_value(tmp_path, monkeypatch, capsys, pages):
    runs = write_arms(tmp_path / "runs")
    (next(runs.iterdir()) / "train.csv").write_text("agent_step,frames,critic_density\n500,1000,0.4\n1000,2000,0.4\n")
    for paths in ((runs,), sorted(runs.iterdir())):
        status, *_ = run_main(plot, monkeypatch, capsys, *paths, "--columns", "return", "critic/dormant_ratio",
                              "train:critic/density", "--out", tmp_path / "a.png", "--save", tmp_path / "runs.csv")
        assert not status and (tmp_path / "a.png").exists()
        labels = {text.get_text() for text in pages[-1].legends[0].get_texts()}
        assert labels == {"critic-regime=dense", "critic-regime=dst"}
        assert {tuple(line.get_ydata()) for line in pages[-1].axes[0].get_lines()} == {(1, 4), (1, 5)}
        assert [tuple(line.get_ydata()) for line in pages[-1].axes[2].get_lines()] == [(0.4, 0.4)]
    again, first = (run_main(plot, monkeypatch, capsys, path, "--columns", "return", "critic/dormant_ratio",
                             "--table", "csv")[1] for path in (tmp_path / "runs.csv", runs))
    assert again == first


def test_a_table_compares_finished_runs_with_the_first_arm(tmp_path, monkeypatch, capsys):
    runs = write_arms(tmp_path / "runs")
    unfinished = flags_to_args("--env", "walker-walk", "--total-steps", "20000", "--critic-regime", "dst", "--seed",
                               "3")
    write_run(runs, unfinished, [(0, 1), (5000, 999)])
    grid = {"tasks": ["walker-walk"], "seeds": 4, "flags": {"total-steps": 20000},
            "arms": {"plain": {}, "dynamic": {"critic-regime": "dst"}}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    _, lines, _ = run_main(plot, monkeypatch, capsys, tmp_path / "grid.json", runs, "--table", "csv")
    heading, plain, dynamic = (line.split(",") for line in lines)
    theirs = scipy.stats.ttest_ind([3, 5, 7], [3, 4, 5], equal_var=False).confidence_interval()
    assert plain[2:5] == ["plain", "3", "4"] and plain[-3:] == ["", "", ""] and dynamic[2:5] == ["dynamic", "3", "5"]
    assert [float(cell) for cell in dynamic[-4:]] == pytest.approx([5, 1, theirs.low, theirs.high], rel=1e-5)
    _, table, _ = run_main(plot, monkeypatch, capsys, runs, "--table", "markdown", "--only", "critic-regime=dst",
                           "--seeds", "2")
    assert len(table) == 3 and table[-1].startswith("| walker-walk | return | these runs | 2 |")


def test_what_cannot_be_done_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_arms(tmp_path / "runs")
    (tmp_path / "ref.csv").write_text("env,agent_step,seed,return\ndog-run,0,0,1\n")
    for argv, message in (("no", "no: no such file or folder"), ("empty", "empty: no runs here"),
                          ("runs --columns retrun", "did you mean return?"),
                          ("runs --tasks dog-run", "--tasks dog-run matches none"),
                          ("runs --only mst", "--only mst matches none of the runs; they have mst=false"),
                          ("runs --only critic-regim=dst", "did you mean critic-regime?"),
                          ("runs runs", "is given twice"),
                          ("fig6 runs", "./sweep.sh plot fig6 runs"), ("runs --reference ref.csv", "none of the tasks"),
                          ("runs --table --reference ref.csv", "add --out"), (__file__, "is not a CSV of runs")):
        status, _, _ = run_main(plot, monkeypatch, capsys, *argv.split())
        assert message in str(status) and "\n" not in str(status)


def test_published_agent_steps_count_frames_as_the_benchmark_does(tmp_path):
    (tmp_path / "ref.csv").write_text("env,agent_step,seed,return\nHopper-v5,500,0,1\nwalker-walk,500,0,1\n")
    lines = plot.references(tmp_path / "ref.csv", plot.STATISTICS["iqm"][0])
    frames = {task: curves[0][1].tolist() for task, curves in lines.items()}
    assert frames == {"Hopper-v5": [500], "walker-walk": [1000]}


def test_published_curves_lie_below_ours(tmp_path, monkeypatch, capsys, pages):
    runs = write_arms(tmp_path / "runs")
    rows = [f"walker-walk,{algo},{step},{seed},{step / 1000 + seed}" for algo in "AB" for step in (0, 10000, 90000)
            for seed in (0, 2)]
    (tmp_path / "ref.csv").write_text("\n".join(["env,algo,env_step,seed,return", *rows]) + "\n")
    assert not run_main(plot, monkeypatch, capsys, runs, "--reference", tmp_path / "ref.csv", "--out", tmp_path)[0]
    published = [tuple(line.get_ydata()) for line in pages[0].axes[0].get_lines() if line.get_color() == "black"]
    assert published == [(1, 11)] * 2  # no further than our 40,000 frames
    check_layout(pages[0])


def test_old_names_of_flags_and_columns(tmp_path):
    (tmp_path / "old.csv").write_text("run,agent_step,frames,critic/dormant,critic/interference\n"
                                      "dog-run__total-steps=20000__mst__growth=random__seed=3,20000,40000,0.25,0.5\n")
    (run,), notes = results.find_runs([str(tmp_path / "old.csv")], ["critic/dormant_ratio", "critic/grad_cosine"])
    assert not notes and run.args.sparse.grow == "random" and run.args.seed == 3
    assert [run.values((name,))[2].item() for name in ("critic/dormant_ratio", "critic/grad_cosine")] == [0.25, 0.5]
    wanted = {"dog-run__total-steps=20000__mst__grow=random__seed=3": run.args}
    assert list(results.gather(wanted, [str(tmp_path / "old.csv")], ["critic/dormant_ratio"])[0]) == list(wanted)
