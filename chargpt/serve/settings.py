"""Limits of a server and who may use it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `make_app` needs to know; the defaults suit a laptop."""

    api_key: str | None = None
    """Required of every request to /v1 and /metrics; None: no key."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the server, or ``*``."""
    hosts: tuple[str, ...] = ()
    """Names in the Host header to accept besides localhost and IP addresses."""
    max_tokens: int = 10_000
    """Most characters of one text."""
    max_prompt: int = 65_536
    """Most characters of all prompts of a request."""
    max_texts: int = 32
    """Most texts of a request: prompts times n."""
    max_body: int = 2**20
    """Most bytes of a request's body."""
    timeout: float = 600.0
    """Seconds until a request is given up, in the queue, writing or sending."""
    log_requests: bool = True
    """Write a line per request to stderr, without its text."""
