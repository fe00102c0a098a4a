"""Draw learning curves: python results/curves.py OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]

A panel for each task. The line is the mean score over the models of all runs with that label, the band the standard error over
their episodes.
"""

import csv
from pathlib import Path

import numpy as np
from runs import labelled_runs, panel_per_task


def main() -> None:
    out, runs = labelled_runs(__doc__)
    rows = []
    for label, run_dir, config in runs:
        with open(Path(run_dir) / "eval.csv") as file:
            for row in csv.DictReader(file):
                updates = float(row["epoch"]) * config["args"]["steps_per_epoch"]
                rows.append(row | dict(task=config["args"]["env_id"], label=label, updates=updates))
    figure, panels = panel_per_task(rows)
    figure.set_size_inches(figure.get_size_inches() + (2.8, 0))  # room for the legend
    score = config["data"].get("score", "score")
    steps = "steps in the environment" if "online_steps" in config["args"] else "training updates"
    lines = {}
    for task, axes in panels.items():
        for number, label in enumerate(dict.fromkeys(label for label, *_ in runs)):
            own = [row for row in rows if (row["task"], row["label"]) == (task, label)]
            updates = sorted({row["updates"] for row in own})
            mean, error = [], []
            for update in updates:
                group = [row for row in own if row["updates"] == update]
                means, stds, episodes = (
                    np.array([float(row[name]) for row in group]) for name in ("score_mean", "score_std", "episodes")
                )
                mean.append(means.mean())
                error.append(np.sqrt(((stds**2).mean() + means.var()) / episodes.sum()))
            (lines[label],) = axes.plot(updates, mean, color=f"C{number}", marker="o", markersize=3)
            axes.fill_between(updates, np.subtract(mean, error), np.add(mean, error), color=f"C{number}", alpha=0.2)
        axes.set(xlabel=steps, ylabel=score)
        axes.locator_params("x", nbins=6)
    limits = [axes.get_ylim() for axes in panels.values()]
    for axes in panels.values():
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
