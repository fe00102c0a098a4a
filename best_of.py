"""Choose one of N sampled actions in each state (Appendix D), for K models."""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from stacked import compiled, with_parameters

STATES = 64  # states of all models that a batch of actions is computed for, as many as environments run together
ROWS = 256  # candidates at a time on a CPU: enough for an efficient product, few enough for its cache
BLOCK = 64  # candidates that the second Q evaluates at a time


class BestOf:
    """Choose one of N sampled actions in each state, with probability softmax(min(Q1, Q2)) (Appendix D), for K models.

    The maximum of min(Q1, Q2) plus Gumbel noise is a sample of that softmax. Candidates are visited by decreasing Q1 + noise,
    and Q2 is evaluated only until no remaining candidate can win: the same action at half the cost.
    """

    def __init__(
        self,
        sample: Callable[[Tensor, Tensor], Tensor],
        noise_dim: int,
        critic: nn.Module | None = None,
        num_candidates: int = 1,
        greedy: bool = False,
        compile: bool = False,
    ):
        """Choose among candidates of `sample`.

        sample: obs (K, n, S), Gaussian noise (K, n, N, noise_dim) -> candidates (K, n, N, A), which are clamped to [-1, 1].
        critic: twin Qs, obs (K, B, S), actions (K, B, A) -> (K, 2, B). Without it a single sample is taken.
        greedy: take the candidate with the largest min(Q1, Q2) instead of sampling.
        """
        self.sample, self.noise_dim, self.critic = sample, noise_dim, critic
        self.num_candidates, self.greedy = num_candidates if critic else 1, greedy
        self.qs = [_view_of_twin(critic, which) for which in (0, 1)] if critic else []
        wrap = compiled if compile else lambda function: function
        self._one, self._first, self._second = wrap(self._one), wrap(self._first), wrap(self._second)

    def _one(self, obs: Tensor, z: Tensor) -> Tensor:
        """One sample (K, n, A) in each state (K, n, S)."""
        return self.sample(obs, z).clamp(-1, 1)[:, :, 0]

    def _first(self, obs: Tensor, z: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates (K, n, N, A), their Q1 + gumbel (K, n, N) in decreasing order, and that order's indices (K, n, N)."""
        candidates = self.sample(obs, z).clamp(-1, 1)
        q = self.qs[0](repeat_states(obs, z.shape[2]), candidates.flatten(1, 2)).view(gumbel.shape)
        return candidates, *(q + gumbel).sort(2, descending=True)

    def _second(self, obs: Tensor, candidates: Tensor, gumbel: Tensor, block: Tensor) -> Tensor:
        """Q2 + gumbel (K, n, m) of the candidates with indices `block` (K, n, m)."""
        actions = candidates.take_along_dim(block[..., None], 2)
        q = self.qs[1](repeat_states(obs, block.shape[2]), actions.flatten(1, 2)).view(block.shape)
        return q + gumbel.take_along_dim(block, 2)

    def choose(self, obs: Tensor, z: Tensor, gumbel: Tensor) -> Tensor:
        """Actions (K, n, A) in states (K, n, S), with Gaussian z (K, n, N, noise_dim) and Gumbel noise (K, n, N)."""
        candidates, bounds, order = self._first(obs, z, gumbel)
        scores = torch.full_like(bounds, -math.inf)
        for bound, block, score in zip(*(tensor.split(BLOCK, 2) for tensor in (bounds, order, scores))):
            if (bound[:, :, 0] <= scores.amax(2)).all():
                break
            score.copy_(torch.minimum(bound, self._second(obs, candidates, gumbel, block)))
        chosen = order.take_along_dim(scores.argmax(2, keepdim=True), 2)
        return candidates.take_along_dim(chosen[..., None], 2)[:, :, 0]

    @torch.no_grad()
    def __call__(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (K, n, A) in observations (K, n, S)."""
        n, size = obs.shape[1], -(-STATES // len(obs))  # a fixed size, so that it is compiled once
        if obs.device.type == "cpu":
            size = min(size, max(1, ROWS // self.num_candidates))
        if len(obs) == n == 1:
            size = 1
        chosen = []
        for part in F.pad(obs, (0, 0, 0, -n % size)).split(size, 1):
            part = part.clone(memory_format=torch.contiguous_format)  # strides must not depend on n either
            shape = (*part.shape[:2], self.num_candidates)
            z = torch.randn(*shape, self.noise_dim, device=obs.device, generator=generator)
            if not self.critic:
                chosen.append(self._one(part, z))
                continue
            gumbel = torch.zeros(shape, device=obs.device)
            if not self.greedy:
                gumbel = -torch.log(gumbel.exponential_(generator=generator))
            chosen.append(self.choose(part, z, gumbel))
        return torch.cat(chosen, 1)[:, :n]


def repeat_states(obs: Tensor, times: int) -> Tensor:
    """Each state `times` times in a row: (K, n, S) -> (K, n times, S)."""
    return obs.unsqueeze(2).expand(-1, -1, times, -1).flatten(1, 2)


def _view_of_twin(critic: nn.Module, which: int) -> nn.Module:
    """One of stacked twins (K, 2, ...) as (K, 1, ...); it shares their parameters."""
    return with_parameters(critic, {name: param.detach()[:, which : which + 1] for name, param in critic.named_parameters()})
