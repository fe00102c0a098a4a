"""The scripts beside the results do what they say."""

import csv
import dataclasses
import json
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from helpers import ROOT, make_args, run_inside, table

import common
import dtql_continuous as dtql
import tasks
from tools import import_method, report, watch

pytestmark = pytest.mark.slow

RESULTS = ROOT / "results"
MAZES = {"U-maze": "umaze", "medium": "medium", "large": "large"}
COLUMNS = {
    "DTQL": "dtql_continuous",
    "KL": "kl_distill",
    "cloning": "bc",
    "IQL": "iql",
    "IDQL": "idql",
    "DQL": "dql",
    "SRPO": "srpo",
    "FQL": "fql",
}


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


@pytest.mark.parametrize(("metric", "least"), [("entropy", -30), ("critic", 0)])
def test_metrics_come_from_the_events(run_dir, tmp_path, metric, least):
    run("metric.py", tmp_path / metric, f"with NLL={run_dir}", f"again={run_dir}")
    rows = read(tmp_path / f"{metric}.csv")
    assert {row["label"] for row in rows} == {"with NLL", "again"} and {row["task"] for row in rows} == {"hopper-medium-v2"}
    assert all(least < float(row[metric]) < 30 for row in rows)
    assert (tmp_path / f"{metric}.png").stat().st_size > 5000


def test_curves_are_a_panel_per_task(tmp_path):
    runs = [f"{RESULTS}/{run}" for run in ("ogbench/iql", "ogbench/dtql_chunk", "online/default")]  # the last has epochs like 2.5
    sizes = []
    for i in (2, 3):
        run("curves.py", tmp_path / f"{i}.png", *(f"label={each}" for each in runs[:i]))
        sizes.append(matplotlib.image.imread(tmp_path / f"{i}.png").shape)
    assert sizes[1][1] - sizes[0][1] == 630 and sizes[0][0] == sizes[1][0]  # 4.2 inches


def test_an_unknown_metric_is_one_message(run_dir, tmp_path):
    result = run_inside(str(tmp_path / "entrpy"), f"a={run_dir}", script="results/metric.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "'entropy'" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("entrpy*"))


@pytest.mark.parametrize("script", ("candidates.py", "curves.py", "metric.py", "mazes.py"))
@pytest.mark.parametrize("arguments", ((), ("out", "label=nowhere"), ("out", "nowhere")))
def test_a_wrong_command_line_is_one_message(script, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_inside(*arguments, script=f"results/{script}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and not any(tmp_path.iterdir())


# ---- what the pages say is what the CSV files say ---------------------------------------------------------------------


def lines_below(heading):
    """The lines of the page of results below a heading, up to the next."""
    text = (RESULTS / "README.md").read_text()
    return text[text.index(heading) + 3 :].partition("\n## ")[0].splitlines()


def numbers_below(heading):
    """The cells of the lines of tables that have a ± in them, below a heading of the page of results."""
    lines = [line for line in lines_below(heading) if line.startswith("|") and " ± " in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def cell(folder, maze, method, digits):
    """(last ± standard error, best) of a method, % of the episodes in a maze that reach the goal."""
    runs = report.by_cell(report.read_runs(RESULTS / folder))[f"dtql/pointmaze-{maze}-v0", method]
    mean, error = report.mean_and_error(runs)
    return f"{mean:.{digits}f} ± {error:.{digits}f}", f"{np.mean([max(run.scores) for run in runs]):.0f}"


def test_the_demo_reaches_the_goal_with_every_seed_that_the_readme_names():
    assert "all 20 episodes (seeds 0 to" in " ".join((ROOT / "README.md").read_text().split())
    for seed in range(5):
        folder = RESULTS / "demo" / str(seed)
        config, last = json.loads((folder / "config.json").read_text()), read(folder / "eval.csv")[-1]
        assert (config["args"]["seed"], last["episodes"], float(last["score_mean"])) == (seed, "20", 100)


def test_the_table_of_the_mazes_is_that_of_the_runs():
    rows = table((RESULTS / "README.md").read_text(), "% at the goal in the last evaluation")
    assert [name.split(",")[0] for name in rows] == list(MAZES)
    for name, row in rows.items():
        cells = {
            column: " / ".join(cell("pointmaze", MAZES[name.split(",")[0]], method, 0)) for column, method in COLUMNS.items()
        }
        assert {column: row[column] for column in COLUMNS} == cells, name


def test_the_tables_of_candidates_are_those_of_the_measurements():
    page = (RESULTS / "README.md").read_text()
    for heading, file in (("**Candidates**", "fair_fight/candidates.csv"), ("* **Candidates**", "candidates/candidates.csv")):
        scores: dict[str, dict[str, list[float]]] = {"medium": {}, "large": {}}
        for row in read(RESULTS / file):
            scores[row["task"].split("-")[1]].setdefault(row["candidates"], []).append(float(row["score"]))
        means = {maze: {number: f"{np.mean(own):.0f}" for number, own in each.items()} for maze, each in scores.items()}
        assert table(page, heading) == {maze: {"candidates": maze} | own for maze, own in means.items()}
    pen: dict[str, list[float]] = {}
    for row in read(RESULTS / "pen_human" / "dtql_continuous_full" / "candidates.csv"):
        pen.setdefault(row["candidates"], []).append(float(row["score"]))
    shown = table(page, "* **Candidates**: how many the action is chosen among")["mean"]
    assert shown == {"candidates": "mean"} | {number: f"{np.mean(own):.1f}" for number, own in pen.items()}
    assert f"seed 0 has {pen['1024'][0]:.1f} with 1,024 and in its run" in page


def commands_below(heading):
    """(method, flags) of each training command below a heading of the page; "and FLAGS" or "and METHOD.py" repeats it so."""
    names = {}
    for line in lines_below(heading):
        if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
            names[f"${assignment[1]}"] = assignment[2]
        elif command := re.match(r"python (\w+)\.py ([^#]*)(?:# *(.*))?", line):
            method, flags, comment = command.groups("")
            flags = " ".join(names.get(word, word) for word in flags.split()).split()
            yield method, flags
            for other, more in re.findall(r"and (?:(\w+)\.py|(--[^,;]+))", comment):
                yield other or method, [*flags, *more.split()]


@pytest.mark.parametrize(
    ("heading", "pattern"),
    [
        ("## A fair fight", "fair_fight/*/*/"),
        ("## pen-human", "pen_human/*/"),
        ("## OGBench data made at home", "ogbench/*/"),
        ("## OGBench: the five tasks", "ogbench/tasks/*/"),
    ],
)
def test_every_run_has_its_command_and_every_command_its_run(heading, pattern):
    asked = []
    for method, flags in commands_below(heading):
        module = import_method(method)
        args = dataclasses.asdict(common.parse_args(module.Args, module.task_defaults, flags))
        asked.append((method, json.loads(json.dumps(args))))
    for config in RESULTS.glob(f"{pattern}config.json"):
        run = json.loads(config.read_text())
        saved = {name: value for name, value in run["args"].items() if name != "device"}
        (command,) = (each for each in asked if each[0] == run["exp_name"] and saved.items() <= each[1].items())
        asked.remove(command)
    assert not asked


def means_of_search(folder, method, number):
    """Value of the weight -> mean of the last two evaluations, or the last, over all seeds: `number` scores."""
    tried: dict[float, list[float]] = {}
    for search in (RESULTS / "fair_fight" / folder).glob(f"{method}*/"):
        rows = read(search / "eval.csv")
        last_two = list(dict.fromkeys(row["epoch"] for row in rows))[-2:]
        for row in (row for row in rows if row["epoch"] in last_two):
            tried.setdefault(float(row["setting"].partition("=")[2]), []).append(float(row["score_mean"]))
    assert all(len(scores) == number for scores in tried.values())
    return {value: np.mean(scores) for value, scores in sorted(tried.items())}


def test_the_tables_of_the_fair_fight_are_those_of_the_runs():
    """Also that the seeds ran with the value that is best in the search, by the mean of the last two evaluations or the last."""
    without_nll = "search_medium_without_nll", "search_large_without_nll"
    weights = {  # and of how many evaluations that mean is in each maze: three seeds with two each, or fewer
        "DTQL": ("dtql_continuous", "alpha", dict(search=6, search_large=2) | dict.fromkeys(without_nll, 6)),
        "KL": ("kl_distill", "alpha", dict(search=6, search_large=2)),
        "IQL": ("iql", "beta", dict(search=6, search_large=6)),
        "IDQL": ("idql", "expectile", dict(search=2, search_large=1)),
        "DQL": ("dql", "eta", dict(search=3, search_large=2)),
        "SRPO": ("srpo", "beta", dict(search=6, search_large=2)),
        "FQL": ("fql", "alpha", dict(search=2, search_large=2)),
        "BC": ("bc", None, dict(search=0, search_large=0)),
    }
    pages = (RESULTS / "README.md").read_text(), (ROOT / "README.md").read_text()
    # Row -> folders of its runs, of the search that it names, and of the one that its value comes from
    medium = dict.fromkeys(weights, ("medium", "search", "search")) | {
        "DTQL, without NLL": ("medium_without_nll", None, "search"),
        "DTQL, without NLL, alpha searched": ("medium_without_nll_searched", without_nll[0], without_nll[0]),
        "DTQL, without pretraining": ("medium_without_pretraining", None, "search"),
    }
    large = dict.fromkeys(weights, ("large", "search_large", "search")) | {
        "DTQL, without NLL": ("large_without_nll", None, "search"),
        "DTQL, without NLL, alpha searched": ("large_without_nll_searched", without_nll[1], without_nll[1]),
        "DTQL, without pretraining": ("large_without_pretraining", None, "search"),
        "IQL, beta searched": ("large_searched", None, "search_large"),
        "DQL, eta searched": ("large_searched", None, "search_large"),
    }
    for maze, headings, names in (
        ("medium", ("## A fair fight", "**A fair fight**"), medium),
        ("large", ("**The large maze**", "**The large maze**"), large),
    ):
        full, short = map(table, pages, headings)
        assert full.keys() == short.keys() == names.keys()
        for name, (folder, *searches) in names.items():
            method, weight, numbers = weights[name.partition(",")[0]]
            runs = sorted((RESULTS / "fair_fight" / folder).glob(f"{method}*/"))
            tried, chosen = (means_of_search(each, method, numbers[each]) if each else {} for each in searches)
            found = evaluations(*runs)
            if weight:
                best = max(chosen, key=chosen.get)
                assert all(json.loads((run / "config.json").read_text())["args"][weight] == best for run in runs)
            last, oracle = cell(f"fair_fight/{folder}", maze, method, 0)
            cells = {
                "": name,
                "tried: % solved": ", ".join(f"{value:g}: {mean:.0f}" for value, mean in tried.items()) or "-",
                "chosen": f"{weight} {best:g}" if weight else "-",
                "last, of each seed": ", ".join(f"{score:.0f}" for score in found[-1][2]),
                "last": last,
                "mean of the last three": f"{np.mean([mean for mean, *_ in found[-3:]]):.0f}",
                "best (an oracle)": oracle,
                "minutes of training": f"{sum(float(read(run / 'eval.csv')[-1]['train_seconds']) for run in runs) / 60:.0f}",
            }
            assert full[name] == cells
            assert short[name].items() <= cells.items()
    few = [row for method in ("idql", "dql", "srpo") for row in read(RESULTS / "fair_fight" / "large" / method / "eval.csv")]
    solved = [(row["epoch"], float(row["score_mean"]), row["episodes"]) for row in few if float(row["score_mean"]) > 0]
    assert (len(few), solved) == (60, [("20", 5, "20")] * 4)
    assert "in four of the 60 evaluations of a model, all at the end" in pages[0]
    text = " ".join(pages[0].split())
    for start, folder in (
        ("seeds 0 to 4 have", "medium_without_nll_searched"),
        ("it is as good:", "medium_without_pretraining"),
        ("with it", "medium"),
        ("seeds 0 to 4", "large_without_nll_searched"),
        ("DTQL has", "large_without_pretraining"),
        ("with it", "large"),
    ):
        *first, last = (f"{mean:.0f}" for mean, *_ in evaluations(RESULTS / "fair_fight" / folder / "dtql_continuous"))
        assert f"{start} {', '.join(first)} and {last} % after" in text
    searches = sorted((RESULTS / "fair_fight" / without_nll[1]).glob("*/"))  # seeds 10, 11, 12; the fourth model has alpha 3
    by_seed = [np.mean([each[3] for *_, each in evaluations(run)[-2:]]) for run in searches]
    assert "seeds 10, 11 and 12 have {:.0f}, {:.0f} and {:.0f}, and seeds 0 to 4 0".format(*by_seed) in text
    here = means_of_search("search_large", "dtql_continuous", 2)
    assert max(here, key=here.get) == 0.1 and "the search here chooses alpha 0.1 too" in text
    smaller = means_of_search("search_smaller_alpha", "dtql_continuous", 6)
    assert ", ".join(f"{value:g}: {mean:.0f}" for value, mean in smaller.items()) in text
    assert max(smaller.values()) < means_of_search("search", "dtql_continuous", 6)[0.1]


def test_the_tables_of_speed_are_those_of_the_measurement():
    """But for rounding: what is within 5 % is the same."""
    page, rows = (ROOT / "docs" / "speed.md").read_text(), read(RESULTS / "speed_cpu_1core.csv")
    numbers = lambda cell: [float(number) for number in re.findall(r"[\d.]+", cell)]
    variants = {"the paper line by line": "plain", "`--no-compile`": "eager", "`--compile`": "compile"}
    for sizes, cells in table(page, "Updates per second").items():
        for column, variant in (variants | {"matrix products alone": "products"}).items():
            found = [
                r for r in rows if [r["what"], r["variant"], r["models"], r["batch"]] == ["updates", variant, *sizes.split(", ")]
            ]
            expected = [float(row[name]) for row in found for name in ("per_second", "low", "high")]
            assert numbers(cells[column]) == pytest.approx(expected, rel=0.05), (sizes, column)

    methods = table(page, "## All methods")
    names = COLUMNS | {"BC": "bc", "DTQL in chunks": "dtql_chunk", "FAN": "fan"}
    measured = {row["variant"] for row in rows if row["what"] == "run"}
    assert {names[name] for name in methods} == measured
    for name, cells in methods.items():
        mine = [row for row in rows if row["variant"] == names[name] and row["stage"] != "pretraining"]
        (run,), (acting,) = ([row for row in mine if row["what"] == what] for what in ("run", "acting"))
        stages = lambda of: {row["stage"]: float(row["seconds_per_1000"]) for row in mine if row["what"] == "method" and of(row)}
        found = [
            list(stages(lambda row: row["own"] == "True").values()),
            *([sum(stages(lambda row: row["batch"] == size).values())] for size in ("256", "2048")),
            *([float(acting[column])] for column in ("ms_per_action", "candidates", "seconds_per_trajectory")),
            [float(run["hours"])],
        ]
        shown = [numbers(cell) for cell in list(cells.values())[2:]]
        assert acting["length"] == "700" and [*shown[:-1], shown[-1][:1]] == [pytest.approx(cell, rel=0.05) for cell in found], (
            name
        )


def test_the_table_of_the_paper_s_arguments_is_that_of_the_runs():
    runs = {
        "DTQL": ("nll", "dtql_continuous"),
        "KL in place of the trust region (Table 5, Figure 8)": ("trust_region_or_kl", "kl_distill"),
        "DTQL without NLL (Figure 5)": ("nll", "dtql_continuous --no-nll"),
        "DTQL without pretraining (Table 3)": ("pretraining", "dtql_continuous --pretrain-epochs 0"),
    } | {f"DTQL, alpha {alpha}": ("alpha", f"dtql_continuous alpha={alpha}") for alpha in ("0.1", "1", "10", "100")}
    rows = {name: cells[:6] for name, *cells in numbers_below("## The paper's arguments")[: len(runs)]}
    assert rows.keys() == runs.keys()
    for name, (folder, method) in runs.items():
        found = report.by_cell(report.read_runs(RESULTS / folder))
        expected = []
        for maze in ("medium", "large"):
            expected += [f"{found[f'dtql/pointmaze-{maze}-v0', method][0].updates:,}", *cell(folder, maze, method, 1)]
        assert rows[name] == expected, name


def evaluations(*run_dirs):
    """(mean, standard error over all episodes, means of the models) of each evaluation of runs, together."""
    found, rows = [], [row for run_dir in run_dirs for row in read(run_dir / "eval.csv")]
    for epoch in dict.fromkeys(row["epoch"] for row in rows):
        own = [row for row in rows if row["epoch"] == epoch]
        means, stds = (np.array([float(row[name]) for row in own]) for name in ("score_mean", "score_std"))
        error = np.sqrt(((stds**2).mean() + means.var()) / sum(int(row["episodes"]) for row in own))
        found.append((means.mean(), error, means))
    return found


def best_of_each(found):
    """The best evaluation of each model, averaged over the models: an oracle."""
    return np.mean(np.max([each for *_, each in found], 0))


def test_a_search_is_a_row_per_model(hopper, tmp_path):
    run_dir = dtql.main(make_args(tmp_path, alpha=(1.0, 5.0), expectile=(0.7, 0.9), epochs=2, eval_every=1))["run_dir"]
    run("search.py", tmp_path / "out", run_dir)
    rows, evaluations = read(tmp_path / "out.csv"), read(f"{run_dir}/eval.csv")
    assert [(row["alpha"], row["expectile"]) for row in rows] == [("1.0", "0.7"), ("1.0", "0.9"), ("5.0", "0.7"), ("5.0", "0.9")]
    for row in rows:
        setting = f"alpha={float(row['alpha']):g} expectile={row['expectile']}"
        own = [float(each["score_mean"]) for each in evaluations if each["setting"] == setting]
        assert np.allclose(list(map(float, row["scores"].split())), own, rtol=1e-4) and len(own) == 2
        assert np.isclose(float(row["mean"]), np.mean(own))
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_the_tables_of_the_search_are_those_of_the_runs(tmp_path):
    run("search.py", tmp_path / "out", *sorted((RESULTS / "ogbench" / "search").glob("*/")))
    rows = read(tmp_path / "out.csv")
    assert rows == read(RESULTS / "ogbench" / "search.csv")
    cube = {
        (f"{float(row['alpha']):g}", row["expectile"], row["nll"]): row["scores"]
        for row in rows
        if row["method"] == "DTQL" and row["task"].startswith("cube") and row["updates"] == "40000"
    }
    page = table((RESULTS / "README.md").read_text(), "## OGBench: a search")
    columns = {"expectile 0.7": ("0.7", "False"), "expectile 0.9": ("0.9", "False"), "expectile 0.9, with NLL": ("0.9", "True")}
    found = {(alpha, *columns[name]): cells[name] for alpha, cells in page.items() for name in columns if cells[name] != "-"}
    assert found == cube
    first = [
        row for row in rows if row["task"].startswith("pointmaze") and row["normalize"] == "False" and row["gamma"] == "0.99"
    ]
    maze = [float(score) for row in first for score in row["scores"].split()]
    assert (len(maze), sorted(maze)[-2:]) == (35, [0, 20])
    others: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["task"].startswith("pointmaze") and row not in first:
            key = tuple("yes" if row[name] == "True" else "no" for name in ("normalize", "nll"))
            others.setdefault((key[0], row["gamma"], key[1]), []).append(f"{float(row['alpha']):g}: {row['scores']}")
    cells = table((RESULTS / "README.md").read_text(), "% solved at each evaluation, every 10,000").values()
    columns = ("normalised", "gamma", "NLL")
    assert {tuple(row[name] for name in columns): row["alpha: evaluations"].split("; ") for row in cells} == others
    kl = [float(score) for row in rows if row["method"] == "KL" for score in row["scores"].split()]
    assert len(kl) == 10 and max(kl) == 5


def test_the_tables_of_cube_single_are_those_of_the_runs():
    folders = {name: [name.lower()] for name in ("IQL", "IDQL", "FAN", "FQL", "BC")} | {
        "DTQL": ["dtql_continuous", "dtql_continuous_seed_1"],
        "DTQL with NLL": ["dtql_continuous_nll"],
        "DTQL in chunks of 5": ["dtql_chunk"],
        "KL": ["kl_distill"],
    }
    rows = {name: cells for name, *cells in numbers_below("## OGBench data made at home")}
    first_page = table((ROOT / "README.md").read_text(), "**cube-single, task 2**")
    assert rows.keys() == first_page.keys() == folders.keys()
    for name, runs in folders.items():
        runs = [RESULTS / "ogbench" / run for run in runs]
        found, minutes = evaluations(*runs), [float(read(run / "eval.csv")[-1]["train_seconds"]) / 60 for run in runs]
        scores, seeds = [f"{mean:.0f} ± {error:.0f}" for mean, error, _ in found], str(len(found[0][2]))
        last_three, best = f"{np.mean([mean for mean, *_ in found[-3:]]):.0f}", f"{best_of_each(found):.0f}"
        assert rows[name] == [seeds, *scores, last_three, best, ", ".join(f"{each:.0f}" for each in minutes)]
        assert list(first_page[name].values())[1:5] == [seeds, scores[-1], last_three, best]


def test_the_tables_of_the_five_tasks_of_cube_single_are_those_of_the_runs():
    rows = table((RESULTS / "README.md").read_text(), "## OGBench: the five tasks")
    first_page = table((ROOT / "README.md").read_text(), "**All five tasks of cube-single**")
    summary = lambda last, error, last_three, best: [f"{last:.0f} ± {error:.0f}", f"{last_three:.0f}", f"{best:.0f}"]
    for name, method, of_task_2 in (
        ("DTQL", "dtql_continuous", ["dtql_continuous", "dtql_continuous_seed_1"]),
        ("IQL", "iql", ["iql"]),
    ):
        shown = {task: [row[f"{name}: {column}"] for column in ("last", "last three", "best")] for task, row in rows.items()}
        numbers = []
        for number in range(1, 6):
            runs = of_task_2 if number == 2 else [f"tasks/{method}_task{number}"]
            found = evaluations(*(RESULTS / "ogbench" / run for run in runs))[:5]  # to 100,000 updates
            numbers.append((*found[-1][:2], np.mean([mean for mean, *_ in found[-3:]]), best_of_each(found)))
            assert shown[f"task {number}"] == summary(*numbers[-1])
        last, errors, last_three, best = np.array(numbers).T
        assert shown["mean"] == summary(last.mean(), np.sqrt((errors**2).sum()) / 5, last_three.mean(), best.mean())
        assert {task: cell for task, cell in first_page[name].items() if task} == {task: own[0] for task, own in shown.items()}


def test_the_table_of_dtql_s_longer_runs_on_cube_single_is_that_of_the_runs():
    page, first_page = (" ".join((folder / "README.md").read_text().split()) for folder in (RESULTS, ROOT))
    runs = {f"task {number}": RESULTS / "ogbench" / "tasks" / f"dtql_continuous_task{number}" for number in (1, 3, 4, 5)}
    found = {task: [mean for mean, *_ in evaluations(run)] for task, run in runs.items()}
    found["mean"] = list(np.mean(list(found.values()), 0))
    shown = table((RESULTS / "README.md").read_text(), "**Twice as long**")
    assert {task: list(row.values())[1:] for task, row in shown.items()} == {
        task: [f"{mean:.0f}" for mean in means[4:]] for task, means in found.items()
    }
    first, later = found["mean"][:5], found["mean"][4:]
    last_three = f"{np.mean(later[-3:]):.0f}"
    assert f"the mean of the last three is {last_three} here, {np.mean(first[-3:]):.0f} after 100,000" in page
    assert later[0] == max(later)
    assert f"between {min(later):.0f} and {max(later):.0f} %, with {last_three} in the last three" in first_page


def test_published_scores_on_the_five_tasks_are_those_of_their_sources():
    published = read(RESULTS / "published.csv")
    rows = table((ROOT / "README.md").read_text(), "**All five tasks of cube-single**")
    rows = {
        tuple(name.partition(", published (")[::2]): list(row.values())[1:] for name, row in rows.items() if "published" in name
    }
    assert len(rows) == 3
    for (method, source), cells in rows.items():
        source = source.removesuffix("'s paper)") + " paper"
        scores = [
            float(row["score"])
            for number in range(1, 6)
            for row in published
            if row["task"] == f"cube-single-play-singletask-task{number}-v0"
            and row["method"] == method
            and row["source"].startswith(source)
        ]
        assert len(scores) == 5 and cells == [f"{score:.0f}" for score in (*scores, np.mean(scores))]


def test_the_first_scores_on_cube_single_are_those_of_the_run():
    text = (RESULTS / "README.md").read_text()
    for row in read(RESULTS / "ogbench" / "dtql_cube-single-play_task2.csv"):
        error = float(row["score_std"]) / int(row["episodes"]) ** 0.5
        assert f"{float(row['score_mean']):.0f} ± {error:.0f} after 10,000 + {row['epoch']},000" in text


def test_the_table_of_the_online_runs_is_that_of_the_runs():
    folders = {"the default": "default", "`--critic td`": "td", "`--freeze-denoiser`": "freeze", "`--offline-ratio 0.5`": "ratio",
               "online only": "only"}  # fmt: skip
    rows = {name: cells for name, *cells in numbers_below("## Offline, then online")}
    assert rows.keys() == folders.keys()
    for name, folder in folders.items():
        found = evaluations(RESULTS / "online" / folder)
        assert rows[name][:5] == [f"{mean:.0f} ± {error:.0f}" for mean, error, _ in found]
        assert rows[name][5] == ", ".join(f"{mean:.0f}" for mean in found[-1][2])


@pytest.mark.parametrize("name", ["first_steps", "without_nll"])
def test_the_tables_of_the_first_online_runs_are_those_of_the_runs(name):
    rows = read(RESULTS / "online" / f"{name}.csv")
    text = (RESULTS / "README.md").read_text()
    by_step = [[float(row["score_mean"]) for row in rows[i : i + 3]] for i in range(0, len(rows), 3)]
    assert f"| seeds 0, 1, 2 | {' | '.join(', '.join(f'{score:.0f}' for score in scores) for scores in by_step)} |" in text
    assert f"| mean | {' | '.join(f'{np.mean(scores):.0f}' for scores in by_step)} |" in text


def test_the_table_of_pen_human_is_that_of_the_runs():
    folders = {
        "DTQL": ["dtql_continuous_full", "dtql_continuous_full_seed_1", "dtql_continuous_full_seed_2"],
        "DTQL, half as long": ["dtql_continuous", "dtql_continuous_seed_1"],
        "BC": ["bc"],
        "IQL": ["iql", "iql_seeds_1_2"],
        "IDQL": ["idql"],
        "DQL": ["dql"],
    }
    rows = {name: cells for name, *cells in numbers_below("## pen-human")}
    first_page = table((ROOT / "README.md").read_text(), "**pen-human, demonstrations replayed**")
    assert rows.keys() == folders.keys() and first_page.keys() == folders.keys() - {"DTQL, half as long"}
    for name, runs in folders.items():
        runs = [RESULTS / "pen_human" / run for run in runs]
        assert all(rows[name][0].split()[-1] == f"{int(read(run / 'eval.csv')[-1]['epoch']) * 1000:,}" for run in runs)
        found = evaluations(*runs)
        (mean, error, each), means = found[-1], [mean for mean, _, _ in found]
        seeds = ", ".join(str(seed) for seed in range(len(each)))
        if len(each) > 1:
            seeds += f" ({', '.join(f'{score:.1f}' for score in each)})"
        assert rows[name][1:3] == [seeds, f"{mean:.1f} ± {error:.1f}"]
        shown = [rows[name][2], rows[name][3].split()[0], rows[name][4]]
        assert shown[1:] == [f"{np.mean(means[-3:]):.1f}", f"{best_of_each(found):.1f}"]
        if name in first_page:
            assert list(first_page[name].values())[1:6] == [rows[name][0], str(len(each)), *shown]
    qs = lambda file: {(row["label"], row["update"]): f"{float(row['q']):,.0f}" for row in read(RESULTS / "pen_human" / file)}
    q, full = qs("q.csv"), qs("dtql_continuous_full/q.csv")
    text = " ".join((RESULTS / "README.md").read_text().split())
    start, top, end = (q["DQL", update] for update in ("24000", "36000", "60000"))
    assert f"from 24,000 to 36,000 updates its mean Q runs up from {start} to {top} and then falls to {end}" in text
    assert f"seed 1's Q falls from {q['DTQL, seed 1', '60000']} to {q['DTQL, seed 1', '200000']}" in text
    first, last = ([full[f"seed {seed}", update] for seed in (0, 1, 2)] for update in ("60000", "350000"))
    start, end = f"{first[0]} ({first[1]} with seed 1, {first[2]} with seed 2)", f"{last[0]} ({last[1]}, {last[2]})"
    assert f"from {start} after 10,000 of these updates to {end} at the end" in text
    for runs in (folders["DTQL"], folders["DTQL, half as long"]):
        for seed, folder in enumerate(runs):
            *first, last = (f"{mean:.1f}" for mean, *_ in evaluations(RESULTS / "pen_human" / folder))
            assert re.search(rf"seed {seed} (scored )?{', '.join(first)} and {last}", text)


@pytest.mark.parametrize(
    ("heading", "task"),
    [("**pen-human, demonstrations", "pen-human-v1"), ("**cube-single, task 2", "cube-single-play-singletask-task2-v0")],
)
def test_published_scores_are_those_of_their_sources(heading, task):
    text = (ROOT / "README.md").read_text()
    text = text[text.index(heading) + 2 :].partition("\n\n**")[0]
    published = [row for row in read(RESULTS / "published.csv") if row["task"] == task]
    shown = [(method, list(row.values())[-1]) for method, row in table(text, "|").items()]
    shown += re.findall(r"(\w+)\s([\d.]+ ± [\d.]+ \(\w+)", text)  # methods without a row
    near = lambda shown, value: abs(float(shown) - float(value)) <= 0.5 / 10 ** len(shown.partition(".")[2])
    found = [(method, *each) for method, cell in shown for each in re.findall(r"([\d.]+)(?: ± ([\d.]+))? \((\w+)", cell)]
    for method, score, spread, source in found:
        rows = [row for row in published if row["method"] == method and row["source"].startswith(source)]
        assert any(near(score, row["score"]) and (not spread or near(spread, row["spread"])) for row in rows), (method, score)
    assert len(found) >= 7


def test_the_table_of_look_alike_data_is_that_of_the_runs():
    rows = {(task, COLUMNS[method]): cells for task, method, *cells in numbers_below("## Look-alike data")}
    folders = {(folder.parent.name, folder.name): folder for folder in (RESULTS / "lookalike").glob("*/*/")}
    assert rows.keys() == folders.keys()
    for key, folder in folders.items():
        config, evaluations = json.loads((folder / "config.json").read_text()), read(folder / "eval.csv")
        args, last = config["args"], evaluations[-1]
        assert (args["env_id"], config["exp_name"], args["epochs"]) == (*key, int(last["epoch"]))
        expected = [
            f"{args['pretrain_epochs']},000 + {args['epochs']},000" if "pretrain_epochs" in args else f"{args['epochs']},000",
            f"{float(last['score_mean']):.1f} ± {float(last['score_std']) / int(last['episodes']) ** 0.5:.1f}",
            f"{max(float(row['score_mean']) for row in evaluations):.1f}",
            last["episodes"],
            f"{float(last['train_seconds']) / 60:.0f}",
            f"{config['device'].split(',')[0]}, {config['started'][:10]}",
        ]
        assert rows[key] == expected, key


def test_policies_to_look_at():
    """They are small, act, and those of the mazes find the goal."""
    folders = sorted(file.parent for file in (RESULTS / "policies").glob("*/config.json"))
    assert len(folders) >= 2
    for folder in folders:
        config = common.read_config(str(folder))
        assert (folder / "checkpoint.pt").stat().st_size < 2e6
        act, env = (
            import_method(config["exp_name"]).load_policy(str(folder / "checkpoint.pt")),
            tasks.make_env(common.Args(env_id=config["args"]["env_id"])),
        )
        if "maze" in config["args"]["env_id"]:
            assert watch.walk(env, act, 2)[1] > 0, folder
        else:
            assert env.action_space.contains(act(env.reset(seed=0)[0])), folder
