"""Plain behaviour cloning: the same one-step policy trained on the NLL term alone. The baseline of docs/curves.py.

    python docs/behaviour_cloning.py --env-id antmaze-umaze-v0

It is also an example of a variant: subclass the agent, change one loss, keep everything else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import common  # noqa: E402
import dtql_continuous as dtql  # noqa: E402


class BehaviourCloning(dtql.DTQL):
    def actor_loss(self, actor, denoiser, critic, batch, z, sigma, noise):
        mean, log_std = torch.func.functional_call(self.policy.actor, actor, (batch.obs,))
        nll = dtql.gaussian_nll(mean, log_std, batch.actions)
        return nll, nll.detach().expand(len(self.metrics) - 3)


if __name__ == "__main__":
    dtql.DTQL, dtql.EXP_NAME = BehaviourCloning, "behaviour_cloning"
    # One candidate: a plain sample of the policy, in which no Q has a say
    defaults = lambda env_id: {**dtql.task_defaults(env_id), "num_candidates": 1}
    common.run(dtql.main, lambda: common.parse_args(dtql.Args, defaults, dtql.run_defaults))
