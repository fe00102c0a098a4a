"""Draw episodes through a maze, all at once, as an animated GIF: python results/walk.py OUT.gif RUN_DIR"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import tasks  # noqa: E402
from tools import import_method, watch  # noqa: E402

EPISODES, STEPS, FPS = 20, 6, 15  # steps of the environment between two pictures


def main(out: str, run_dir: str) -> None:
    config = common.read_config(run_dir)
    module = import_method(config["exp_name"])
    env = tasks.make_env(common.Args(env_id=config["args"]["env_id"]))
    paths, reached = watch.walk(env, module.load_policy(f"{run_dir}/checkpoint.pt"), EPISODES)
    figure, axes = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
    watch.draw_maze(axes, env, [path[:1] for path in paths], f"DTQL: {reached} of {EPISODES} reach the goal")
    lines = [axes.plot([], [], linewidth=1, alpha=0.6)[0] for _ in paths]
    dots = [axes.plot([], [], "o", markersize=5, color=line.get_color())[0] for line in lines]

    def draw(frame: int) -> None:
        for path, line, dot in zip(paths, lines, dots):
            walked = path[: 1 + frame * STEPS]
            line.set_data(*walked.T)
            dot.set_data(*walked[-1:].T)

    longest = max(len(path) for path in paths)
    frames = [*range(-(-longest // STEPS) + 1), *[longest] * FPS]  # a second's rest at the end
    FuncAnimation(figure, draw, frames).save(out, PillowWriter(fps=FPS), dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
