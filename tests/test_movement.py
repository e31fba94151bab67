"""What train.csv says of topology changes, and a run that began before it said so."""

import csv

import pytest

from runtime.log import Table
from tests.helpers import in_process, table, tiny_run


@pytest.mark.slow
def test_train_csv_shows_whether_a_topology_moves(tmp_path):
    flags = tiny_run("mrq", ("sst", "dst", "dense"))
    assert in_process([*flags, "--runs", str(tmp_path)], str(tmp_path / "output")) == 0
    rows = table(tmp_path / "run", "train.csv")
    assert not {"encoder/dropped", "actor/dropped"} & rows[0].keys()  # only regimes that move have the columns
    dropped, kept = ([float(row[f"critic/{key}"]) for row in rows] for key in ("dropped", "initial_kept"))
    assert all(value > 0 for value in dropped)  # an interval of 15 updates ends with each row
    assert all(0 < value < 1 for value in kept)
    for row in rows:
        assert float(row["critic/dropped"]) == float(row["critic/grown"]) >= float(row["critic/regrown"])


def test_a_continued_table_keeps_its_header(tmp_path):
    one = Table(tmp_path / "train.csv")
    one.write({"agent_step": 1, "loss": 0.5})
    with pytest.raises(ValueError, match="loss"):  # within one run, columns do not change
        one.write({"agent_step": 2, "loss": 0.5, "critic/dropped": 3.0})
    continued = Table(tmp_path / "train.csv", **one.position())
    continued.write({"agent_step": 2, "loss": 0.25, "critic/dropped": 3.0})
    with pytest.raises(ValueError, match="loss"):
        continued.write({"agent_step": 3, "critic/dropped": 3.0})
    with open(tmp_path / "train.csv") as file:
        assert list(csv.reader(file)) == [["agent_step", "loss"], ["1", "0.5"], ["2", "0.25"]]
