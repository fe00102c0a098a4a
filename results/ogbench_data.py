"""Statistics of an OGBench file, made at home or downloaded: python results/ogbench_data.py NAME.npz OUT.csv

A row per quantity: moments of actions, share of steps in which a cube moves, and returns of episodes for each of the five tasks.
"""

import csv
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from tasks import ogbench  # noqa: E402


def main(file: Path, out: Path) -> None:
    ogbench.register()
    from ogbench.relabel_utils import relabel_dataset

    name, kind = re.fullmatch(r"(.+)-(\w+)-v0", file.stem).groups()
    with np.load(file) as source:
        data = {key: source[key] for key in source if key != "about"}
        rows = [{"quantity": "about", "value": str(source["about"]) if "about" in source else "OGBench's own file"}]
    add = lambda quantity, value: rows.append({"quantity": quantity, "value": f"{value:.4g}"})
    ends = np.flatnonzero(data["terminals"])
    add("episodes", len(ends))
    add("steps", len(data["terminals"]))
    for i, (mean, std) in enumerate(zip(data["actions"].mean(0), data["actions"].std(0))):
        add(f"action {i}, mean", mean)
        add(f"action {i}, std", std)
    add("share of action entries at the bounds", (np.abs(data["actions"]) > 0.999).mean())
    inside = np.ones(len(data["terminals"]) - 1, bool)
    inside[ends[:-1]] = False
    cubes = {"single": 1, "double": 2, "triple": 3, "quadruple": 4, "octuple": 8}.get(name.split("-")[-1], int(name == "scene"))
    for i in range(cubes):
        moved = np.linalg.norm(np.diff(data["qpos"][:, 14 + 7 * i : 17 + 7 * i], axis=0), axis=1)[inside] > 1e-3
        add(f"share of steps in which cube {i} moves by more than 1 mm", moved.mean())
    for task in range(1, 6):
        env = ogbench.make_env(f"{name}-singletask-task{task}-v0")
        labelled = dict(data)
        relabel_dataset(f"{name}-singletask-task{task}-v0", env, labelled)
        env.close()
        returns = np.add.reduceat(labelled["rewards"], np.concatenate(([0], ends[:-1] + 1)))
        for quantity, value in (("mean", returns.mean()), ("std", returns.std()), ("largest", returns.max())):
            add(f"task {task}, return of an episode, {quantity}", value)
        solved = np.logical_or.reduceat(labelled["masks"] == 0, np.concatenate(([0], ends[:-1] + 1)))
        add(f"task {task}, share of episodes in which it is solved", solved.mean())
    with open(out, "w", newline="") as target:
        writer = csv.DictWriter(target, ["quantity", "value"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("error: give an OGBench file and where to write, such as cube-single-play-v0.npz out.csv")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
