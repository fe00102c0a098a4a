"""Entropy of the policy during training (Figure 5): python results/entropy.py OUT LABEL=RUN_DIR [LABEL=RUN_DIR ...]

Reads it from the runs' TensorBoard events, where it is the mean over 100 updates and all models; writes OUT.csv and OUT.png, in
which runs of the same task share a panel. It is that of the Gaussian before the tanh, in nats (log_std is bounded to [-5, 2]).
"""

import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main(out: str, *runs: str) -> None:
    rows = []
    for label, run_dir in (run.split("=", 1) for run in runs):
        task = json.loads((Path(run_dir) / "config.json").read_text())["args"]["env_id"]
        events = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
        rows += [dict(task=task, label=label, update=e.step, entropy=e.value) for e in events.Scalars("losses/entropy")]
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.2 * len(tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [row for row in rows if (row["task"], row["label"]) == (task, label)]
            axes.plot([row["update"] for row in own], [row["entropy"] for row in own], label=label)
        axes.set(title=task, xlabel="updates, with pretraining", ylabel="entropy of the policy")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{out}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
