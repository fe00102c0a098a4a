"""Entropy of the policy during training (Figure 5): python results/entropy.py OUT LABEL=RUN_DIR [LABEL=RUN_DIR ...]

Reads it from the runs' TensorBoard events, where it is the mean over 100 updates and all models; writes OUT.csv and OUT.png, in
which runs of the same task share a panel. It is that of the Gaussian before the tanh, in nats (log_std is bounded to [-5, 2]).
"""

import sys
from pathlib import Path

from runs import labelled_runs, panel_per_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402


def main() -> None:
    (out, runs), rows = labelled_runs(__doc__), []
    for label, run_dir, config in runs:
        task = config["args"]["env_id"]
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
    main()
