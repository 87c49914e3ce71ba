"""Collects the Minari dataset PointMaze/umaze-controller-v0: a point in a U-shaped maze.

    python results/minari-pointmaze/collect_pointmaze.py

A PD controller follows the shortest path through the maze's cells, with noise on the actions. In
half of the episodes it heads for a random cell instead of the goal.
"""

import gymnasium
import gymnasium_robotics  # noqa: F401 registers the environment
import minari
import numpy as np
import tyro


def next_cell(maze_map, cell, goal):
    """The cell after `cell` on the shortest path to `goal`: breadth first search from the goal."""
    came_from = {goal: goal}
    queue = [goal]
    for i, j in queue:
        for neighbour in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if neighbour not in came_from and maze_map[neighbour[0]][neighbour[1]] != 1:
                came_from[neighbour] = (i, j)
                queue.append(neighbour)
    return came_from[cell]


def act(maze, obs, target, rng):
    """A noisy action towards the position `target`."""
    position, velocity = obs["observation"][:2], obs["observation"][2:]
    cell = tuple(maze.cell_xy_to_rowcol(position))
    goal = tuple(maze.cell_xy_to_rowcol(target))
    waypoint = target
    if cell != goal:
        waypoint = maze.cell_rowcol_to_xy(next_cell(maze.maze_map, cell, goal))
    action = 10 * (waypoint - position) - velocity + rng.normal(0, 0.5, 2)
    return action.clip(-1, 1).astype(np.float32)


def main(dataset_id: str = "PointMaze/umaze-controller-v0", episodes: int = 500, seed: int = 0):
    rng = np.random.default_rng(seed)
    env = minari.DataCollector(gymnasium.make("PointMaze_UMaze-v3", continuing_task=False))
    maze = env.unwrapped.maze
    successes = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=2**20 + seed + episode)  # not the seeds of evaluations
        target = obs["desired_goal"]
        if episode % 2 == 1:
            target = maze.cell_rowcol_to_xy(
                maze.cell_xy_to_rowcol(rng.choice(maze.unique_goal_locations))
            )
        done = False
        while not done:
            obs, _, terminated, truncated, info = env.step(act(maze, obs, target, rng))
            done = terminated or truncated
        successes.append(info["success"])
    data = env.create_dataset(dataset_id, algorithm_name="PD controller, half of its goals random")
    print(f"{data.total_steps} steps, {data.total_episodes} episodes of {dataset_id}")
    print(f"success {np.mean(successes):.3f}; towards the goal {np.mean(successes[::2]):.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
