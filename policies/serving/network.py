"""TLS, loopback addresses, HTTP requests and plain HTTP answers of the policy server."""

from __future__ import annotations

import http
import ipaddress
import re
import ssl

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from policies.serving import wire


def tls_context(certificate: str, key: str | None = None) -> ssl.SSLContext:
    """A server's TLS from PEM files; ValueError naming what is wrong with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as problem:
        raise ValueError(f"cannot read the certificate {certificate} or its key: {wire.one_line(problem)}") from None
    return context


def plain(text: str, content_type: str) -> Response:
    """An HTTP 200 response with `text` as its body, after which the connection is closed."""
    body = text.encode()
    headers = Headers([("Content-Type", content_type), ("Content-Length", str(len(body))), ("Connection", "close")])
    return Response(http.HTTPStatus.OK, "OK", headers, body)


def is_loopback(host: str) -> bool:
    """True if `host` is localhost or a loopback address; False for any other host name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name: it may resolve to anything
        return False


_WITH_BODY = re.compile(rb"(POST|PUT|PATCH|DELETE|OPTIONS) ")
_BODY_HEADERS = re.compile(rb"^(Content-Length|Transfer-Encoding):[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_MAX_HEAD_BYTES = 2**16


class HTTPConnection(ServerConnection):
    """A server's connection that understands the head of an HTTP request with a body, so that it can be answered
    (`other_method`); the websockets library closes it without a word. The body is not read."""

    _head: bytes | None = b""
    """The part of the request's head that has come; None once the library reads by itself."""
    _body = False

    def data_received(self, data: bytes) -> None:
        """Hand the library what came, of a request with a body its head without the lines that announce one."""
        if self._body:
            return
        if self._head is not None:
            data, self._head = self._head + data, None
            if _WITH_BODY.match(data):
                head, end, _ = data.partition(b"\r\n\r\n")
                if not end and len(data) < _MAX_HEAD_BYTES:
                    self._head = data
                    return
                self._body = bool(end)
                data = _BODY_HEADERS.sub(b"", head + b"\r\n") + b"\r\n" if end else data
        super().data_received(data)


def other_method(connection: ServerConnection, request: Request) -> Response | None:
    """The answer to a request that is none for a websocket, as POST; None for GET."""
    if request.method in ("GET", "HEAD"):
        return None
    response = connection.respond(
        http.HTTPStatus.METHOD_NOT_ALLOWED,
        f"a policy is not asked by {request.method}: this server speaks websocket (openpi's protocol), connect with "
        "policies.serving.client.PolicyClient or an openpi client\n",
    )
    response.headers["Allow"] = "GET"
    return response
