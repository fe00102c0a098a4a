"""Make OGBench's data instead of downloading it: `python -m tasks.make cube-single-play-v0`.

The recipe is that of OGBench's own commands (`data_gen_scripts`, MIT), whose scripted experts are part of its package for
pointmaze, cube, scene and puzzle. They are not seeded there, so this is another draw from the same distribution, not OGBench's
file. Here every episode has its own seed: the same bytes for any number of workers. MuJoCo rounds otherwise on another kind of
processor, where some episodes come out differently.
"""

import importlib
import io
import json
import multiprocessing
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro

import common
import evaluation
from common import UserError, check, line
from tasks import ogbench
from tasks.download import folder

# Probability of stacking a cube, drawn for each episode
STACK = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5), "octuple": (0, 0.35)}


@dataclass
class Args:
    """Make an OGBench data set with OGBench's scripted experts."""

    name: tyro.conf.Positional[str]
    """OGBench's name of the data set, such as cube-single-play-v0 or pointmaze-large-navigate-v0"""
    episodes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: as many as OGBench's)")] = None
    """training episodes; a tenth as many are made for validation"""
    seed: int = 0
    """seed of the data"""
    workers: int = evaluation.num_cores()
    """processes"""


Episode = dict[str, np.ndarray]


class Maze:
    """A point that is driven along shortest paths, with noise."""

    def __init__(self, name: str):
        _, size, self.kind = name.removesuffix("-v0").split("-")
        steps = 201 if self.kind == "stitch" else 2001 if size == "giant" else 1001
        self.env = gym.make(f"pointmaze-{size}-v0", terminate_at_goal=False, max_episode_steps=steps)
        walls = self.env.unwrapped.maze_map == 1
        self.cells = [tuple(cell) for cell in np.argwhere(~walls)]
        corridor = lambda i, j: (
            (walls[i - 1, j] and walls[i + 1, j] and not walls[i, j - 1] and not walls[i, j + 1])
            or (walls[i, j - 1] and walls[i, j + 1] and not walls[i - 1, j] and not walls[i + 1, j])
        )
        self.vertices = [cell for cell in self.cells if not corridor(*cell)]

    def goal(self, start: tuple[int, int]) -> tuple[int, int]:
        """A random vertex; to stitch, a random cell four steps from the start."""
        near, border = {start}, {start}
        for _ in range(4 if self.kind == "stitch" else 0):
            border = {(i + a, j + b) for i, j in border for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))} & set(self.cells) - near
            near |= border
        goals = self.vertices if self.kind == "navigate" else sorted(border) or self.cells
        return goals[np.random.randint(len(goals))]

    def episode(self, seed: int) -> Episode:
        start = self.cells[np.random.randint(len(self.cells))]
        obs, _ = self.env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": self.goal(start)}})
        maze, rows, done = self.env.unwrapped, [], False
        while not done:
            way = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - maze.get_xy()
            action = np.clip(way / (np.linalg.norm(way) + 1e-6) + np.random.normal(0, 0.5, 2), -1, 1)
            next_obs, _, terminated, truncated, info = self.env.step(action)
            if info["success"] and self.kind == "navigate":
                maze.set_goal(self.goal(start))
            rows.append((obs, action, info))
            obs, done = next_obs, terminated or truncated
        return columns(rows)


class Manipulation:
    """A robot arm that is given one random aim after another."""

    def __init__(self, name: str):
        kind, *sizes, oracle = name.removesuffix("-v0").split("-")
        self.noisy, self.scene = oracle == "noisy", kind == "scene"
        self.stack = STACK.get("".join(sizes), (0.5, 0.5))
        env_id = "-".join((kind, *sizes, "v0"))
        self.env = gym.make(env_id, terminate_at_goal=False, mode="data_collection", max_episode_steps=1001)
        self.action_space = self.env.action_space  # made anew, with a seed of its own, whenever it is asked for
        self.oracles = {}
        for aim in {"cube": ["cube"], "puzzle": ["button"], "scene": ["cube", "button", "drawer", "window"]}[kind]:
            way = "markov" if self.noisy else "plan"
            module = importlib.import_module(f"ogbench.manipspace.oracles.{way}.{aim}_{way}")
            settings: dict[str, Any] = {"min_norm": 0.4} if self.noisy else {"noise": 0.1, "noise_smoothing": 0.5}
            if self.noisy and self.scene and aim == "cube":
                settings["max_step"] = 100
            if kind == "puzzle":
                settings["gripper_always_closed"] = True
            self.oracles[aim] = getattr(module, f"{aim.title()}{way.title()}Oracle")(env=self.env, **settings)

    def episode(self, seed: int) -> Episode:
        self.action_space.seed(seed)
        made = self.attempt(seed)
        while self.scene and self.cube_is_lost(made["qpos"]):
            made = self.attempt(None)
        return made

    @staticmethod
    def cube_is_lost(qpos: np.ndarray) -> bool:
        """Whether the cube ever lies where the arm cannot reach it, behind the drawer or the window; qpos (T, ...)."""
        y, z = qpos[:, 15], qpos[:, 16]
        return bool(((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any())

    def attempt(self, seed: int | None) -> Episode:
        obs, info = self.env.reset(seed=seed)
        stack, noise = np.random.uniform(*self.stack), np.random.uniform(0, 0.1) * np.array((1, 1, 1, 3, 10))
        oracle = self.oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        rows, done = [], False
        while not done:
            if self.noisy and np.random.rand() < 0.1:
                action = self.action_space.sample()
            else:
                action = oracle.select_action(obs, info) + (np.random.normal(0, noise) if self.noisy else 0)
            action = np.clip(action, -1, 1)
            next_obs, _, terminated, truncated, info = self.env.step(action)
            rows.append((obs, action, info))
            obs, done = next_obs, terminated or truncated
            if oracle.done:
                obs, info = self.env.unwrapped.set_new_target(p_stack=stack)
                oracle = self.oracles[info["privileged/target_task"]]
                oracle.reset(obs, info)
        return columns(rows)


def columns(rows: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]) -> Episode:
    """OGBench's columns of an episode of T steps, from (observation, action, info of the step)."""
    obs, actions, infos = zip(*rows)
    made = {
        "observations": np.array(obs, np.float32),
        "actions": np.array(actions, np.float32),
        "terminals": np.arange(1, len(rows) + 1) == len(rows),
        "qpos": np.array([info["prev_qpos"] for info in infos], np.float32),
        "qvel": np.array([info["prev_qvel"] for info in infos], np.float32),
    }
    if "prev_button_states" in infos[0]:
        made["button_states"] = np.array([info["prev_button_states"] for info in infos], np.int64)
    return made


def maker_of(name: str) -> Maze | Manipulation:
    ogbench.register()
    return Maze(name) if name.startswith("pointmaze") else Manipulation(name)


maker: Maze | Manipulation  # of a worker process


def start_worker(name: str) -> None:
    global maker
    evaluation.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    maker = maker_of(name)


def make_episode(seed: int) -> Episode:
    """The episode of a seed, whatever was made before it."""
    np.random.seed(seed)
    return maker.episode(seed)


def main(args: Args) -> None:
    """Make NAME.npz and NAME-val.npz in OGBench's folder. Raises UserError, with nothing half-made left."""
    check(args.workers >= 1, f"--workers must be at least 1, not {args.workers}")
    check(args.episodes is None or args.episodes >= 1, f"--episodes must be at least 1, not {args.episodes}")
    check(args.seed >= 0, f"--seed must not be negative, not {args.seed}")
    name = args.name
    known = "pointmaze-SIZE-(navigate|stitch)-v0 and (cube-SIZE|scene|puzzle-SIZE)-(play|noisy)-v0 can be"
    check(not name.startswith(("ant", "humanoid")), f"{name} needs a trained expert, which OGBench's package lacks; {known}")
    check(ogbench.CAN_BE_MADE.fullmatch(name) is not None, f"{name} cannot be made: {known}")
    ogbench.register()
    place = folder("OGBENCH_DATASET_DIR", ".ogbench/data")
    files = [place / f"{name}{suffix}.npz" for suffix in ("", "-val")]
    number = args.episodes or {"stitch-v0": 5000}.get(name[-9:], 500 if "giant" in name else 1000)
    numbers = [number, -(-number // 10)]
    about = {"made with": "tasks.make", "name": name, "episodes": number, "seed": args.seed}
    about |= {package: version(package) for package in ("ogbench", "mujoco", "numpy")}
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = common.lock(place / f".{name}.lock", f"another process makes {name}: wait for it")
        try:
            for file in files:
                check(not file.exists(), f"{file} is there already: move it away to make another")
                common.check_writable(file, "OGBENCH_DATASET_DIR")
            made = make(args, sum(numbers), place)
            for file, few in zip(files[::-1], (made[number:], made[:number])):  # the training data last, complete with both
                content = io.BytesIO()
                together = {key: np.concatenate([episode[key] for episode in few]) for key in few[0]}
                np.savez_compressed(content, **together, about=json.dumps(about))
                common.write_atomically(file, content.getvalue())
        finally:
            lock.release()
    except BrokenProcessPool:
        raise UserError(f"a worker process has died (out of memory?): try fewer than {args.workers} --workers") from None
    except OSError as error:
        raise UserError(f"cannot make {name} in {place} ({line(error)}): set OGBENCH_DATASET_DIR to a folder with room") from None
    print(*files)


def make(args: Args, number: int, place: Path) -> list[Episode]:
    """The first `number` episodes, in order, each with a seed of its own."""
    seeds = [int(np.random.SeedSequence([args.seed, i]).generate_state(1)[0]) for i in range(number)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, start_worker, (args.name,)) as pool:
        made, episodes = pool.map(make_episode, seeds), []
        try:
            with common.progress_bar(total=number, unit="episode", desc=f"making {args.name}") as progress:
                for episode in made:
                    if not episodes:
                        size = number * sum(column.nbytes for column in episode.values()) >> 20
                        free = shutil.disk_usage(place).free >> 20
                        check(free > size, f"{size} MiB may be needed and {free} are free in {place}: set OGBENCH_DATASET_DIR")
                    episodes.append(episode)
                    progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return episodes


if __name__ == "__main__":
    common.run(main, lambda: common.cli(Args))
