"""See a run's policy: `python -m tools.watch RUN_DIR` renders episodes to a GIF, and for a maze draws the paths of 20 to a PNG.

Rendering needs EGL, OSMesa or a window; paths need none of them.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import common
from common import UserError, check

PROBE = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()"
SPEED, WIDTH, HEIGHT = 25, 480, 360  # frames per second, pixels


@dataclass
class Args:
    """Render episodes of a run's policy; for a maze, draw its paths."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """folder of a run"""
    index: int = 0
    """model of the run"""
    episodes: int = 1
    """episodes to render; 0 renders none"""
    paths: int = 20
    """episodes whose paths are drawn, in a maze"""
    out: str = "."
    """folder for watch.gif and paths.png"""


def find_renderer() -> str | None:
    """The first of MuJoCo's ways to render that works here, as MUJOCO_GL calls it."""
    window = ("glfw",) if os.environ.get("DISPLAY") or sys.platform != "linux" else ()
    for name in (os.environ["MUJOCO_GL"],) if "MUJOCO_GL" in os.environ else (*window, "egl", "osmesa"):
        environment = os.environ | _environment(name)
        if subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True).returncode == 0:
            return name
    return None


def _environment(name: str) -> dict[str, str]:
    return {"MUJOCO_GL": name, "PYOPENGL_PLATFORM": name if name in ("egl", "osmesa") else ""}


def simulation(env: gym.Env) -> tuple[Any, Any]:
    """MuJoCo's model and data of an environment. Raises UserError if it has none."""
    inner = env.unwrapped
    for holder in (inner, *(getattr(inner, name, None) for name in ("point_env", "ant_env", "robot_env"))):
        for model, state in (("model", "data"), ("_model", "_data")):
            if hasattr(holder, model) and hasattr(holder, state):
                return getattr(holder, model), getattr(holder, state)
    raise UserError(f"{inner} is no MuJoCo environment: there is nothing to render")


def episode(env: gym.Env, act: Callable[[np.ndarray], np.ndarray], seed: int) -> Iterator[float]:
    """Run one episode; yields the reward of each step, 0 after the reset."""
    obs, _ = env.reset(seed=seed)
    if hasattr(act, "reset"):
        act.reset()
    done, reward = False, 0.0
    yield reward
    while not done:
        obs, reward, terminated, truncated, _ = env.step(act(obs))
        done = terminated or truncated
        yield float(reward)


def walk(env: gym.Env, act: Callable[[np.ndarray], np.ndarray], episodes: int) -> tuple[list[np.ndarray], int]:
    """The ways (T, 2) through a maze in `episodes` episodes, and how many ended at the goal."""
    paths, reached, (_, state) = [], 0, simulation(env)
    for seed in common.progress_bar(iterable=range(episodes), desc="walking", unit="episode", leave=False):
        points, rewards = zip(*((state.qpos[:2].copy(), reward) for reward in episode(env, act, seed)))
        paths.append(np.array(points))
        reached += max(rewards) > 0
    return paths, reached


def draw_maze(axes: Axes, env: gym.Env, paths: list[np.ndarray], title: str) -> None:
    """Walls, ways, the start of the first and the goal of the last."""
    model, _ = simulation(env)
    boxes = [i for i in range(model.ngeom) if model.geom_bodyid[i] == 0 and model.geom_type[i] == 6]  # mjGEOM_BOX
    for i in boxes:
        (x, y), (width, depth) = model.geom_pos[i][:2], model.geom_size[i][:2]
        axes.add_patch(Rectangle((x - width, y - depth), 2 * width, 2 * depth, color="0.6", linewidth=0))
    for path in paths:
        axes.plot(*path.T, linewidth=0.7, alpha=0.5)
    axes.plot(*paths[0][0], "ko", markersize=6)
    inner = env.unwrapped
    goal = next((getattr(inner, name) for name in ("target_goal", "goal", "cur_goal_xy") if hasattr(inner, name)), None)
    if goal is not None:
        axes.plot(*np.asarray(goal)[:2], "r*", markersize=12)
    axes.set(title=title, aspect="equal", xticks=[], yticks=[])


def render(env: gym.Env, act: Callable[[np.ndarray], np.ndarray], episodes: int, file: Path) -> None:
    """Episodes as an animated GIF, one after the other, in the environment's own time."""
    import mujoco

    model, state = simulation(env)
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    frames = []
    with mujoco.Renderer(model, HEIGHT, WIDTH) as renderer:
        for seed in common.progress_bar(iterable=range(episodes), desc="rendering", unit="episode", leave=False):
            shown = -np.inf
            for _ in episode(env, act, seed):
                if state.time < shown or state.time >= shown + 1 / SPEED:
                    shown = state.time
                    renderer.update_scene(state, camera)
                    frames.append(Image.fromarray(renderer.render()).quantize(64))
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1000 / SPEED, loop=0)


def main(args: Args) -> list[Path]:
    """Write what can be shown of the run; returns the files. Raises UserError for bad input, or if nothing can be rendered."""
    check(0 <= args.episodes <= 1000 and 0 <= args.paths <= 10_000, "--episodes must lie in [0, 1000], --paths in [0, 10000]")
    config = common.read_config(args.run_dir)
    renderer = find_renderer() if args.episodes else None
    os.environ |= _environment(renderer or "disabled")  # before mujoco is imported
    import tasks
    from tools import import_method

    method = config["exp_name"]
    module = import_method(method)
    torch.set_num_threads(1)  # one state at a time is too little work for more
    act = module.load_policy(f"{args.run_dir}/checkpoint.pt", args.index)
    settings = module.Args(**common.saved_settings(module.Args, config["args"], args.run_dir))
    env, written, out = tasks.make_env(settings), [], Path(args.out)
    check(env is not None, f"{args.run_dir} was trained without an environment: there is nothing to see")
    name = settings.env_id
    if "maze" in name and args.paths:
        common.check_writable(out / "paths.png", "--out")
        paths, reached = walk(env, act, args.paths)
        figure = Figure(figsize=(4.5, 4.2), layout="constrained")
        draw_maze(figure.subplots(), env, paths, f"{name}\n{method}: {reached} of {len(paths)} reach the goal")
        figure.savefig(out / "paths.png", dpi=110)
        written.append(out / "paths.png")
        print(written[-1])
    if renderer:
        common.check_writable(out / "watch.gif", "--out")
        render(env, act, args.episodes, out / "watch.gif")
        written.append(out / "watch.gif")
        print(written[-1])
    env.close()
    check(
        bool(renderer) or not args.episodes,
        "cannot render: MuJoCo finds neither EGL (Debian: apt install libegl1), OSMesa (libosmesa6) nor a window; "
        "--episodes 0 asks for none",
    )
    return written


if __name__ == "__main__":
    common.run(main, lambda: common.cli(Args))
