"""Hyper-parameter sweeps: many runs as trials of Ray Tune.

`read_plan` reads and checks what a sweep is to do without Ray; `sweep` does it; `trainable` is one run as a
Trainable, for a Tuner of your own.
"""
