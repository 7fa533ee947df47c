"""TLS, loopback addresses and plain HTTP answers of the policy server."""

from __future__ import annotations

import http
import ipaddress
import ssl

from websockets.datastructures import Headers
from websockets.http11 import Response

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
