"""Train a language model on a gymnasium environment of text, the way RLlib trains anything else.

    python examples/rllib_train.py --iterations 60

A two-layer random model learns to repeat the words of `parrot.Parrot` in about two minutes on a laptop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import parrot  # noqa: F401  (registers Parrot-v0)
from ray.rllib.callbacks.callbacks import RLlibCallback

from stateset_ray.rllib import GRPOConfig


class Log(RLlibCallback):
    """Prints a line per iteration, and what was said last."""

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        """Remember a conversation."""
        self.last = f"{episode.get_observations(0)!r} -> {episode.get_actions(0)!r}"

    def on_train_result(self, *, result: dict[str, Any], **kwargs: Any) -> None:
        """Print what an iteration came to."""
        played = result["env_runners"]
        print(
            f"iteration {result['training_iteration']:3}  return {played['episode_return_mean']:+.3f}  "
            f"replies {played['num_env_steps_sampled_lifetime']:6.0f}  {self.last}"
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; returns the mean return of the first and the last iteration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--checkpoint", default=None, help="folder to save to; a temporary one by default")
    parser.add_argument("--runs", default="runs", help="folder of run folders")
    options = parser.parse_args(arguments)
    config = (
        GRPOConfig()
        .environment("Parrot-v0", env_config={"letters": "abc"})
        .env_runners(num_env_runners=1, num_envs_per_env_runner=64)
        .learners(num_learners=1)
        .training(
            lr=3e-3,
            model={"name": "tiny", "threads": 1},
            run={"name": "parrot", "dir": options.runs},
            rollout={"max_turns": 2, "max_turn_tokens": 4, "max_context": 128, "on_cut_reply": "close"},
            grpo={"group_size": 16, "advantage": "mean_std"},
            train={"tasks_per_step": 4},
        )
        .evaluation(evaluation_duration=32, evaluation_config={"explore": False})
        .callbacks(Log)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    try:
        returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(options.iterations)]
        heldout = algorithm.evaluate()["env_runners"]["episode_return_mean"]
        print(f"held-out tasks, greedy: {heldout:+.3f}")
        print(f"saved to {algorithm.save_to_path(options.checkpoint)}")
    finally:
        algorithm.stop()
    return {"first": returns[0], "last": returns[-1], "heldout": heldout}


if __name__ == "__main__":
    main()
