"""The paper's 2-D bandits: what the diffusion trust region does, and what KL regularisation does instead.

    python toy_bandit.py              Figure 6: trust region and KL on five problems, and between them FAN's flow anchor
    python toy_bandit.py --figure 1   the trust-region loss over the action plane at five noise levels
    python toy_bandit.py --figure 2   KL without any Q
    python toy_bandit.py --figure 3   columns 1 and 5 of Figure 6

One constant state, two-dimensional actions on their raw scale. The whole method in one page: the diffusion model
(Eq. 2), IQL's critic (Eqs. 6, 7), and the one-step policy with Eq. 4 or Eq. 12 beside -Q (Eq. 5). The flow anchor is the
trust region with flow matching in place of Eqs. 2 and 4: without EDM's noise levels and without the weight 1 / c_out^2.
"""

import copy
import io
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import common
import evaluation


@dataclass
class Args:
    """Draw a figure of the paper's 2-D bandits, with a table of what can be counted."""

    figure: Literal[1, 2, 3, 6] = 6
    """which figure of the paper"""
    seed: int = 0
    """seed of data, networks and noise"""
    out_dir: str = "figures"
    """folder for the picture (PNG) and the table (CSV)"""


SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0  # EDM (Appendix B)
SIGMA_GEN = 2.5  # noise level at which the implicit policy generates in one step
HIDDEN, LEARNING_RATE, EXPECTILE, GAMMA = 128, 3e-3, 0.95, 0.99
PRETRAINING, ITERATIONS = 2500, 1000
BATCH, KL_BATCH = 256, 1024  # a difference of two learnt scores is noisy
POLICY_RATE = 1e-3  # of the Gaussian policy: slower than what it follows
FAKE_STEPS = 2  # to one step of the policy, which it must keep up with
ON_DATA = 0.5  # a sample nearer than this to a data point lies on the data
FLOW_STD = 7.0  # of the flow's noise: that of the data
DRAWS = 64  # of the noise, for each action of Figure 1
KL_FLOOR = 0.2  # of the weight's denominator: without it the step explodes on the data


# ---- data and rewards --------------------------------------------------------------------------------------------------

GRID = torch.cartesian_prod(*[torch.linspace(-10, 10, 5)] * 2)  # the modes of the 25 Gaussians
TOP_LEFT = torch.tensor([-10.0, 10.0])


def gaussians(n: int = 10_000) -> Tensor:
    """25 Gaussians of std 0.3 on a grid, (n, 2)."""
    return GRID[torch.randint(len(GRID), (n,))] + 0.3 * torch.randn(n, 2)


def swiss_roll(n: int = 10_000) -> Tensor:
    """A spiral of radius = angle in [1.5 pi, 4.5 pi] with noise 0.1, (n, 2)."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, 1))
    return angle * torch.cat((angle.cos(), angle.sin()), 1) + 0.1 * torch.randn(n, 2)


def distance(a: Tensor) -> Tensor:
    return a.norm(dim=-1)


def top_left_doubled(a: Tensor) -> Tensor:
    return distance(a) * (1 + ((a - TOP_LEFT).norm(dim=-1) < 1.5))


def nearness(a: Tensor, furthest: float) -> Tensor:
    return furthest - distance(a)


@dataclass
class Problem:
    """A column of Figure 6, with the weight of each regularisation against Q and the length of KL's training."""

    title: str
    sample: Callable[[], Tensor]
    reward: Callable[[Tensor], Tensor]
    trust_region_weight: float
    anchor_weight: float
    kl_weight: float
    kl_iterations: int


PROBLEMS = [
    Problem("four best corners", gaussians, distance, 0.5, 0.02, 1.0, 2500),
    Problem("top left doubled", gaussians, top_left_doubled, 1.0, 0.1, 1.0, 3500),
    Problem("centre best", gaussians, lambda a: nearness(a, 15.5), 1.0, 0.05, 0.5, 3500),
    Problem("outer end best", swiss_roll, distance, 1.0, 0.05, 2.0, 1500),
    Problem("inner end best", swiss_roll, lambda a: nearness(a, 15.5), 1.0, 0.5, 3.0, 1500),
]


# ---- networks ------------------------------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.SiLU, norm: bool = False) -> nn.Sequential:
    """Three hidden layers. SiLU, not the paper's Mish: much the same curve in a sixth of the time on a CPU."""
    layers = []
    for width in (inputs, HIDDEN, HIDDEN):
        layers += [nn.Linear(width, HIDDEN), *([nn.LayerNorm(HIDDEN)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


def c_out(sigma: Tensor) -> Tensor:
    return sigma * SIGMA_DATA * torch.rsqrt(sigma**2 + SIGMA_DATA**2)


class Denoiser(nn.Module):
    """mu_phi(a_t, t) with EDM's preconditioning (Appendix B): (B, 2), sigma (B, 1) -> (B, 2)."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2 + 16, 2)
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7))

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma**2 + SIGMA_DATA**2
        angles = torch.log(sigma) / 4 * self.frequencies
        output = self.net(torch.cat((noisy * torch.rsqrt(variance), angles.sin(), angles.cos()), -1))
        return SIGMA_DATA**2 / variance * noisy + c_out(sigma) * output


class Velocity(nn.Module):
    """The flow's v(x_t, t), from noise at t = 0 to data at t = 1: (B, 2), time (B, 1) -> (B, 2)."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2 + 1, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat((x, time), -1))


class GaussianPolicy(nn.Module):
    """a = scale tanh(mean + std z), the policy of the trust-region and flow-anchor rows; it starts wide."""

    def __init__(self, scale: float):
        super().__init__()
        self.net, self.scale = mlp(1, 4, nn.ReLU), scale
        nn.init.constant_(self.net[-1].bias[2:], 2.0)

    def forward(self, z: Tensor) -> Tensor:
        mean, std = self.net(torch.zeros(1, 1)).chunk(2, -1)
        std = torch.sigmoid(std)  # below 1: with much more, tanh would put the mass into all corners and leave it there
        return self.scale * torch.tanh(mean + std * z)


class ImplicitPolicy(Denoiser):
    """a = D_theta(sigma_gen z, sigma_gen), the policy of the KL row; it starts as the diffusion model (theta = phi)."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(SIGMA_GEN * z, torch.full((1, 1), SIGMA_GEN).expand(len(z), 1))


# ---- losses --------------------------------------------------------------------------------------------------------------


def sample_sigma(n: int, median: float = SIGMA_DATA, scale: float = 0.5) -> Tensor:
    """log sigma ~ logistic(log median, scale), truncated, (n, 1); the defaults are those of Appendix B."""
    low, high = (1 / (1 + (median / sigma) ** (1 / scale)) for sigma in (SIGMA_MIN, SIGMA_MAX))
    return median * torch.exp(scale * torch.logit(low + (high - low) * torch.rand(n, 1)))


def denoising_loss(denoiser: nn.Module, actions: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 2 (actions from the data) and the trust-region loss, Eq. 4 (actions of the policy)."""
    denoised = denoiser(actions + sigma * torch.randn_like(actions), sigma)
    return ((denoised - actions) / c_out(sigma)).square().mean()


def anchor_loss(velocity: nn.Module, actions: Tensor, z: Tensor | None = None) -> Tensor:
    """Flow matching along straight lines (actions from the data); FAN's anchor (those of the policy, with their own z)."""
    time, noise = torch.rand(len(actions), 1), FLOW_STD * (torch.randn_like(actions) if z is None else z)
    return (velocity((1 - time) * noise + time * actions, time) - (actions - noise)).square().mean()


def kl_loss(real: nn.Module, fake: nn.Module, actions: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 12 by its gradient, the weighted difference of scores (Algorithm 2)."""
    with torch.no_grad():
        noisy = actions + sigma * torch.randn_like(actions)
        pred_real, pred_fake = real(noisy, sigma), fake(noisy, sigma)
        weight = (actions - pred_real).abs().mean(-1, keepdim=True).clamp(min=KL_FLOOR)
        target = actions - (pred_fake - pred_real) / weight
    return 0.5 * (actions - target).square().mean()


# ---- training ------------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """IQL's critic (Eqs. 6, 7) of the one state, which is always the next one too."""

    def __init__(self, bound: float):
        """`bound`: the largest |action| of the data, beyond which Q knows nothing and only the implicit policy can go."""
        super().__init__()
        self.value, self.qs = mlp(1, 1), nn.ModuleList([mlp(2, 1, norm=True), mlp(2, 1, norm=True)])
        self.bound = bound

    def q(self, actions: Tensor) -> Tensor:
        """The mean of min(Q1, Q2)."""
        bounded = actions.clamp(-self.bound, self.bound)
        return torch.cat([q(bounded) for q in self.qs], 1).amin(1).mean()

    def loss(self, actions: Tensor, rewards: Tensor) -> Tensor:
        v, q = self.value(torch.zeros(1, 1)).squeeze(), torch.cat([q(actions) for q in self.qs], 1)
        u = q.detach().amin(1) - v
        value_loss = ((EXPECTILE - (u < 0).float()).abs() * u**2).mean()  # Eq. 6
        target = rewards + GAMMA * v.detach()  # Eq. 7; never terminal, so that Q grows to the order of a thousand
        return value_loss + (target[:, None] - q).square().mean(0).sum()


class Trainer:
    """Adam for a network; its rate falls to 0 over the last third of `steps`, so that the noise dies down."""

    def __init__(self, net: nn.Module, steps: int, rate: float = LEARNING_RATE):
        self.params = list(net.parameters())
        self.optimizer = torch.optim.Adam(self.params, rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, 3 * (1 - step / steps)))

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward(inputs=self.params)
        self.optimizer.step()
        self.schedule.step()


def start(problem: Problem, model: type[nn.Module] = Denoiser) -> tuple[Tensor, nn.Module, Critic]:
    """Data (10000, 2), the diffusion or flow model and the critic, both untrained."""
    data = problem.sample()
    return data, model(), Critic(data.abs().max().item())


def minibatches(problem: Problem, data: Tensor, iterations: int, size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Actions (size, 2) of the data with their rewards (size,)."""
    rewards = problem.reward(data)
    for _ in tqdm(range(iterations), desc=f"{what}, {problem.title}", leave=False):
        batch = torch.randint(len(data), (size,))
        yield data[batch], rewards[batch]


def pretrain(
    problem: Problem, data: Tensor, denoiser: Denoiser, trainer: Trainer, size: int, noise: tuple[float, ...] = ()
) -> None:
    """Clone the data with the diffusion model (Eq. 2)."""
    for actions, _ in minibatches(problem, data, PRETRAINING, size, "diffusion"):
        trainer.step(denoising_loss(denoiser, actions, sample_sigma(size, *noise)))


def trust_region(problem: Problem, flow: bool = False) -> tuple[Tensor, GaussianPolicy]:
    """Algorithm 1: diffusion model, critic, and a policy held by Eq. 4; with `flow` by FAN's anchor. Returns data and policy."""
    data, model, critic = start(problem, Velocity if flow else Denoiser)
    weight = problem.anchor_weight if flow else problem.trust_region_weight

    def regulariser(actions: Tensor, z: Tensor | None = None) -> Tensor:
        return anchor_loss(model, actions, z) if flow else denoising_loss(model, actions, sample_sigma(len(actions)))

    model_trainer, critic_trainer = (Trainer(net, PRETRAINING + ITERATIONS) for net in (model, critic))
    for actions, rewards in minibatches(problem, data, PRETRAINING, BATCH, "flow" if flow else "diffusion"):
        model_trainer.step(regulariser(actions))
        critic_trainer.step(critic.loss(actions, rewards))
    policy = GaussianPolicy(1.2 * critic.bound)  # beyond the data: at the edge tanh is flat, and nothing pulls back
    policy_trainer = Trainer(policy, ITERATIONS, POLICY_RATE)
    for actions, rewards in minibatches(problem, data, ITERATIONS, BATCH, "flow anchor" if flow else "trust region"):
        z = torch.randn(BATCH, 2)
        own = policy(z)
        critic_trainer.step(critic.loss(actions, rewards))  # Eqs. 6, 7
        model_trainer.step(regulariser(actions))  # Eq. 2
        policy_trainer.step(weight * regulariser(own, z) - critic.q(own))  # Eqs. 4 and 5
    return data, policy


def kl(problem: Problem, with_q: bool) -> tuple[Tensor, ImplicitPolicy]:
    """Algorithm 2: a policy held by Eq. 12, which takes a second diffusion model, the fake score, of the policy's actions."""
    data, denoiser, critic = start(problem)
    iterations = problem.kl_iterations if with_q else PRETRAINING
    # To weigh modes that lie 5 apart against each other takes noise of that size, where no Q chooses among them
    noise = () if with_q else (1.0, 0.7)
    pretrain(problem, data, denoiser, Trainer(denoiser, PRETRAINING), KL_BATCH, noise)
    policy, fake = ImplicitPolicy(), copy.deepcopy(denoiser)
    policy.load_state_dict(denoiser.state_dict())  # theta = phi, and xi = phi
    fake_trainer = Trainer(fake, FAKE_STEPS * iterations)
    policy_trainer, critic_trainer = Trainer(policy, iterations), Trainer(critic, iterations)
    for actions, rewards in minibatches(problem, data, iterations, KL_BATCH, "KL"):
        own = policy(torch.randn(KL_BATCH, 2))
        for _ in range(FAKE_STEPS):
            others = policy(torch.randn(KL_BATCH, 2)).detach()
            fake_trainer.step(denoising_loss(fake, others, sample_sigma(KL_BATCH, *noise)))
        loss = problem.kl_weight * kl_loss(denoiser, fake, own, sample_sigma(KL_BATCH, *noise))  # Eq. 12
        if with_q:
            critic_trainer.step(critic.loss(actions, rewards))  # Eqs. 6, 7
            loss = loss - critic.q(own)  # Eq. 5
        policy_trainer.step(loss)
    return data, policy


METHODS: dict[str, Callable[[Problem], tuple[Tensor, nn.Module]]] = {
    "trust region": trust_region,
    "flow anchor": lambda problem: trust_region(problem, flow=True),
    "KL": lambda problem: kl(problem, with_q=True),
    "KL without Q": lambda problem: kl(problem, with_q=False),
}


# ---- counting and drawing ------------------------------------------------------------------------------------------------


def count(problem: Problem, data: Tensor, samples: Tensor) -> dict[str, float]:
    """What a picture shows, in numbers; shares in per cent. On the data: nearer than 0.5 to a data point."""
    rewards, best = problem.reward(samples), problem.reward(data).max()
    result = {"on data": 100 * (torch.cdist(samples, data).amin(1) < ON_DATA).float().mean()}
    if problem.sample is gaussians:
        near = torch.cdist(samples, GRID)
        hits = torch.bincount(near.argmin(1)[near.amin(1) < 1.5], minlength=len(GRID)).float() / len(samples)
        of_modes = problem.reward(GRID)
        result["modes"] = (hits > 0.002).sum()
        result["corners"] = (hits[distance(GRID) > 14] > 0.01).sum()
        result["in the best mode"] = 100 * hits[of_modes > of_modes.max() - 1e-3].max()
    else:  # stretches of the roll, a tenth of its angle each
        angle = samples.norm(dim=-1)[torch.cdist(samples, data).amin(1) < ON_DATA]
        parts = torch.histc((angle - 1.5 * math.pi) / (3 * math.pi), 10, 0, 1) / len(samples)
        result["tenths of the roll"] = (parts > 0.002).sum()
    result["mean reward"] = rewards.mean()
    result["of the best reward"] = 100 * rewards.mean() / best
    return {name: round(float(value), 1) for name, value in result.items()}


def draw(axes: plt.Axes, data: Tensor, colours: np.ndarray | str, samples: Tensor | None, title: str) -> object:
    points = axes.scatter(*data.T.numpy(), c=colours, s=2, rasterized=True)
    if samples is not None:
        axes.scatter(*samples.T.numpy(), c="red", s=6, linewidths=0, alpha=0.5, rasterized=True)
    axes.set(aspect="equal", title=title, xlim=(-16, 16), ylim=(-16, 16))
    axes.tick_params(labelsize=7)
    return points


def sampled(job: tuple[int, str, int]) -> tuple[Tensor, Tensor]:
    """Data of a problem and 1000 samples of the policy trained on it: (problem, method, seed)."""
    index, method, seed = job
    torch.manual_seed(seed)
    data, policy = METHODS[method](PROBLEMS[index])
    with torch.no_grad():
        return data, policy(torch.randn(1000, 2))


def quiet_worker() -> None:
    """Terminals send signals to all processes: the main one decides, and kills its workers. They also end when it dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # one of its own: a shared one would stay locked if its holder were killed
    # An idle worker would not notice by itself: it and its siblings hold the pipe open on which it waits
    evaluation.end_with_parent()


def sample_all(jobs: list[tuple[int, str, int]]) -> list[tuple[Tensor, Tensor]]:
    """`sampled` of all jobs, one on each core: the networks are too small to share cores."""
    torch.set_num_threads(1)
    workers = min(len(jobs), os.cpu_count())
    with ProcessPoolExecutor(workers, evaluation.process_context(), quiet_worker) as pool:
        try:
            return list(tqdm(pool.map(sampled, jobs), total=len(jobs), unit="training", desc="all"))
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def comparison(columns: list[int], methods: list[str], seed: int, report: Callable) -> plt.Figure:
    """Figures 3 and 6: the samples of each method's policy, over the data coloured by reward."""
    size = (3 * len(columns) + 1, 3.1 * len(methods))
    figure, grid = plt.subplots(len(methods), len(columns), figsize=size, layout="constrained")
    jobs = [(index, method, seed) for index in columns for method in methods]
    for axes, (index, method, _), (data, samples) in zip(grid.T.ravel(), jobs, sample_all(jobs)):
        problem = PROBLEMS[index]
        report(method, problem.title, count(problem, data, samples))
        points = draw(axes, data, problem.reward(data).numpy(), samples, f"{method}: {problem.title}")
    bar = figure.colorbar(points, ax=grid, shrink=0.6, label="reward", ticks=points.get_clim())
    bar.ax.set_yticklabels(["low", "high"])
    return figure


def coverage(seed: int, report: Callable) -> plt.Figure:
    """Figure 2: KL without any Q covers the data."""
    figure, grid = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
    jobs = [(index, "KL without Q", seed) for index in (0, 3)]
    for axes, (index, *_), (data, samples) in zip(grid, jobs, sample_all(jobs)):
        name = "25 Gaussians" if index == 0 else "Swiss roll"
        report("KL without Q", name, count(PROBLEMS[index], data, samples))
        draw(axes, data, "tab:green", samples, f"KL without Q: {name}")
    return figure


def heat_maps(report: Callable) -> plt.Figure:
    """Figure 1: the trust-region loss of each action at five noise levels."""
    levels = (0.4, 0.8, 1.5, 3.0, 5.0)
    figure, grid = plt.subplots(2, 6, figsize=(17, 6), layout="constrained")
    axis = torch.linspace(-16, 16, 129)
    plane = torch.cartesian_prod(axis, axis)
    for row, problem in zip(grid, (PROBLEMS[0], PROBLEMS[3])):
        data, denoiser, _ = start(problem)
        pretrain(problem, data, denoiser, Trainer(denoiser, PRETRAINING), KL_BATCH)
        name = "25 Gaussians" if problem.sample is gaussians else "Swiss roll"
        draw(row[0], data, "tab:green", None, name)
        near = torch.cdist(plane, data).amin(1)
        for axes, level in zip(row[1:], levels):
            with torch.no_grad():
                losses = [
                    ((denoiser(plane + level * torch.randn_like(plane), torch.full((len(plane), 1), level)) - plane) / level)
                    .square()
                    .mean(1)
                    for _ in range(DRAWS)
                ]
            loss = torch.stack(losses).mean(0)
            report(
                f"t = {level:g}",
                name,
                {
                    "loss on the data": round(loss[near < 0.2].mean().item(), 3),
                    "0.5-1 away": round(loss[(near > 0.5) & (near < 1)].mean().item(), 3),
                    "over 3 away": round(loss[near > 3].mean().item(), 3),
                },
            )
            image = axes.imshow(loss.reshape(129, 129).T.clamp(min=1e-3).log().numpy(), origin="lower", extent=(-16, 16, -16, 16))
            axes.set(title=f"{name}: t = {level:g}")
            bar = figure.colorbar(image, ax=axes, shrink=0.45, ticks=image.get_clim(), label="log loss")
            bar.ax.set_yticklabels(["low", "high"])
    return figure


def main(args: Args) -> list[dict[str, object]]:
    """Draw the figure; prints and returns the table. Raises UserError if it cannot be written."""
    common.check(0 <= args.seed < 2**63, f"--seed must lie in [0, 2^63), not {args.seed}")
    torch.manual_seed(args.seed)
    name = Path(args.out_dir) / f"figure{args.figure}_seed{args.seed}"
    common.check_writable(name.with_suffix(".csv"), "--out-dir")
    rows: list[dict[str, object]] = []

    def report(method: str, problem: str, numbers: dict[str, float]) -> None:
        rows.append({"figure": args.figure, "seed": args.seed, "method": method, "problem": problem, **numbers})
        tqdm.write(f"{method:14} {problem:18} " + "   ".join(f"{name} {value:g}" for name, value in numbers.items()))

    if args.figure == 1:
        figure = heat_maps(report)
    elif args.figure == 2:
        figure = coverage(args.seed, report)
    elif args.figure == 3:
        figure = comparison([0, 4], ["trust region", "KL"], args.seed, report)
    else:
        figure = comparison([0, 1, 2, 3, 4], ["trust region", "flow anchor", "KL"], args.seed, report)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    common.write_atomically(name.with_suffix(".png"), picture.getvalue())
    common.write_atomically(
        name.with_suffix(".csv"), common.to_csv(list(dict.fromkeys(key for row in rows for key in row)), rows)
    )
    print(f"{name}.png, {name}.csv")
    return rows


if __name__ == "__main__":
    common.run(main, lambda: common.cli(Args))
