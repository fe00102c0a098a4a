"""Scores by the number of candidate actions (Appendix D): python results/candidates.py OUT RUN_DIR [RUN_DIR ...]

Evaluates all models of runs of dtql_continuous.py as at their end, but for the number of candidates; writes OUT.csv and OUT.png.
"""

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from runs import panel_per_task

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import dtql_continuous as dtql  # noqa: E402
import evaluation  # noqa: E402
import run_folder  # noqa: E402
import stacked  # noqa: E402
import tasks  # noqa: E402

CANDIDATES = (1, 4, 16, 64, 256, 1024)


def evaluate(run_dir: str) -> list[dict[str, float | str]]:
    """A row for each number of candidates and model. Raises UserError if that is no run."""
    saved = common.open_checkpoint(f"{run_dir}/checkpoint.pt")
    args = replace(dtql.Args(**common.saved_settings(dtql.Args, saved["args"], run_dir)), compile=False)
    task, rows, device = tasks.load_task(args), [], torch.device("cpu")
    with contextlib.closing(evaluation.make_envs(task, args)) as envs:
        for number in common.progress_bar(iterable=CANDIDATES, desc=args.env_id, unit="evaluation"):
            agent = dtql.DTQL(replace(args, num_candidates=number), saved["obs_dim"], len(saved["action_low"]), device)
            stacked.load_state(agent, saved["agent"])
            _, scores, lengths, seconds = run_folder.evaluate(task, envs, agent.act, args, args.epochs, device)
            for seed, own, steps in zip(args.model_seeds, scores, lengths):
                row = dict(task=args.env_id, seed=seed, candidates=number, score=own.mean(), std=own.std())
                rows.append(row | dict(length=steps.mean(), episodes=len(own), seconds=round(seconds, 1)))
    return rows


def main(args: argparse.Namespace) -> None:
    rows = [row for run_dir in args.runs for row in evaluate(run_dir)]
    common.write_atomically(Path(f"{args.out}.csv"), common.to_csv(list(rows[0]), rows))
    figure, panels = panel_per_task(rows)
    for task, axes in panels.items():
        own = [row for row in rows if row["task"] == task]
        axes.plot([row["candidates"] for row in own], [row["score"] for row in own], "o", markersize=4, alpha=0.5, label="a seed")
        means = [np.mean([row["score"] for row in own if row["candidates"] == number]) for number in CANDIDATES]
        axes.plot(CANDIDATES, means, label="mean")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="candidates", ylabel="score", ylim=(-3, 103), xticks=CANDIDATES, xticklabels=CANDIDATES)
    axes.legend()
    figure.savefig(f"{args.out}.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    common.run(main, parser.parse_args)
