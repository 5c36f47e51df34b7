"""``chargpt serve`` as a process: what it prints, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chargpt.base.errors import UserError
from chargpt.cli.main import run as run_command


@contextmanager
def process(run: Path, *flags: str) -> Iterator[tuple[Any, str]]:
    """Start the command on a free port; yield the process and its address."""
    command = [sys.executable, "-m", "chargpt", "serve", str(run), "--port", "0", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().rpartition(" at ")[2].strip()
            assert url.startswith("http://127.0.0.1:"), server.stderr and server.stderr.read()
            yield server, url
        finally:
            server.kill()


def ask(max_tokens: int) -> dict[str, Any]:
    return {"prompt": "the ", "max_tokens": max_tokens, "stream": True}


def test_sigterm_lets_requests_finish_and_refuses_new_ones(run: Path) -> None:
    with process(run, "--grace", "60") as (server, url):
        refused = False
        with httpx.stream("POST", url + "/v1/completions", json=ask(1500), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            port, rest = int(url.rpartition(":")[2]), []
            for line in lines:
                rest.append(line)
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                except ConnectionRefusedError:
                    refused = True
        assert refused and "data: [DONE]" in rest
        assert server.wait(timeout=30) == 0


def test_sigterm_without_grace_ends_at_once(run: Path) -> None:
    with (
        process(run, "--grace", "0", "--max-tokens", "1000000") as (server, url),
        httpx.stream("POST", url + "/v1/completions", json=ask(10**6), timeout=60) as answer,
    ):
        next(answer.iter_lines())
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0


def test_the_printed_example_works(run: Path) -> None:
    with process(run) as (server, url):
        example = server.stdout.readline()
        assert example.startswith(f"curl {url}/v1/completions ")
        command = example.replace("curl ", "curl -s --max-time 20 ", 1)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--host", "0.0.0.0"], "CHARGPT_API_KEY"),
        (["--port", "70000"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--timeout", "nan"], "--timeout"),
        (["RUN"], "name"),
    ],
)
def test_a_wrong_flag(
    run: Path, flags: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHARGPT_API_KEY", raising=False)
    given = [str(run) if flag == "RUN" else flag for flag in flags]
    with pytest.raises(UserError, match=problem):
        run_command(["serve", str(run), *given])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        run_command(["serve", str(tmp_path), "--port", "0"])
