"""Tests of docs/training.md: it names the columns that runs write. Generated tables: test_claims.py."""

import re

import numpy as np

import evaluate
from agents import AGENTS
from stream import StreamAC
from tests.helpers import HERE, tiny_of

# of train.py
LOOP = {"agent_step", "env_frames", "seconds", "return", "return_std", "returns", "steps_per_second", "episode_return"}


def documented():
    text = (HERE / "docs/training.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", text[text.index("### Columns of eval.csv"):text.index("## Stop and resume")],
                      re.MULTILINE)
    return {name for cell in rows for name in re.findall("`([^`]+)`", cell)}


def generic(column):
    """critic/srank_q1_max -> MODULE/srank_NAME_max"""
    column = re.sub(r"^(encoder|critic|actor)/", "MODULE/", column)
    column = re.sub(r"/srank_.+?(_max)?$", r"/srank_NAME\1", column)
    return re.sub(r"/dormant_ratio/.+", "/dormant_ratio/LAYER", column)


def columns(algo):
    if algo == "stream":
        agent = StreamAC(4, 2, total_updates=40)
        for step in range(3):
            agent.update_obs_stats(np.full(4, step, np.float32))
            action = agent.act(np.full(4, step, np.float32), explore=True)
            agent.add(np.full(4, step, np.float32), action, 1.0, np.full(4, step + 1, np.float32), False, False)
    else:
        agent, _ = tiny_of(algo)
        agent.update()
    density = {f"{name}/density" for name in agent.sparse}
    movement = {f"{name}/{key}" for name, sparse in agent.sparse.items() if sparse.dynamic for key in sparse.movement()}
    return {generic(name) for name in {*evaluate.measure(agent), *agent.info, *density, *movement}}


def test_docs_name_every_column_and_no_other():
    written = {algo: columns(algo) for algo in AGENTS}
    assert LOOP <= documented()
    for algo, names in written.items():
        assert not names - documented(), f"{algo}: docs/training.md lacks columns"
    assert not documented() - LOOP - set().union(*written.values()), "docs/training.md has columns that nobody writes"
