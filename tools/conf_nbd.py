"""NBD URIs as `device`: which socket to serve on and under which export name.

The forms are those of the NBD URI specification that a server without TLS can have: ``nbd://HOST:PORT/EXPORT``
and ``nbd+unix:///EXPORT?socket=PATH``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

NBD_PORT: Final = 10809  # IANA's
UNIX_PATH_MAX: Final = 107  # sun_path holds 108 bytes, the last one is the terminating NUL (unix(7))
EXPORT_MAX: Final = 4096  # bytes of an export name (NBD protocol, "string")


class UriProblem(Exception):
    """Why a URI cannot be served; the sentence goes behind the URI."""


@dataclass(frozen=True, slots=True)
class NbdUri:
    """*socket* is the path of a Unix socket; when empty, *host* (without brackets) and *port* are TCP's."""

    export: str
    host: str = ""
    port: int = 0
    socket: str = ""


def parse_nbd_uri(text: str) -> NbdUri:
    """The parts of *text*; UriProblem says what a servable URI looks like."""
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in ("nbd", "nbd+unix"):
        why = "TLS is not implemented; " if scheme in ("nbds", "nbds+unix") else ""
        raise UriProblem(f"{why}nbd:// or nbd+unix:// expected")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        query = dict(parse_qsl(parts.query, keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise UriProblem(f"not a valid URI: {error}") from None
    if len(export.encode("utf-8", "surrogateescape")) > EXPORT_MAX or "\0" in export:
        raise UriProblem(f"an export name of at most {EXPORT_MAX} bytes expected")
    if scheme == "nbd+unix":
        return NbdUri(export, socket=_socket(query.get("socket", ""), parts.netloc))
    if "socket" in query:
        raise UriProblem("'socket=' belongs to nbd+unix://")
    if not host:
        raise UriProblem("an address to listen on expected: nbd://127.0.0.1:10809/EXPORT")
    if port == 0:
        raise UriProblem("port 0 => 0 out of range [1..65535].")
    return NbdUri(export, host, NBD_PORT if port is None else port)


def _socket(path: str, netloc: str) -> str:
    if netloc or not path.startswith("/"):
        raise UriProblem("nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH expected")
    n_bytes = len(path.encode("utf-8", "surrogateescape"))
    if n_bytes > UNIX_PATH_MAX:
        raise UriProblem(f"the socket path has {n_bytes} bytes, at most {UNIX_PATH_MAX} are possible")
    if "\0" in path:
        raise UriProblem("a socket path without NUL characters expected")
    return path
