"""Draw paths through a maze: python results/mazes.py OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]

The first panel shows 100 of the data's episodes, the others 20 episodes of each run's first model, from the start to the goal.
"""

import importlib
import json
import sys
from pathlib import Path

import minari
import numpy as np
from gymnasium.spaces import flatten
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def roll_out(env, act, episodes: int = 20) -> tuple[list[np.ndarray], int]:
    """The positions (T, 2) of each episode, and how many reached the goal."""
    paths, reached = [], 0
    for seed in range(episodes):
        obs, info = env.reset(seed=seed)
        path, done = [obs["achieved_goal"]], False
        while not done:
            obs, _, terminated, truncated, info = env.step(act(flatten(env.observation_space, obs)))
            path.append(obs["achieved_goal"])
            done = terminated or truncated
        reached += bool(info["success"])
        paths.append(np.array(path))
    return paths, reached


def main(out: str, *runs: str) -> None:
    labels, folders = zip(*(run.split("=", 1) for run in runs))
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in folders]
    env_id = configs[0]["args"]["env_id"]
    dataset = minari.load_dataset(env_id)
    env = dataset.recover_environment(eval_env=True)
    maze = env.unwrapped.maze
    panels = {"data": [episode.observations["achieved_goal"] for episode in dataset.sample_episodes(100)]}
    for label, folder, config in zip(labels, folders, configs):
        act = importlib.import_module(config["exp_name"]).load_policy(f"{folder}/checkpoint.pt")
        paths, reached = roll_out(env, act)
        panels[f"{label}: {reached} of {len(paths)} reach the goal"] = paths
    start, goal = panels[list(panels)[1]][0][0], env.unwrapped.goal

    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, paths) in zip(figure.subplots(1, len(panels)), panels.items()):
        for row, cells in enumerate(maze.maze_map):
            for column, cell in enumerate(cells):
                if cell == 1:
                    x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color="0.6", linewidth=0))
        for path in paths:
            axes.plot(*path.T, linewidth=0.7, alpha=0.5)
        axes.plot(*start, "ko", markersize=6)
        axes.plot(*goal, "r*", markersize=12)
        axes.set(title=title, aspect="equal", xticks=[], yticks=[])
    figure.suptitle(f"{env_id}: from the dot to the star")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
