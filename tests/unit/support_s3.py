"""A server that speaks S3 (moto's), in this process, and fails when it is told to."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["KEYS", "S3Server", "serving_s3"]

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

Fault = Callable[[Mapping[str, Any]], tuple[str, bytes] | None]
"""What to answer to a request (its WSGI environment) instead of doing it: status and body; None to do it."""


class S3Server:
    """What a test holds of the server.

    Attributes:
        address: for AWS_ENDPOINT_URL.
        fault: asked before each request.
        asked: method and path of each request.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self.address = ""
        self.fault: Fault = lambda request: None
        self.asked: list[str] = []

    def __call__(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.asked.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
        answer = self.fault(request)
        if answer is None:
            return self._app(request, start)  # type: ignore[no-any-return]
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        status, body = answer
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body if request["REQUEST_METHOD"] != "HEAD" else b""]

    def deny(self, *methods: str) -> None:
        """Answer these methods as S3 does to who has no permission."""
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.fault = lambda request: ("403 Forbidden", body) if request["REQUEST_METHOD"] in methods else None


@contextmanager
def serving_s3(bucket: str) -> Iterator[S3Server]:
    """Serve one empty bucket until the block ends."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = S3Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True)
    server.address = f"http://127.0.0.1:{http.port}"
    thread = threading.Thread(target=http.serve_forever, name="s3", daemon=True)
    thread.start()
    try:
        reset = urllib.request.Request(f"{server.address}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # what it holds is held by this process
        options = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", endpoint_url=server.address, region_name="us-east-1", **options)
        client.create_bucket(Bucket=bucket)
        yield server
    finally:
        http.shutdown()
        thread.join(10)
        http.server_close()
