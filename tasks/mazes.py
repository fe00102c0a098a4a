"""Mazes that collect their own data, so that the demo needs no download: a point mass driven by a scripted controller."""

import functools
import io
from typing import Any

import gymnasium as gym
import numpy as np

from common import UserError, check_stop, line, progress_bar, signals_held, write_atomically
from tasks.download import folder
from tasks.task import Task, check_env, read_columns, temporary_files_removed

# gymnasium-robotics' PointMaze and the number of transitions; the first is the demo
POINTMAZES = {
    "dtql/pointmaze-umaze-v0": ("PointMaze_UMaze-v3", 100_000),
    "dtql/pointmaze-medium-v0": ("PointMaze_Medium-v3", 200_000),
    "dtql/pointmaze-large-v0": ("PointMaze_Large-v3", 200_000),
}
Cell = tuple[int, int]  # row, column
COLUMNS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "next_observations": 2}


def shortest_paths(maze_map: list[list[Any]], start: Cell) -> dict[Cell, list[Cell]]:
    """The shortest path from `start` to each free cell, both ends included, nearest cells first."""
    paths, queue = {start: [start]}, [start]
    for row, column in queue:  # breadth first: the queue grows during the loop
        for cell in ((row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)):
            if maze_map[cell[0]][cell[1]] != 1 and cell not in paths:
                paths[cell] = [*paths[row, column], cell]
                queue.append(cell)
    return paths


def _layout(env_id: str) -> tuple[list[list[Any]], dict[Cell, dict[Cell, list[Cell]]], Cell, Cell]:
    """The map, the shortest paths between all free cells, and both ends of the longest of them: start and goal."""
    maze_map = [list(row) for row in gym.spec(POINTMAZES[env_id][0]).kwargs["maze_map"]]
    free = [(i, j) for i, row in enumerate(maze_map) for j, cell in enumerate(row) if cell != 1]
    paths = {cell: shortest_paths(maze_map, cell) for cell in free}
    goal, start = max(((a, b) for a in paths for b in paths), key=lambda ends: len(paths[ends[0]][ends[1]]))
    maze_map[goal[0]][goal[1]] = "g"
    return maze_map, paths, start, goal


def make_env(env_id: str, evaluation: bool = True) -> gym.Env:
    """The maze; with `evaluation` its episodes start at the end of the maze that is farthest from the goal."""
    maze_map, _, start, _ = _layout(env_id)
    if evaluation:
        maze_map[start[0]][start[1]] = "r"
    with temporary_files_removed():
        env = gym.make(POINTMAZES[env_id][0], maze_map=maze_map, continuing_task=False, disable_env_checker=True)
    return check_env(env, env_id)


def load(env_id: str) -> Task:
    """A maze with its data, which is collected if it is missing. Raises UserError if it cannot be written."""
    file = folder("DTQL_DATASET_DIR", ".dtql/datasets") / f"{env_id.split('/')[1]}.npz"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            with signals_held():
                np.savez_compressed(content, **collect(env_id))
            write_atomically(file, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {file} ({line(error)}): set DTQL_DATASET_DIR") from None
    arrays = read_columns(file, COLUMNS)
    return Task(
        *(arrays[name].astype(np.float32) for name in COLUMNS),
        make_env=functools.partial(make_env, env_id),
        score=lambda returns: 100 * returns,
        score_name="success rate",
        sparse_goal=True,
        origin=str(file),
    )


def collect(env_id: str) -> dict[str, np.ndarray]:
    """Transitions of a point mass that a PD controller with noise drives between random cells, as in D4RL's maze2d data."""
    _, paths, _, goal = _layout(env_id)
    cells, env, rng, steps = list(paths[goal]), make_env(env_id, evaluation=False), np.random.default_rng(0), []
    maze = env.unwrapped.maze
    with progress_bar(total=POINTMAZES[env_id][1], unit="step", desc=f"collecting the data of {env_id}") as progress:
        while len(steps) < POINTMAZES[env_id][1]:
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            done, path = False, []
            while not done:
                position, velocity = obs[4:6], obs[6:8]  # after the achieved and the desired goal
                if not path:  # drive to another cell, through all cells between
                    here = tuple(int(i) for i in maze.cell_xy_to_rowcol(position))
                    path = list(paths[here][cells[rng.integers(len(cells))]])
                target = maze.cell_rowcol_to_xy(np.array(path[0]))
                action = (10 * (target - position) - velocity + 0.5 * rng.standard_normal(2)).clip(-1, 1).astype(np.float32)
                next_obs, reward, terminated, truncated, _ = env.step(action)
                steps.append((obs, action, reward, terminated, next_obs))
                check_stop()
                done, obs = terminated or truncated, next_obs
                if np.linalg.norm(target - obs[4:6]) < 0.3:
                    path.pop(0)
                progress.update()
    env.close()
    return {name: np.array(column, np.float32) for name, column in zip(COLUMNS, zip(*steps))}
