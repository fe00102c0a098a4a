"""From files to transitions, downloads, Minari, and every kind of bad data."""

import contextlib
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from helpers import FLAGS, ROOT, load_task, run_here, write_d4rl, write_minari

import bc
import common
import tasks
from common import UserError
from tasks import d4rl, mazes, ogbench

HOPPER = d4rl.TASKS["hopper-medium-v2"]


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
    return d4rl.transitions(file, limit=4)


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
    score = load_task("hopper-medium-v2").score
    np.testing.assert_allclose(score(np.array([-20.272305, 3234.3])), [0, 100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rewards=None), "lacks rewards"),
        (dict(observations=np.full((600, 11), np.nan)), "NaN or infinite obs"),
        (dict(actions=np.full((600, 3), np.inf)), "NaN or infinite actions"),
        (dict(rewards=np.full(600, -np.inf)), "NaN or infinite rewards"),
        (dict(actions=np.full((600, 3), 1.5)), "outside the environment's bounds"),
        (dict(observations=np.zeros((600, 12))), "data of another task"),
        (dict(actions=np.zeros((600, 4))), "data of another task"),
        (dict(rewards=np.zeros(599)), "which belong together"),
        (dict(observations=np.zeros(600)), "not 2 dimension"),
        (dict(rows=1), "no transitions"),
        (dict(rows=0), "no transitions"),
    ],
)
def test_bad_files_are_refused_by_name(hopper, changes, message):
    write_d4rl(hopper, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_task("hopper-medium-v2")
    assert str(hopper) in str(error.value) and "\n" not in str(error.value)


def test_truncated_hdf5_is_refused(hopper):
    hopper.write_bytes(hopper.read_bytes()[: hopper.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot read .*damaged"):
        load_task("hopper-medium-v2")


def test_missing_file_without_network_says_where_to_put_it(hopper):
    hopper.unlink()
    with pytest.raises(UserError, match=f"put {hopper.name} into {hopper.parent}"):
        load_task("hopper-medium-v2")
    assert names(hopper.parent) == []


class Server:
    """An HTTP server on 127.0.0.1 that gives `content`; the first answer ends after `cut` bytes."""

    def __init__(self, content: bytes, cut: int | None = None, delay: float = 0.0):
        paths = self.paths = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                paths.append(self.path)
                time.sleep(delay)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: cut if len(paths) == 1 else None])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/base"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(d4rl, "SOURCES", ())


def test_download(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    server = Server(content)
    monkeypatch.setenv("D4RL_BASE_URL", server.url)
    task = load_task("hopper-medium-v2")
    assert len(task.obs) == 600 - 1 - 11 and hopper.read_bytes() == content
    assert server.paths == [f"/base/{HOPPER.path}"]
    load_task("hopper-medium-v2")
    assert len(server.paths) == 1  # the second time it is there
    server.server.shutdown()


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


@pytest.mark.parametrize("kind", ["not HDF5", "empty"])
def test_bad_downloads_leave_nothing(hopper, monkeypatch, kind):
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", Server({"not HDF5": b"<html>moved</html>", "empty": b""}[kind]).url)
    with pytest.raises(UserError, match="cannot download"):
        load_task("hopper-medium-v2")
    assert names(hopper.parent) == []


def test_a_download_that_is_cut_off_leaves_nothing_and_starts_again(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", Server(content, cut=1000).url)
    (hopper.parent / f"{hopper.name}.part").symlink_to(hopper.parent / "elsewhere")  # is not followed
    with pytest.raises(UserError, match="1000 of .* bytes arrived"):
        load_task("hopper-medium-v2")
    assert names(hopper.parent) == []
    load_task("hopper-medium-v2")
    assert hopper.read_bytes() == content and names(hopper.parent) == [hopper.name]


def test_a_server_that_sends_hardly_anything_is_given_up(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", Server(content).url)
    times = iter([0, *range(100, 10_000, 100)])
    monkeypatch.setattr("tasks.download.time.monotonic", lambda: next(times))
    monkeypatch.setattr("tasks.download.SLOWEST", 10**9)
    with pytest.raises(UserError, match="bytes arrived in a minute"):
        load_task("hopper-medium-v2")


def test_sources_are_tried_in_turn(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    bad, good = Server(b"<html>moved</html>"), Server(content)
    monkeypatch.setenv("D4RL_BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(d4rl, "SOURCES", (bad.url, good.url))
    load_task("hopper-medium-v2")
    assert len(bad.paths) == len(good.paths) == 1 and hopper.read_bytes() == content
    hopper.unlink()
    monkeypatch.setattr(d4rl, "SOURCES", (bad.url,))
    with pytest.raises(UserError, match=f"cannot download http://127.0.0.1:9/.* nor {bad.url}/"):
        load_task("hopper-medium-v2")


@pytest.mark.slow
def test_two_processes_download_once(hopper, monkeypatch):
    content = hopper.read_bytes()
    hopper.unlink()
    server = Server(content, delay=3)
    code = (
        "import tasks, common; from tasks import d4rl; d4rl.SOURCES = (); tasks.load_task(common.Args(env_id='hopper-medium-v2'))"
    )
    environment = os.environ | {"D4RL_BASE_URL": server.url}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(server.paths) == 1 and hopper.read_bytes() == content


def test_ogbenchs_mirror_is_asked_last(tmp_path, monkeypatch, capfd):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(ogbench, "SOURCES", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))

    def download(repo, path, repo_type, local_dir):
        asked.append((repo, path, repo_type))
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying")
        raise OSError("no mirror")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        UserError, match="127.0.0.1:9.* nor zhouzypaul/ogbench_datasets .*no mirror.*put cube-single-play-v0.npz into"
    ):
        load_task("cube-single-play-singletask-v0")
    assert asked == [("zhouzypaul/ogbench_datasets", "cube-single-play-v0.npz", "dataset")]
    assert capfd.readouterr().err == ""  # its warnings would hide the one line


def test_unknown_task_suggests_near_ones():
    with pytest.raises(UserError, match="did you mean hopper-medium-v2"):
        load_task("hopper-medum-v2")


# ---- Minari ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def minari_root(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def episodes_of(env_id: str) -> list:
    return list(minari.load_dataset(env_id).iterate_episodes())


SCORES = dict(ref_min_score=-1000.0, ref_max_score=0.0)


def test_minari_transitions(minari_root):
    write_minari("test/pendulum-v0", gym.make("Pendulum-v1", max_episode_steps=30), 3, 30, **SCORES)
    episodes = episodes_of("test/pendulum-v0")
    task = load_task("test/pendulum-v0")
    assert len(task.obs) == 90  # no step is dropped
    np.testing.assert_allclose(task.next_obs[29], episodes[0].observations[30], rtol=1e-6)
    np.testing.assert_allclose(task.obs[30], episodes[1].observations[0], rtol=1e-6)
    np.testing.assert_allclose(task.actions[:30], episodes[0].actions / 2, rtol=1e-6)  # torques lie in [-2, 2]
    assert task.terminals.sum() == 0 and not task.sparse_goal
    np.testing.assert_allclose(task.score(np.array([-1000.0, -500.0, 0.0])), [0, 50, 100])
    assert task.score_name == "Minari normalised score"


def test_maze_episodes_end_at_their_first_success(monkeypatch, minari_root, tmp_path):
    """A data set that goes on at the goal is cut there, is terminal there, and is evaluated with episodes that end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where this maze leaves its model
    maze = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]
    env = gym.make("PointMaze_UMaze-v3", maze_map=maze, continuing_task=True, max_episode_steps=60)
    monkeypatch.setattr(env.action_space, "sample", lambda: np.array([0.6, 0.0], np.float32))
    write_minari("test/maze-v0", env, 2, 60, ref_min_score=0.0, ref_max_score=1.0)
    episodes = episodes_of("test/maze-v0")
    lengths = [int(np.argmax(episode.rewards > 0)) + 1 for episode in episodes]
    assert all(length < 60 for length in lengths) and episodes[0].rewards.sum() > 1  # it did go on
    task = load_task("test/maze-v0")
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


def test_discrete_actions_are_refused(minari_root):
    write_minari("test/cartpole-v0", gym.make("CartPole-v1"))
    with pytest.raises(UserError, match="^(?!the environment does not work).*bounded vector"):
        load_task("test/cartpole-v0")


def test_a_data_set_without_reference_scores_reports_returns(minari_root):
    write_minari("test/plain-v0", gym.make("Pendulum-v1"))
    task = load_task("test/plain-v0")
    assert task.score_name == "return" and task.score(np.array([3.0])) == 3.0


def test_a_data_set_needs_neither_a_namespace_nor_an_environment(minari_root, tmp_path, capsys):
    file = write_minari("mypendulum-v0", gym.make("Pendulum-v1")) / "data" / "metadata.json"
    assert load_task("mypendulum-v0").make_env is not None
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if "env_spec" not in key}))
    run_dir = run_here(bc, "--env-id=mypendulum-v0", f"--run-dir={tmp_path}/runs", *FLAGS)
    assert "names no environment" in capsys.readouterr().err
    assert bc.load_policy(f"{run_dir}/checkpoint.pt").high == [2]
    with pytest.raises(UserError, match="unknown task yourpendulum-v0"):
        load_task("yourpendulum-v0")


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_reference_scores_without_a_scale(minari_root, low, high):
    file = write_minari("test/small-v0", gym.make("Pendulum-v1"), **SCORES) / "data" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ref_min_score": low, "ref_max_score": high}))
    with pytest.raises(UserError, match="reference scores"):
        load_task("test/small-v0")


class Ordered(gym.Env):
    """Observations with an order of keys that is not alphabetical."""

    observation_space = gym.spaces.Dict([("velocity", gym.spaces.Box(-9, 9, (1,))), ("angle", gym.spaces.Box(-9, 9, (2,)))])
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.rows = self.np_random.uniform(-1, 1, (20, 3)).astype(np.float32)
        self.now = 0
        return self._obs(), {}

    def step(self, action):
        self.now += 1
        return self._obs(), 0.0, False, self.now == 10, {}

    def _obs(self):
        return {"velocity": self.rows[self.now, :1], "angle": self.rows[self.now, 1:]}


def test_data_are_flattened_in_the_environments_own_order(minari_root):
    gym.register("Ordered-v0", "test_data:Ordered", max_episode_steps=10)
    write_minari("test/ordered-v0", gym.make("Ordered-v0"), 3, 10)
    task = load_task("test/ordered-v0")
    obs, _ = task.make_env().reset(seed=0)  # the first episode was recorded with this seed
    np.testing.assert_allclose(task.obs[0], obs, rtol=1e-6)


def test_code_that_a_data_set_names_is_not_run_unasked(minari_root, tmp_path):
    file = write_minari("test/evil-v0", gym.make("Pendulum-v1")) / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    spec = json.loads(metadata["env_spec"]) | {
        "id": "Evil-v0",
        "entry_point": "os:system",
        "kwargs": {"command": f"touch {tmp_path}/ran"},
    }
    file.write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    with pytest.raises(UserError, match="asks to run os:system"):
        load_task("test/evil-v0")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("env_id", ["../../x/y-v0", "/etc/x-v0", "a/../b-v0", "D4RL/pen/human", "a//b-v0"])
def test_ids_that_are_no_ids(minari_root, env_id):
    with pytest.raises(UserError, match="unknown task"):
        load_task(env_id)


def test_unreachable_minari_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def no_network(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    with pytest.raises(UserError, match="no network at all") as error:
        load_task("D4RL/pen/human-v2")
    assert "\n" not in str(error.value) and names(tmp_path) == []


def test_damaged_minari_data_sets(minari_root):
    """A dozen cuts and wrong bytes in each file: read as data or refused in one line."""
    files = [file for file in write_minari("test/broken-v0", gym.make("Pendulum-v1"), **SCORES).rglob("*") if file.is_file()]
    refused = 0
    for seed in range(12):
        for file in files:
            good = file.read_bytes()
            file.write_bytes(corrupted(good, np.random.default_rng(seed)))
            try:
                load_task("test/broken-v0")
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700
            file.write_bytes(good)
    assert refused > 6


def corrupted(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, or with some wrong bytes where the structure is."""
    if rng.integers(2):
        return content[: rng.integers(len(content))]
    changed = bytearray(content)
    for position in rng.integers(min(4000, len(changed)), size=5):
        changed[position] = rng.integers(256)
    return bytes(changed)


def test_damaged_hdf5_files(hopper):
    content, refused = hopper.read_bytes(), 0
    for seed in range(12):
        hopper.write_bytes(corrupted(content, np.random.default_rng(seed)))
        try:
            load_task("hopper-medium-v2")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(hopper) in str(error)
    assert refused > 3


def test_files_that_point_elsewhere_and_good_ones_that_cannot_be_read(hopper, tmp_path):
    good = hopper.read_bytes()
    rewards = h5py.File(hopper)["rewards"][:]
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["rewards"] = rewards
    rewards.tofile(tmp_path / "raw")
    layout = h5py.VirtualLayout(rewards.shape, rewards.dtype)
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "rewards", rewards.shape)
    for make in (
        lambda file: file.update({"rewards": h5py.ExternalLink(tmp_path / "other.hdf5", "rewards")}),
        lambda file: file.update({"rewards": h5py.SoftLink("/nowhere")}),
        lambda file: file.create_dataset("rewards", rewards.shape, rewards.dtype, external=[(tmp_path / "raw", 0, 2400)]),
        lambda file: file.create_virtual_dataset("rewards", layout),
        lambda file: file.create_group("rewards"),
    ):
        hopper.write_bytes(good)
        with h5py.File(hopper, "a") as file:
            del file["rewards"]
            make(file)
        with pytest.raises(UserError, match="another file|group"):
            load_task("hopper-medium-v2")
    hopper.write_bytes(good)
    with h5py.File(hopper, "a"), pytest.raises(UserError, match="cannot read") as error:  # locked by its writer
        subprocess_load(hopper)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize(("column", "rows"), [("observations", 30), ("observations", 20), ("actions", 29), ("rewards", 31)])
def test_minari_episodes_of_uneven_columns(minari_root, column, rows):
    """A last step without a next observation is dropped; what does not belong together is refused."""
    file = write_minari("test/small-v0", gym.make("Pendulum-v1"), 2, 30) / "data" / "main_data.hdf5"
    with h5py.File(file, "a") as source:
        values = source[f"episode_1/{column}"][:]
        del source[f"episode_1/{column}"]
        source[f"episode_1/{column}"] = np.resize(values, (rows, *values.shape[1:]))
    if (column, rows) == ("observations", 30):
        task = load_task("test/small-v0")
        assert len(task.obs) == 59 and np.flatnonzero(task.ends).tolist() == [29, 58]
    else:
        with pytest.raises(UserError, match="episode 1 has"):
            load_task("test/small-v0")


def test_minari_files_that_point_elsewhere(minari_root, tmp_path):
    file = write_minari("test/small-v0", gym.make("Pendulum-v1"), episodes=2) / "data" / "main_data.hdf5"
    with h5py.File(file, "a") as source:
        rewards = source["episode_1/rewards"][:]
        del source["episode_1/rewards"]
        source["episode_1/rewards"] = h5py.ExternalLink(tmp_path / "other.hdf5", "rewards")
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["rewards"] = rewards
    with pytest.raises(UserError, match="another file"):
        load_task("test/small-v0")


def subprocess_load(file: Path) -> None:
    code = (
        "import common, tasks, sys; common.run(lambda _: tasks.load_task(common.Args(env_id='hopper-medium-v2')), lambda: None)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    raise UserError(result.stderr)


@pytest.mark.parametrize("rewards", [np.arange(600) % 2 - 1.0, np.arange(600) % 3, np.full(600, 0.5)])
def test_sparse_rewards_are_0_and_1(tmp_path, monkeypatch, rewards):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_d4rl(tmp_path / d4rl.TASKS["antmaze-umaze-v0"].file, obs_dim=29, action_dim=8, rewards=rewards.astype(np.float32))
    with pytest.raises(UserError, match="rewards must be 0 and 1"):
        load_task("antmaze-umaze-v0")


# ---- mazes -------------------------------------------------------------------------------------------------------------


def shorten(monkeypatch, steps: int) -> None:
    """Let every maze collect no more than so many steps (and the rest of an episode)."""
    for env_id, (gym_id, _) in list(tasks.POINTMAZES.items()):
        monkeypatch.setitem(tasks.POINTMAZES, env_id, (gym_id, steps))


def test_shortest_paths():
    maze = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    paths = mazes.shortest_paths(maze, (3, 1))
    assert paths[3, 3] == [(3, 1), (2, 1), (1, 1), (1, 2), (1, 3), (2, 3), (3, 3)]
    assert [len(path) for path in paths.values()] == [1, 2, 3, 4, 5, 6, 7] and paths[3, 1] == [(3, 1)]
    open_field = [[1] * 6, *[[1, 0, 0, 0, 0, 1] for _ in range(4)], [1] * 6]
    for (row, column), path in mazes.shortest_paths(open_field, (2, 1)).items():
        assert len(path) == 1 + abs(row - 2) + abs(column - 1)
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in zip(path, path[1:]))


@pytest.mark.parametrize(
    ("env_id", "cells", "limit"), [("dtql/pointmaze-medium-v0", 12, 600), ("dtql/pointmaze-large-v0", 20, 800)]
)
def test_mazes_are_evaluated_along_their_longest_shortest_path(monkeypatch, tmp_path, env_id, cells, limit):
    monkeypatch.setenv("DTQL_DATASET_DIR", str(tmp_path))
    shorten(monkeypatch, 1500)
    task = load_task(env_id)
    assert task.sparse_goal and len(task.obs) >= 1500
    env = task.make_env()
    maze = env.unwrapped.maze
    assert env.spec.max_episode_steps == limit
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        start, goal = (tuple(int(i) for i in maze.cell_xy_to_rowcol(xy)) for xy in (obs[:2], obs[2:4]))
        maze_map = [[1 if cell == 1 else 0 for cell in row] for row in maze.maze_map]
        assert len(mazes.shortest_paths(maze_map, start)[goal]) == cells
    env.close()


def test_demo_data(monkeypatch, tmp_path):
    """A shorter collection: whole or absent, evaluated from the other end of the U, scored by success."""
    monkeypatch.setenv("DTQL_DATASET_DIR", str(tmp_path))
    shorten(monkeypatch, 3000)
    task = load_task(common.Args.env_id)
    assert task.sparse_goal and len(task.obs) >= 3000 and np.abs(task.actions).max() <= 1
    assert names(tmp_path) == ["pointmaze-umaze-v0.npz"]  # no leftovers
    assert task.score(np.array([1.0])) == 100
    env = task.make_env()
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        assert np.linalg.norm(obs[:2] - obs[2:4]) > 1.2  # start and goal are two cells apart, walls between
    env.close()


def test_a_signal_that_a_library_swallows_still_stops_the_collection(monkeypatch, tmp_path):
    monkeypatch.setenv("DTQL_DATASET_DIR", str(tmp_path))
    step = gym.wrappers.TimeLimit.step

    def swallow(env, action):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(env, action)

    monkeypatch.setattr(gym.wrappers.TimeLimit, "step", swallow)
    with pytest.raises(common.Interrupted):
        load_task(common.Args.env_id)
    assert names(tmp_path) == []


def test_interrupted_collection_and_environments_leave_nothing(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DTQL_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    shorten(monkeypatch, 500)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        load_task(common.Args.env_id)
    assert names(tmp_path / "data") == []
    env = load_task(common.Args.env_id).make_env()
    env.reset(seed=0)
    env.close()
    assert list((tmp_path / "tmp").iterdir()) == []
