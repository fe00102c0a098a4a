"""Entropy of the policy during training (Figure 5): python results/entropy.py OUT LABEL=RUN_DIR [LABEL=RUN_DIR ...]

Reads it from the runs' TensorBoard events, where it is the mean over 100 updates and all models; writes OUT.csv and OUT.png, in
which runs of the same task share a panel. It is that of the Gaussian before the tanh, in nats (log_std is bounded to [-5, 2]).
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402


def panel_per_task(rows: list[dict]) -> tuple[Figure, dict[str, Axes]]:
    """Panels side by side, one for each task in a table."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.2 * len(tasks), 3.4), layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]))
    for task, axes in panels.items():
        axes.set_title(task)
        axes.grid(alpha=0.3)
    return figure, panels


def main(out: str, *runs: str) -> None:
    rows = []
    for label, run_dir in (run.split("=", 1) for run in runs):
        task = json.loads((Path(run_dir) / "config.json").read_text())["args"]["env_id"]
        events = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
        rows += [dict(task=task, label=label, update=e.step, entropy=e.value) for e in events.Scalars("losses/entropy")]
    common.write_atomically(Path(f"{out}.csv"), common.to_csv(list(rows[0]), rows))
    figure, panels = panel_per_task(rows)
    for task, axes in panels.items():
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [row for row in rows if (row["task"], row["label"]) == (task, label)]
            axes.plot([row["update"] for row in own], [row["entropy"] for row in own], label=label)
        axes.set(xlabel="updates, with pretraining", ylabel="entropy of the policy")
    axes.legend()
    figure.savefig(f"{out}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
