"""The command line. Every command imports what it needs when it is called: `--help` loads nothing heavy.

Exit codes: 0 done, 1 it failed, or a run, model or cluster that it needs is not there, 2 the configuration,
the command or a data set is wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from stateset_ray.cli.base import app
from stateset_ray.cli.batch import batch
from stateset_ray.cli.learning import evaluate, train
from stateset_ray.cli.serving import serve
from stateset_ray.cli.submit import jobs
from stateset_ray.cli.sweep import sweep
from stateset_ray.cli.talking import chat
from stateset_ray.cli.workshop import doctor, init, version

__all__ = [
    "app", "batch", "chat", "doctor", "evaluate", "init", "jobs", "main", "serve", "sweep", "train",
    "version",
]  # fmt: skip


def main() -> None:
    """The program `stateset-ray`."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not every stream can be told
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # policies say anything
    app(prog_name="stateset-ray")
