"""The learner: one rank of a group that turns samples into optimizer steps."""
