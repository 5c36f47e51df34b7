"""What a server holds out: load, dropped requests, and the cost of equal bytes.

    python benchmarks/serve_load.py RUN [--seconds 60] [--at-once 64] [--cycles 1000]

Prints a line per figure. The server is a process of its own; the clients share the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from chargpt.config import SampleConfig
from chargpt.engine.decoder import Decoder, PyTorchDecoder
from chargpt.engine.scheduler import Engine
from chargpt.generate import make_decoder
from chargpt.runs.folder import load
from chargpt.serve.models import OneByOne


def offline(decoder: Decoder, seconds: float, n_characters: int = 200) -> float:
    """Return characters per second of the engine with all slots busy."""
    engine, config = Engine(decoder), SampleConfig(temperature=1.0, max_new_tokens=n_characters)
    written, seed, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        while engine.n_free:
            engine.add([0], config, [seed := seed + 1])
        written += len(engine.step())
    return written / (time.perf_counter() - began)


async def stream(host: str, port: int, body: dict[str, Any], drop_after: float | None) -> Any:
    """Send a request; return status, seconds to the first text, and characters.

    A plain socket costs the machine less than a client library does.
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status, first, n = 0, None, 0
    try:
        async with asyncio.timeout(drop_after):
            status = int((await reader.readline()).split()[1])
            async for line in reader:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - began
                    n += sum(len(c["text"]) for c in json.loads(line[6:])["choices"])
    except TimeoutError:
        pass
    finally:
        writer.close()
    return status, first, n


async def load_for(host: str, port: int, seconds: float, at_once: int) -> None:
    """Keep `at_once` streams open; print the times to the first character and the rate."""
    rng, results, end = random.Random(0), [], time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            body = {"prompt": "", "max_tokens": rng.choice([50, 200, 800]), "stream": True}
            results.append(await stream(host, port, body, None))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    rate = sum(n for *_, n in results) / (time.perf_counter() - began)
    counts = {s: sum(status == s for status, *_ in results) for s in {s for s, *_ in results}}
    times = sorted(first for _, first, _ in results if first)
    p50, p99 = statistics.median(times), times[int(0.99 * (len(times) - 1))]
    print(f"load         {at_once} streams: {rate:,.0f} characters/s, statuses {counts}")
    print(f"first        p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")


async def drop(host: str, port: int, n: int, at_once: int, after: float) -> None:
    """Drop `n` requests for 10,000 characters."""
    body = {"prompt": "", "max_tokens": 10_000, "stream": True}
    gate = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with gate:
            await stream(host, port, body, after)

    await asyncio.gather(*(one() for _ in range(n)))


def state(process: psutil.Process) -> str:
    """Return memory, threads and files of the server."""
    memory = process.memory_info().rss / 2**20
    return f"{memory:.0f} MiB, {process.num_threads()} threads, {process.num_fds()} files"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--cycles", type=int, default=1000)
    args = parser.parse_args()
    model, _ = load(args.run)
    engine_rate = offline(make_decoder(model, 32), 5)
    print(f"engine       {engine_rate:,.0f} characters/s, 32 texts, offline")
    for name, decoder in {
        "batched": PyTorchDecoder(model, 32),
        "one by one": OneByOne(PyTorchDecoder(model, 32)),
    }.items():
        print(f"PyTorch      {offline(decoder, 3):,.0f} characters/s, {name}")
    command = [sys.executable, "-m", "chargpt", "serve", str(args.run), "--port", "0", "--quiet"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().rpartition(" at ")[2].strip()
            httpx.post(url + "/v1/completions", json={"prompt": ""}).raise_for_status()
            print(f"start        {time.perf_counter() - began:.1f} s to the first answer")
            host, port = "127.0.0.1", int(url.rpartition(":")[2])
            asyncio.run(load_for(host, port, args.seconds, args.at_once))
            asyncio.run(drop(host, port, 200, 200, 0.5))
            began = time.perf_counter()
            httpx.post(url + "/v1/completions", json={"prompt": ""}).raise_for_status()
            seconds = time.perf_counter() - began
            print(f"dropped      200 requests; then one answers in {seconds:.3f} s")
            process = psutil.Process(server.pid)
            asyncio.run(drop(host, port, 100, 16, 0.05))
            time.sleep(1)
            print(f"before       {state(process)}")
            asyncio.run(drop(host, port, args.cycles, 16, 0.05))
            time.sleep(1)  # the last connections close
            print(f"after        {state(process)}, {args.cycles} dropped requests later")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
