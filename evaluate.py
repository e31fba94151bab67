"""Evaluates what a run has learnt, and films it: `python train.py --eval-only --checkpoint RUN --video out.mp4`.

What it claims: with as many episodes as the run's own evaluations had, a finished run's returns are those of the last row of
its eval.csv. A run that has not ended is evaluated as its newest checkpoint has it.

Episodes, processes and the device are the command line's; everything else is the run's own. Frames are drawn by MuJoCo
through OpenGL: of a screen, of a GPU or Mesa (MUJOCO_GL=egl), or of libOSMesa (MUJOCO_GL=osmesa).
"""

import dataclasses
import json
import os
import sys
import warnings

import torch

from runtime import fast
from agents import build_agent
from runtime.checkpoint import Checkpoints, read
from envs import Env, Evaluator, episode_seed
from settings import from_config


def main(args):
    """Prints the returns, and writes the video if it is asked for. ValueError, OSError or ImportError, in one line."""
    imageio = import_imageio() if args.video else None
    run_args, state = load(args.checkpoint)
    run_args = dataclasses.replace(run_args, device=args.device, compile="off", cuda_graphs="off")
    device = fast.resolve_device(args.device)
    torch.set_num_threads(args.threads or fast.usable_cores())
    env = Env(run_args.env, run_args.seed)
    if args.video:
        check_drawing(env)
    agent = build_agent(run_args, env.obs_dim, env.action_dim, device)
    restore(agent, state, args.checkpoint)

    def act(obs):
        return agent.act(obs, explore=False)

    # The number by which the run's own evaluation at this step was seeded.
    returns = Evaluator(run_args.env, args.eval_episodes, run_args.seed, workers=args.eval_workers)(act, state["step"])
    print(f"{args.checkpoint}, step {state['step']:,}: return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} "
          f"episodes: {', '.join(f'{value:.1f}' for value in returns)}")
    if args.video:
        shown = film(imageio, env, act, episode_seed(run_args.seed, state["step"], 0), args.video)
        print(f"{args.video}: the first of them, return {shown:.1f}")


def load(folder):
    """(Args, what was saved) of a run: from `final.pt`, or from the newest whole checkpoint of one that has not ended."""
    with open(os.path.join(folder, "config.json")) as file:
        try:
            args = from_config(json.load(file))
        except ValueError as error:
            raise ValueError(f"{file.name} cannot be read: {str(error).splitlines()[0]}") from None
    path = os.path.join(folder, "final.pt")
    if os.path.exists(path):
        return args, read(path)[0]
    checkpoints = Checkpoints(folder)
    state = checkpoints.load()
    if state is None:
        raise ValueError(f"{folder} holds neither final.pt nor a checkpoint: nothing has been saved yet")
    return args, state["agent"] | {"step": checkpoints.step}


def restore(agent, state, folder):
    try:
        for name, network in agent.networks.items():
            network.load_state_dict(state["networks"][name])
        with torch.no_grad():
            for name, tensor in agent.tensors().items():
                tensor.copy_(state["tensors"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"what is saved in {folder} does not fit its config.json: {str(error).splitlines()[0]}") from None


def film(imageio, env, act, seed, path, height=480, width=640):
    """Plays one episode and writes it as it goes. Returns its return."""
    obs, total, done = env.reset(seed), 0.0, False
    with imageio.get_writer(path, fps=round(1 / env.step_seconds)) as writer:
        while not done:
            writer.append_data(env.render(height, width))
            obs, reward, terminated, truncated = env.step(act(obs[None])[0])
            total, done = total + reward, terminated or truncated
    return total


def check_drawing(env):
    """ValueError, in one line, where there is no OpenGL."""
    warnings.simplefilter("ignore")  # about displays
    try:
        env.render(8, 8)
    except Exception as error:  # of many kinds: whatever OpenGL there is, or is not
        sys.unraisablehook = lambda _: None  # the half-made drawing context complains again as it goes
        raise ValueError(f"--video: nothing can be drawn here ({type(error).__name__}): with a GPU or Mesa set MUJOCO_GL=egl, "
                         "or MUJOCO_GL=osmesa with libOSMesa") from None


def import_imageio():
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401  what writes .mp4
        return imageio.v2
    except ImportError:
        raise ImportError("--video needs imageio: pip install imageio imageio-ffmpeg") from None
