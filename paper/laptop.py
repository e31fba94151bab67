"""Laptop studies: the paper's questions, and a few of our own, at sizes that two cores finish in hours or days.

Guarantees: arms of one study differ in what its title names and in nothing else.

    ./sweep.sh list                            # every study: what it shows, its runs and hours
    ./sweep.sh fig11 --laptop                  # run one
    ./sweep.sh plot fig11 runs/ --laptop       # draw it

A new study is one more entry of LAPTOP; docs/figures.md lists it from then on. Results: docs/results.md.
"""

import dataclasses

from paper.figures import (CRITIC_DORMANT, CRITIC_SRANK, CRITIC_STEP, FIGURES, REGIMES, RES, RETURN, TYPE_LABELS,
                           Figure, mst_ablation, stream_arms)
from runtime.grid import Arm

TASK = "walker-walk"
_SHORT = {"learning_starts": 2000, "total_steps": 12000, "eval_every": 1000}
_NARROW = {"width_scale": 0.25, **_SHORT}
_STRONG = {"encoder_type": 6, "encoder_scale": 3, **_NARROW}
_ACTOR = {"encoder_type": 6, "actor_scale": 5, **_NARROW}
_DEEP_RES = {"depth_scale": 5, **RES, **_NARROW}
_DEEP_MST = {"depth_scale": 5, "mst": True, **_NARROW}


def _small(figure, arms, step_ms, size="Width ×0.25", **changes):
    """A figure of the paper with other arms: one task, five seeds, 12,000 agent steps."""
    return dataclasses.replace(FIGURES[figure], arms=tuple(arms), tasks=(TASK,), seeds=5, step_ms=step_ms,
                               note=f"{size}; 12,000 agent steps, of which 2,000 are random.", **changes)


def _types(module, types, **others):
    """Dense networks of these types as the curves of one panel."""
    return (Arm("types, dense", TYPE_LABELS[t].replace("\n", " "), {f"{module}_type": t, **others}) for t in types)


def _regimes(module, arch_type, **others):
    return (Arm(f"regimes, Type {arch_type}", regime,
                {f"{module}_type": arch_type, f"{module}_regime": regime, **others}) for regime in REGIMES)


def _simba(algo):
    width, depth = ((1, {}), (4, {"width_scale": 0.5})), ((1, {}), (4, {"depth_scale": 4}))
    for name, points in (("width", width), ("depth", depth)):
        for scale, flags in points:
            for series, mst in (("plain", {}), ("MST", {"mst": True})):
                yield Arm(f"{algo.upper()}, {name}", series,
                          {"algo": algo, **_SHORT, "width_scale": 0.125, **flags, **mst}, f"×{scale}")


def _visual():
    small = {"pixels": True, "image_size": 64, "batch_size": 64, "width_scale": 0.5, "learning_starts": 1000,
             "total_steps": 30000, "eval_every": 3000, "eval_episodes": 3}
    for series, flags in (("dense", RES), ("static encoder", {**RES, "encoder_regime": "sst"}),
                          ("static critic and actor", {**RES, "critic_regime": "sst", "actor_regime": "sst"}),
                          ("MST", {"mst": True})):
        yield Arm("", series, {**small, **flags})


_DEEP_CRITIC = tuple(_regimes("critic", 6, critic_scale=5, **_STRONG))
_DEEP_ACTOR = tuple(_regimes("actor", 5, **_ACTOR))
_QUICK = {"width_scale": 0.25, "learning_starts": 1000, "eval_every": 3000}
_QUICK_MST = {"mst": True, **_QUICK}
_BALL = {"mst": True, "width_scale": 0.25, "learning_starts": 1000, "total_steps": 20000, "eval_every": 4000}
_STREAM_MST = {"algo": "stream", "mst": True, "total_steps": 200_000, "eval_every": 50_000}
_CRITIC = (RETURN, CRITIC_SRANK, CRITIC_DORMANT)

# step_ms: mean of the arms, each timed for some steps on one core of an Intel Xeon (AVX-512).
LAPTOP = {
    "quickstart": Figure(
        "the README's first command: longer, shorter, dense, and after more random steps", "curves",
        (Arm("", "MST", {**_QUICK_MST, "total_steps": 24000}),
         Arm("", "MST, 30,000 steps", {**_QUICK_MST, "total_steps": 30000}),
         Arm("", "MST, 18,000 steps", {**_QUICK_MST, "total_steps": 18000}),
         Arm("", "dense, 18,000 steps", {**RES, **_QUICK, "total_steps": 18000}),
         Arm("", "MST, 10,000 random steps", {**_QUICK_MST, "learning_starts": 10000, "total_steps": 27000})),
        _CRITIC, tasks=("cartpole-swingup",), step_ms=29,
        note="Width ×0.25, types 6, 6 and 5; 1,000 random steps (one arm: 10,000)."),
    "stream_quickstart": Figure(
        "the README's streaming command, and growth by the last gradient", "curves",
        (Arm("", "MST", _STREAM_MST), Arm("", "MST, last gradient", {**_STREAM_MST, "growth_score": "last"})),
        tasks=(TASK,), step_ms=0.6,
        note="128 units, sparsity 0.8; 200,000 agent steps. Growth is ranked by the sum of δ·z since the last "
             "change, or by the last gradient."),
    "stream_length": Figure(
        "Stream AC(λ) as published, over 2 million steps", "curves",
        (Arm("", "dense", {"algo": "stream", "total_steps": 2_000_000, "eval_every": 100_000}),),
        (RETURN, CRITIC_STEP), tasks=(TASK,), seeds=3, step_ms=0.42, note="128 units, dense, SparseInit."),
    "ball_in_cup": Figure(
        "short runs of narrow SAC and DDPG agents", "curves",
        (Arm("", "MST, SAC", {"algo": "sac", **_BALL}), Arm("", "MST, DDPG", {"algo": "ddpg", **_BALL})), _CRITIC,
        tasks=("ball_in_cup-catch",), step_ms=29, note="Width ×0.25; 20,000 agent steps, of which 1,000 are random."),
    # Full size and default settings, to stand beside published runs.
    "mrq": Figure(
        "MR.Q as published, but with one more layer in encoder and actor", "curves",
        (Arm("", "this code", {"total_steps": 20000}),), seeds=5, step_ms=200,
        tasks=("cartpole-swingup", "walker-walk", "dog-run", "dog-trot", "humanoid-run", "humanoid-walk"),
        note="Types 4, 4 and 3, dense; 20,000 agent steps, of which 10,000 are random."),
    "gym": Figure(
        "MR.Q as published on Gymnasium, where episodes terminate", "curves",
        (Arm("", "this code", {"total_steps": 20000}),), seeds=3, step_ms=200, tasks=("Hopper-v5", "Walker2d-v5"),
        note="Types 4, 4 and 3, dense; 20,000 agent steps, of which 10,000 are random; action repeat 1."),
    "simba": Figure(
        "SAC on SimBa networks, as published", "curves",
        (Arm("", "this code", {"algo": "sac", "total_steps": 25000}),), seeds=5, step_ms=210,
        tasks=("walker-walk", "cheetah-run", "dog-run", "dog-trot", "humanoid-run", "humanoid-walk"),
        note="25,000 agent steps, of which 5,000 are random."),
    # Longer than the two above, until policies are good. Scale 1, at which the paper has no comparison of MST.
    "length": Figure(
        "MR.Q over 100,000 agent steps, dense as published and with MST", "curves",
        (Arm("", "dense", {"total_steps": 100_000}), Arm("", "MST", {"total_steps": 100_000, "mst": True})),
        tasks=("walker-walk", "cartpole-swingup", "cheetah-run"), seeds=2, step_ms=200,
        note="Types 4, 4 and 3, dense, and types 6, 6 and 5 with MST; scale 1, fp32; 10,000 random steps."),
    "fig2": _small("fig2", _types("encoder", (1, 2, 3, 4, 6), **_NARROW), 28, kind="curves",
                   title="encoder: architecture types"),
    "fig3": _small("fig3", _types("encoder", (1, 2, 3, 4, 6), **_NARROW), 28),
    "fig6": _small("fig6", _DEEP_CRITIC, 67, kind="curves", title="critic five times as deep: training regimes"),
    "fig7": _small("fig7", _DEEP_CRITIC, 67, title="critic five times as deep: SRank and dormant neurons"),
    "fig8": _small("fig8", _types("actor", (3, 4, 5, 6), **_ACTOR), 32, kind="curves",
                   title="actor five times as deep: architecture types"),
    "fig9": _small("fig9", _DEEP_ACTOR, 31, kind="curves", title="actor five times as deep: training regimes"),
    "fig10": _small("fig10", _DEEP_ACTOR, 31, title="actor five times as deep: dormant neurons"),
    "fig11": _small("fig11", (Arm("", "MR.Q", {"depth_scale": 5, **_NARROW}), Arm("", "MR.Q + Res", _DEEP_RES),
                              Arm("", "MR.Q + Res + MST", _DEEP_MST)), 87,
                    title="all modules five times as deep: MR.Q, with residual connections, with MST"),
    "fig12": _small("fig12", mst_ablation(_DEEP_MST, _DEEP_RES, ()), 89,
                    title="MST, all modules five times as deep: distribution and growth"),
    "fig13": _small("fig13", (*_simba("sac"), *_simba("ddpg")), 37,
                    size="Width ×0.125 of SimBa's published sizes (called ×1 here), and four times as wide or deep"),
    "visual": Figure(
        "MR.Q from pixels: static sparse encoder, static sparse critic and actor, and MST", "curves",
        tuple(_visual()), (RETURN, CRITIC_SRANK, CRITIC_DORMANT), tasks=("walker-stand", "cartpole-balance"), seeds=5,
        step_ms=175,  # on a busy AMD EPYC
        note="64×64 pixels, width ×0.5, batch 64; 30,000 agent steps, of which 1,000 are random; three episodes per "
             "evaluation; types 6, 6 and 5; sparsity 0.6."),
    "stream": dataclasses.replace(
        FIGURES["stream"], kind="curves", tasks=(TASK,), seeds=5, step_ms=1.2, measures=(RETURN, CRITIC_STEP),
        arms=tuple(arm for width in (1, 4) for arm in stream_arms(
            width, f"{128 * width} units", total_steps=500_000, eval_every=50_000)),
        note="500,000 agent steps; sparsity 0.8 at 128 units, 0.9 at 512. \"Larger step\": κ lowered until the median "
             "steps of a short dense run are those of a static one."),
}

OLD_NAMES = {"first": "quickstart", "cup": "ball_in_cup"}
