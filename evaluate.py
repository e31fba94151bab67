"""Evaluates, measures and films a trained run.

    python evaluate.py runs/NAME                                   # 10 fresh episodes
    python evaluate.py runs/NAME --episodes 50 --seed 5            # other episodes
    python evaluate.py runs/NAME --video out.mp4                   # also film the first of them

Guarantees: the same seed gives the same episodes; the default seed gives episodes that training never used; with the
run's own seed and as many episodes as its evaluations had, a finished run's returns are those of the last row of its
eval.csv. The filmed episode is the first of those listed. A run that has not finished is evaluated from its newest
checkpoint.

The training loop uses `evaluate` and `measure` of this file. MuJoCo draws with OpenGL: on a display, a GPU or Mesa
(MUJOCO_GL=egl), or libOSMesa (MUJOCO_GL=osmesa).
"""

import contextlib
import dataclasses
import math
import os
import sys
import warnings
from dataclasses import dataclass

import torch
import tyro

import metrics
from runtime import fast
from runtime.checkpoint import Checkpoints, read

METRIC_BATCH = 2048  # samples for SRank and the dormant ratio
INTERFERENCE_SAMPLES = 32  # per-sample gradients that are compared
FRESH_SEEDS = 1_000_000  # added to a run's seed by default, so that episodes differ from the run's own


# ---- during training ----

def measure(agent, wanted=True):
    """Every module's plasticity metrics, as columns of eval.csv. NaN if not wanted, or if nothing is stored yet."""
    batch, ready = agent.metric_batch(METRIC_BATCH if wanted else 0)
    with contextlib.ExitStack() as stack:
        activations = {name: stack.enter_context(metrics.record_activations(network))
                       for name, network in agent.networks.items()}
        features = agent.compute_features(batch)
    losses = agent.per_sample_losses(batch._make(part[:INTERFERENCE_SAMPLES] for part in batch))
    row = {}
    for name, network in agent.networks.items():
        columns = metrics.module_metrics(network, features[name], activations[name], losses[name],
                                         agent.sparse[name].masks)
        row |= {f"{name}/{column}": value if ready or column == "parameter_norm" else math.nan
                for column, value in columns.items()}
        row[f"{name}/density"] = agent.sparse[name].density()
    return row


# ---- afterwards ----

@dataclass
class Args:
    run: tyro.conf.Positional[str]  # a run's folder, or a file in it
    episodes: int = 10  # episodes to play
    seed: int | None = None  # of the episodes; default: other episodes than training had
    video: str | None = None  # also film the first episode into this .mp4 file
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads of PyTorch; 0: all cores
    eval_workers: int | None = None  # worker processes (default: cores / 4); does not change results


def main():
    from runtime.console import USER_ERRORS, error_message
    try:
        run(tyro.cli(Args, description=__doc__))
    except USER_ERRORS as error:
        sys.exit(f"evaluate.py: {error_message(error)}")


def run(args):
    """Prints the returns, and writes the video if requested. ValueError, OSError or ImportError, in one line."""
    from agents import build_agent, env_maker
    from runtime.evaluator import Evaluator, episode_seed
    if args.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, not {args.episodes}")
    if args.video and not args.video.endswith(".mp4"):
        raise ValueError(f"--video {args.video} must be an .mp4 file")
    imageio = import_imageio() if args.video else None
    folder = os.path.dirname(args.run) or "." if os.path.isfile(args.run) else args.run
    run_args, state = load(folder)
    seed = run_args.seed + FRESH_SEEDS if args.seed is None else args.seed
    device = torch.device("cpu") if run_args.algo == "stream" else fast.resolve_device(args.device)
    torch.set_num_threads(args.threads or fast.usable_cores())
    make = env_maker(run_args)
    env = make(run_args.env, run_args.seed, run_args.action_repeat)
    if args.video:
        check_drawing(env)
    precision = "auto" if run_args.precision == "tf32" else run_args.precision  # auto: tf32 on CUDA
    run_args = dataclasses.replace(run_args, device=str(device), precision=precision, compile="off", cuda_graphs="off")
    smallest = 2 * run_args.agent.horizon + 2 + run_args.pixel.frame_stack
    agent = build_agent(run_args, env.obs_dim, env.action_dim, device, buffer_size=smallest)
    restore(agent, state, folder)

    def act(obs):
        return agent.act(obs, explore=False)

    evaluator = Evaluator(run_args.env, args.episodes, seed, run_args.action_repeat, args.eval_workers, make=make)
    returns = evaluator(act, state["step"])
    each = ", ".join(f"{value:.1f}" for value in returns)
    print(f"{folder}, step {state['step']:,}: return {returns.mean():.1f} ± {returns.std():.1f} "
          f"(mean ± sd of {len(returns)} episodes, seed {seed}): {each}")
    if args.video:
        filmed = film(imageio, env, act, episode_seed(seed, state["step"], 0), args.video)
        print(f"{args.video}: the first of them, return {filmed:.1f}")


def load(folder):
    """(settings.Args, saved state) of a run: from final.pt, or from an unfinished run's newest whole checkpoint."""
    from settings import read_config
    args = read_config(folder)
    path = os.path.join(folder, "final.pt")
    if os.path.exists(path):
        return args, read(path)[0]
    checkpoints = Checkpoints(folder)
    state = checkpoints.load()
    if state is None:
        raise ValueError(f"{folder} holds neither final.pt nor a checkpoint: nothing has been saved yet")
    return args, state["agent"] | {"step": checkpoints.step}


def restore(agent, state, folder):
    from base import load_tensors
    try:
        for name, network in agent.networks.items():
            network.load_state_dict(state["networks"][name])
        load_tensors(agent, state["tensors"])
    except (KeyError, TypeError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"the state saved in {folder} does not fit its config.json: {line} (for networks "
                         "of your own, call evaluate.main() where you call train.main())") from None


def film(imageio, env, act, seed, path, height=480, width=640):
    """Plays one episode, writes each frame as it goes, and returns the episode's return."""
    obs, total, done = env.reset(seed), 0.0, False
    with imageio.get_writer(path, fps=round(1 / env.step_seconds)) as writer:
        while not done:
            writer.append_data(env.render(height, width))
            obs, reward, terminated, truncated = env.step(act(obs[None])[0])
            total, done = total + reward, terminated or truncated
    return total


def check_drawing(env):
    """ValueError, in one line, if OpenGL does not work."""
    warnings.simplefilter("ignore")  # about displays
    try:
        env.render(8, 8)
    except Exception as error:  # many kinds, depending on the OpenGL that is installed
        sys.unraisablehook = lambda _: None  # the half-made context complains again when it is deleted
        raise ValueError(f"--video: cannot draw ({type(error).__name__}): set MUJOCO_GL=egl with a GPU or Mesa, or "
                         "MUJOCO_GL=osmesa with libOSMesa") from None


def import_imageio():
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401  what writes .mp4
        return imageio.v2
    except ImportError:
        raise ImportError("--video needs imageio: pip install imageio imageio-ffmpeg") from None


if __name__ == "__main__":
    main()
