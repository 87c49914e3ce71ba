"""Trains qflow.py or fql.py on a Minari dataset, in the environment that the dataset names.

    pip install "minari[hdf5,hf]==0.5.4" gymnasium-robotics==1.4.2      # Python 3.11 or newer
    python results/minari_data.py D4RL/pen/human-v2 --script fql.py
    python results/minari_data.py D4RL/pen/human-v2 --script fql.py -- --alpha 3000 --seed 1
    python results/minari_data.py D4RL/pen/human-v2 --script fql.py -- --resume runs/RUN
    python results/evaluate.py runs/RUN --episodes 200

Flags after -- go to the script; `-- --help` shows them with the defaults for this dataset. A
dataset works if its actions are a bounded Box and its observations a Box or a Dict of Boxes. If it
is not in $MINARI_DATASETS_PATH (~/.minari/datasets), it is downloaded. With MuJoCo 4, only the
mazes and Adroit hands of gymnasium-robotics 1.4.2 work; Fetch, Shadow hand and kitchen need
mujoco==3.3.7.

- Observations: all parts of a Dict, concatenated by name (achieved goal, desired goal,
  observation). The achieved goal is needed: AntMaze's `observation` lacks the ant's position.
- Actions: from the environment's box to [-1, 1]; numbers outside are clipped.
- Masks are 1 - terminations. Where an episode is truncated, the critic bootstraps.
- The environment is the dataset's own for evaluation, with its time limit. That of
  D4RL/antmaze/umaze and -diverse is the mirror image of the data's maze (Minari's issue 304), so
  here it gets the maze of the data.
- Success: whether the environment reported success at any step of the episode.
- eval.csv has normalized_score (Minari's: 0 is a random policy, 1 an expert) where the dataset has
  the reference returns.

D4RL's 18 tasks have the settings of FQL's paper; for Q-Flow, only the antmazes have settings, those
of its authors. On D4RL's antmazes the reward is r - 1, in the data and online; evaluation reports
the environment's own return.
"""

import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import FlattenObservation, RescaleAction, TransformReward

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import import_script  # noqa: E402

import common  # noqa: E402

NOTE = (
    "scores are not comparable with D4RL's tables: Minari's antmaze data were collected anew, and "
    "the spaces of gymnasium-robotics differ (Minari's issues 296 and 313)"
)


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]
    """id of a Minari dataset"""
    script: str
    """qflow.py, fql.py, or a copy of one"""
    online: bool = False
    """the authors' settings for training offline, then online (D4RL)"""


# Defaults by the beginning of the dataset's id; all keys that match apply, later ones over earlier.
FQL = {
    "D4RL/antmaze/": dict(alpha=10.0, q_agg="mean", discount=0.99, offline_steps=500_000),
    "D4RL/antmaze/large": dict(alpha=3.0),
    "D4RL/(pen|door|hammer|relocate)/": dict(q_agg="min", discount=0.99, offline_steps=500_000),
    "D4RL/pen/": dict(alpha=10_000.0),
    "D4RL/pen/expert": dict(alpha=3_000.0),
    "D4RL/door/": dict(alpha=30_000.0),
    "D4RL/hammer/": dict(alpha=30_000.0),
    "D4RL/hammer/cloned": dict(alpha=10_000.0),
    "D4RL/relocate/": dict(alpha=30_000.0),
    "D4RL/relocate/human": dict(alpha=10_000.0),
}
FQL_ONLINE = {
    "D4RL/(antmaze|(pen|door|hammer|relocate)/cloned)": dict(
        offline_steps=1_000_000, online_steps=1_000_000
    ),
    "D4RL/(pen|door|hammer)/cloned": dict(alpha=1_000.0),
    "D4RL/relocate/cloned": dict(alpha=10_000.0),
}
QFLOW = {
    "D4RL/antmaze/": dict(
        lam=0.2,
        time_dim=16,
        hidden=(256, 256, 256, 256),
        q_agg="mean",
        discount=0.99,
        offline_steps=1_000_000,
    ),
    "D4RL/antmaze/medium": dict(lam=0.5),
}
QFLOW_ONLINE = {"D4RL/antmaze/": dict(online_steps=200_000)}

# The maze of the data of D4RL/antmaze/umaze-v2, with start and goal.
UMAZE = [
    [1, 1, 1, 1, 1],
    [1, "g", 0, 0, 1],
    [1, 1, 1, 0, 1],
    [1, "r", 0, 0, 1],
    [1, 1, 1, 1, 1],
]


def settings(script, online):
    """The table of defaults for a script's file name; copies have none."""
    tables = {"fql.py": (FQL, FQL_ONLINE), "qflow.py": (QFLOW, QFLOW_ONLINE)}
    name = Path(script).name
    if name not in tables:
        return {}
    offline_table, online_table = tables[name]
    if not online:
        return offline_table
    merged = dict(offline_table)
    for names, values in online_table.items():  # both tables may have the same key
        merged[names] = {**merged.get(names, {}), **values}
    return merged


# ----------------------------------------------------------------------------------------- data


def load_data(dataset_id):
    """A minari.MinariDataset, downloaded if it is not there. Raises UserError."""
    try:
        import minari
    except ImportError as error:
        hint = 'pip install "minari[hdf5,hf]" gymnasium-robotics'
        raise common.UserError(f"needs Minari: {hint} ({error})") from None
    if not re.search(r"-v\d+$", dataset_id):
        raise common.UserError(f"{dataset_id}: an id ends in a version, such as -v2")
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari, its download clients and file formats raise many types
        reason = str(error).partition("\n")[0]
        folder = minari.storage.datasets_root_dir.get_dataset_path()
        hint = f"not found in {folder}, and the download failed"
        if (folder / dataset_id / "data").exists():
            hint = f"cannot be read from {folder}"
        raise common.UserError(f"{dataset_id}: {hint}: {reason}") from None


def is_box(space):
    """Whether a space is a Box of numbers, or a Dict of such spaces."""
    if isinstance(space, Dict):
        return all(is_box(part) for part in space.values())
    return isinstance(space, Box)


def flatten(space, observations):
    """Observations of n steps -> (n, O), in the order of gymnasium's FlattenObservation."""
    if isinstance(space, Dict):
        parts = [flatten(space[name], observations[name]) for name in space]
        return np.concatenate(parts, axis=1)
    return np.reshape(observations, (len(observations), -1)).astype(np.float32)


def training_reward(dataset_id, reward):
    """The reward to learn from: r - 1 in D4RL's antmazes, as in FQL and its predecessors."""
    return reward - 1 if dataset_id.startswith("D4RL/antmaze/") else reward


def to_dataset(data, env, device="cpu"):
    """A Minari dataset as (common.Dataset, description); env: as recovered. Raises UserError."""
    low, high = env.action_space.low, env.action_space.high
    columns = {name: [] for name in common.Dataset.COLUMNS}
    num_outside = 0
    try:
        for episode in data:
            actions = 2 * (episode.actions - low) / (high - low) - 1
            num_outside += (np.abs(actions) > 1.0001).any(1).sum()
            masks = 1.0 - episode.terminations
            rewards = training_reward(data.id, episode.rewards)
            columns["observations"].append(flatten(env.observation_space, episode.observations))
            # A last row for the last observation; nothing else of that row is used.
            columns["actions"].append(np.append(actions, actions[-1:], axis=0))
            columns["rewards"].append(np.append(rewards, 0))
            columns["masks"].append(np.append(masks, 0))
            columns["valids"].append(np.append(np.ones(len(episode)), 0))
        arrays = {name: np.concatenate(episodes) for name, episodes in columns.items()}
        arrays["actions"] = arrays["actions"].clip(-1 + 1e-5, 1 - 1e-5)  # as the authors do
        dataset = common.Dataset(**arrays, device=device)
    except (ValueError, LookupError, TypeError) as error:  # also where env has other spaces
        raise common.UserError(f"{data.id}: not a usable dataset: {error}") from None
    description = f"{len(dataset)} transitions, {dataset.num_episodes} episodes of Minari"
    if num_outside > 0:
        description += f", {num_outside} actions clipped to the environment's box"
    if data.id.startswith("D4RL/antmaze/umaze"):
        description += "; evaluated in the maze of the data; Minari's own is its mirror image"
    if data.id.startswith("D4RL/"):
        description += f"; {NOTE}"
    return dataset, description


# ---------------------------------------------------------------------------------- environment


class Success(gymnasium.Wrapper):
    """Sets info["success"] to whether the task has been solved so far in the episode."""

    def reset(self, **options):
        self.solved = False
        return self.env.reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        for name in ("success", "is_success"):  # the latter in Fetch and the Shadow hand
            if name in info:
                self.solved = self.solved or bool(info[name])
                info = {**info, "success": self.solved}
        return obs, reward, terminated, truncated, info


def recover_environment(data, **options):
    """The dataset's environment for evaluation; options: of gymnasium.make. Raises UserError."""
    if data.id.startswith("D4RL/antmaze/umaze"):
        options = dict(options, maze_map=UMAZE)
    try:
        env = data.recover_environment(eval_env=True, **options)
    except Exception as error:  # a missing package, for example
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, AssertionError):  # of gymnasium-robotics' Fetch, hand and kitchen
            reason += "; if MuJoCo is too new for it: pip install mujoco==3.3.7"
        raise common.UserError(f"{data.id}: its environment cannot be made: {reason}") from None
    space = env.action_space
    if not isinstance(space, Box) or not space.is_bounded() or (space.low == space.high).any():
        raise common.UserError(f"{data.id}: requires actions in a box, has {space}")
    if not is_box(env.observation_space):
        raise common.UserError(f"{data.id}: observations in {env.observation_space}, not a Box")
    if env.spec.max_episode_steps is None:
        raise common.UserError(f"{data.id}: its environment has no time limit")
    return env


def make_env(args, **options):
    """The environment of the dataset --env as the scripts need it; also for evaluate.py."""
    env = Success(recover_environment(load_data(args.env), **options))
    return RescaleAction(FlattenObservation(env), -1.0, 1.0)


# ------------------------------------------------------------------------------------- training


def add_normalized_score(script, data):
    """Let the script's `evaluate` also return Minari's normalized score of each episode.

    Returns whether the dataset has the reference returns that this needs.
    """
    import minari

    if data.storage.metadata.get("ref_max_score") is None:
        return False
    script_evaluate = script.evaluate

    def evaluate(policy, env, num_episodes, seed):
        results = script_evaluate(policy, env, num_episodes, seed)
        results["normalized_score"] = minari.get_normalized_score(data, results["return"])
        return results

    script.evaluate = evaluate
    return True


def main():
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    cli = tyro.cli(Args, args=words[:split], description=__doc__)
    script = import_script(cli.script)
    script.SETTINGS = settings(cli.script, cli.online)
    sys.argv = [cli.script, *words[split + 1 :], "--env", cli.dataset]
    args = script.parse_args()
    if args.task or args.dataset:
        raise common.UserError("--task and --dataset are for OGBench, not for Minari")
    if cli.online and args.online_steps == 0:
        reason = f"{cli.script} has no settings for {args.env}, or the run to resume has its own"
        raise common.UserError(f"--online: {reason}; give --online-steps behind --")
    data = load_data(args.env)
    has_score = add_normalized_score(script, data)
    if not any(re.match(names, args.env) for names in script.SETTINGS):
        print(f"{args.env} has no tuned settings: using the script's defaults")

    # From here on as in the script's own `main`.
    device = script.choose_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.compile:
        common.check_compiler(device)
    with recover_environment(data) as env:
        dataset, description = to_dataset(data, env, device)
    if args.horizon > len(dataset):
        raise common.UserError(f"--horizon {args.horizon}: longer than the dataset")
    env = TransformReward(make_env(args), lambda reward: training_reward(args.env, reward))
    eval_env = make_env(args)
    with common.start_run(script.__file__, args.env, args, description, device) as run:
        run.config["environment"] = Path(__file__).name  # evaluate.py calls its functions
        run.how_to_resume = "repeat this command to resume"
        if not (args.resume or args.start_or_resume):
            run.how_to_resume = f"resume with this command and, after --, --resume {run.folder}"
        script.train(args, dataset, env, eval_env, run)
        if has_score:
            scores = common.read_columns(run.folder / "eval.csv")["normalized_score"]
            print(f"normalized score of the last evaluation: {scores[-1]:.4g}")
        if args.env.startswith("D4RL/"):
            print(NOTE)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's signal: like Ctrl-C
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, lines appear at once
    try:
        main()
    except (common.UserError, MemoryError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
