"""Ray actors: rollout workers and their pool, learner ranks and their group, placement, weights."""
