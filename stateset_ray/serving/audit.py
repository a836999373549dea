"""Who let the policy do what: a JSON line when a call of a tool begins, and one with what came of it."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

from stateset_ray.serving.events import Stepped
from stateset_ray.serving.lines import append_line
from stateset_ray.serving.redaction import redact

__all__ = ["Audit"]

_log = logging.getLogger("ray.serve")
_LONGEST = 200  # characters of an argument, cut when it is redacted: half of a number is not known as one


class Audit:
    """Writes the lines.

    Args:
        file: where they go besides the log; appended to, made with mode 0600.
        arguments: write what tools were called with, or only the names of it.
    """

    def __init__(self, file: Path | None, *, arguments: bool) -> None:
        self._file = file
        self._arguments = arguments

    def write(self, step: Stepped, *, request: str, key: str, problem: str) -> None:
        """Write down one call.

        Args:
            problem: the kind of error that the tool raised.
        """
        line = json.dumps(
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "request": request,
                "key": key,
                "tool": redact(step.tool),
                "arguments": {
                    redact(name)[:_LONGEST]: redact(value)[:_LONGEST]
                    for name, value in step.arguments.items()
                }
                if self._arguments
                else sorted(redact(name)[:_LONGEST] for name in step.arguments),
                "outcome": step.outcome,
                "problem": problem,
                "seconds": round(step.seconds, 6),
                "version": step.version,
            }
        )
        _log.info("tool call %s", line, extra={"request": request})
        if self._file is None:
            return
        try:
            append_line(self._file, line.encode())
        except OSError as error:
            _log.error("the audit file cannot be written: %s", error.strerror)
