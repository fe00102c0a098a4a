"""Draw learning curves: python results/curves.py OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]

The line is the mean score over the models of all runs with that label, the band the standard error over their episodes.
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from runs import labelled_runs  # noqa: E402


def main() -> None:
    out, runs = labelled_runs(__doc__)
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    pooled: dict[str, list[dict[str, float]]] = {}
    for label, run_dir, config in runs:
        with open(Path(run_dir) / "eval.csv") as file:
            pooled.setdefault(label, []).extend(
                {name: float(value) for name, value in row.items() if name not in ("phase", "setting")}
                for row in csv.DictReader(file)
            )
    for label, rows in pooled.items():
        epochs = sorted({row["epoch"] for row in rows})
        groups = [[row for row in rows if row["epoch"] == epoch] for epoch in epochs]
        mean = np.array([np.mean([row["score_mean"] for row in group]) for group in groups])
        spread = np.array(
            [
                np.sqrt(
                    (np.mean([row["score_std"] ** 2 for row in group]) + np.var([row["score_mean"] for row in group]))
                    / sum(row["episodes"] for row in group)
                )
                for group in groups
            ]
        )
        updates = np.array(epochs) * config["args"]["steps_per_epoch"]
        (line,) = axes.plot(updates, mean, marker="o", markersize=3, label=label)
        axes.fill_between(updates, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)
    score = config["data"].get("score", "score")
    steps = "steps in the environment" if "online_steps" in config["args"] else "training updates"
    axes.set(xlabel=steps, ylabel=score, title=config["args"]["env_id"])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
