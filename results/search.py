"""Draw a search for settings: python results/search.py OUT RUN_DIR [RUN_DIR ...]

Runs whose models differ in alpha, and in the expectile if that was swept too. OUT.csv has a row per model, OUT.png a panel per
task: the mean of the last two evaluations by alpha; the bar is its standard error over the episodes.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from runs import panel_per_task

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402


def read(run_dir: str) -> list[dict[str, float | str]]:
    """A row for each model of a run: its settings, each evaluation's score, the last two's mean and its error."""
    config = common.read_config(run_dir)
    args, models = config["args"], {}
    with open(Path(run_dir) / "eval.csv") as file:
        for row in csv.DictReader(file):
            models.setdefault((row.get("setting", ""), row["seed"]), []).append(row)
    rows = []
    for (setting, seed), evaluations in models.items():
        swept = dict(part.split("=") for part in setting.split())
        alpha, expectile = (float(swept.get(name, np.ravel(args[name])[0])) for name in ("alpha", "expectile"))
        scores = [float(row["score_mean"]) for row in evaluations]
        variances = [float(row["score_std"]) ** 2 / int(row["episodes"]) for row in evaluations[-2:]]
        method = {"dtql_continuous": "DTQL", "kl_distill": "KL"}.get(config["exp_name"], config["exp_name"])
        rows.append(
            dict(task=args["env_id"], method=method, nll=args.get("nll", False), expectile=expectile, alpha=alpha, seed=seed)
            | dict(normalize=args.get("normalize", False), gamma=args["gamma"])
            | dict(updates=int((args.get("pretrain_epochs", 0) + float(evaluations[-1]["epoch"])) * args["steps_per_epoch"]))
            | dict(scores=" ".join(f"{score:g}" for score in scores), mean=np.mean(scores[-2:]))
            | dict(error=np.sqrt(np.sum(variances)) / len(variances))
        )
    return rows


def main(args: argparse.Namespace) -> None:
    rows = [row for run_dir in args.runs for row in read(run_dir)]
    common.write_atomically(Path(f"{args.out}.csv"), common.to_csv(list(rows[0]), rows))
    figure, panels = panel_per_task(rows)
    for task, axes in panels.items():
        lines: dict[str, list] = {}
        for row in rows:
            if row["task"] == task:
                method = f"{row['method']}{' with NLL' if row['nll'] else ''}"
                if row["normalize"]:
                    method += ", normalised"
                label = f"{method}, expectile {row['expectile']:g}, gamma {row['gamma']:g}, {row['updates']:,} updates"
                lines.setdefault(label, []).append((row["alpha"], row["mean"], row["error"]))
        for label, points in lines.items():
            alphas, means, errors = zip(*sorted(points))
            axes.errorbar(alphas, means, errors, marker="o", markersize=4, capsize=2, label=label)
        axes.set_xscale("log")
        axes.set(xlabel="alpha", ylabel="success rate, %", ylim=(-3, 103))
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.set_figheight(4.8)
    figure.savefig(f"{args.out}.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    common.run(main, parser.parse_args)
