"""From files to transitions, downloads, Minari, and every kind of bad data."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from helpers import ROOT, make_args, write_d4rl

import d4rl_tasks
import data
import dtql_continuous as dtql
from common import UserError

HOPPER = d4rl_tasks.TASKS["hopper-medium-v2"]


def hand_made(tmp_path: Path, rows: int, terminals=(), timeouts=None) -> dict[str, np.ndarray]:
    """Transitions of a file whose row i has the observation i, the action 0 and the reward i."""
    marks = lambda where: np.isin(np.arange(rows), where)
    file = write_d4rl(
        tmp_path / "file.hdf5",
        rows,
        observations=np.arange(rows, dtype=np.float32)[:, None],
        rewards=np.arange(rows, dtype=np.float32),
        terminals=marks(terminals),
        timeouts=None if timeouts is None else marks(timeouts),
    )
    return data.d4rl_transitions(file, limit=4)


def test_rows_at_timeouts_are_dropped_even_if_terminal(tmp_path):
    arrays = hand_made(tmp_path, 8, terminals=[1, 5], timeouts=[3, 5])
    assert arrays["obs"][:, 0].tolist() == [0, 1, 2, 4, 6]  # not 3 and 5 (timeouts), nor 7 (the last row)
    assert arrays["next_obs"][:, 0].tolist() == [1, 2, 3, 5, 7]
    assert arrays["terminals"].tolist() == [0, 1, 0, 0, 0]
    assert arrays["rewards"].tolist() == [0, 1, 2, 4, 6]


def test_without_timeouts_episodes_are_cut_at_the_limit(tmp_path):
    arrays = hand_made(tmp_path, 10)
    assert arrays["obs"][:, 0].tolist() == [0, 1, 2, 4, 5, 6, 8]  # steps 3 and 7 are final at a limit of 4


def test_without_timeouts_steps_are_counted_as_d4rl_does(tmp_path):
    """d4rl's qlearning_dataset, row by row, on random terminals."""
    for seed in range(20):
        terminals = np.flatnonzero(np.random.default_rng(seed).random(40) < 0.2)
        kept, step = [], 0
        for i in range(39):
            if step == 3:
                step = 0
                continue
            if i in terminals:
                step = 0
            kept.append(i)
            step += 1
        assert hand_made(tmp_path, 40, terminals=terminals)["obs"][:, 0].tolist() == kept


def test_terminal_at_the_end_of_the_file_is_never_used(tmp_path):
    arrays = hand_made(tmp_path, 3, terminals=[2], timeouts=[])
    assert arrays["obs"][:, 0].tolist() == [0, 1] and arrays["terminals"].tolist() == [0, 0]
    arrays = hand_made(tmp_path, 3, terminals=[1], timeouts=[])
    assert arrays["terminals"].tolist() == [0, 1]


def test_d4rl_scores(hopper):
    score = data.load_task("hopper-medium-v2").score
    np.testing.assert_allclose(score(np.array([-20.272305, 3234.3])), [0, 100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rewards=None), "lacks the key"),
        (dict(observations=np.full((600, 11), np.nan)), "NaN or infinite obs"),
        (dict(actions=np.full((600, 3), np.inf)), "NaN or infinite actions"),
        (dict(rewards=np.full(600, -np.inf)), "NaN or infinite rewards"),
        (dict(actions=np.full((600, 3), 1.5)), "outside the environment's bounds"),
        (dict(observations=np.zeros((600, 12))), "data of another task"),
        (dict(actions=np.zeros((600, 4))), "data of another task"),
        (dict(rewards=np.zeros(599)), "does not fit"),
        (dict(observations=np.zeros(600)), "does not fit"),
        (dict(rows=1), "no transitions"),
        (dict(rows=0), "no transitions"),
    ],
)
def test_bad_files_are_refused_by_name(hopper, changes, message):
    write_d4rl(hopper, **changes)
    with pytest.raises(UserError, match=message) as error:
        data.load_task("hopper-medium-v2")
    assert str(hopper) in str(error.value) and "\n" not in str(error.value)


def test_truncated_hdf5_is_refused(hopper):
    hopper.write_bytes(hopper.read_bytes()[: hopper.stat().st_size // 2])
    with pytest.raises(UserError, match="not a complete HDF5 file"):
        data.load_task("hopper-medium-v2")


def test_missing_file_without_network_says_where_to_put_it(hopper):
    hopper.unlink()
    with pytest.raises(UserError, match=f"put {hopper.name} into {hopper.parent}"):
        data.load_task("hopper-medium-v2")
    assert list(hopper.parent.iterdir()) == []


class Server:
    """An HTTP server on 127.0.0.1 that gives `content` and says that it is `claim` bytes long; it knows byte ranges."""

    def __init__(self, content: bytes, claim: int | None = None, tag: str | None = '"one"', cut: int | None = None):
        """`tag`: the content's ETag. `cut`: the first answer ends after so many bytes."""
        paths, ranges = self.paths, self.ranges = [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                paths.append(self.path)
                ranges.append(self.headers.get("Range"))
                start = 0
                if ranges[-1] and self.headers.get("If-Range") == tag:
                    start = int(ranges[-1].removeprefix("bytes=").removesuffix("-"))
                if start and start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str((len(content) if claim is None else claim) - start))
                if tag:
                    self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(content[start : cut if len(paths) == 1 else None])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/base"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(data, "D4RL_SOURCES", ())


def test_download(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    server = Server(content)
    monkeypatch.setenv("D4RL_BASE_URL", server.url)
    task = data.load_task("hopper-medium-v2")
    assert len(task.obs) == 600 - 1 - 11 and hopper.read_bytes() == content
    assert server.paths == [f"/base/{HOPPER.path}"]
    data.load_task("hopper-medium-v2")
    assert len(server.paths) == 1  # the second time it is there
    server.server.shutdown()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("kind", ["not HDF5", "empty"])
def test_bad_downloads_leave_nothing(hopper, monkeypatch, kind):
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", Server({"not HDF5": b"<html>moved</html>", "empty": b""}[kind]).url)
    with pytest.raises(UserError, match="cannot download"):
        data.load_task("hopper-medium-v2")
    assert names(hopper.parent) == []


@pytest.mark.parametrize("resumes", [True, False])
def test_a_download_that_was_cut_off_goes_on_where_it_stopped(hopper, monkeypatch, resumes):
    content = hopper.read_bytes()
    hopper.unlink()
    server = Server(content, cut=1000, tag='"one"' if resumes else None)
    monkeypatch.setenv("D4RL_BASE_URL", server.url)
    with pytest.raises(UserError, match="1000 of .* goes on from there"):
        data.load_task("hopper-medium-v2")
    assert not hopper.exists() and (hopper.parent / f"{hopper.name}.part").stat().st_size == 1000
    data.load_task("hopper-medium-v2")
    assert server.ranges == [None, "bytes=1000-" if resumes else None]
    assert hopper.read_bytes() == content
    assert names(hopper.parent) == [hopper.name, f"{hopper.name}.sha256"]


def test_what_changed_on_the_server_begins_anew(hopper, monkeypatch):
    content, part = hopper.read_bytes(), hopper.parent / f"{hopper.name}.part"
    hopper.unlink()
    server = Server(content, tag='"two"')
    monkeypatch.setenv("D4RL_BASE_URL", server.url)
    path = data.d4rl_tasks.TASKS["hopper-medium-v2"].path
    part.write_bytes(b"x" * 500)
    part.with_name(f"{part.name}.source").write_text(f'{server.url}/{path}\n"one"')
    data.load_task("hopper-medium-v2")
    assert server.ranges == ["bytes=500-"] and hopper.read_bytes() == content
    # A part that was already whole, but not yet looked at, when the process was killed
    hopper.rename(part)
    part.with_name(f"{part.name}.source").write_text(f'{server.url}/{path}\n"two"')
    data.load_task("hopper-medium-v2")
    assert hopper.read_bytes() == content


def test_sources_are_tried_in_turn(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    bad, good = Server(b"<html>moved</html>"), Server(content)
    monkeypatch.setenv("D4RL_BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(data, "D4RL_SOURCES", (bad.url, good.url))
    data.load_task("hopper-medium-v2")
    assert len(bad.paths) == len(good.paths) == 1 and hopper.read_bytes() == content
    hopper.unlink()
    monkeypatch.setattr(data, "D4RL_SOURCES", (bad.url,))
    with pytest.raises(UserError, match=f"cannot download http://127.0.0.1:9/.* nor {bad.url}/"):
        data.load_task("hopper-medium-v2")


def test_two_processes_download_once(hopper, monkeypatch):
    """Also where the second one comes while the first looks at what has arrived."""
    content = hopper.read_bytes()
    hopper.unlink()
    server = Server(content)
    code = (
        "import data, hashlib, time; digest = hashlib.file_digest; data.D4RL_SOURCES = ()\n"
        "hashlib.file_digest = lambda *args: (time.sleep(3), digest(*args))[1]\n"
        "data.load_task('hopper-medium-v2')"
    )
    environment = os.environ | {"D4RL_BASE_URL": server.url}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(server.paths) == 1 and hopper.read_bytes() == content
    assert names(hopper.parent) == [hopper.name, f"{hopper.name}.sha256"]


def test_checksum_is_kept_and_compared_once_in_another_process(hopper, monkeypatch, capfd):
    content, sums = hopper.read_bytes(), hopper.with_name(f"{hopper.name}.sha256")
    data._checking.clear()  # of other tests
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", Server(content).url)
    data.load_task("hopper-medium-v2")
    assert sums.read_text() == f"{hashlib.sha256(content).hexdigest()}  {hopper.name}\n"
    data.load_task("hopper-medium-v2")  # the next start
    data._checking.pop().wait()
    assert sums.read_text().splitlines()[1:] == ["# checked"]
    data.load_task("hopper-medium-v2")
    assert not data._checking  # never again
    sums.write_text(f"{hashlib.sha256(b'else').hexdigest()}  {hopper.name}\n")
    data.load_task("hopper-medium-v2")  # not held up; told by the other process, and refused from then on
    data._checking.pop().wait()
    assert capfd.readouterr().err.count("is not what was downloaded") == 1
    with pytest.raises(UserError, match="delete it to download it again"):
        data.load_task("hopper-medium-v2")


def test_unknown_task_suggests_near_ones():
    with pytest.raises(UserError, match="did you mean hopper-medium-v2"):
        data.load_task("hopper-medum-v2")


# ---- Minari ----------------------------------------------------------------------------------------------------------


def collect(monkeypatch, tmp_path: Path, env: gym.Env, name: str, steps: int = 200, **kwargs) -> list:
    """Collect random steps into a local Minari data set; returns the episodes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collector = minari.DataCollector(env)
    done = True
    collector.action_space.seed(0)
    for _ in range(steps):
        if done:
            collector.reset(seed=0)
        *_, terminated, truncated, _ = collector.step(collector.action_space.sample())
        done = terminated or truncated
    kwargs = {"ref_min_score": None, **kwargs}
    dataset = collector.create_dataset(name, algorithm_name="random", author="t", author_email="t", code_permalink="t", **kwargs)
    return list(dataset.iterate_episodes())


def test_minari_transitions(monkeypatch, tmp_path):
    episodes = collect(
        monkeypatch,
        tmp_path,
        gym.make("Pendulum-v1", max_episode_steps=30),
        "test/pendulum-v0",
        ref_min_score=-1000.0,
        ref_max_score=0.0,
    )
    task = data.load_task("test/pendulum-v0")
    assert len(task.obs) == 200  # no step is dropped
    np.testing.assert_allclose(task.next_obs[29], episodes[0].observations[30], rtol=1e-6)
    np.testing.assert_allclose(task.obs[30], episodes[1].observations[0], rtol=1e-6)
    np.testing.assert_allclose(task.actions[:30], episodes[0].actions / 2, rtol=1e-6)  # torques lie in [-2, 2]
    assert task.terminals.sum() == 0 and not task.sparse_goal
    np.testing.assert_allclose(task.score(np.array([-1000.0, -500.0, 0.0])), [0, 50, 100])
    assert task.score_name == "Minari normalised score"


def test_maze_episodes_end_at_their_first_success(monkeypatch, tmp_path):
    """A data set that goes on at the goal is cut there, is terminal there, and is evaluated with episodes that end."""
    maze = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]
    env = gym.make("PointMaze_UMaze-v3", maze_map=maze, continuing_task=True, max_episode_steps=60)
    monkeypatch.setattr(env.action_space, "sample", lambda: np.array([0.6, 0.0], np.float32))
    episodes = collect(monkeypatch, tmp_path, env, "test/maze-v0", 120, ref_min_score=0.0, ref_max_score=1.0)
    lengths = [int(np.argmax(episode.rewards > 0)) + 1 for episode in episodes]
    assert all(length < 60 for length in lengths) and episodes[0].rewards.sum() > 1  # it did go on
    task = data.load_task("test/maze-v0")
    assert len(task.obs) == sum(lengths) and task.sparse_goal
    assert np.flatnonzero(task.terminals).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert task.rewards.sum() == len(episodes)
    # Alphabetical: achieved_goal (2), desired_goal (2), observation (4), in the data as in the environment
    np.testing.assert_allclose(task.obs[0, :2], episodes[0].observations["achieved_goal"][0], rtol=1e-6)
    np.testing.assert_allclose(task.obs[0, 4:], episodes[0].observations["observation"][0], rtol=1e-6)
    env = task.make_env()
    obs, _ = env.reset(seed=0)
    raw = env.unwrapped._get_obs(obs[4:])
    np.testing.assert_allclose(obs, np.concatenate([raw[key] for key in sorted(raw)]))
    rewards, terminated = 0, False
    while not terminated:
        _, reward, terminated, truncated, _ = env.step(np.array([0.6, 0.0], np.float32))
        assert not truncated
        rewards += reward
    assert rewards == 1


def test_discrete_actions_are_refused(monkeypatch, tmp_path):
    collect(monkeypatch, tmp_path, gym.make("CartPole-v1"), "test/cartpole-v0", 50, ref_min_score=0.0, ref_max_score=1.0)
    with pytest.raises(UserError, match="bounded vector"):
        data.load_task("test/cartpole-v0")


def test_a_data_set_without_reference_scores_reports_returns(monkeypatch, tmp_path):
    collect(monkeypatch, tmp_path, gym.make("Pendulum-v1"), "test/plain-v0", 210, num_episodes_average_score=1)
    task = data.load_task("test/plain-v0")
    assert task.score_name == "return" and task.score(np.array([3.0])) == 3.0


def test_unreachable_minari_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def no_network(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    with pytest.raises(UserError, match="no network at all") as error:
        data.load_task("D4RL/pen/human-v2")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_damaged_minari_data_set(monkeypatch, tmp_path):
    collect(monkeypatch, tmp_path, gym.make("Pendulum-v1"), "test/broken-v0", 210, ref_min_score=0.0, ref_max_score=1.0)
    file = next((tmp_path / "minari" / "test" / "broken-v0").rglob("*.hdf5"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError):
        data.load_task("test/broken-v0")


def shorten(monkeypatch, steps: int) -> None:
    """Let every maze collect no more than so many steps (and the rest of an episode)."""
    monkeypatch.setattr(data, "POINTMAZES", {env_id: (gym_id, steps) for env_id, (gym_id, _) in data.POINTMAZES.items()})


def test_shortest_paths():
    maze = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    paths = data.shortest_paths(maze, (3, 1))
    assert paths[3, 3] == [(3, 1), (2, 1), (1, 1), (1, 2), (1, 3), (2, 3), (3, 3)]
    assert [len(path) for path in paths.values()] == [1, 2, 3, 4, 5, 6, 7] and paths[3, 1] == [(3, 1)]
    open_field = [[1] * 6, *[[1, 0, 0, 0, 0, 1] for _ in range(4)], [1] * 6]
    for (row, column), path in data.shortest_paths(open_field, (2, 1)).items():
        assert len(path) == 1 + abs(row - 2) + abs(column - 1)
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in zip(path, path[1:]))


@pytest.mark.parametrize(
    ("env_id", "cells", "limit"), [("dtql/pointmaze-medium-v0", 12, 600), ("dtql/pointmaze-large-v0", 20, 800)]
)
def test_mazes_are_evaluated_along_their_longest_shortest_path(monkeypatch, tmp_path, env_id, cells, limit):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shorten(monkeypatch, 1500)
    task = data.load_task(env_id)
    assert task.sparse_goal and len(task.obs) >= 1500
    env = task.make_env()
    maze = env.unwrapped.maze
    assert env.spec.max_episode_steps == limit
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        start, goal = (tuple(int(i) for i in maze.cell_xy_to_rowcol(xy)) for xy in (obs[:2], obs[2:4]))
        maze_map = [[1 if cell == 1 else 0 for cell in row] for row in maze.maze_map]
        assert len(data.shortest_paths(maze_map, start)[goal]) == cells
    env.close()


def test_demo_data(monkeypatch, tmp_path):
    """A shorter collection: whole or absent, evaluated from the other end of the U, scored by success."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shorten(monkeypatch, 3000)
    task = data.load_task(data.DEMO_ID)
    assert task.sparse_goal and len(task.obs) >= 3000 and np.abs(task.actions).max() <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["dtql"]  # no leftovers
    assert task.score(np.array([1.0])) == 100
    env = task.make_env()
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        assert np.linalg.norm(obs[:2] - obs[2:4]) > 1.2  # start and goal are two cells apart, walls between
    env.close()


def test_interrupted_collection_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari.DataCollector, "step", functools.partial(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        data.load_task(data.DEMO_ID)
    assert list(tmp_path.iterdir()) == []


def test_rewards_of_antmaze_are_shifted(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    file = d4rl_tasks.TASKS["antmaze-umaze-v0"].file
    write_d4rl(tmp_path / file, obs_dim=29, action_dim=8, rewards=(np.arange(600) % 7 == 6).astype(np.float32))
    task = data.load_task("antmaze-umaze-v0")
    agent = dtql.DTQL(make_args(tmp_path), task, torch.device("cpu"))
    np.testing.assert_array_equal(agent.data.rows[:, 29 + 8].numpy(), task.rewards - 1)
    assert set(task.rewards) == {0.0, 1.0}
