"""How large a run's networks are, and about how long it takes, without building them.

What it claims: the counts are those of networks.py, to the parameter, and need no PyTorch; hours are an estimate from
steps that were timed, and only of the processor they were timed on.

    args = parse(["--mst", "--scale", "5", "--env", "humanoid-run"])
    sizes(args)                    # {"encoder": 154270720, "critic": ..., "actor": ...}: dense, targets not counted
    step_ms(args)                  # milliseconds of an agent step

Paper: Section 3 prints 2 / 37 / 154 M, 3 / 33 / 139 M and 1.3 / 16 / 69 M.
"""

import functools
import math

from settings import module_configs

SHAPES = {"dog-run": (223, 38), "humanoid-run": (67, 21), "walker-walk": (24, 6),  # observation, action
          "cartpole-balance": (5, 1)}
# Milliseconds of an agent step at millions of parameters, as README's "Speed" has them: two cores of an AMD EPYC, fp32.
TIMED = {"encoder": ((2.09, 51), (36.97, 595), (154.69, 2420)), "critic": ((1.58, 20), (33.06, 267), (144.24, 1140)),
         "actor": ((0.81, 13), (16.58, 191), (72.22, 808)), "agent": ((4.39, 85), (207.96, 3100))}  # "agent": SAC, DDPG


def sizes(args):
    """Trainable parameters, dense, module by module: counted as networks.py builds them, without building them."""
    obs, action = SHAPES.get(args.env, SHAPES["humanoid-run"])
    return _sizes(args.algo, obs, action, getattr(args.agent, "twin_critics", False),
                  *((name, m.width_scale, m.depth_scale) for name, m in module_configs(args).items()))


@functools.cache
def _sizes(algo, obs, action, twin, *modules):
    def mlp(inputs, outputs, hidden, blocks):  # networks.BlockMLP
        return hidden * (inputs + 1) + blocks * 2 * hidden * (hidden + 1) + outputs * (hidden + 1)

    def simba(inputs, outputs, hidden, blocks):  # networks.SimbaMLP: its LayerNorms have parameters
        return hidden * (inputs + 1) + blocks * (8 * hidden ** 2 + 7 * hidden) + 2 * hidden + outputs * (hidden + 1)

    on_simba = algo in ("sac", "ddpg")
    base = {"critic": (512, 2), "actor": (128, 1)} if on_simba else dict.fromkeys(("encoder", "critic", "actor"), (512, 1))
    width = {name: max(1, round(base[name][0] * scale)) for name, scale, _ in modules}
    blocks = {name: max(1, round(base[name][1] * scale)) for name, _, scale in modules}
    heads = 2 if algo in ("sac", "mrsac") else 1  # mean and log-std
    if on_simba:
        return {"critic": (1 + twin) * simba(obs + action, 1, width["critic"], blocks["critic"]),
                "actor": simba(obs, heads * action, width["actor"], blocks["actor"])}
    z = width["encoder"]
    za = max(1, z // 2)
    return {"encoder": mlp(obs, z, z, blocks["encoder"]) + za * (action + 1) + mlp(z + za, z, z, blocks["encoder"]),
            "critic": 2 * mlp(z, 1, width["critic"], blocks["critic"]),
            "actor": mlp(z, heads * action, width["actor"], blocks["actor"])}


def millions(count):
    """12 M, 1.3 M or 45 k, from millions."""
    return f"{count:.0f} M" if count >= 9.95 else f"{count:.1f} M" if count >= 0.095 else f"{1e3 * count:.0f} k"


def step_ms(args):
    """An estimate: module by module, between the sizes that were timed in proportion (log-log), MR.SAC as MR.Q."""
    counts = sizes(args)
    if args.algo in ("sac", "ddpg"):
        counts = {"agent": sum(counts.values())}
    return sum(_between(TIMED[name], count / 1e6) for name, count in counts.items())


def _between(points, x):
    logs = [(math.log(size), math.log(ms)) for size, ms in points]
    (x0, y0), (x1, y1) = next(((a, b) for a, b in zip(logs, logs[1:]) if math.log(x) <= b[0]), logs[-2:])
    return math.exp(y0 + (y1 - y0) * (math.log(x) - x0) / (x1 - x0))
