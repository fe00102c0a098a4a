"""Compilation changes the time and nothing else; the measurements measure what they say."""

import csv
import sys

import pytest
import torch
from helpers import FLAGS, assert_same_end, make_agent, run_here, run_script, whole_and_resumed

import bc
import common
import dql
import dtql_chunk
import dtql_continuous as dtql
import fan
import idql
import iql
import kl_distill
import srpo
from tools import speed

pytestmark = pytest.mark.slow


def test_a_compiled_run_resumes_bit_identically(hopper, tmp_path, monkeypatch):
    assert_same_end(*whole_and_resumed(tmp_path, monkeypatch, bc, compile=True, num_seeds=2))


def test_without_a_compiler_a_run_goes_on_with_one_note(hopper, tmp_path):
    flags = ["--env-id", "hopper-medium-v2", *(flag for flag in FLAGS if "compile" not in flag)]
    path = tmp_path / "bin"  # a PATH with python and nothing else
    path.mkdir()
    (path / "python").symlink_to(sys.executable)
    result = run_script(
        *flags,
        "--compile",
        "--run-dir",
        tmp_path / "a",
        PATH=str(path),
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        script="bc.py",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("note: going on without --compile") == 1, result.stderr
    eager = run_here(bc, *flags, "--no-compile", "--run-dir", tmp_path / "b")
    assert_same_end(next((tmp_path / "a").iterdir()), eager)


@pytest.mark.parametrize(
    "flags, compiled",
    [
        ([], False),  # the demo, 3000 updates
        (["--env-id", "hopper-medium-v2"], True),
        (["--env-id", "hopper-medium-v2", "--epochs", "9", "--pretrain-epochs", "0"], False),
        (["--env-id", "hopper-medium-v2", "--no-compile"], False),
        (["--compile"], True),
    ],
)
def test_only_long_runs_are_compiled_unless_asked_for(flags, compiled):
    assert common.parse_args(dtql.Args, dtql.task_defaults, flags).compile == compiled


def test_speed_table(tmp_path, monkeypatch, uncompiled, tiny_networks):
    """The command of the README, cut short: all variants and methods are there, and the parts belong to their updates."""
    table = tmp_path / "speed.csv"
    methods = ["dtql_continuous", "dtql_chunk", "srpo"]
    flags = ["--device", "cpu", "--models", "1", "--batch-sizes", "32", "--rounds", "1", "--seconds", "0.05", "--csv", table]
    monkeypatch.setattr(speed, "ROWS", 5000)
    speed.main(common.cli(speed.Args, [*map(str, flags), "--methods", *methods]))
    with open(table) as file:
        rows = list(csv.DictReader(file))
    by_name = {(row["what"], row["variant"]): row for row in rows}
    updates = {variant: float(row["per_second"]) for (what, variant), row in by_name.items() if what == "updates"}
    assert updates.keys() == {"plain", "eager", "compile", "products"}
    assert all(value > 0 for value in updates.values()) and updates["products"] > updates["eager"]
    assert float(by_name["updates", "eager"]["ratio"]) == 1
    hours = float(by_name["updates", "eager"]["hours_to_1050000_updates"])
    assert hours == pytest.approx(1_050_000 / updates["eager"] / 3600, rel=0.01)
    assert ("environment steps", "eager, 10 in lock-step") in by_name and ("actions", "compile, 100 states") in by_name

    parts = {"critic", "diffusion or flow model", "policy", "target networks"}
    for method in methods:
        own, small = ([row for row in rows if row["variant"] == method and row["own"] == own] for own in ("True", "False"))
        assert {part for row in small for part in parts if row[part]} == parts, method
        assert {row["batch"] for row in small} == {"32"}
        for row in own + small:
            assert 0 < float(row["low"]) <= float(row["seconds_per_1000"]) <= float(row["high"])
        run, acting = by_name["run", method], by_name["acting", method]
        seconds = sum(float(row["seconds_per_1000"]) * int(row["updates"]) / 1000 for row in own)
        assert float(run["hours"]) == pytest.approx(seconds / 3600, rel=0.01)
        assert acting["length"] == "700" and float(acting["seconds_per_trajectory"]) > 0
    assert by_name["run", "dtql_continuous"]["updates"] == "550000" and by_name["run", "srpo"]["updates"] == "4500000"
    sizes = {row["stage"]: row["batch"] for row in rows if row["variant"] == "srpo" and row["own"] == "True"}
    assert sizes == {"denoiser": "2048", "critic": "256", "actor": "256"}
    assert (tmp_path / "speed.png").stat().st_size > 10_000


EVERYTHING = {"critic", "diffusion or flow model", "policy", "target networks"}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (dtql, EVERYTHING),
        (dtql_chunk, EVERYTHING),
        (fan, {"all networks", "target networks"}),
        (kl_distill, EVERYTHING),
        (bc, {"policy"}),
        (iql, EVERYTHING - {"diffusion or flow model"}),
        (idql, EVERYTHING - {"policy"}),
        (dql, EVERYTHING - {"diffusion or flow model"}),  # its policy is one
        (srpo, {"policy"}),  # in its last phase
    ],
)
def test_the_parts_of_an_update_are_its_steps(module, expected):
    """Recording an update changes nothing; its parts, made once each, are the update."""
    agents = [make_agent(module=module) for _ in range(2)]
    (_, update, _), (_, whole, _) = (speed.stages(agent)[-1] for agent in agents)
    params = lambda agent: list(agent.parameters())
    before = [param.clone() for param in params(agents[0])]
    torch.manual_seed(0)
    whole()
    torch.manual_seed(0)
    parts = speed.parts_of(agents[0], update)
    assert all(map(torch.equal, params(agents[0]), before))
    assert parts.keys() == expected
    for part in parts.values():
        part()
    assert not all(map(torch.equal, params(agents[0]), before))
    if module is not idql:  # whose averages are not all at the end, but are one part
        assert all(map(torch.equal, params(agents[0]), params(agents[1])))


def test_products_are_counted():
    """One product of (3, 4) by (4, 5) forward, two backward: 3 * 2 * 60 operations."""
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with speed.Products() as products:
        (a @ b).sum().backward()
    assert products.flops == 360 and len(products.calls) == 3
