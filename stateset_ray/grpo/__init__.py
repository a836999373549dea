"""GRPO as pure functions: rewards -> advantages, trajectories -> samples, log-probabilities -> loss."""
