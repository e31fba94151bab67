"""The paper's figures as grids of runs: which runs each needs, what is read from them, and how it is laid out.

Guarantees: each grid is what the paper's text describes; where the text leaves something open, `note` says what was
chosen. A run that several figures share has one name, and is run once.

    ./sweep.sh list                                  # every figure: what it shows, its runs, sizes, hours, columns
    ./sweep.sh fig6 --tasks dog-run --seeds 3        # run a part of one
    ./sweep.sh plot fig6 runs/                       # draw it from whatever runs are there

laptop.py has smaller studies of the same questions, and studies.py finds both by name.
Paper: Sections 3 and 4, Appendices B.2.2, D and E. Figures 18-25 are the rows of 2, 4, 5, 6, 8 and 9, task by task.
"""

import dataclasses
import itertools
from dataclasses import dataclass

from runtime.grid import Arm

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
TYPES = (1, 2, 3, 4, 5, 6)
TYPE_LABELS = {1: "Type 1\nReLU", 2: "Type 2\nELU", 3: "Type 3\nLN, ReLU", 4: "Type 4\nLN, ELU",
               5: "Type 5\nLN, ReLU,\nresidual", 6: "Type 6\nLN, ELU,\nresidual"}
TASKS = ("dog-run", "humanoid-run")  # Section 3, Setup
SMOKE_TASK = "cartpole-balance"
SMOKE_STEP_MS = 75  # measured: 6 seconds per run, start included, of 80 learning steps


@dataclass(frozen=True)
class Measure:
    """What is read from eval.csv, and what a reader of the figure must know about it."""
    columns: tuple  # their mean
    label: str
    note: str = ""


RETURN = Measure(("return",), "return", "Return: mean of an evaluation's episodes, no exploration noise.")
_SRANK = "SRank: smallest k whose singular values reach 1 - δ of their sum, δ = 0.01, batch of 2,048, of "
_DORMANT = ("Dormant: mean |activation| at most τ = 0.025 of its layer's mean, batch of 2,048, "
            "all hidden layers of the ")
ENCODER_SRANK = Measure(("encoder/srank_zsa",), "SRank of z_sa", _SRANK + "the encoder's z_sa.")
CRITIC_SRANK = Measure(("critic/srank_q1", "critic/srank_q2"), "SRank, critic",
                       _SRANK + "each Q network's last hidden layer, mean of both.")
CRITIC_DORMANT = Measure(("critic/dormant_ratio",), "dormant ratio, critic", _DORMANT + "critic.")
ACTOR_DORMANT = Measure(("actor/dormant_ratio",), "dormant ratio, actor", _DORMANT + "actor.")
CRITIC_STEP = Measure(("train:critic/step_size",), "step size, critic",
                      "Step size: ObGD's, median of the last 1,000 steps.")


@dataclass(frozen=True)
class Figure:
    title: str
    kind: str  # "points": final performance over x; "curves": over environment frames
    arms: tuple
    measures: tuple = (RETURN,)  # one panel each
    tasks: tuple = TASKS
    seeds: int | tuple = 8  # how many, or which
    module: str = "agent"  # whose parameters the figure is about: encoder, critic, actor, or those of the whole agent
    note: str = ""  # what the paper's text leaves open, and what was chosen
    step_ms: float | None = None  # measured: one agent step on one core, mean of the arms; None: estimated from sizes

    @property
    def x_is_size(self):
        """Whether the points lie on an axis of sizes, so that lines between them mean something."""
        return self.kind == "points" and self.arms[0].x.startswith("×")

    @property
    def seed_list(self):
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)


def grid(module, types, scales=(1,), regimes=REGIMES, by_type=True, **others):
    """A study of one module: types × regimes × scales. by_type: one panel per type, else one with the types as x."""
    for arch_type, scale, regime in itertools.product(types, scales, regimes):
        flags = {f"{module}_type": arch_type, f"{module}_regime": regime, f"{module}_scale": scale, **others}
        label = TYPE_LABELS[arch_type]
        yield Arm(label.replace("\n", " ", 1).replace("\n", " ") if by_type else "", regime, flags,
                   f"×{scale}" if by_type else label)


def dimensions(points, **others):
    """Scaling in width, in depth and in both: (panel's name, x, flags). Scale 1 is the first point of each."""
    for name, flag, scales in (("width", "width_scale", points[0]), ("depth", "depth_scale", points[1]),
                               ("width and depth", "scale", points[2])):
        for scale in scales:
            yield name, f"×{scale}", {flag: scale, **others} if scale != 1 else others


# ---- the paper's ----

STRONG_ENCODER = {"encoder_type": 6, "encoder_scale": 3}  # Section 3.2: "Type 6, 37M parameters", dense
RES = {"encoder_type": 6, "critic_type": 6, "actor_type": 5}  # MST's architecture, all dense: "+ Res"

_SCALES = (1, 3, 5)  # Section 3, Setup
_SIMBA_POINTS = (1, 2, 4), (1, 2, 4), (1, 2, 3)
_MRSAC_POINTS = (1, 3, 5), (1, 3, 5), (1, 3, 5)
_MST5 = {"scale": 5, "mst": True}
_FIG14 = {"algo": "sac", "width_scale": 4, "depth_scale": 3}


def mst_ablation(base, dense, levels):
    """Fig. 12: MST in every panel, beside MST with one part changed."""
    for panel, series, flags in (("distribution", "uniform", {"distribution": "uniform"}),
                                 ("growth (critic)", "SET", {"grow": "random"})):
        yield Arm(panel, "MST (ER, RigL, 0.6)", base)
        yield Arm(panel, series, {**base, **flags})
    for level in levels:
        series = {0: "sparsity 0 (dense)", 0.6: "MST (ER, RigL, 0.6)"}.get(level, f"sparsity {level}")
        yield Arm("sparsity", series, {0: dense, 0.6: base}.get(level, {**base, "sparsity": level}))


def _plain_and_mst(name, points, plain, **others):
    for dimension, x, flags in dimensions(points, **others):
        yield Arm(f"{name}, {dimension}", "plain", {**plain, **flags}, x)
        yield Arm(f"{name}, {dimension}", "MST", {**flags, "mst": True}, x)


# Streaming. ObGD's step is always at its bound, and the bound counts active weights: pruning makes steps larger, and
# more units make them smaller. "dense, larger step" has the static arm's median steps: what differs is the sparsity.
STREAM_SPARSITY = {1: 0.8, 2: 0.8, 4: 0.9, 8: 0.9}  # by width scale
# (actor's κ, critic's κ) of that arm. From walker-walk, 20,000 steps, seeds 100 and 101: medians of train.csv's step
# sizes over the second half, dense and static; κ is the published one times their ratio, then corrected once by the
# ratio that was left.
STREAM_KAPPA = {1: (1.2, 0.96), 2: (1.4, 0.86), 4: (0.97, 0.70), 8: (1.1, 0.60)}


def visual_arms(x="", **size):
    """MR.Q from pixels: which modules are sparse. The types are MST's, so that only regimes differ."""
    static = {name: {f"{name}_regime": "sst"} for name in ("encoder", "critic", "actor")}
    both = static["critic"] | static["actor"]
    for series, flags in (("dense", RES), ("static, all modules", {**RES, **static["encoder"], **both}),
                          ("static, critic and actor", {**RES, **both}), ("MST", {"mst": True})):
        yield Arm("", series, {"pixels": True, **flags, **size}, x)


def stream_arms(width, panel="", x="", **others):
    """Six arms of Stream AC(λ) at this multiple of 128 units. "dense" is the published agent."""
    base = {"algo": "stream", "width_scale": width, **others}
    sparse = {**base, "sparsity": STREAM_SPARSITY[width]}
    static = {**sparse, "critic_regime": "sst", "actor_regime": "sst"}
    actor_kappa, critic_kappa = STREAM_KAPPA[width]
    for series, flags in (("dense", base), ("dense, no SparseInit", {**base, "sparse_init": 0.0}),
                          ("static", static), ("static, no SparseInit", {**static, "sparse_init": 0.0}),
                          ("MST", {**sparse, "mst": True, "update_interval": 10_000}),
                          ("dense, larger step", {**base, "actor_kappa": actor_kappa, "critic_kappa": critic_kappa})):
        yield Arm(panel, series, flags, x)


FIGURES = {
    "fig2": Figure(
        "encoder: architecture types and training regimes, default size", "points",
        tuple(grid("encoder", TYPES, by_type=False)), module="encoder"),
    "fig3": Figure(
        "encoder: SRank with LayerNorm and without", "curves", tuple(grid("encoder", (2, 4))), (ENCODER_SRANK,),
        module="encoder", note="Our choice: all five regimes. Types 2 and 4 are the paper's."),
    "fig4": Figure(
        "encoder scaled in width and depth", "points", tuple(grid("encoder", (2, 4, 6), _SCALES)), module="encoder"),
    "fig5": Figure(
        "critic: architecture types and training regimes, default size", "points",
        tuple(grid("critic", TYPES, by_type=False, **STRONG_ENCODER)), module="critic"),
    "fig6": Figure(
        "critic scaled in width and depth", "points", tuple(grid("critic", TYPES, _SCALES, **STRONG_ENCODER)),
        module="critic", note="Our choice: all six types; the paper names Types 1-4 and 5-6."),
    "fig7": Figure(
        "critic at scale 5: SRank and dormant neurons", "curves", tuple(grid("critic", (4, 6), (5,), **STRONG_ENCODER)),
        (CRITIC_SRANK, CRITIC_DORMANT), module="critic",
        note="Our choice: types 4 and 6, without and with residual connections."),
    "fig8": Figure(
        "actor: architecture types and training regimes, default size", "points",
        tuple(grid("actor", TYPES, by_type=False, **STRONG_ENCODER)), module="actor"),
    "fig9": Figure(
        "actor scaled in width and depth", "points", tuple(grid("actor", (1, 3, 5), _SCALES, **STRONG_ENCODER)),
        module="actor"),  # types: the captions of Figs. 24 and 25
    "fig10": Figure(
        "actor at scale 5: dormant neurons", "curves", tuple(grid("actor", (3, 5), (5,), **STRONG_ENCODER)),
        (ACTOR_DORMANT,), module="actor"),
    "fig11": Figure(
        "all modules at scale 5: MR.Q, with residual connections, with MST", "curves",
        (Arm("", "MR.Q", {"scale": 5}), Arm("", "MR.Q + Res", {"scale": 5, **RES}),
         Arm("", "MR.Q + Res + MST", _MST5)), (RETURN, CRITIC_SRANK, CRITIC_DORMANT, ACTOR_DORMANT),
        note="Our choice: SRank and dormant ratio of the critic, dormant ratio of the actor."),
    "fig12": Figure(
        "MST at scale 5: distribution, growth and level of sparsity", "curves",
        tuple(mst_ablation(_MST5, {"scale": 5, **RES}, (0, 0.4, 0.6, 0.8, 0.9))), tasks=("dog-run",),
        note="Our choice: the levels, the same for critic and actor; 0 is Fig. 11's \"+ Res\", dense."),
    "fig13": Figure(
        "SAC and DDPG on SimBa scaled, plain and with MST", "points",
        (*_plain_and_mst("SAC", _SIMBA_POINTS, {}, algo="sac"),
         *_plain_and_mst("DDPG", _SIMBA_POINTS, {}, algo="ddpg")),
        note="Our choice: the scales; sparsity 0.8 is the companion paper's public example."),
    "fig14": Figure(
        "SAC at 207 M: static or dynamic, actor and critic in all pairings", "curves",
        tuple(Arm("", f"critic {critic.upper()}, actor {actor.upper()}{' (MST)' * ((critic, actor) == ('dst', 'sst'))}",
                   {**_FIG14, "critic_regime": critic, "actor_regime": actor})
              for critic in ("dst", "sst") for actor in ("sst", "dst")), tasks=("humanoid-run",),
        note="Our choice: width 4 and depth 3, which give the paper's 207 M."),
    "fig17": Figure(
        "residual connections before or after norm and activation, scales 1 and 3", "points",
        tuple(Arm("", f"{residual}-layer", {"scale": scale, **RES, "residual": residual}, f"×{scale}")
              for scale in (1, 3) for residual in ("pre", "post")),
        note="Our choice: all three modules, types 6, 6 and 5, dense."),
    "fig26": Figure(
        "MR.SAC scaled, plain and with MST", "points",
        tuple(_plain_and_mst("MR.SAC", _MRSAC_POINTS, RES, algo="mrsac")),
        seeds=5,  # the caption
        note="Our choice: the scales; the plain arms have MST's types 6, 6 and 5, so that only regimes differ."),
    "visual": Figure(  # arXiv 2506.17204, Section 5, on the same tasks with DrQ-v2
        "MR.Q from pixels: dense, static sparse modules, and MST", "points",
        tuple(arm for scale in _SCALES for arm in visual_arms(f"×{scale}", **({"scale": scale} if scale > 1 else {}))),
        tasks=("quadruped-run", "hopper-hop"), step_ms=15000,  # 1.8, 9.4 and 33 s at the three scales, on a busy EPYC
        note="Our choice: MR.Q instead of DrQ-v2, types 6, 6 and 5, and sparsity 0.6."),
    "stream": Figure(  # arXiv 2506.17204, Section 5, on Gymnasium's Ant and Walker2d
        "Stream AC(λ) in width: dense or sparse, with SparseInit or without; dense with the sparse agent's step size",
        "points", tuple(arm for width in STREAM_SPARSITY for arm in stream_arms(width, x=f"×{width}")),
        tasks=("Walker2d-v5", "quadruped-run", "walker-run"), step_ms=2.6,
        note="Our choice: tasks, widths and sparsity (0.8 up to ×2, then 0.9); 2,000,000 agent steps. "
             "\"Larger step\": κ lowered until the median steps of a short dense run are those of a static one."),
}


# ---- the same, small ----

def smoke(figure):
    """The same grid, tiny: 1/32 of the width and few steps; every other flag of an arm stays."""
    tiny = {"total_steps": 120, "eval_every": 60, "eval_episodes": 1, "update_interval": 20}
    replay = {"learning_starts": 40, "batch_size": 16, "buffer_size": 2000}
    more = {"stream": {}, "sac": replay, "ddpg": replay}
    arms = []
    for arm in figure.arms:
        width = arm.flags.get("width_scale", arm.flags.get("scale", 1)) / 32
        own = more.get(arm.flags.get("algo"), {**replay, "target_update_freq": 20})
        own |= {"image_size": 36} if arm.flags.get("pixels") else {}
        arms.append(dataclasses.replace(arm, flags={**arm.flags, **tiny, **own, "width_scale": width}))
    return dataclasses.replace(figure, arms=tuple(arms), tasks=(SMOKE_TASK,), seeds=1, step_ms=SMOKE_STEP_MS)
