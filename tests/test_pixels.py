"""FQL on pixels: stacks of frames, the encoder, the augmentation, and runs on images.

tests/test_parity.py replays the authors' updates on images.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results/bptt"))
import bptt  # noqa: E402

NAME = "visual-cube-single-play-singletask-task1-v0"
EPISODES = (1, 2, 3, 7, 1, 4)  # steps of each


def make_episodes(lengths=EPISODES, shape=(6, 5, 3)):
    """Random episodes, each a list of its frames and a list of its actions."""
    rng = np.random.default_rng(0)
    episodes = []
    for length in lengths:
        frames = [rng.integers(256, size=shape, dtype=np.uint8) for _ in range(length + 1)]
        actions = [rng.uniform(-1, 1, 2) for _ in range(length)]
        episodes.append((frames, actions))
    return episodes


def make_dataset(episodes):
    """The episodes as a Dataset; the reward of a step is its number, masks are all 1."""
    rows = []
    for frames, actions in episodes:
        for t, (frame, action) in enumerate(zip(frames, actions)):
            rows.append((frame, action, t, 1, 1))
        rows.append((frames[-1], np.zeros(2), 0, 1, 0))
    return common.Dataset(*(np.array(column) for column in zip(*rows)))


def stack(frames, t):
    """The last three frames at step t; before the first one, the first one."""
    return np.concatenate([frames[max(t - 2, 0)], frames[max(t - 1, 0)], frames[t]], -1)


@pytest.fixture
def small_encoder(monkeypatch):
    monkeypatch.setattr(fql.Encoder, "channels", (4, 6))
    monkeypatch.setattr(fql.Encoder, "feature_dim", 16)


def make(batch_size=8, horizon=1, image=(12, 10, 9), **settings):
    """Small networks on images, a random batch and noise."""
    torch.manual_seed(0)
    sizes = {"hidden": (16, 16), "flow_steps": 4}
    args = fql.Args(**{**sizes, **settings}, horizon=horizon, batch_size=batch_size)
    nets = fql.Networks(image, 3 * horizon, args)
    batch = common.Batch(
        observations=torch.randint(256, (batch_size, *image), dtype=torch.uint8),
        actions=torch.rand(batch_size, 3 * horizon) * 2 - 1,
        rewards=torch.randn(batch_size),
        masks=(torch.rand(batch_size) > 0.3).float(),
        next_observations=torch.randint(256, (batch_size, *image), dtype=torch.uint8),
        valid=torch.ones(batch_size, horizon),
    )
    noise = fql.sample_noise(batch.actions, None)
    return args, nets, batch, noise


# ----------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_stacks_are_those_of_plain_lists_of_episodes(horizon):
    episodes = make_episodes()
    dataset = make_dataset(episodes)
    assert len(dataset) == sum(EPISODES) and dataset.obs_dim == (6, 5, 9)
    starts = torch.arange(len(dataset) - horizon + 1)
    batch = dataset.chunks(starts, horizon, 0.9)
    assert batch.observations.dtype == batch.next_observations.dtype == torch.uint8
    steps = [(frames, t) for frames, actions in episodes for t in range(len(actions))]
    for start in starts.tolist():
        frames, t = steps[start]
        last = min(t + horizon, len(frames) - 1)
        assert np.array_equal(batch.observations[start], stack(frames, t))
        assert np.array_equal(batch.next_observations[start], stack(frames, last))
        rewards = sum(0.9**i * (t + i) for i in range(last - t))
        assert batch.rewards[start].item() == pytest.approx(rewards)


class Counter(gymnasium.Env):
    """Frames (H, W, 3) in the colour of their episode with a stripe that tells the step."""

    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, size=8, length=5):
        self.observation_space = Box(0, 255, (size, size, 3), np.uint8)
        self.length = length

    def frame(self):
        frame = np.full(self.observation_space.shape, self.colour, np.uint8)
        frame[self.steps % frame.shape[0]] = 255 - self.steps
        return frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.colour = self.np_random.integers(200)
        self.steps = 0
        return self.frame(), {}

    def step(self, action):
        self.steps += 1
        reward = -float(np.square(action - 0.5).sum())
        return self.frame(), reward, self.steps == self.length, False, {}


def test_the_environment_stacks_as_the_dataset_does():
    env = common.stack_frames(Counter())
    assert env.observation_space == Box(0, 255, (8, 8, 9), np.uint8)
    seen = []
    episodes = []
    for _ in range(3):
        obs, _ = env.reset()
        frames = [env.unwrapped.frame()]
        seen.append(obs)
        done = False
        while not done:
            obs, _, done, _, _ = env.step(env.action_space.sample())
            assert obs.dtype == np.uint8 and env.observation_space.contains(obs)
            frames.append(env.unwrapped.frame())
            seen.append(obs)
        episodes.append((frames, [np.zeros(2)] * 5))
    dataset = make_dataset(episodes)
    assert np.array_equal(dataset.observe(torch.arange(18)), np.stack(seen))


class SpaceThatRenders(Counter):
    """As OGBench's robot arms: the space is computed from an observation."""

    reads = 0
    observation_space = property(lambda self: self.render_once(), lambda self, space: None)

    def render_once(self):
        self.reads += 1
        return Box(0, 255, (8, 8, 3), np.uint8)

    def frame(self):
        return np.zeros((8, 8, 3), np.uint8)


def test_stacking_renders_no_frame_of_its_own():
    env = SpaceThatRenders()
    stacked = common.stack_frames(gymnasium.Wrapper(env))
    reads = env.reads
    stacked.reset()
    stacked.step(np.zeros(2, np.float32))
    assert env.reads == reads


def test_what_is_collected_cannot_be_added_to_frames():
    dataset = make_dataset([([np.zeros((8, 8, 3), np.uint8)] * 3, [np.zeros(2)] * 2)])
    dataset.reserve(0)
    with pytest.raises(common.UserError, match="--online-steps 5: not on pixels"):
        dataset.reserve(5)


# ------------------------------------------------------------------------------------ augmentation


def test_crops_are_those_of_a_loop_over_padded_images():
    _, _, batch, noise = make(batch_size=49)
    offsets = torch.cartesian_prod(torch.arange(7), torch.arange(7))  # all that there are
    cropped = fql.augment(batch, offsets)
    for name in ("observations", "next_observations"):
        images = getattr(batch, name).numpy()
        for image, (y, x), result in zip(images, offsets.tolist(), getattr(cropped, name)):
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="edge")
            assert np.array_equal(result, padded[y : y + 12, x : x + 10])
    unchanged = fql.augment(batch, torch.full((49, 2), 3))
    assert torch.equal(unchanged.observations, batch.observations)
    others = set(batch._fields) - {"observations", "next_observations"}
    assert all(getattr(cropped, name) is getattr(batch, name) for name in others)


def test_half_of_the_batches_are_cropped_with_an_offset_for_each_sample():
    generator = torch.Generator().manual_seed(0)
    actions = torch.zeros(64, 3)
    offsets = torch.stack([fql.sample_offsets(actions, generator) for _ in range(400)])
    assert offsets.shape == (400, 64, 2)
    unshifted = (offsets == 3).all(2).all(1)
    assert 0.42 < unshifted.float().mean() < 0.58  # 0.5 and three standard deviations
    counts = offsets[~unshifted].flatten(0, 1)
    for column in counts.T:
        shares = torch.bincount(column, minlength=7) / len(column)
        assert len(shares) == 7 and (shares - 1 / 7).abs().max() < 0.015
    assert torch.corrcoef(counts.T.double())[0, 1].abs() < 0.03


# ------------------------------------------------------------------------------------- the networks


def test_the_encoder_has_the_authors_size_and_starting_weights():
    encoder = fql.Encoder((64, 64, 9))
    assert sum(p.numel() for p in encoder.parameters()) == 1_105_920
    weight = encoder.stacks[1].conv.weight  # from 16 to 32 channels, windows of 9
    bound = math.sqrt(6 / (9 * 16 + 9 * 32))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert encoder.dense.weight.abs().max() <= math.sqrt(6 / (2048 + 512))
    assert all((p == 0).all() for name, p in encoder.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("size", [(12, 10), (11, 9), (7, 8)])
def test_pooling_pads_as_jax_does(size):
    stack = fql.ResidualStack(1, 1)
    torch.nn.init.zeros_(stack.block[3].weight)
    torch.nn.init.zeros_(stack.block[3].bias)  # the residual block adds nothing
    torch.nn.init.dirac_(stack.conv.weight)
    torch.nn.init.zeros_(stack.conv.bias)  # the convolution changes nothing
    image = torch.randn(1, 1, *size)
    pooled = stack(image).detach()[0, 0]
    starts = []
    for n in size:
        total = max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0)  # padding of "SAME", the half in front
        starts.append([2 * i - total // 2 for i in range(math.ceil(n / 2))])
    assert pooled.shape == (len(starts[0]), len(starts[1]))
    for i, y in enumerate(starts[0]):
        for j, x in enumerate(starts[1]):
            window = image[0, 0, max(y, 0) : y + 3, max(x, 0) : x + 3]
            assert pooled[i, j] == window.max()


def test_bytes_and_their_floats_have_the_same_features():
    encoder = fql.Encoder((16, 16, 9))
    images = torch.randint(256, (4, 16, 16, 9), dtype=torch.uint8)
    assert torch.equal(encoder(images), encoder(images.float()))
    assert not torch.allclose(encoder(images), encoder(images.flip(1)))


def test_each_loss_trains_its_own_network_and_encoder_only(small_encoder):
    args, nets, batch, noise = make()
    target = fql.td_target(nets, batch, noise.next_z, args)
    losses = {
        "critic": lambda: fql.critic_loss(nets, batch, target)[0],
        "velocity": lambda: fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)[0],
        "one_step": lambda: fql.policy_loss(nets, batch, noise.policy_z, args)[0],
    }
    for own, loss in losses.items():
        nets.zero_grad()
        loss().backward()
        for name, parameter in nets.named_parameters():
            got = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert got == name.startswith(f"{own}."), (own, name)
    encoders = {id(net.encoder) for net in (nets.critic, nets.target_critic, nets.velocity)}
    assert len(encoders | {id(nets.one_step.encoder)}) == 4


def test_a_rollout_encodes_once(small_encoder):
    args, nets, batch, noise = make(flow_steps=7)
    calls = []
    hook = nets.velocity.encoder.register_forward_hook(lambda *_: calls.append(1))
    fql.policy_loss(nets, batch, noise.policy_z, args)
    assert len(calls) == 1
    hook.remove()
    _, metrics = fql.policy_loss(nets, batch, noise.policy_z, args)
    obs, z = batch.observations, noise.policy_z
    each_time = fql.rollout(nets.velocity, obs, z, torch.zeros(8, 1), 7)
    distance = (nets.one_step(obs, z) - each_time).square().mean()
    assert metrics["distill_loss"].item() == pytest.approx(distance.item(), rel=1e-5)


@pytest.mark.slow
def test_the_loss_on_images_is_traced_into_one_graph_and_computes_the_same(small_encoder):
    args, nets, batch, noise = make(horizon=2, flow_steps=2)
    traced = torch.compile(fql.total_loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (fql.total_loss, traced):
        nets.zero_grad()
        loss, metrics = function(nets, batch, noise, args)
        loss.backward()
        gradients = [p.grad.clone() for p in nets.parameters() if p.requires_grad]
        results.append([loss.detach(), *metrics.values(), *gradients])
    for plain, other in zip(*results):
        assert torch.allclose(plain, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_policy_finds_the_action_that_the_image_shows(small_encoder):
    """Behaviour cloning, nearly: a bright left half means -0.5, a bright right half 0.5."""
    args, nets, _, _ = make(batch_size=32, alpha=100.0, lr=3e-3, image=(8, 8, 9))
    optimizer = fql.make_optimizer(nets, args)
    generator = torch.Generator().manual_seed(0)

    def sample():
        right = torch.rand(32, generator=generator) < 0.5
        images = torch.randint(100, (32, 8, 8, 9), generator=generator).to(torch.uint8)
        images[right, :, 4:] += 100
        images[~right, :, :4] += 100
        return images, torch.where(right, 0.5, -0.5)[:, None].expand(-1, 3)

    for _ in range(150):
        images, actions = sample()
        zeros = torch.zeros(32)
        batch = common.Batch(images, actions, zeros, zeros, images, zeros[:, None] + 1)
        batch = fql.augment(batch, fql.sample_offsets(actions, generator))
        noise = fql.sample_noise(actions, generator)
        fql.update(nets, optimizer, batch, noise, args)
    images, actions = sample()
    chosen = fql.act(nets, images.numpy(), args, generator)
    assert chosen.shape == (32, 1, 3)
    assert (np.sign(chosen[:, 0]) == np.sign(actions.numpy())).mean() > 0.9


# --------------------------------------------------------------------------------------------- runs


def train(folder, steps, resume=False):
    """A run of fql on random frames that is evaluated in Counter: its folder and networks."""
    dataset = make_dataset(make_episodes((5, 9, 5, 6), shape=(8, 8, 3)))
    args = fql.Args(
        env="Counter",
        offline_steps=steps,
        eval_interval=4,
        eval_episodes=2,
        log_interval=1,
        batch_size=4,
        hidden=(8, 8),
        flow_steps=2,
        horizon=2,
    )
    env, eval_env = (common.stack_frames(Counter()) for _ in range(2))
    config = dict(script="fql.py", args=vars(args))
    with common.Run(folder, config, resume) as run:
        nets = fql.train(args, dataset, env, eval_env, run)
    return run.folder, nets


def rows(folder, name):
    columns = common.read_columns(folder / name)
    columns.pop("steps_per_s", None)
    return {key: values.tolist() for key, values in columns.items()}


def test_training_sees_the_cropped_images(small_encoder, monkeypatch, tmp_path):
    augment, update = fql.augment, fql.update
    cropped = []
    seen = []

    def noted_augment(batch, offsets):
        cropped.append(augment(batch, offsets))
        return cropped[-1]

    def noted_update(nets, optimizer, batch, *rest):
        seen.append(batch)
        return update(nets, optimizer, batch, *rest)

    monkeypatch.setattr(common.Run, "plot", lambda run, **options: None)
    monkeypatch.setattr(fql, "augment", noted_augment)
    monkeypatch.setattr(fql, "update", noted_update)
    train(tmp_path / "run", 6)
    assert len(seen) == 6
    assert all(batch is given for batch, given in zip(cropped, seen))


def test_a_run_goes_on_bit_for_bit_and_its_policy_loads(small_encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(common.Run, "plot", lambda run, **options: None)  # a picture takes a second
    whole, nets = train(tmp_path / "whole", 10)
    train(tmp_path / "half", 4)
    half, _ = train(tmp_path / "half", 10, resume=True)
    assert rows(whole, "train.csv")["step"] == list(range(1, 11))
    assert rows(whole, "eval.csv")["step"] == [4, 8, 10]
    assert rows(whole, "eval.csv")["length"] == [5, 5, 5]
    for name in ("train.csv", "eval.csv"):
        theirs = rows(half, name)
        for column, values in rows(whole, name).items():
            assert np.array_equal(values, theirs[column], equal_nan=True), (name, column)
    states = [common.read_checkpoint(folder) for folder in (whole, half)]
    for name, weights in states[0]["nets"].items():
        assert torch.equal(weights, states[1]["nets"][name]), name
    assert torch.equal(states[0]["generator"], states[1]["generator"])
    loaded, args = fql.load(whole)
    image = np.random.default_rng(0).integers(256, size=(1, 8, 8, 9), dtype=np.uint8)
    actions = [fql.act(n, image, args, torch.Generator().manual_seed(1)) for n in (nets, loaded)]
    assert actions[0].shape == (1, 2, 2) and np.array_equal(*actions)


# -------------------------------------------------------------------------------------- mistakes


def visual_names():
    """Names of all visual single tasks of OGBench."""
    return [name for name in common.single_tasks() if name.startswith("visual-")]


def test_all_visual_tasks_have_names():
    names = visual_names()
    registered = [x for x in gymnasium.registry if x.startswith("visual-") and "singletask" in x]
    assert {common.resolve_task(name)[2] for name in names} == set(registered)
    assert common.resolve_task("visual-antmaze-large-explore-v0", 3) == (
        "visual-antmaze-large-explore-singletask-task3-v0",
        "visual-antmaze-large-explore-v0",
        "visual-antmaze-large-singletask-task3-v0",
    )
    for name in names:
        assert gymnasium.spec(common.resolve_task(name)[2]).kwargs["ob_type"] == "pixels"


@pytest.mark.parametrize(
    "env, alpha",
    [("cube-single", 300), ("cube-double", 100), ("scene", 100)]
    + [("puzzle-3x3", 300), ("puzzle-4x4", 300)],
)
def test_settings_are_the_papers(monkeypatch, env, alpha):
    monkeypatch.setattr(sys, "argv", ["fql.py", "--env", f"visual-{env}-play-singletask-task1-v0"])
    args = fql.parse_args()
    found = (args.alpha, args.q_agg, args.discount, args.offline_steps, args.eval_interval)
    assert found == (alpha, "mean", 0.99, 500_000, 100_000)
    assert args.batch_size == 256 and args.hidden == (512,) * 4 and args.num_critics == 2


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (qflow, f"--env {NAME}", f"--env {NAME}: pixels are for fql.py only"),
        (flow_sac, f"--env {NAME}", f"--env {NAME}: pixels are for fql.py only"),
        (fql, f"--env {NAME} --online-steps 5", "--online-steps 5: not on pixels, offline only"),
        (fql, f"--env {NAME} --sparse", "--sparse: is for scene and puzzle"),
    ],
)
def test_what_pixels_exclude_is_one_line(monkeypatch, script, flags, words):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(common.UserError, match=f"^{re.escape(words)}") as error:
        script.main()
    assert "\n" not in str(error.value)


def test_backpropagation_refuses_images():
    with pytest.raises(common.UserError, match="pixels are for fql.py only"):
        bptt.Networks((8, 8, 9), 3, fql.Args(env=NAME))


def write_npz(path, observations):
    n = len(observations)
    terminals = np.arange(n) % 10 == 9
    arrays = dict(actions=np.zeros((n, 2), np.float32), terminals=terminals)
    arrays |= dict(rewards=np.zeros(n), masks=np.ones(n))
    np.savez(path, observations=observations, **arrays)


@pytest.fixture
def counter_id():
    gymnasium.register("Counter-v0", Counter, max_episode_steps=10)
    yield "Counter-v0"
    del gymnasium.registry["Counter-v0"]


def test_a_file_of_frames_is_read_as_bytes(tmp_path, counter_id):
    frames = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    write_npz(tmp_path / "frames.npz", frames)
    dataset, _ = common.load_dataset(tmp_path / "frames.npz", counter_id, "cpu")
    assert dataset.observations.dtype == torch.uint8 and len(dataset) == 36
    assert np.array_equal(dataset.observations, frames)


@pytest.mark.parametrize(
    "observations, words",
    [
        (np.ones((20, 8, 8, 3), np.float32), "frames must have numbers from 0 to 255"),
        (np.full((20, 9, 8, 3), 7, np.uint8), "observation, action sizes (9, 8, 3, 2)"),
        (np.full((20, 4), 7, np.float32), "observation, action sizes (4, 2)"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, counter_id, observations, words):
    write_npz(tmp_path / "file.npz", observations)
    with pytest.raises(common.UserError, match=re.escape(words)):
        common.load_dataset(tmp_path / "file.npz", counter_id, "cpu")


# ------------------------------------------------------------------------------------- rendering


def can_render():
    """Whether EGL works here; in a process of its own, for MuJoCo decides when it is imported."""
    program = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


# Collects, trains, resumes and evaluates, with episodes of 6 steps.
PROGRAM = """
import sys
from pathlib import Path

sys.path[:0] = [{root!r}, {root!r} + "/results"]
import common

whole = common.make_env
def short(env_id, **options):
    return whole(env_id, **{{**options, "max_episode_steps": 6}})
common.make_env = short

def call(module, *argv):
    sys.argv = ["script.py", *argv]
    module.main()

import collect_play
import evaluate
import fql

call(collect_play, "visual-cube-single-play-v0", "--episodes", "2", "--out", "data")
flags = "--env {name} --dataset data/visual-cube-single-play-v0.npz --batch-size 4 --device cpu"
flags += " --hidden 32 32 --flow-steps 2 --eval-episodes 1 --log-interval 1"
call(fql, *flags.split(), "--offline-steps", "4", "--start-or-resume", "whole")
call(fql, *flags.split(), "--offline-steps", "2", "--start-or-resume", "half")
call(fql, *flags.split(), "--offline-steps", "4", "--start-or-resume", "half")
call(evaluate, "whole", "--episodes", "2", "--device", "cpu", "--video")

maze = fql.make_env(fql.Args(env="visual-antmaze-medium-navigate-v0"))
assert fql.reset(maze, 0).shape == maze.observation_space.shape == (64, 64, 9)
maze.step(maze.action_space.sample())
"""


@pytest.mark.slow
def test_collect_train_resume_and_evaluate_with_rendering(tmp_path):
    if not can_render():
        pytest.skip("EGL does not work here: apt-get install libegl1 libgl1-mesa-dri")
    program = PROGRAM.format(root=str(ROOT), name=NAME)
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "data/visual-cube-single-play-v0.npz") as file:
        frames = file["observations"]
        assert frames.shape == (12, 64, 64, 3) and frames.dtype == np.uint8
        assert np.flatnonzero(file["terminals"]).tolist() == [5, 11]
        assert file["qpos"].dtype == file["actions"].dtype == np.float32
        assert "not the official file" in str(file["source"])
    assert all(len(np.unique(frame)) > 50 for frame in frames)  # a picture, not a blank
    assert (frames[1:] != frames[:-1]).any((1, 2, 3)).all()
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert rows(whole, "train.csv") == rows(half, "train.csv")
    assert rows(whole, "train.csv")["step"] == [1, 2, 3, 4]
    evaluations = rows(whole, "eval.csv")
    assert evaluations["length"] == [6.0]
    last = {key: values[-1:] for key, values in rows(half, "eval.csv").items()}
    assert last == evaluations
    assert json.loads((whole / "config.json").read_text())["args"]["env"] == NAME
    assert "success 0 (95%" in result.stdout and "length 6" in result.stdout
    assert (whole / "evaluation.gif").stat().st_size > 1000


@pytest.mark.parametrize("on_host, hint", [(False, "; --device-data cpu keeps them"), (True, "")])
def test_frames_that_find_no_memory_are_one_line(on_host, hint, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory.\nMore lines")

    monkeypatch.setattr(torch.Tensor, "to", full)
    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    frames = np.zeros((1000, 64, 64, 3), np.uint8)
    words = f"^cannot store 0.0 GB of frames: CUDA out of memory.{hint}"
    with pytest.raises(common.UserError, match=words) as error:
        common.store_frames(frames, "cuda", on_host)
    assert "\n" not in str(error.value) and ("--device-data" in str(error.value)) != on_host
