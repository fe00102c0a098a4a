"""Draw paths through a maze: python results/mazes.py OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]

The first panel shows 100 of the data's episodes, the others four episodes of each of a run's models, from the start to the goal.
"""

import importlib
import sys
from pathlib import Path

import minari
from matplotlib.figure import Figure
from runs import labelled_runs

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402

import watch  # noqa: E402


def main() -> None:
    out, runs = labelled_runs(__doc__)
    env_id = runs[0][2]["args"]["env_id"]
    env = data.load_task(env_id).make_env()
    panels = {"data": [episode.observations["achieved_goal"] for episode in minari.load_dataset(env_id).sample_episodes(100)]}
    for label, folder, config in runs:
        paths, reached = [], 0
        for index in range(config["args"]["num_seeds"]):
            act = importlib.import_module(config["exp_name"]).load_policy(f"{folder}/checkpoint.pt", index)
            walked = watch.walk(env, act, 4)
            paths, reached = paths + walked[0], reached + walked[1]
        panels[f"{label}: {reached} of {len(paths)} reach the goal"] = paths
    start = panels[list(panels)[1]][0][:1]  # of the policies, not of the data
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, paths) in zip(figure.subplots(1, len(panels)), panels.items()):
        watch.draw_maze(axes, env, [start, *paths], title)
    figure.suptitle(f"{env_id}: from the dot to the star")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
