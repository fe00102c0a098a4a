"""How fast training and evaluation are, and how near an update comes to its matrix products alone.

    python -m tools.speed                      on the GPU, if there is one
    OMP_NUM_THREADS=1 python -m tools.speed    on one core of the CPU

Training, by number of models and batch size. All variants are measured in turn, round by round, in this one process:

    plain     the paper line by line: one module and one Adam (unfused) each, Q evaluated twice, gradients also of the
              networks that stay fixed. One model only
    eager     dtql_continuous.py with --no-compile --no-cudagraphs
    compile   ... with --compile --no-cudagraphs
    graph     ... with --no-compile --cudagraphs (GPU)
    both      ... with --compile --cudagraphs (GPU)
    products  the floor: the matrix products of one eager update, and nothing else

The ratio is that to eager in the same round; in evaluation (1024 candidates in each state) that to one environment at a
time with 1024 repeated policy passes. Rates are medians over the rounds, with the lowest and the highest.

Methods (Table 2 and Figure 4): seconds per 1,000 updates of one model as it trains by default, and of the parts of an update on
their own, at the method's own batch size and at each of --batch-sizes; milliseconds per action; seconds per trajectory; hours of
a run of the published length. As a picture too.
"""

import collections
import copy
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dtql_continuous as dtql
import evaluation
import fql
import stacked
from stacked import Transitions
from tasks import Task
from tools import import_method, methods


@dataclass
class Args:
    """Measure updates per second and actions per second, of DTQL in its variants and of all methods."""

    device: str = "auto"
    """auto (a CUDA GPU if there is one, else the CPU), cpu, cuda or cuda:1, ..."""
    models: tuple[int, ...] = (1, 5) if torch.cuda.is_available() else (1,)
    """numbers of models that train at once"""
    batch_sizes: tuple[int, ...] = (256, 2048)
    """transitions per update and model"""
    methods: tuple[str, ...] = tuple(name for name in methods() if name != "dtql_online")  # whose updates are DTQL's
    """methods to compare"""
    rounds: int = 3
    """how often each variant is measured"""
    seconds: float = 0.5
    """for how long each time, at least"""
    csv: str = "speed.csv"
    """file for the table; the picture is put beside it"""


ENV_ID = "antmaze-umaze-v0"
OBS_DIM, ACTION_DIM, ROWS = 29, 8, 1_000_000  # of the AntMaze files
PAPER_UPDATES = 1_050_000  # 50 epochs of pretraining and 1000 of training (Table 4, locomotion)
# Table 2: seconds per 1,000 updates, seconds per trajectory, hours. One RTX A5000; neither batch sizes nor lengths are stated
TABLE_2 = {
    "dql": (24.13, 3.03, 6.70),
    "idql": (17.57, 3.04, 14.64),
    "srpo": (24.71, 0.22, 9.42),
    "dtql_continuous": (21.83, 0.35, 3.33),
}


def random_task() -> Task:
    """An AntMaze with random transitions: what the numbers are does not change the time."""
    draw = np.random.default_rng(0).uniform
    columns = (
        draw(-1, 1, shape).astype(np.float32) for shape in ((ROWS, OBS_DIM), (ROWS, ACTION_DIM), ROWS, ROWS, (ROWS, OBS_DIM))
    )
    bounds = -np.ones(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32)
    return Task(*columns, lambda: gym.make(f"d4rl/{ENV_ID}"), lambda r: r, "return", False, "random", *bounds)


# ---- the paper line by line ------------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.Mish, norm: bool = False) -> nn.Sequential:
    layers = []
    for width in (inputs, 256, 256):
        layers += [nn.Linear(width, 256), *([nn.LayerNorm(256)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(256, outputs))


class PlainDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.net = nn.Sequential(nn.Linear(ACTION_DIM + OBS_DIM + 16, 256), mlp(256, ACTION_DIM))
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7))

    def forward(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        variance = sigma**2 + 0.25
        angles = sigma.log() / 4 * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        output = self.net(torch.cat((noisy_actions / variance.sqrt(), obs, embedding), 1))
        return 0.25 / variance * noisy_actions + 0.5 * sigma / variance.sqrt() * output


class Plain:
    """One model without any of the script's devices: modules, five optimizers, one loss after the other."""

    def __init__(self, task: Task, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self.data = [torch.as_tensor(column, device=device) for column in task[:5]]
        self.qs = [mlp(OBS_DIM + ACTION_DIM, 1, norm=True).to(device) for _ in range(2)]
        self.targets = copy.deepcopy(self.qs)
        self.v, self.denoiser = mlp(OBS_DIM, 1).to(device), PlainDenoiser().to(device)
        self.actor = mlp(OBS_DIM, 2 * ACTION_DIM, nn.ReLU).to(device)
        self.optimizers = {
            net: torch.optim.Adam(net.parameters(), 3e-4, foreach=False) for net in (*self.qs, self.v, self.denoiser, self.actor)
        }

    def step(self, net: nn.Module, loss: Tensor) -> None:
        self.optimizers[net].zero_grad()
        loss.backward()
        self.optimizers[net].step()

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = self.actor(obs).chunk(2, 1)
        log_std = log_std.clamp(-5, 2)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean)), mean, log_std

    def q(self, obs: Tensor, actions: Tensor) -> list[Tensor]:
        return [q(torch.cat((obs, actions), 1)).squeeze(1) for q in self.qs]

    def denoising_loss(self, actions: Tensor, obs: Tensor) -> Tensor:
        sigma = dtql.sample_sigma(torch.rand(len(obs), 1, device=self.device))
        denoised = self.denoiser(actions + sigma * torch.randn_like(actions), sigma, obs).clamp(-1, 1)
        return (((denoised - actions) / dtql.c_out(sigma)) ** 2).mean()

    def update(self) -> None:
        batch = torch.randint(ROWS, (self.batch_size,), device=self.device)
        obs, actions, rewards, terminals, next_obs = (column[batch] for column in self.data)
        with torch.no_grad():
            q = torch.minimum(*self.q(obs, actions))
        u = q - self.v(obs).squeeze(1)
        self.step(self.v, ((0.9 - (u < 0).float()).abs() * u**2).mean())
        with torch.no_grad():
            target = rewards + 0.99 * (1 - terminals) * self.v(next_obs).squeeze(1)
        for net, q in zip(self.qs, self.q(obs, actions)):
            self.step(net, F.mse_loss(q, target))
        self.step(self.denoiser, self.denoising_loss(actions, obs))
        a, mean, log_std = self.sample(obs)
        z = (torch.atanh(actions / 1.001) - mean) / log_std.exp()
        nll = (0.5 * z**2 + log_std).sum(1).mean()
        self.step(self.actor, self.denoising_loss(a, obs) - torch.minimum(*self.q(obs, a)).mean() + nll)
        for net, target_net in zip(self.qs, self.targets):
            for param, target_param in zip(net.parameters(), target_net.parameters()):
                target_param.data.copy_(0.005 * param.data + 0.995 * target_param.data)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """One action for one observation (1, S): 1024 policy passes, one for each candidate."""
        repeated = torch.as_tensor(obs, dtype=torch.float32, device=self.device).expand(1024, -1)
        candidates = self.sample(repeated)[0]
        q = torch.minimum(*(q(torch.cat((repeated, candidates), 1)) for q in self.targets)).squeeze(1)
        return candidates[torch.multinomial(torch.softmax(q, 0), 1)].cpu().numpy()


# ---- measuring ---------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Collects the matrix products made under it, and their number of floating-point operations."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            a, b = (x.detach().clone(memory_format=torch.preserve_format) for x in args[-2:])
            self.calls.append(functools.partial(torch.matmul, a, b, out=torch.empty_like(torch.matmul(a, b))))
            self.flops += 2 * a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def run(self) -> None:
        for call in self.calls:
            call()


def rate(function: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Calls per second, over at least `seconds`."""
    calls, started = 0, time.perf_counter()
    while True:
        for _ in range(max(1, calls)):
            function()
        calls = max(1, 2 * calls)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        if elapsed > seconds:
            return calls / elapsed


def in_turn(functions: dict[str, Callable[[], object]], args: Args, device: torch.device) -> dict[str, list[float]]:
    """The rates of several functions, measured in turn `args.rounds` times after one round for warming up."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for measured in common.progress_bar(iterable=range(args.rounds + 1), desc=" ".join(functions), leave=False):
        for name, function in functions.items():
            value = rate(function, args.seconds if measured else min(0.2, args.seconds), device)
            if measured:
                rates[name].append(value)
    return rates


def summary(rates: list[float], reference: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(rates, reference)]
    values = {
        "per_second": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def peak_memory(device: torch.device) -> int | None:
    """MB: on a GPU of its allocator since the last reset, on the CPU of the process since it began; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20))


def measure_training(task: Task, models: int, batch_size: int, args: Args, device: torch.device) -> list[dict]:
    torch.compiler.reset()
    data = Transitions(*task[:5], device)
    settings = dict(num_seeds=models, batch_size=batch_size, **PAPER)
    variants = {"eager": (False, False), "compile": (True, False)}
    if device.type == "cuda":
        variants |= {"graph": (False, True), "both": (True, True)}
    functions: dict[str, Callable[[], object]] = {}
    startup, memory = {}, {}
    if models == 1:
        functions["plain"] = Plain(task, batch_size, device).update
    for name, (compiled, graph) in variants.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        started = time.perf_counter()
        agent = dtql.DTQL(dtql.Args(**settings, compile=compiled, cudagraphs=graph), OBS_DIM, ACTION_DIM, device, data)
        update = functools.partial(agent.update, training=True)
        functions[name] = stacked.fastest(update, agent, compiled, graph)
        functions[name]()
        startup[name] = round(time.perf_counter() - started, 1)
        memory[name] = round(peak_memory(device) - before) if device.type == "cuda" else peak_memory(device)
        if name == "eager":
            with Products() as products:
                update()
    functions["products"] = stacked.capture(products.run) if device.type == "cuda" else products.run
    rates = in_turn(functions, args, device)
    rows = []
    for name, values in rates.items():
        row = {"what": "updates", "variant": name, "models": models, "batch": batch_size, **summary(values, rates["eager"])}
        if "plain" in rates:
            row["ratio_to_plain"] = summary(values, rates["plain"])["ratio"]
        row["model_updates_per_second"] = float(f"{models * row['per_second']:.4g}")
        row["hours_to_1050000_updates"] = round(PAPER_UPDATES / row["per_second"] / 3600, 2)
        row |= {"startup_seconds": startup.get(name), "peak_memory_mb": memory.get(name)}
        if name == "products":
            row["gflops"] = round(products.flops * row["per_second"] / 1e9)
        rows.append(row)
    return rows


# Table 4's AntMaze settings, without what is measured
PAPER = dict(env_id=ENV_ID, nll=True, lr_decay=True, epochs=1000, steps_per_epoch=1000)


def measure_evaluation(task: Task, args: Args, device: torch.device) -> list[dict]:
    """Steps per second of an AntMaze: all episodes in lock-step, against one environment at a time."""
    torch.compiler.reset()
    single, copies = task.make_env(), evaluation.LockstepEnvs(task.make_env, range(10))  # forked before the first CUDA call
    agents = {
        name: dtql.DTQL(dtql.Args(compile=compiled, **PAPER), OBS_DIM, ACTION_DIM, device)
        for name, compiled in (("eager", False), ("compile", True))
    }
    plain, generator = Plain(task, 256, device), torch.Generator(device).manual_seed(0)
    states = np.zeros((1, 100, OBS_DIM), np.float32)

    def act(name: str, obs: np.ndarray) -> np.ndarray:
        return agents[name].act(torch.as_tensor(obs, device=device), generator).cpu().numpy()

    def report(what: str, functions: dict[str, tuple[Callable[[], object], int]]) -> list[dict]:
        rates = in_turn({name: function for name, (function, _) in functions.items()}, args, device)
        scaled = {name: [size * value for value in rates[name]] for name, (_, size) in functions.items()}
        return [{"what": what, "variant": name, **summary(values, scaled["plain"])} for name, values in scaled.items()]

    variants = [(name, number) for name in agents for number in (1, 10, 100)]
    rows = report(
        "actions",
        {"plain": (lambda: plain.act(states[0, :1]), 1)}
        | {f"{name}, {number} states": (functools.partial(act, name, states[:, :number]), number) for name, number in variants},
    )

    everyone = np.arange(10)
    single.reset(seed=0)
    copies.reset(everyone, everyone)
    # An episode has 700 steps; time goes on counting after that, which does not change what a step costs
    rows += report(
        "environment steps",
        {"plain": (lambda: single.unwrapped.step(plain.act(states[0, :1])[0]), 1)}
        | {
            f"{name}, 10 in lock-step": (lambda name=name: copies.step(everyone, act(name, states[:, :10])[0]), 10)
            for name in agents
        },
    )
    copies.close()
    if device.type == "cuda":
        envs, seeds = evaluation.make_envs(task, dtql.Args(eval_episodes=100, **PAPER)), np.arange(100)[None]
        started = time.perf_counter()
        evaluation.run_episodes(envs, functools.partial(act, "compile"), seeds)
        rows.append({"what": "100 AntMaze episodes", "seconds": round(time.perf_counter() - started, 1)})
        envs.close()
    return rows


# ---- all methods: Table 2 and Figure 4 ---------------------------------------------------------------------------------

PARTS = {
    "step_critic": "critic",
    "step_value": "critic",
    "step_denoiser": "diffusion or flow model",
    "step_fake": "diffusion or flow model",
    "step_flow": "diffusion or flow model",
    "step_actor": "policy",
    "step": "all networks",  # of methods with a single loss
}
TARGETS, REST = "target networks", "minibatch and noise"


def make_agent(method: str, data: Transitions | None, args: Args, device: torch.device, **settings: int) -> nn.Module:
    """A method's agent with its settings for the task, except for `settings`; one model, as it trains by default."""
    module = import_method(method)
    defaults = module.task_defaults(ENV_ID) | settings
    own = module.Args(env_id=ENV_ID, compile=True, **defaults)
    (cls,) = (
        cls for cls in vars(module).values() if isinstance(cls, type) and hasattr(cls, "sample") and issubclass(cls, nn.Module)
    )
    agent = cls(own, OBS_DIM, ACTION_DIM, device, data)
    if method == "dtql_chunk":
        agent.ends = torch.zeros(ROWS, device=device)  # what they are does not change the time
    if method == "fql":
        split_loss(agent)
    return agent


def split_loss(agent: fql.FQL) -> None:
    """Give FQL a step for each part of its single loss, so that the parts can be measured; together they are its update."""
    parts = {"critic": agent.critic, "flow": agent.flow, "actor": agent.actor}
    for name, net in parts.items():
        optimizer = torch.optim.Adam(net.parameters(), agent.args.learning_rate, fused=True)
        setattr(agent, f"step_{name}", stacked.make_step(getattr(agent, f"{name}_loss"), optimizer, agent.args.compile))


def stages(agent: nn.Module) -> list[tuple[str, Callable[[], object], int]]:
    """The phases of a run: name, update, number of updates."""
    args = agent.args
    if hasattr(agent, "phases"):
        return [
            (update.__name__.removeprefix("update_"), update, epochs * args.steps_per_epoch) for update, epochs in agent.phases
        ]
    if not args.pretrain_steps:
        return [("training", agent.update, args.total_steps)]
    return [
        ("pretraining", functools.partial(agent.update, training=False), args.pretrain_steps),
        ("training", functools.partial(agent.update, training=True), args.total_steps - args.pretrain_steps),
    ]


def parts_of(agent: nn.Module, update: Callable[[], object]) -> dict[str, Callable[[], None]]:
    """The steps and Polyak updates of one update, by part, to be repeated with the same minibatch and noise."""
    calls, polyak_update = collections.defaultdict(list), stacked.polyak_update
    steps = {name: step for name, step in vars(agent).items() if name in PARTS}

    def record(name: str, *inputs: object) -> dict[str, Tensor]:
        if isinstance(agent, fql.FQL):
            batch, noise, time = inputs
            for i, (part, more) in enumerate({"step_critic": (), "step_flow": (time,), "step_actor": ()}.items()):
                calls[PARTS[part]].append(functools.partial(steps[part], batch, noise[:, i], *more))
        else:  # DQL's policy is its diffusion model
            part = "policy" if type(agent).__name__ == "DQL" and name == "step_denoiser" else PARTS[name]
            calls[part].append(functools.partial(steps[name], *inputs))
        return {}

    for name in steps:
        setattr(agent, name, functools.partial(record, name))
    stacked.polyak_update = lambda *inputs: calls[TARGETS].append(functools.partial(polyak_update, *inputs))
    try:
        update()
    finally:
        stacked.polyak_update = polyak_update
        for name, step in steps.items():
            setattr(agent, name, step)
    return {part: functools.partial(_call_all, functions) for part, functions in calls.items()}


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def measure_method(method: str, task: Task, batch_size: int | None, args: Args, device: torch.device) -> list[dict]:
    """A row for each stage: seconds per 1,000 updates and of their parts. At the method's own batch size if None."""
    module, data = import_method(method), Transitions(*task[:5], device)
    sizes = [name for name in ("batch_size", "diffusion_batch_size") if hasattr(module.Args, name)]
    agent = make_agent(method, data, args, device, **(dict.fromkeys(sizes, batch_size) if batch_size else {}))
    rows = []
    for stage, update, number in stages(agent):
        if batch_size and stage == "pretraining":
            continue  # nothing in it that training has not
        fast = stacked.fastest(update, agent, True, device.type == "cuda")
        parts = parts_of(agent, update)
        if device.type == "cuda":
            parts = {part: stacked.capture(function) for part, function in parts.items()}
        rates = in_turn({"all": fast, **parts}, args, device)
        seconds = {name: 1000 / statistics.median(values) for name, values in rates.items()}
        whole = seconds.pop("all")
        size = agent.args.diffusion_batch_size if stage == "denoiser" else agent.args.batch_size
        row = {"what": "method", "variant": method, "stage": stage, "batch": size, "own": batch_size is None}
        row |= {"seconds_per_1000": whole, "low": 1000 / max(rates["all"]), "high": 1000 / min(rates["all"])}
        row |= {**seconds, REST: max(0.0, whole - sum(seconds.values())), "updates": number}
        rows.append({name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()})
    return rows


def measure_acting(task: Task, args: Args, device: torch.device) -> list[dict]:
    """A row for each method: milliseconds per action in one state and in a full batch of them, seconds per trajectory."""
    torch.compiler.reset()
    agents = {method: make_agent(method, None, args, device) for method in args.methods}
    generator = torch.Generator(device).manual_seed(0)
    states = torch.zeros(1, evaluation.MAX_COPIES, OBS_DIM, device=device)
    act = lambda method, obs: agents[method].act(obs, generator).cpu().numpy()
    one = in_turn({method: functools.partial(act, method, states[:, :1]) for method in agents}, args, device)
    many = in_turn({method: functools.partial(act, method, states) for method in agents}, args, device)
    rows, envs = [], evaluation.LockstepEnvs(task.make_env, [0])
    for method in agents:
        chunk = getattr(agents[method].args, "chunk", 1)  # the number of actions that one call gives
        started = time.perf_counter()
        on_device = lambda obs, method=method: act(method, torch.as_tensor(obs, device=device))
        _, lengths = evaluation.run_episodes(envs, on_device, np.zeros((1, 1), int), chunk)
        seconds = time.perf_counter() - started
        row = {
            "what": "acting",
            "variant": method,
            "candidates": agents[method].act.num_candidates,
            "ms_per_action": 1000 / chunk / statistics.median(one[method]),
            f"ms_per_action_of_{evaluation.MAX_COPIES}": 1000 / chunk / evaluation.MAX_COPIES / statistics.median(many[method]),
            "seconds_per_trajectory": seconds,
            "length": int(lengths.item()),
        }
        if method in TABLE_2:
            row["paper_seconds_per_trajectory"] = TABLE_2[method][1]
        rows.append({name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()})
    envs.close()
    return rows


def whole_runs(rows: list[dict]) -> list[dict]:
    """A row for each method: hours of its published length at its own batch size, and the paper's numbers (Table 2)."""
    runs = []
    for method in dict.fromkeys(row["variant"] for row in rows if row["what"] == "method"):
        own = [row for row in rows if row["what"] == "method" and row["variant"] == method and row["own"]]
        hours = sum(row["seconds_per_1000"] * row["updates"] for row in own) / 3.6e6
        run = {"what": "run", "variant": method, "hours": float(f"{hours:.4g}"), "updates": sum(row["updates"] for row in own)}
        if method in TABLE_2:
            run |= {"paper_seconds_per_1000": TABLE_2[method][0], "paper_hours": TABLE_2[method][2]}
        runs.append(run)
    return runs


def draw_methods(rows: list[dict], args: Args, title: str, file: Path) -> None:
    """Figure 4: seconds per 1,000 updates by part; SRPO's three phases on top of each other."""
    rows = [row for row in rows if row["what"] == "method" and row["stage"] != "pretraining"]
    panels = {"own batch size": [row for row in rows if row["own"]]}
    for size in args.batch_sizes:
        panels[f"batches of {size}"] = [row for row in rows if row["batch"] == size]
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    bars = {}
    for axes, (name, shown) in zip(figure.subplots(1, len(panels)), panels.items()):
        for place, method in enumerate(args.methods):
            bottom, stages_seen = 0.0, set()
            for row in shown:
                if row["variant"] != method or row["stage"] in stages_seen:
                    continue
                stages_seen.add(row["stage"])
                for color, part in enumerate(dict.fromkeys([*PARTS.values(), TARGETS, REST])):
                    bars[part] = axes.bar(place, row.get(part, 0.0), bottom=bottom, color=f"C{color}", width=0.7)
                    bottom += row.get(part, 0.0)
        labels = [method.removesuffix("_continuous").removesuffix("_distill") for method in args.methods]
        axes.set(title=name, ylabel="seconds per 1,000 updates")
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(file, dpi=110)


def main(args: Args) -> list[dict]:
    """Measure, print and write the table and the picture; returns the table's rows."""
    for number in (*args.models, *args.batch_sizes, args.rounds):
        common.check(1 <= number <= 10**6, f"--models, --batch-sizes and --rounds must lie in [1, 10^6], not {number}")
    common.check(0 < args.seconds <= 1000, f"--seconds must lie in (0, 1000], not {args.seconds}")
    for method in args.methods:
        import_method(method)
    device = common.find_device(args.device)
    picture = Path(args.csv).with_suffix(".png")
    for file in (Path(args.csv), picture):
        common.check_writable(file, "--csv")  # now, not after all the measuring
    common.set_up_torch(common.Args(), device)
    name = common.device_name(device)
    print(f"{name}, {platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}")
    task, rows = random_task(), []

    def report(new: list[dict]) -> None:
        rows.extend(new)
        for row in new:
            print("   ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        common.write_atomically(Path(args.csv), common.to_csv(columns, rows))

    for models in args.models:
        for batch_size in args.batch_sizes:
            report(measure_training(task, models, batch_size, args, device))
    report(measure_evaluation(task, args, device))
    for method in args.methods:
        torch.compiler.reset()
        for batch_size in (None, *args.batch_sizes):
            own = [row for row in rows if row["what"] == "method" and row["variant"] == method and row["own"]]
            if not own or any(row["batch"] != batch_size for row in own):
                report(measure_method(method, task, batch_size, args, device))
    report(whole_runs(rows))
    report(measure_acting(task, args, device))
    if args.methods:
        draw_methods(rows, args, name, picture)
    return rows


if __name__ == "__main__":
    common.run(main, lambda: common.cli(Args))
