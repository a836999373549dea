"""The page at `/`: chat with the policy in a browser. One file, nothing from elsewhere, nothing stored.

It holds nothing that needs a key; what it asks the endpoint for needs one, which the user types and which
stays in the page. Its policy allows its own script and style by their hashes, connections to where it came
from, and nothing else; everything that is said is put into it as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

__all__ = ["add_page"]


def add_page(app: FastAPI) -> None:
    """Add the page to an application."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        html, policy = _page()
        return HTMLResponse(
            html,
            headers={
                "content-security-policy": policy,
                "cross-origin-opener-policy": "same-origin",
                "cross-origin-resource-policy": "same-origin",
                "permissions-policy": "camera=(), microphone=(), geolocation=()",
                "referrer-policy": "no-referrer",
                "x-frame-options": "DENY",
            },
        )


@cache
def _page() -> tuple[str, str]:
    """The file and its content security policy."""
    html = resources.files("stateset_ray.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return html, "; ".join(policy)


def _hashes(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
