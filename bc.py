"""Behaviour cloning (BC): supervised regression from states to actions, the floor that every method should beat.

Three policies: a deterministic one (the usual baseline), the Gaussian of `dtql_continuous.py` trained on its NLL alone, and
DTQL's diffusion policy, from which actions are sampled. The latter two separate "clones better" from "Q improves".

It differs from `iql.py` in these points:

1. There is no critic, and no reward is read.
2. Observations are standardised, with the statistics of the data in the checkpoint.
3. The loss of the policy is one of three, without weights; its learning rate is constant.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], sigma (K, B, 1).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import evaluation
import stacked
import tasks
from best_of import BestOf
from common import check
from run_folder import Run
from stacked import Batch, Linear, Metrics, Mish, Transitions


@dataclass
class Args(common.Args):
    """Behaviour cloning. The defaults shown are those of the given task."""

    # Algorithm specific arguments
    policy: Literal["deterministic", "gaussian", "diffusion"] = "deterministic"
    """a tanh MLP trained on the squared error, a tanh Gaussian on its NLL, or DTQL's diffusion policy on Eq. 2"""
    layers: int = 2
    """hidden layers of the deterministic policy; the others have DTQL's networks"""
    width: int = 256
    """units of each of them"""
    normalize: bool = True
    """standardise observations with the data's mean and standard deviation"""
    learning_rate: float = 3e-4
    """of the policy"""
    sampling_steps: int = 18
    """steps of the ODE solver that samples the diffusion policy"""
    epochs: int = 3
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(1 <= self.layers <= 100, f"--layers must lie in [1, 100], not {self.layers}")
        check(1 <= self.width <= 100_000, f"--width must lie in [1, 100000], not {self.width}")
        check(1 <= self.sampling_steps <= 1000, f"--sampling-steps must lie in [1, 1000], not {self.sampling_steps}")


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4, batch_size=64)
    ogbench, long = tasks.is_ogbench(env_id), tasks.domain(env_id) in ("antmaze", "pen", "kitchen")
    sizes = dict(layers=4, width=512) if ogbench else {}  # as in FQL's paper
    return sizes | dict(epochs=1000, eval_every=100 if ogbench else 50, eval_episodes=50 if ogbench else 100 if long else 10)


# ---- EDM schedule (Appendix B; Karras et al. 2022) -------------------------------------------------------------------

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0


def c_skip(sigma: Tensor) -> Tensor:
    return SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)


def c_out(sigma: Tensor) -> Tensor:
    return sigma * SIGMA_DATA * torch.rsqrt(sigma**2 + SIGMA_DATA**2)


def c_in(sigma: Tensor) -> Tensor:
    return torch.rsqrt(sigma**2 + SIGMA_DATA**2)


def c_noise(sigma: Tensor) -> Tensor:
    return torch.log(sigma) / 4


def sample_sigma(u: Tensor) -> Tensor:
    """Noise levels from uniform u in [0, 1): log sigma ~ logistic(log sigma_data, 0.5), truncated by inverse CDF."""
    low, high = (1 / (1 + math.exp(-math.log(sigma / SIGMA_DATA) / 0.5)) for sigma in (SIGMA_MIN, SIGMA_MAX))
    return (SIGMA_DATA * torch.exp(0.5 * torch.logit(low + (high - low) * u))).clamp(SIGMA_MIN, SIGMA_MAX)


def heun_sampler(denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    """Algorithm 1 of Karras et al. (2022) with sigma(t) = t and rho = 7: Gaussian z (..., A) -> samples (..., A).

    `denoise` takes noisy actions (..., A) and sigma (..., 1).
    """
    ramp = torch.linspace(0, 1, steps, device=z.device)
    sigmas = (SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7
    x = sigmas[0] * z
    for i in range(steps - 1):
        sigma, following = (sigmas[j].expand(*z.shape[:-1], 1) for j in (i, i + 1))
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        x = x + (following - sigma) * (slope + (euler - denoise(euler, following)) / following) / 2
    # Euler's step down to no noise, where the slope is not defined, ends at the denoised action
    return denoise(x, sigmas[-1].expand(*z.shape[:-1], 1))


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN = 256


class DeterministicActor(nn.Module):
    """a = tanh(MLP(s)): obs (K, B, S) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int, layers: int, width: int):
        super().__init__()
        self.net = nn.Sequential(Linear(obs_dim, width), nn.ReLU())
        for _ in range(layers - 1):
            self.net.extend((Linear(width, width), nn.ReLU()))
        self.net.extend((Linear(width, action_dim), nn.Tanh()))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


class GaussianActor(nn.Module):
    """a = tanh(mean + std z): obs (K, B, S) -> mean, log_std (K, B, A), both before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(obs_dim, HIDDEN), nn.ReLU(),
            Linear(HIDDEN, HIDDEN), nn.ReLU(),
            Linear(HIDDEN, HIDDEN), nn.ReLU(),
            Linear(HIDDEN, 2 * action_dim),
        )  # fmt: skip
        for layer in self.net:
            if isinstance(layer, Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class Denoiser(nn.Module):
    """The diffusion policy mu_phi(a_t, t | s) (Appendix B): noisy actions (K, B, A), sigma (K, B, 1), obs (K, B, S)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(Linear(16, 32), Mish(), Linear(32, 16))
        self.net = nn.Sequential(
            Linear(action_dim + obs_dim + 16, HIDDEN),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, action_dim),
        )  # fmt: skip
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        angles = c_noise(sigma) * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        output = self.net(torch.cat((c_in(sigma) * noisy_actions, obs, embedding), -1))
        return c_skip(sigma) * noisy_actions + c_out(sigma) * output


ACTORS = {"deterministic": DeterministicActor, "gaussian": GaussianActor, "diffusion": Denoiser}


# ---- the agent ---------------------------------------------------------------------------------------------------------


class BC(nn.Module):
    """Behaviour cloning, for K models. The loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. `data` has standardised observations; deployment needs none."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            sizes = (args.layers, args.width) if args.policy == "deterministic" else ()
            return nn.ModuleDict({"actor": ACTORS[args.policy](obs_dim, action_dim, *sizes)})

        (self.actor,) = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True)

        self.step_actor = stacked.make_step(self.actor_loss, self.actor_optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, compile=args.compile)

    def actor_loss(self, batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """The squared error, averaged over minibatch and dimensions; the NLL; or Eq. 2."""
        obs, metrics = batch.obs, {}
        if self.args.policy == "deterministic":
            loss = (self.actor(obs) - batch.actions).square().mean((-1, -2))
        elif self.args.policy == "gaussian":
            mean, log_std = self.actor(obs)
            loss = gaussian_nll(mean, log_std, batch.actions)
            metrics["entropy"] = log_std.sum(-1).mean(-1) + 0.5 * mean.shape[-1] * math.log(2 * math.pi * math.e)
        else:  # Eq. 2 with w = 1 / c_out^2
            error = self.denoise(batch.actions + sigma * noise, sigma, obs) - batch.actions
            loss = (error / c_out(sigma)).square().mean((-1, -2))
        return loss, {"actor": loss, **metrics}

    def denoise(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        """The diffusion policy; predictions are clamped to [-1, 1]."""
        return self.actor(noisy_actions, sigma, obs).clamp(-1, 1)

    def update(self) -> Metrics:
        """One step of Adam. Tensors only, with static shapes."""
        shape = self.args.num_models, self.args.batch_size
        batch = self.data.sample(*shape)
        sigma = sample_sigma(torch.rand(*shape, 1, device=self.device))
        noise = torch.randn(*shape, self.action_dim, device=self.device)
        return self.step_actor(batch, sigma, noise)

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """Actions (K, n, 1, A) in states (K, n, S): the deterministic one, or a sample from noise z (K, n, 1, A)."""
        z = z.squeeze(2)
        if self.args.policy == "deterministic":
            actions = self.actor(obs)
        elif self.args.policy == "gaussian":
            mean, log_std = self.actor(obs)
            actions = torch.tanh(mean + torch.exp(log_std) * z)
        else:
            actions = heun_sampler(lambda noisy, sigma: self.denoise(noisy, sigma, obs), z, self.args.sampling_steps)
        return actions.unsqueeze(2)


def gaussian_nll(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """-E log pi(a | s) of the Gaussian before the tanh, whose Jacobian does not depend on theta; (K, B, A) -> (K,)."""
    z = (torch.atanh(actions / (1 + 1e-3)) - mean) * torch.exp(-log_std)
    return (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean(-1)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, BC, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = Transitions(task.obs, task.actions, task.rewards, task.terminals, task.next_obs, device)
    agent = BC(args, task.obs.shape[1], task.actions.shape[1], device, data)
    fastest = functools.cache(
        lambda: stacked.fastest(agent.update, agent, args.compile, args.cudagraphs and device.type == "cuda")
    )

    with Run(__file__, args, task, envs, agent) as run:
        while True:
            if run.evaluation_due():
                run.evaluate(agent.act)
            if run.ended:
                break
            update = fastest()
            for _ in range(run.until_log()):
                run.advance(update())
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
