"""``chargpt serve``: an HTTP server with OpenAI's API for one or more runs."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import logging
import os
import shlex
import socket
from pathlib import Path
from typing import Annotated, Any

import tyro

from chargpt.base.errors import UserError
from chargpt.base.terminal import visible
from chargpt.cli import shared
from chargpt.cli.shared import flag
from chargpt.config import OnOffAuto

KEY = "CHARGPT_API_KEY"
_RUNS = tyro.conf.arg(help="Run folders.", metavar="RUN [RUN ...]", help_behavior_hint="")


def make_flags(_: str) -> type:
    """Return the flags of ``serve`` as a dataclass."""
    many = tyro.conf.UseAppendAction[tuple[str, ...]]
    key_help = f"Requests must send this key; better set {KEY}, which others cannot see."
    open_help = "Serve without a key, although other machines can connect."
    cors_help = "Let pages of this origin call the server; * for all. May be given several times."
    host_help = "Accept this name in the Host header, too. May be given several times."
    slots_help = "Texts of a model written at the same time. (32)"
    grace_help = "After SIGTERM, the time to finish running requests, in seconds. (10.0)"
    timeout_help = "Give a request up after this time, in seconds. (600.0)"
    kernels_help = "C++ kernels for a CPU; auto turns them on where they work. (auto)"
    return shared.flags_class(
        "Serve models over HTTP with OpenAI's API. A model has the name of its folder.",
        [
            ("runs", Annotated[tyro.conf.Positional[tuple[Path, ...]], _RUNS]),
            flag("host", str, "127.0.0.1", "Address to listen on. (127.0.0.1)"),
            flag("port", int, 8000, "Port to listen on; 0: a free one. (8000)"),
            flag("api_key", str | None, None, key_help, "KEY"),
            flag("no_api_key", bool, False, open_help),
            flag("cors", many, (), cors_help, "ORIGIN"),
            flag("allow_host", many, (), host_help, "NAME"),
            flag("slots", int, 32, slots_help),
            flag("queue", int, 128, "Texts that may wait for a slot. (128)"),
            flag("max_tokens", int, 10_000, "Most characters of a text. (10000)"),
            flag("timeout", float, 600.0, timeout_help),
            flag("grace", float, 10.0, grace_help),
            flag("quiet", bool, False, "Write no line per request."),
            *shared.MODEL_FLAGS,
            flag("kernels", OnOffAuto, "auto", kernels_help),
        ],
    )


def run(command: Any) -> int:
    """Serve until a signal; return the exit code."""
    _check(command)
    key = command.api_key or os.environ.get(KEY) or None
    _check_open(command, key)
    names = _names(command.runs)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install 'chargpt[serve]'")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("chargpt.serve").setLevel(logging.INFO)

    from chargpt.serve.server import serve
    from chargpt.serve.settings import ServeSettings

    settings = ServeSettings(
        api_key=key,
        cors=command.cors,
        hosts=tuple(name.lower() for name in command.allow_host),
        max_tokens=command.max_tokens,
        timeout=command.timeout,
        log_requests=not command.quiet,
    )
    with _listen(command.host, command.port) as listener:
        options = {name: getattr(command, name) for name in ("which", "device", "kernels")}
        options |= {"n_slots": command.slots, "max_waiting": command.queue}

        def started(url: str, served: Any) -> None:
            print(_greeting(url, served, key), flush=True)

        serve(names, listener, settings, options, grace=command.grace, started=started)
    return 0


def _check(command: Any) -> None:
    least = {"port": 0, "slots": 1, "queue": 0, "max_tokens": 1, "timeout": 0, "grace": 0}
    for name, minimum in least.items():
        value = getattr(command, name)
        if not minimum <= value < 2**31:
            flag_name = "--" + name.replace("_", "-")
            raise UserError(f"{flag_name} is {value}: give a number of at least {minimum}")
    if command.port > 65535:
        raise UserError(f"--port is {command.port}: give 0 to 65535")
    if not command.runs:
        raise UserError("no run is given: name a run folder")


def _check_open(command: Any, key: str | None) -> None:
    """Refuse to serve other machines without a key, unless the user insists."""
    try:
        local = command.host == "localhost" or ipaddress.ip_address(command.host).is_loopback
    except ValueError:
        local = False
    if key is not None and not key.isprintable():
        raise UserError("the API key has characters that a header cannot hold: give letters")
    if local or key:
        return
    if not command.no_api_key:
        raise UserError(
            f"--host is {command.host}, which other machines can reach: set {KEY}, or give "
            "--no-api-key to serve anyone"
        )
    shared.print_message(f"WARNING: anyone who can reach {command.host} can use this server")


def _names(runs: tuple[Path, ...]) -> dict[str, Path]:
    """Return the runs by name."""
    names: dict[str, Path] = {}
    for path in runs:
        name = path.resolve().name
        if name in names:
            raise UserError(f"two runs have the name {name}: give folders with different names")
        names[name] = path
    return names


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot listen on {host}:{port} ({reason}): give another --host or --port"
        ) from error


def _greeting(url: str, served: dict[str, Any], key: str | None) -> str:
    """Return the lines printed when the server is ready, with an example to copy."""
    name, first = next(iter(served.items()))
    known = set("The ") <= {*first.tokenizer.characters}
    example = {"model": name, "prompt": "The " if known else "", "max_tokens": 200}
    body = shlex.quote(json.dumps(example))
    header = f' -H "Authorization: Bearer ${KEY}"' if key else ""
    lines = (
        f"serving {', '.join(served)} at {url}",
        f'curl {url}/v1/completions -H "Content-Type: application/json"{header} -d {body}',
    )
    return "\n".join(map(visible, lines))
