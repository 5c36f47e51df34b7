"""Slots, the queue, fairness and closed connections."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import wait_until

from chargpt.serve.settings import ServeSettings

LONG = {"model": "hearts", "prompt": "the ", "max_tokens": 10_000, "seed": 1}
BRIEF = {"model": "hearts", "prompt": "the ", "max_tokens": 5, "seed": 1}


def send(server: Any, body: dict[str, Any]) -> socket.socket:
    """Send a request and return its socket, with the answer unread."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection: socket.socket = server.connect()
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_closed_connection_stops_within_two_characters(server: Any, stream: bool, n: int) -> None:
    for _ in range(5):
        before = server.worker.n_characters
        connection = send(server, LONG | {"stream": stream, "n": n})
        wait_until(lambda before=before: server.worker.n_characters > before + 20)
        connection.close()
        at_close = server.worker.n_characters
        wait_until(lambda: server.worker.n_running == 0)
        assert server.worker.n_characters - at_close <= 2 * n


def test_a_closed_connection_leaves_the_queue(serve: Any, run: Any) -> None:
    with serve(run, n_slots=1) as server:
        first = send(server, LONG)
        wait_until(lambda: server.worker.n_running == 1)
        second = send(server, LONG)
        wait_until(lambda: server.worker.n_waiting == 1)
        second.close()
        wait_until(lambda: server.worker.n_waiting == 0)
        first.close()
        wait_until(lambda: server.worker.n_running == 0)
        assert server.post(BRIEF).status_code == 200


def test_many_dropped_requests_leave_nothing(server: Any) -> None:
    for _ in range(40):
        connections = [send(server, LONG | {"stream": stream}) for stream in (True, False)]
        wait_until(lambda: server.worker.n_running + server.worker.n_waiting > 0)
        for connection in connections:
            connection.close()
    wait_until(lambda: server.worker.n_running + server.worker.n_waiting == 0)
    assert server.post(BRIEF).status_code == 200


@pytest.mark.parametrize(("slots", "requests"), [(1, 3), (2, 2), (2, 4), (4, 2), (4, 6)])
def test_more_requests_than_slots(serve: Any, run: Any, slots: int, requests: int) -> None:
    with serve(run, n_slots=slots) as server, ThreadPoolExecutor(requests) as pool:
        jobs = [pool.submit(server.post, BRIEF | {"max_tokens": 50}) for _ in range(requests)]
        answers = [job.result() for job in jobs]
        assert [answer.status_code for answer in answers] == [200] * requests
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_a_full_queue_says_when_to_try_again(serve: Any, run: Any) -> None:
    with serve(run, n_slots=1, max_waiting=1) as server, server.client() as client:
        connections = [send(server, LONG)]
        wait_until(lambda: server.worker.n_running == 1)
        connections.append(send(server, LONG))
        wait_until(lambda: server.worker.n_waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**BRIEF)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for connection in connections:
            connection.close()
        wait_until(lambda: server.worker.n_running + server.worker.n_waiting == 0)
        assert client.completions.create(**BRIEF).choices[0].text


def test_short_texts_do_not_wait_for_long_ones(serve: Any, run: Any) -> None:
    with serve(run, n_slots=4, settings=ServeSettings(max_tokens=10**8)) as server:
        endless = [send(server, LONG | {"max_tokens": 10**8}) for _ in range(6)]
        wait_until(lambda: server.worker.n_running == 3 and server.worker.n_waiting == 3)
        assert server.post(BRIEF).status_code == 200
        for connection in endless:
            connection.close()


def test_a_request_of_many_texts_does_not_hold_up_another(serve: Any, run: Any) -> None:
    """One slot, and both take turns."""
    with serve(run, n_slots=1) as server, ThreadPoolExecutor(2) as pool:
        order: list[str] = []
        many = pool.submit(server.post, BRIEF | {"n": 16, "max_tokens": 50})
        many.add_done_callback(lambda _: order.append("many"))
        wait_until(lambda: server.worker.n_running == 1)
        one = pool.submit(server.post, BRIEF)
        one.add_done_callback(lambda _: order.append("one"))
        assert many.result().status_code == one.result().status_code == 200
        assert order == ["one", "many"]


def test_a_slow_reader_does_not_stop_the_others(server: Any) -> None:
    slow = send(server, LONG | {"stream": True, "logprobs": 5, "max_tokens": 300})
    assert server.post(BRIEF).status_code == 200
    wait_until(lambda: server.worker.n_running == 0)
    slow.close()


def test_a_half_open_connection_does_not_stop_the_others(server: Any) -> None:
    with server.connect() as silent, server.connect() as partial:
        partial.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
        assert server.post(BRIEF).status_code == 200
        silent.sendall(b"nonsense\r\n\r\n")
        assert b" 400 " in silent.recv(100)


def test_a_request_has_a_time_limit(serve: Any, run: Any) -> None:
    settings = ServeSettings(timeout=0.05, max_tokens=10**8)
    with serve(run, settings=settings) as server:
        assert server.post(LONG | {"max_tokens": 10**8}).status_code == 504
        wait_until(lambda: server.worker.n_running == 0)
        text = server.post(LONG | {"max_tokens": 10**8, "stream": True}).text
        assert '"code":"timeout"' in text and text.endswith("[DONE]\n\n")


def test_a_failed_step_fails_its_requests_only(serve: Any, run: Any, monkeypatch: Any) -> None:
    with serve(run) as server:
        engine, fails = server.worker._engine, threading.Event()
        step = engine.step

        def broken() -> Any:
            if fails.is_set():
                fails.clear()
                raise RuntimeError("a bug in /secret/path")
            return step()

        monkeypatch.setattr(engine, "step", broken)
        fails.set()
        response = server.post(BRIEF)
        assert response.status_code == 500 and "secret" not in response.text
        assert server.post(BRIEF).status_code == 200
