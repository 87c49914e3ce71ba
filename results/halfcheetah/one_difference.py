"""SAC Flow on HalfCheetah-v5 with one difference of the authors' scripts at a time, or with all.

    python results/halfcheetah/one_difference.py two-heads --policy flow-t --compile

makes a run of 30,000 steps in runs/one-difference/DIFFERENCE-POLICY, or resumes it. Differences:

    none            flow_sac.py as it is
    noise           no drift; noise std whatever dt is (flow-t: std dt), std at most e^2; flow-t's
                    density leaves out std
    range           log sigma in (-5, 2) instead of (-5, 0)
    two-heads       flow-t, naive: sigma is a second head of the velocity's network and so depends
                    on x
    normalised-x    the velocity sees x normalised by BatchRenorm, one for all steps (flow-t: one
                    for each)
    normalised-t    naive: t is normalised in this way
    post-norm       flow-t: LayerNorm after each sum instead of before each block
    post-renorm     flow-t: BatchRenorm there, the same for all steps
    floor           tanh's density as log(1 - tanh^2 + 1e-6): its gradient is lost for large x_K
    all             what the authors' script for this policy has of these

They replace parts of flow_sac here, for these runs only.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import flow_sac  # noqa: E402

RUNS = Path("runs/one-difference")
ORIGINAL_FLOW_T = flow_sac.FlowT
FLOW_STEPS = 4
ALL = {
    "flow-t": {"noise", "two-heads", "normalised-x", "post-renorm", "floor"},
    "flow-g": {"noise", "normalised-x", "floor"},
    "naive": {"noise", "two-heads", "normalised-x", "normalised-t", "floor"},
}

ONLY_FOR = {
    "two-heads": ["flow-t", "naive"],
    "normalised-t": ["naive"],
    "post-norm": ["flow-t"],
    "post-renorm": ["flow-t"],
}


def rollout(velocity, log_sigma, obs, x, eps, authors_noise, two_heads):
    """As flow_sac.rollout, with the authors' noise, a velocity that returns log sigma too, or both.

    log_sigma: a LogSigma, of which two_heads uses the range only.
    """
    is_flow_t = isinstance(velocity, ORIGINAL_FLOW_T)
    dt = 1 / len(eps)
    log_prob = -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)
    for i, noise in enumerate(eps):
        t = torch.full_like(x[:, :1], i * dt)
        velocity.step = i
        v = velocity(obs, x, t)
        if two_heads:
            v, middle = v.chunk(2, -1)
            half_range = 0.5 * (log_sigma.high - log_sigma.low)
            log_std = log_sigma.low + half_range * (middle.tanh() + 1)
        else:
            log_std = log_sigma(obs, t)
        if authors_noise:
            std = log_std.exp()
            if is_flow_t:
                std = std * dt
                log_std = torch.zeros_like(log_std)
            x = x + v * dt + std * noise
        else:
            score = (t * v - x) / (1 - t)
            drift = v + 0.5 * (2 * log_std).exp() * score
            log_std = log_std + 0.5 * math.log(dt)
            x = x + drift * dt + log_std.exp() * noise
        log_prob = log_prob - (log_std + 0.5 * (noise**2 + math.log(2 * math.pi))).sum(-1)
    return x, log_prob


def sample_with_log_prob(policy, obs, x0, eps):
    """As flow_sac.sample_with_log_prob for a flow, with the authors' density of tanh."""
    obs = policy.obs_norm(obs)
    x, log_prob = flow_sac.rollout(policy.velocity, policy.log_sigma, obs, x0, eps)
    actions = x.tanh()
    return actions, log_prob - (1 - actions**2 + 1e-6).log().sum(-1)


class Naive(flow_sac.Naive):
    """With x, t or both normalised, and a second head or not."""

    def __init__(self, obs_dim, action_dim, width, has_x, has_t, two_heads):
        super().__init__(obs_dim, action_dim, width)
        if has_x:
            self.x_norm = flow_sac.BatchRenorm(1, action_dim)
        if has_t:
            self.t_norm = flow_sac.BatchRenorm(1, 1)
        if two_heads:
            self.mlp[-1] = flow_sac.Linear(width, 2 * action_dim)

    def forward(self, obs, x, t):
        if hasattr(self, "x_norm"):
            x = self.x_norm(x)
        if hasattr(self, "t_norm"):
            t = self.t_norm(t)
        return super().forward(obs, x, t)


class FlowG(flow_sac.FlowG):
    """With x normalised where gate and candidate see it."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__(obs_dim, action_dim, width)
        self.x_norm = flow_sac.BatchRenorm(1, action_dim)

    def forward(self, obs, x, t):
        angles = t * self.frequencies
        embedded = self.time_mlp(torch.cat([angles.sin(), angles.cos()], -1))
        inputs = torch.cat([obs, self.x_norm(x), embedded], -1)
        return self.gate(inputs).sigmoid() * (self.candidate(inputs) - x)


class FlowT(flow_sac.FlowT):
    """With x normalised, each step by its own statistics, and a second head or not.

    The rollout says which step it is.
    """

    def __init__(self, obs_dim, action_dim, width, has_x, two_heads):
        super().__init__(obs_dim, action_dim, width)
        if has_x:
            norms = [flow_sac.BatchRenorm(1, action_dim) for _ in range(FLOW_STEPS)]
            self.x_norms = nn.ModuleList(norms)
        if two_heads:
            self.head = flow_sac.Linear(width, 2 * action_dim)

    def forward(self, obs, x, t):
        if hasattr(self, "x_norms"):
            x = self.x_norms[self.step](x)
        return super().forward(obs, x, t)


class PostNormLayer(flow_sac.DecoderLayer):
    """The decoder layer with a norm after each sum."""

    def __init__(self, width, norm):
        super().__init__(width)
        self.norm1 = norm(width)
        self.norm2 = norm(width)
        self.norm3 = norm(width)

    def forward(self, token, memory):
        token = self.norm1(token + self.self_attention(token))
        token = self.norm2(token + self.cross_attention(memory))
        return self.norm3(token + self.feed_forward(token))


def impose(differences, policy):
    """Make flow_sac work with this set of differences."""
    has_noise = "noise" in differences
    two_heads = "two-heads" in differences
    has_x = "normalised-x" in differences
    has_t = "normalised-t" in differences
    flow_sac.rollout = partial(rollout, authors_noise=has_noise, two_heads=two_heads)
    if "floor" in differences:
        flow_sac.sample_with_log_prob = sample_with_log_prob
    if has_noise or "range" in differences:
        flow_sac.LogSigma = partial(flow_sac.LogSigma, high=2.0)
    if policy == "flow-t":
        flow_sac.FlowT = partial(FlowT, has_x=has_x, two_heads=two_heads)
    elif policy == "naive":
        flow_sac.Naive = partial(Naive, has_x=has_x, has_t=has_t, two_heads=two_heads)
    elif has_x:
        flow_sac.FlowG = FlowG
    if "post-norm" in differences:
        flow_sac.DecoderLayer = partial(PostNormLayer, norm=partial(nn.LayerNorm, eps=1e-6))
    if "post-renorm" in differences:
        flow_sac.DecoderLayer = partial(PostNormLayer, norm=partial(flow_sac.BatchRenorm, 1))


def main(
    difference: tyro.conf.Positional[
        Literal[
            "none",
            "noise",
            "range",
            "two-heads",
            "normalised-x",
            "normalised-t",
            "post-norm",
            "post-renorm",
            "floor",
            "all",
        ]
    ],
    policy: Literal["flow-t", "flow-g", "naive"] = "flow-t",
    online_steps: int = 30_000,
    learning_starts: int = 5_000,
    eval_episodes: int = 10,
    compile: bool = False,
):
    """All but the first two: as in flow_sac.py."""
    if policy not in ONLY_FOR.get(difference, ALL):
        sys.exit(f"one_difference.py: error: {difference} is not for --policy {policy}")
    impose(ALL[policy] if difference == "all" else {difference}, policy)
    width = 64 if policy == "flow-t" else 128
    flags = f"""--env HalfCheetah-v5 --policy {policy} --policy-width {width} --hidden 256 256
        --batch-size 256 --flow-steps {FLOW_STEPS} --online-steps {online_steps}
        --learning-starts {learning_starts} --eval-interval 10000 --eval-episodes {eval_episodes}
        --start-or-resume {RUNS / f"{difference}-{policy}"}"""
    if compile:
        flags += " --compile"
    if difference != "none":
        flow_sac.__file__ = f"one_difference_{difference}.py"  # the run's name for the script
    sys.argv = ["flow_sac.py", *flags.split()]
    flow_sac.main()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
