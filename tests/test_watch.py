"""watch.py: what it draws of a run, with and without a way to render."""

import os

import numpy as np
import pytest
from helpers import make_args, run_script, write_d4rl
from PIL import Image

import dtql_continuous as dtql
from common import UserError
from tasks import d4rl
from tools import watch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)


@pytest.fixture
def run_dir(hopper, tmp_path):
    return dtql.main(make_args(tmp_path, epochs=0, pretrain_epochs=0, eval_episodes=1))["run_dir"]


def test_an_episode_becomes_a_gif(run_dir, tmp_path):
    if watch.find_renderer() is None:
        pytest.skip("nothing renders here")
    result = run_script(
        run_dir, "--out", tmp_path / "out", script="tools.watch"
    )  # how mujoco renders is settled once per process
    assert result.returncode == 0, result.stderr
    file = tmp_path / "out" / "watch.gif"
    with Image.open(file) as picture:
        assert picture.size == (watch.WIDTH, watch.HEIGHT) and picture.n_frames > 2
        first = np.array(picture.convert("RGB"), int)
        picture.seek(picture.n_frames - 1)
        assert np.abs(first - np.array(picture.convert("RGB"), int)).max() > 30  # something moves
    assert os.listdir(tmp_path / "out") == ["watch.gif"]


def test_without_a_renderer_one_line_says_what_to_install(run_dir, tmp_path):
    result = run_script(run_dir, "--out", tmp_path / "out", script="tools.watch", MUJOCO_GL="nothing")
    assert result.returncode == 2 and "libegl1" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_ways_through_a_maze(tmp_path, monkeypatch):
    """Walls where the maze has them, ways that begin at the start, and whoever is rewarded has reached the goal."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    write_d4rl(tmp_path / "data" / d4rl.TASKS["antmaze-umaze-v2"].file, obs_dim=29, action_dim=8, rewards=np.zeros(600))
    args = make_args(tmp_path, env_id="antmaze-umaze-v2", epochs=0, pretrain_epochs=0, eval_episodes=1)
    run = dtql.main(args)["run_dir"]
    (file,) = watch.main(watch.Args(run, episodes=0, paths=2, out=str(tmp_path)))
    assert file.name == "paths.png"
    with Image.open(file) as picture:
        grey = (np.array(picture.convert("RGB")) == 153).all(2)
    assert grey.mean() > 0.1

    class Maze:
        unwrapped = property(lambda self: self)
        model, data = None, type("State", (), {"qpos": np.zeros(3)})()

        def reset(self, seed):
            self.time, self.good = 0, seed % 2
            self.data.qpos[:] = seed
            return np.zeros(1), {}

        def step(self, action):
            self.time += 1
            self.data.qpos[0] += action
            return np.zeros(1), float(self.good and self.time == 3), self.time == 3, False, {}

    paths, reached = watch.walk(Maze(), lambda obs: 1.0, 4)
    assert reached == 2
    np.testing.assert_array_equal(paths[3], [[3, 3], [4, 3], [5, 3], [6, 3]])


@pytest.mark.parametrize("changes", [{"index": 1}, {"run_dir": "/nowhere"}, {"episodes": -1}])
def test_bad_input(run_dir, tmp_path, changes):
    with pytest.raises(UserError) as error:
        watch.main(watch.Args(**{"run_dir": run_dir, "out": str(tmp_path / "out"), **changes}))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_run_without_an_environment_shows_nothing(tmp_path):
    rng = np.random.default_rng(0)
    columns = dict(observations=rng.random((9, 2)), actions=rng.random((9, 1)), rewards=rng.random(9), terminals=np.eye(9)[8])
    np.savez(tmp_path / "log.npz", **columns)
    run = dtql.main(make_args(tmp_path, env_id="", data=str(tmp_path / "log.npz"), epochs=0, pretrain_epochs=0))["run_dir"]
    with pytest.raises(UserError, match="without an environment"):
        watch.main(watch.Args(run))
