"""A metric during training: python results/metric.py FOLDER/METRIC LABEL=RUN_DIR [LABEL=RUN_DIR ...]

Reads it, such as entropy (Figure 5) or critic, from the runs' TensorBoard events, where it is the mean over 100 updates and all
models; writes FOLDER/METRIC.csv and .png, in which runs of the same task share a panel. The entropy is that of the Gaussian
before the tanh, in nats (log_std is bounded to [-5, 2]).
"""

import sys
from pathlib import Path

from runs import labelled_runs, panel_per_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402


def main(arguments: tuple) -> None:
    (out, runs), rows = arguments, []
    metric = Path(out).name
    for label, run_dir, config in runs:
        task = config["args"]["env_id"]
        events = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
        names = [tag.removeprefix("losses/") for tag in events.Tags()["scalars"] if tag.startswith("losses/")]
        common.check(metric in names, f"{run_dir} has no loss {metric!r}: give OUT as FOLDER/METRIC, one of {names}")
        rows += [{"task": task, "label": label, "update": e.step, metric: e.value} for e in events.Scalars(f"losses/{metric}")]
    common.write_atomically(Path(f"{out}.csv"), common.to_csv(list(rows[0]), rows))
    figure, panels = panel_per_task(rows)
    for task, axes in panels.items():
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [row for row in rows if (row["task"], row["label"]) == (task, label)]
            axes.plot([row["update"] / 1000 for row in own], [row[metric] for row in own], label=label, linewidth=1)
        axes.set(xlabel="thousand updates, with pretraining", ylabel=metric)
        if min(row[metric] for row in rows) > 0:
            axes.set_yscale("log")
    axes.legend()
    figure.savefig(f"{out}.png", dpi=110)


if __name__ == "__main__":
    common.run(main, lambda: labelled_runs(__doc__))
