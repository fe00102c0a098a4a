"""DTQL, offline and then online: `dtql_continuous.py`, which goes on learning in the environment.

Then every update follows a step with a sample of the policy, on minibatches of data and online transitions. What is offline:

A diffusion policy only clones behaviour; a one-step policy is deployed. The one-step policy maximises an IQL critic
and is held near the data by a diffusion trust-region loss. Equation, section and appendix numbers are those of Chen,
Wang and Zhou, "Diffusion Policies Creating a Trust Region for Offline Reinforcement Learning" (2024).

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], sigma (K, B, 1), rewards, terminals and
V (K, B), both Qs (K, 2, B). The networks are written for one model and stacked; a loss is (K,), one value per model.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import evaluation
import online
import stacked
import tasks
from best_of import BestOf, repeat_states
from common import check
from run_folder import Run
from stacked import Batch, LayerNorm, Linear, Metrics, Mish, Transitions


@dataclass
class Args(online.Args):
    """DTQL, offline and then online. The defaults shown are those of the given task (Table 4 of the paper)."""

    sweep = ("alpha", "expectile")

    # Algorithm specific arguments
    alpha: float | tuple[float, ...] = 1.0
    """weight of the trust-region loss (Eq. 5)"""
    expectile: float | tuple[float, ...] = 0.9
    """expectile of the value loss, the paper's tau (Eq. 6)"""
    nll: bool = True
    """add the negative log-likelihood of the data's actions to the policy loss (Section 2.4)"""
    policy: Literal["gaussian", "implicit"] = "gaussian"
    """one-step policy: a tanh Gaussian, or a generator with the architecture of the diffusion policy"""
    learning_rate: float = 3e-4
    """of the diffusion policy and the one-step policy; Q and V always use 3e-4"""
    lr_decay: bool = False
    """decay all learning rates to 0 along a cosine over the training epochs"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs, the paper's 1 - rho"""
    pretrain_epochs: int = 1
    """epochs that train only the critic and the diffusion policy, before the training epochs"""
    num_candidates: int = 1024
    """actions sampled from the policy in each state, one of which is taken with probability softmax(Q) (Appendix D)"""

    offline_ratio: float | None = None
    """share of the data in each minibatch; default: data and online transitions are equally likely"""
    freeze_denoiser: bool = False
    """leave the diffusion policy as the offline phase left it"""
    online_alpha: float | None = None
    """weight of the trust-region loss in the online phase; default: --alpha"""
    online_nll: bool = True
    """go on with --nll in the online phase"""
    critic: Literal["iql", "td"] = "iql"
    """critic of the online phase: as offline, or Q(s', pi(s')) in place of V(s')"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 <= alpha < math.inf for alpha in self.values("alpha")), f"--alpha must be at least 0, not {self.alpha}")
        check(all(0 < tau < 1 for tau in self.values("expectile")), f"--expectile must lie in (0, 1), not {self.expectile}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")
        check(0 <= self.pretrain_epochs <= 1e9, f"--pretrain-epochs must not be negative, not {self.pretrain_epochs}")
        check(1 <= self.num_candidates <= 1e6, f"--num-candidates must be at least 1, not {self.num_candidates}")
        check(self.offline_ratio is None or 0 <= self.offline_ratio <= 1, "--offline-ratio must lie in [0, 1]")
        check(self.online_alpha is None or 0 <= self.online_alpha < math.inf, "--online-alpha must be at least 0")
        if self.policy == "implicit":
            check(not self.nll, "--policy implicit has no likelihood, which the NLL term needs: add --no-nll")


# Table 4: alpha, expectile, NLL, training epochs, learning rate, lr decay
TABLE_4 = {
    "halfcheetah-medium-v2": (1, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-expert-v2": (50, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-v2": (5, 0.7, False, 1000, 1e-4, True),
    "hopper-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-expert-v2": (20, 0.7, False, 1000, 3e-4, False),
    "walker2d-medium-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-expert-v2": (5, 0.7, False, 1000, 3e-4, True),
    "antmaze-umaze-v0": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v0": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-medium-diverse-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-large-play-v0": (1, 0.9, True, 350, 3e-4, False),
    "antmaze-large-diverse-v0": (0.5, 0.9, True, 300, 3e-4, False),
    "antmaze-umaze-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v2": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-medium-diverse-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-diverse-v2": (0.5, 0.9, True, 500, 3e-4, False),
    "pen-human-v1": (1500, 0.9, False, 300, 3e-5, True),
    "pen-cloned-v1": (1500, 0.7, False, 200, 1e-5, False),
    "kitchen-complete-v0": (200, 0.7, False, 500, 1e-4, True),
    "kitchen-partial-v0": (100, 0.7, False, 1000, 1e-4, True),
    "kitchen-mixed-v0": (200, 0.7, False, 500, 3e-4, True),
}
OTHERS = (5, 0.7, False, 1000, 3e-4, False)  # tasks that are not in the paper
MANIPULATION = (10, 0.9, False, 1000, 3e-4, False)  # OGBench's cube, scene and puzzle: DTQL's on cube-single (results/ogbench)
AS_ANTMAZE = (1, 0.9, True, 1000, 3e-4, False)  # OGBench's mazes and soccer: a guess (results/README.md)


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 6, "dtql/pointmaze-large-v0": 12}.get(env_id)
        if epochs is None:
            return {}
        # Larger mazes need more updates; smaller batches let three mazes finish in half an hour on two cores
        return dict(pretrain_epochs=2, epochs=epochs, eval_every=epochs // 3, batch_size=64, num_candidates=64, lr_decay=True)
    name = tasks.d4rl_id(env_id) or ""  # Minari's data of the same task uses the same row
    ogbench = tasks.is_ogbench(env_id)
    others = OTHERS if not ogbench else MANIPULATION if env_id.startswith(tasks.MANIPULATION) else AS_ANTMAZE
    alpha, expectile, nll, epochs, learning_rate, lr_decay = TABLE_4.get(name, others)
    return dict(
        alpha=float(alpha),
        expectile=expectile,
        nll=nll,
        epochs=epochs,
        learning_rate=learning_rate,
        lr_decay=lr_decay,
        pretrain_epochs=50,
        normalize=others is AS_ANTMAZE,
        num_candidates=64 if others is MANIPULATION else 1024,
        batch_size=2048 if name.startswith("antmaze") else 256,
        gamma=0.995 if others is AS_ANTMAZE else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if name.startswith(("antmaze", "pen", "kitchen")) else 10,
    )


# ---- EDM schedule (Appendix B; Karras et al. 2022) -------------------------------------------------------------------

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
SIGMA_GEN = 2.5  # noise level at which the implicit policy generates an action in one step


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


# ---- networks (Appendix D), written for one model --------------------------------------------------------------------

HIDDEN = 256


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


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(obs_dim + action_dim, HIDDEN), LayerNorm(HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), LayerNorm(HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), LayerNorm(HIDDEN), Mish(),
            Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (K, B, S) -> (K, B)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(obs_dim, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class GaussianActor(nn.Module):
    """The one-step policy a = tanh(mean + std z): obs (K, B, S) -> mean, log_std (K, B, A), both before the tanh."""

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


class ImplicitActor(Denoiser):
    """The one-step policy a = D_theta(sigma_gen z, sigma_gen | s), with the diffusion policy's architecture."""

    def forward(self, obs: Tensor, z: Tensor) -> Tensor:
        return super().forward(SIGMA_GEN * z, z.new_full((1,), SIGMA_GEN).expand(*z.shape[:-1], 1), obs)


# ---- the agent ---------------------------------------------------------------------------------------------------------


class DTQL(nn.Module):
    """Algorithm 1, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            actor = GaussianActor if args.policy == "gaussian" else ImplicitActor
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)]),
                "value": Value(obs_dim),
                "denoiser": Denoiser(obs_dim, action_dim),
                "actor": actor(obs_dim, action_dim),
            })  # fmt: skip

        self.critic, self.value, self.denoiser, self.actor = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_optimizer = torch.optim.Adam([*self.critic.parameters(), *self.value.parameters()], 3e-4, fused=True)
        self.denoiser_optimizer = torch.optim.Adam(self.denoiser.parameters(), args.learning_rate, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True)
        self.register_buffer("train_step", torch.zeros((), device=device))  # updates after pretraining

        self.alpha, self.expectile = args.per_model("alpha", device), args.per_model("expectile", device)
        self.step_critic = stacked.make_step(self.critic_loss, self.critic_optimizer, args.compile)
        self.step_denoiser = stacked.make_step(self.denoiser_loss, self.denoiser_optimizer, args.compile)
        self.step_actor = stacked.make_step(self.actor_loss, self.actor_optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, self.target_critic, args.num_candidates, compile=args.compile)

        self.explore = BestOf(self.sample, action_dim, compile=args.compile)  # a plain sample
        self.online, self.td, self.nll = False, False, args.nll
        self.replay = online.Replay(data, args.num_models, args.warmup_steps + args.online_steps) if data else None

    def start_online(self) -> None:
        """End of the offline phase."""
        self.online, self.td, self.nll = True, self.args.critic == "td", self.args.nll and self.args.online_nll
        if self.args.online_alpha is not None:
            self.alpha.fill_(self.args.online_alpha)
        for optimizer in (self.critic_optimizer, self.denoiser_optimizer, self.actor_optimizer):
            stacked.set_learning_rate(optimizer, torch.ones_like(self.train_step))

    def next_q(self, batch: Batch, z: Tensor) -> Tensor:
        """The mean target Q at s' of a sample of the one-step policy, (K, B)."""
        next_actions = self.sample(batch.next_obs, z.unsqueeze(2)).squeeze(2).clamp(-1, 1)
        return self.target_critic(batch.next_obs, next_actions).mean(1)

    def critic_loss(self, batch: Batch, z: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Eqs. 6 and 7. V's loss sends no gradient to Q, and Q's none to V(s')."""
        q, v = self.critic(batch.obs, batch.actions), self.value(batch.obs)
        with torch.no_grad():
            next_value = self.next_q(batch, z) if self.td else self.value(batch.next_obs)
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * next_value
        value_loss = expectile_loss(q.detach().amin(1) - v, self.expectile)
        critic_loss = (target[:, None] - q).square().mean(-1).sum(1)
        return critic_loss + value_loss, {"critic": critic_loss, "value": value_loss}

    def denoiser_loss(self, batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 2."""
        loss = self.denoising_loss(batch.actions, batch.obs, sigma, noise)
        return loss, {"denoiser": loss}

    def actor_loss(self, batch: Batch, z: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 5, with the NLL term of Section 2.4. Trains the one-step policy only."""
        metrics = {}
        if self.args.policy == "gaussian":
            mean, log_std = self.actor(batch.obs)
            actions = torch.tanh(mean + torch.exp(log_std) * z)
            metrics["entropy"] = log_std.sum(-1).mean(-1) + 0.5 * mean.shape[-1] * math.log(2 * math.pi * math.e)
        else:
            actions = self.actor(batch.obs, z)
        trust_region = self.denoising_loss(actions, batch.obs, sigma, noise)
        # Q is trained on [-1, 1] only, so clamp; the trust region pulls the implicit policy's actions back into range
        q = self.critic(batch.obs, actions.clamp(-1, 1)).amin(1).mean(-1)
        loss = self.alpha * trust_region - q
        if self.nll:
            metrics["nll"] = gaussian_nll(mean, log_std, batch.actions)
            loss = loss + metrics["nll"]
        return loss, {"actor": loss, "trust_region": trust_region, "q": q, **metrics}

    def denoising_loss(self, actions: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Eq. 2 (actions from the data) and Eq. 4 (actions of the policy) with w = 1 / c_out^2, also averaged over A."""
        denoised = self.denoiser(actions + sigma * noise, sigma, obs).clamp(-1, 1)
        return ((denoised - actions) / c_out(sigma)).square().mean((-1, -2))

    def update(self, training: bool) -> Metrics:
        """One iteration of Algorithm 1; pretraining stops after the diffusion policy. Tensors only, with static shapes."""
        args, shape = self.args, (self.args.num_models, self.args.batch_size)
        batch = self.replay.sample(*shape, args.offline_ratio) if self.online else self.data.sample(*shape)
        sigma = sample_sigma(torch.rand(2, *shape, 1, device=self.device))
        noise = torch.randn(3, *shape, self.action_dim, device=self.device)
        if training and args.lr_decay and not self.online:
            factor = (1 + torch.cos(math.pi * self.train_step / (args.epochs * args.steps_per_epoch))) / 2
            for optimizer in (self.critic_optimizer, self.denoiser_optimizer, self.actor_optimizer):
                stacked.set_learning_rate(optimizer, factor)

        metrics = self.step_critic(batch, torch.randn_like(noise[0]) if self.td else None)
        if not (self.online and args.freeze_denoiser):
            metrics |= self.step_denoiser(batch, sigma[0], noise[0])
        if training:
            metrics |= self.step_actor(batch, noise[1], sigma[1], noise[2])
            stacked.polyak_update(self.target_critic, self.critic, args.tau)
            self.train_step += 1
        return metrics

    def start_training(self) -> None:
        """End of pretraining: the target Qs start as copies of the online ones."""
        self.target_critic.load_state_dict(self.critic.state_dict())

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """Candidates (K, n, N, A) of the one-step policy in states (K, n, S), from Gaussian noise (K, n, N, A)."""
        if self.args.policy == "implicit":
            return self.actor(repeat_states(obs, z.shape[2]), z.flatten(1, 2)).view(z.shape)
        mean, log_std = self.actor(obs)
        return torch.tanh(mean.unsqueeze(2) + torch.exp(log_std).unsqueeze(2) * z)


def transform(task: tasks.Task, rewards: np.ndarray) -> np.ndarray:
    """AntMaze: -1 on the way, 0 at the goal; others as they are."""
    return rewards - 1 if task.sparse_goal else rewards


def expectile_loss(u: Tensor, expectile: Tensor) -> Tensor:
    """Eq. 6: mean of |expectile - 1(u < 0)| u^2; u (K, B), expectile (K,) -> (K,)."""
    return ((expectile[:, None] - (u < 0).float()).abs() * u**2).mean(-1)


def gaussian_nll(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """-E log pi(a | s) of the Gaussian before the tanh, whose Jacobian does not depend on theta; (K, B, A) -> (K,)."""
    z = (torch.atanh(actions / (1 + 1e-3)) - mean) * torch.exp(-log_std)
    return (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean(-1)


def load_policy(
    checkpoint: str, index: int = 0, num_candidates: int | None = None, device: str = "cpu", seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    `num_candidates`: as trained if None; 1 takes a single sample of the policy.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, DTQL, Args, index, device, seed, num_candidates=num_candidates)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    check(task.make_env is not None, "the online phase needs an environment: give --env-id")
    data = Transitions(task.obs, task.actions, transform(task, task.rewards), task.terminals, task.next_obs, device)
    if args.offline is not None:
        args = replace(args, pretrain_epochs=0, epochs=0)
    agent = DTQL(args, task.obs.shape[1], task.actions.shape[1], device, data)
    fastest = functools.lru_cache(1)(  # of one phase at a time: an offline graph would go on sampling the data alone
        lambda training, online: stacked.fastest(
            functools.partial(agent.update, training), agent, args.compile, args.cudagraphs and device.type == "cuda"
        )
    )

    if args.offline is not None and args.resume is None:
        online.load_offline(agent, args.offline)
    with Run(__file__, args, task, envs, agent) as run:
        collector = online.Collector(agent, task, functools.partial(transform, task), run.dir)
        run.before_save = collector.save
        while True:
            if run.evaluation_due():
                run.evaluate(agent.act)
            if run.ended:
                break
            if run.step == args.pretrain_steps and args.offline is None:
                agent.start_training()
            if run.step >= args.offline_steps:
                agent.start_online()
            update = fastest(run.step >= args.pretrain_steps, agent.online)
            for _ in range(run.until_log()):
                while agent.online and collector.size <= args.warmup_steps + run.step - args.offline_steps:
                    collector.step()
                run.advance(update())
            run.log()
        run.save()
        collector.envs.close()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
