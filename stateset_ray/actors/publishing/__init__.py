"""How a version of the policy comes from the learner to the engines: one protocol, three transports."""
