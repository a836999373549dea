"""The one way in which the endpoint says no: a status, a stable code, a sentence, and the parameter meant.

Nothing here repeats what a client sent, except the name of a parameter, and that only if it is a plain one.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["ApiError", "plain_name"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,63}")


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        code: stable, for programs: clients may compare it.
        message: one sentence for people, without anything that a client sent.
        param: the parameter that it is about.
        retry_after: seconds after which the same request may succeed; None if it never will.

    Example:
        >>> ApiError(404, "model_not_found", "there is no such model", "model").body()["error"]["code"]
        'model_not_found'
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body, in the shape that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def headers(self) -> dict[str, str]:
        """What tells a client whether and when to try again.

        OpenAI's client retries 408, 409, 429 and everything from 500 on, unless it is told not to; it obeys a
        `Retry-After` of up to 120 seconds and gives up at a longer one.
        """
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(max(1, round(self.retry_after))), "x-should-retry": "true"}


def plain_name(name: object) -> str | None:
    """The name of a parameter if it may be repeated to a client, else None."""
    text = str(name)
    return text if _PLAIN.fullmatch(text) else None
