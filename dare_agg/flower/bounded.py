"""Answers over HTTP that are not read where they are longer than they may be.

A client decides how long its reply is, and HTTP clients read an answer whole. In a thread that
has said how much it takes, one that is longer ends with an error before its body is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import httpx

from dare_agg.flower.limits import need

_thread = threading.local()


@contextmanager
def at_most(client: httpx.Client, nbytes: int) -> Iterator[None]:
    """Within, this thread reads no answer of more bytes; `UpdateError` (reason "oversized")."""
    for when, hook in (("request", _ask_uncompressed), ("response", _measure)):
        if hook not in client.event_hooks[when]:
            client.event_hooks[when].append(hook)
    _thread.most = nbytes
    try:
        yield
    finally:
        del _thread.most


def _ask_uncompressed(request: httpx.Request) -> None:
    if hasattr(_thread, "most"):
        request.headers["accept-encoding"] = "identity"


def _measure(response: httpx.Response) -> None:
    if not hasattr(_thread, "most"):
        return
    _fits(int(response.headers.get("content-length", 0)))
    response.stream = _Measured(cast(httpx.SyncByteStream, response.stream))


class _Measured(httpx.SyncByteStream):
    """A body that ends with an error once it is longer than it may be."""

    def __init__(self, body: httpx.SyncByteStream) -> None:
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        come = 0
        for chunk in self.body:
            come += len(chunk)
            _fits(come)
            yield chunk

    def close(self) -> None:
        self.body.close()


def _fits(nbytes: int) -> None:
    need(nbytes, _thread.most, "bytes in one of its parts")
