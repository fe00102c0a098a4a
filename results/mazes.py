"""Draw paths through a maze: python results/mazes.py OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]

The first panel shows 100 of the data's episodes, the others four episodes of each of a run's models, from the start to the goal;
a run with several settings has a panel for each.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from runs import labelled_runs

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import tasks  # noqa: E402
from tools import import_method, watch  # noqa: E402


def main() -> None:
    out, runs = labelled_runs(__doc__)
    env_id = runs[0][2]["args"]["env_id"]
    task = tasks.load_task(common.Args(env_id=env_id))
    env, ends = task.make_env(), np.flatnonzero(np.abs(task.obs[1:] - task.next_obs[:-1]).sum(1) > 0) + 1
    drawn = np.random.default_rng(0).permutation(len(ends))[:100]
    panels = {"data": [episode[:, :2] for i, episode in enumerate(np.split(task.obs, ends)) if i in drawn]}
    for label, folder, config in runs:
        method = import_method(config["exp_name"])
        settings = method.Args(**common.saved_settings(method.Args, config["args"], folder)).labels
        for setting in dict.fromkeys(settings):
            name, paths, reached = f"{label} {setting}".strip(), [], 0
            for index in [i for i, one in enumerate(settings) if one == setting]:
                walked = watch.walk(env, method.load_policy(f"{folder}/checkpoint.pt", index), 4)
                paths, reached = paths + walked[0], reached + walked[1]
            panels[f"{name}: {reached} of {len(paths)} reach the goal"] = paths
    start = panels[list(panels)[1]][0][:1]  # of the policies, not of the data
    rows, columns = -(-len(panels) // 6), min(len(panels), 6)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    for i, (title, paths) in enumerate(panels.items(), 1):
        watch.draw_maze(figure.add_subplot(rows, columns, i), env, [start, *paths], title)
    figure.suptitle(f"{env_id}: from the dot to the star")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
