"""Refuse every connection that leaves this machine, in this process.

tests/conftest.py loads it for the suite and puts its folder on PYTHONPATH, where Python looks for a
`sitecustomize` at its start: so every process that a test starts is held to it too.
"""

import socket
import sys

LOCAL = {"", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}
refused: list[str] = []
"""The hosts that this process tried to reach."""


def _check(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        host = args[1][0] if isinstance(args[1], tuple) else None  # else: a socket in a file
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not isinstance(host, str) or host in LOCAL or host.startswith("127."):
        return
    refused.append(host)
    sys.stderr.write(f"refused a connection to {host}\n")
    raise PermissionError(f"the tests run without a network, and {event} asked for {host}")


_first = sys.modules.get("sitecustomize")
if __name__ != "sitecustomize" and getattr(_first, "__file__", None) == __file__:
    refused = _first.refused  # this process started with the rule
else:
    sys.addaudithook(_check)
