"""Behaviour cloning (BC): supervised regression of the data's actions on its states, below which nothing should fall.

Three policies: a deterministic one (the usual baseline), the Gaussian of `dtql_continuous.py` trained on its NLL alone, and
DTQL's diffusion policy, from which actions are sampled. The latter two separate "clones better" from "Q improves".

It differs from `iql.py` in these points:

1. There is no critic, and no reward is read.
2. Observations are standardised, with the statistics of the data in the checkpoint.
3. The loss of the policy is one of three, without weights; its learning rate is constant.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], sigma (B, 1).
"""

import contextlib
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
import data
import stacked
from stacked import Batch, Mish, Net, Params


@dataclass
class Args(common.Args):
    """Behaviour cloning. The defaults shown are those of the given task."""

    # Algorithm specific arguments
    policy: Literal["deterministic", "gaussian", "diffusion"] = "deterministic"
    """a tanh MLP trained on the squared error, a tanh Gaussian on its NLL, or DTQL's diffusion policy on Eq. 2"""
    normalize: bool = True
    """standardise observations; DTQL does not"""
    learning_rate: float = 3e-4
    """of the policy"""
    sampling_steps: int = 18
    """steps of the ODE solver that samples the diffusion policy"""
    epochs: int = 3
    """training epochs"""


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4, batch_size=64)
    episodes = 100 if data.domain(env_id) in ("antmaze", "pen", "kitchen") else 10
    return dict(epochs=1000, eval_episodes=episodes) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(args, learning_rate="(0, inf)", sampling_steps="[1, 1000]")


# ---- EDM schedule (Appendix B; Karras et al. 2022) -------------------------------------------------------------------

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0

c_skip = lambda sigma: SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
c_out = lambda sigma: sigma * SIGMA_DATA * torch.rsqrt(sigma**2 + SIGMA_DATA**2)
c_in = lambda sigma: torch.rsqrt(sigma**2 + SIGMA_DATA**2)
c_noise = lambda sigma: torch.log(sigma) / 4


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
    for i in range(steps):
        sigma = sigmas[i].expand(*z.shape[:-1], 1)
        slope = (x - denoise(x, sigma)) / sigma
        if i == steps - 1:
            return x - sigma * slope  # down to no noise, where the slope is not defined: Euler's step
        following = sigmas[i + 1].expand_as(sigma)
        euler = x + (following - sigma) * slope
        x = x + (following - sigma) * (slope + (euler - denoise(euler, following)) / following) / 2
    raise AssertionError("no steps")


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN = 256


class DeterministicActor(nn.Module):
    """a = tanh(MLP(s)): obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, action_dim), nn.Tanh(),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


class GaussianActor(nn.Module):
    """a = tanh(mean + std z): obs (B, S) -> mean, log_std (B, A), both before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * action_dim),
        )  # fmt: skip
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class Denoiser(nn.Module):
    """The diffusion policy mu_phi(a_t, t | s) (Appendix B): noisy actions (B, A), sigma (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), Mish(), nn.Linear(32, 16))
        self.net = nn.Sequential(
            nn.Linear(action_dim + obs_dim + 16, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, action_dim),
        )  # fmt: skip
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        angles = c_noise(sigma) * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        output = self.net(torch.cat((c_in(sigma) * noisy_actions, obs, embedding), -1))
        return c_skip(sigma) * noisy_actions + c_out(sigma) * output


ACTORS = {"deterministic": DeterministicActor, "gaussian": GaussianActor, "diffusion": Denoiser}


# ---- losses of one model ---------------------------------------------------------------------------------------------


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Eq. 2 with w = 1 / c_out^2, mean over dimensions too."""
    return ((denoise(actions + sigma * noise, sigma, obs) - actions) / c_out(sigma)).square().mean()


def gaussian_nll(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """-E log pi(a | s) of the Gaussian before the tanh; the tanh's Jacobian does not depend on theta."""
    z = (torch.atanh(actions / (1 + 1e-3)) - mean) * torch.exp(-log_std)
    return (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean()


# ---- the agent ---------------------------------------------------------------------------------------------------------


class BC:
    """Behaviour cloning, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        mean, std = np.zeros(task.obs.shape[1], np.float32), np.ones(task.obs.shape[1], np.float32)
        if args.normalize and len(task.obs):  # a policy that is deployed loads them from its checkpoint
            mean, std = task.obs.mean(0), task.obs.std(0) + 1e-3
        self.data = stacked.Transitions(
            (task.obs - mean) / std, task.actions, task.rewards, task.terminals, (task.next_obs - mean) / std, device
        )
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.actor = Net(lambda: ACTORS[args.policy](*dims), device)

        nets = {"actor": self.actor}
        metrics = ["actor", "entropy"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile)
        self.models.optimize(self.actor_loss, "actor", lr=args.learning_rate)
        self.mean = self.models.buffers["obs_mean"] = torch.as_tensor(mean, device=device)
        self.std = self.models.buffers["obs_std"] = torch.as_tensor(std, device=device)
        self.best_of = stacked.BestOf(self.sample, None, ("actor",), 1, task.action_low, task.action_high, device, args.compile)

    def denoise(self, params: Params) -> Callable[..., Tensor]:
        """The diffusion policy with `params`; what it predicts is clamped to the actions there are."""
        return lambda *inputs: self.actor(params, *inputs).clamp(-1, 1)

    def actor_loss(self, p: dict[str, Params], batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Params]:
        """The squared error, mean over batch and dimensions; the NLL; or Eq. 2."""
        metrics = {}
        if self.args.policy == "deterministic":
            loss = (self.actor(p["actor"], batch.obs) - batch.actions).square().mean()
        elif self.args.policy == "gaussian":
            mean, log_std = self.actor(p["actor"], batch.obs)
            loss = gaussian_nll(mean, log_std, batch.actions)
            metrics["entropy"] = log_std.sum(-1).mean() + 0.5 * mean.shape[-1] * math.log(2 * math.pi * math.e)
        else:
            loss = denoising_loss(self.denoise(p["actor"]), batch.actions, batch.obs, sigma, noise)
        return loss, {"actor": loss, **metrics}

    def update(self) -> None:
        """One step of Adam. Tensors only, of static shapes."""
        shape = self.models.num_models, self.args.batch_size
        batch = self.data.sample(*shape)
        sigma = sample_sigma(torch.rand(*shape, 1, device=self.device))
        noise = torch.randn(*shape, self.action_dim, device=self.device)
        self.models.step(self.actor_loss, batch, sigma, noise)

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) in raw observations (..., S): the deterministic one, or a sample made from Gaussian noise z."""
        obs = (obs - self.mean) / self.std
        if self.args.policy == "deterministic":
            return self.actor(p["actor"], obs)
        if self.args.policy == "gaussian":
            mean, log_std = self.actor(p["actor"], obs)
            return torch.tanh(mean + torch.exp(log_std) * z)
        denoise = self.denoise(p["actor"])
        return heun_sampler(lambda noisy, sigma: denoise(noisy, sigma, obs), z, self.args.sampling_steps)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = BC(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: BC, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
    """Episodes of all models in lock-step."""
    act = lambda obs, generator: agent.best_of(agent.models.params, obs, generator)
    return common.evaluate(task, envs, act, agent.args, epoch, agent.device)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    check_args(args)
    device = common.find_device(args)
    task = data.task_of(args)
    envs = common.make_lockstep_envs(task, args)
    common.seed_everything(args.seed, args.torch_deterministic)
    agent = BC(args, task, device)
    prepare = functools.cache(lambda: agent.models.prepare(agent.update, args.cudagraphs and args.cuda))

    with contextlib.closing(envs), common.Run(__file__, args, task, agent.models, device) as run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, task, envs, run.epoch))
            if run.step == args.total_steps:
                break
            update = prepare()
            for _ in range(run.until_log()):
                update()
                run.advance()
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
