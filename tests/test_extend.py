"""Training a finished run on: `train.py --extend RUN --total-steps MORE`."""

import re

import pytest

from settings import parse
from tests.helpers import in_process, refuses, table, timeless

pytestmark = pytest.mark.slow
FLAGS = ["--env", "cartpole-swingup", "--width-scale", "0.05", "--learning-starts", "45", "--eval-every", "50",
         "--eval-episodes", "1", "--log-every", "10", "--batch-size", "16", "--target-update-freq", "20",
         "--update-interval", "15"]
OWN = ["--device", "cpu", "--threads", "1", "--compile", "off"]


def run(folder, *flags):
    """(exit status, output) of train.py."""
    output = folder / "output"
    output.unlink(missing_ok=True)
    status = in_process([*flags, *OWN, "--runs", str(folder)], output)
    return status, output.read_text()


@pytest.mark.parametrize("regime", ["dense", "sst"])
def test_extended_run_equals_a_long_one(tmp_path, regime):
    flags = [*FLAGS, "--critic-regime", regime]
    run(tmp_path, *flags, "--total-steps", "130", "--name", "short")
    run(tmp_path, *flags, "--total-steps", "200", "--name", "long")
    before = (tmp_path / "short/eval.csv").read_bytes()
    status, said = run(tmp_path, "--extend", str(tmp_path / "short"), "--total-steps", "200", "--name", "more")
    assert status == 0 and "extends" in said
    assert timeless(tmp_path / "more") == timeless(tmp_path / "long")
    assert (tmp_path / "short/eval.csv").read_bytes() == before  # the finished run stays as it is
    status, said = run(tmp_path, "--extend", str(tmp_path / "short"), "--total-steps", "200", "--name", "more")
    assert status == 0 and "finished already" in said


def test_resume_with_more_steps_names_extend_which_writes_beside_the_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for steps in ("60", "90", "80"):
        in_process([*FLAGS, *OWN, "--total-steps", steps, "--resume", "--runs", "mine"], tmp_path / steps)
        hints = re.findall("--extend (.*) --total-steps (.*)", (tmp_path / steps).read_text())
        if steps == "60":
            assert not hints
            (short,) = (tmp_path / "mine").iterdir()
        else:  # not the longer one
            assert hints == [(f"mine/{short.name}", steps)]
    command = ["--extend", f"mine/{short.name}", "--total-steps", "70", *OWN]
    assert in_process(command, tmp_path / "output") == 0 and len(list((tmp_path / "mine").iterdir())) == 4


def test_extending_dst_follows_the_longer_schedule(tmp_path):
    run(tmp_path, *FLAGS, "--mst", "--total-steps", "130", "--name", "short")
    status, said = run(tmp_path, "--extend", str(tmp_path / "short"), "--total-steps", "200", "--name", "more")
    assert status == 0 and "critic" in said.split("extends")[1] and "Eq. (1)" in said
    assert [row["agent_step"] for row in table(tmp_path / "more", "eval.csv")][-1] == "200"


def test_extension_refuses_what_it_cannot_mean(tmp_path):
    for name, flags in (("short", []), ("d2s", ["--critic-regime", "d2s"]), ("none", ["--keep-checkpoint", "off"])):
        run(tmp_path, *FLAGS, *flags, "--total-steps", "130", "--name", name)
    for name, flags, word in (("short", "130", "--total-steps"), ("short", "200 --mst", "--mst"),
                              ("short", "200 --critic-lr 1", "--critic-lr"), ("d2s", "200", "Eq. 2"),
                              ("none", "200", "--keep-checkpoint"),
                              ("nowhere", "200", "nowhere is not a run's folder")):
        more = ["--total-steps", *flags.split(), "--name", "more"]
        status, said = run(tmp_path, "--extend", str(tmp_path / name), *more)
        assert status == 1 and word in said and not (tmp_path / "more").exists()
    refuses(lambda: parse(["--extend", str(tmp_path / "short")]), "--extend needs --total-steps")  # not 500,000
