"""The scripts beside the results do what they say."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, make_args

import dtql_continuous as dtql


@pytest.fixture
def run_dir(hopper, tmp_path):
    return dtql.main(make_args(tmp_path, num_seeds=2, num_candidates=16))["run_dir"]


def run(script, *arguments):
    result = subprocess.run([sys.executable, ROOT / "results" / script, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def read(file):
    with open(file, newline="") as table:
        return list(csv.DictReader(table))


def test_as_many_candidates_as_in_the_run_give_its_last_scores(run_dir, tmp_path):
    run("candidates.py", tmp_path / "out", run_dir)
    rows = read(tmp_path / "out.csv")
    assert [int(row["candidates"]) for row in rows] == [n for n in (1, 4, 16, 64, 256, 1024) for _ in range(2)]
    expected = [float(row["score_mean"]) for row in read(f"{run_dir}/eval.csv")[-2:]]
    assert np.allclose([float(row["score"]) for row in rows if row["candidates"] == "16"], expected, rtol=1e-6)
    assert len({row["score"] for row in rows}) > 4  # and others give others
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_entropy_comes_from_the_events(run_dir, tmp_path):
    run("entropy.py", tmp_path / "out", f"with NLL={run_dir}", f"again={run_dir}")
    rows = read(tmp_path / "out.csv")
    assert {row["label"] for row in rows} == {"with NLL", "again"} and {row["task"] for row in rows} == {"hopper-medium-v2"}
    assert all(-30 < float(row["entropy"]) < 30 for row in rows)
    assert (tmp_path / "out.png").stat().st_size > 5000


@pytest.mark.parametrize("script", ("candidates.py", "curves.py", "entropy.py", "mazes.py"))
@pytest.mark.parametrize("arguments", ((), ("out", "label=nowhere"), ("out", "nowhere")))
def test_a_wrong_command_line_is_one_message(script, arguments, tmp_path):
    command = [sys.executable, ROOT / "results" / script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and not any(tmp_path.iterdir())
