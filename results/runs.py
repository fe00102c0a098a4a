"""What the scripts beside it share: runs named on the command line, and a panel for each task."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def labelled_runs(usage: str) -> tuple[str, list[tuple[str, str, dict[str, Any]]]]:
    """OUT and, of each LABEL=RUN_DIR on the command line, the label, the folder and its config.json.

    Exits with status 2 and a line that says what is wrong, if anything is.
    """
    parser = argparse.ArgumentParser(description=usage)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR")
    args, runs = parser.parse_args(), []
    for run in args.runs:
        label, equals, run_dir = run.partition("=")
        config = Path(run_dir) / "config.json"
        if not (equals and config.is_file()):
            parser.error(f"{run}: give LABEL=RUN_DIR, a folder that has config.json")
        runs.append((label, run_dir, json.loads(config.read_text())))
    return args.out, runs


def panel_per_task(rows: list[dict]) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each task in a table, up to three side by side."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns, lines = min(len(tasks), 3), -(-len(tasks) // 3)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    panels = {task: figure.add_subplot(lines, columns, i) for i, task in enumerate(tasks, 1)}
    for task, axes in panels.items():
        axes.set_title(task)
        axes.grid(alpha=0.3)
    return figure, panels
