"""Who may use a server, and what its answers tell."""

import logging
from typing import Any

import httpx
import openai
import pytest

from chargpt.serve.settings import ServeSettings

BODY = {"model": "hearts", "prompt": "the ", "max_tokens": 5}
KEY = "a secret"


def test_a_key_is_required_except_for_health_and_docs(serve: Any, run: Any) -> None:
    with serve(run, settings=ServeSettings(api_key=KEY)) as server:
        with server.client(KEY) as client:
            assert client.completions.create(**BODY).choices[0].text
        with server.client("another") as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(**BODY)
        assert server.post(BODY, headers={"X-Api-Key": KEY}).status_code == 200
        for path, status in {
            "/v1/models": 401, "/metrics": 401, "/health": 200, "/docs": 200,
        }.items():  # fmt: skip
            response = httpx.get(server.url + path)
            assert response.status_code == status
        assert server.post(BODY).json()["error"]["type"] == "authentication_error"
        assert server.post(BODY, headers={"Authorization": "Bearer ü".encode()}).status_code == 401


def test_cors_is_off_unless_an_origin_is_named(serve: Any, run: Any, server: Any) -> None:
    origin = "https://page.example"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    def allowed(url: str, **changes: str) -> str | None:
        response = httpx.options(url + "/v1/completions", headers=asked | changes)
        return response.headers.get("access-control-allow-origin")

    assert allowed(server.url) is None
    with serve(run, settings=ServeSettings(cors=(origin,), api_key=KEY)) as named:
        assert allowed(named.url) == origin
        assert allowed(named.url, Origin="https://other.example") is None
        refused = named.post(BODY, headers={"Origin": origin})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("192.168.1.7:8000", 200),
        ("my.example", 200), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("", 403), ("[", 403),
    ],
)  # fmt: skip
def test_a_rebound_name_is_refused(serve: Any, run: Any, host: str, status: int) -> None:
    with serve(run, settings=ServeSettings(hosts=("my.example",))) as server:
        assert server.post(BODY, headers={"Host": host}).status_code == status


def test_every_answer_has_the_security_headers(server: Any) -> None:
    answers = [
        server.post(BODY), server.post({}), server.post(BODY | {"stream": True}),
        server.post(BODY, headers={"Host": "evil.example"}),
        *(httpx.get(server.url + path) for path in ("/health", "/docs", "/nothing", "/metrics")),
    ]  # fmt: skip
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers


def test_prompts_are_not_logged_and_paths_not_answered(
    serve: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serve(run, settings=ServeSettings()) as server:
        answers = [
            server.post(BODY | {"prompt": "Romeo", "user": "Romeo"}, path=path)
            for path in ("/v1/completions", "/v1/completions?q=Romeo", "/v1/chat/completions")
        ]
        answers.append(httpx.get(server.url + "/v1/models"))
        assert not any(str(run.parent) in answer.text for answer in answers)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("chargpt", "uvicorn"))]
    assert any(line.startswith("POST /v1/completions 200") for line in ours)
    assert not any("Romeo" in line for line in ours)


def test_metrics_count(serve: Any, run: Any) -> None:
    with serve(run) as server:
        for _ in range(3):
            server.post(BODY | {"stream": True})
        server.post(BODY | {"n": 0})
        text = httpx.get(server.url + "/metrics").text
    for line in (
        'chargpt_requests_total{path="/v1/completions",status="200"} 3.0',
        'chargpt_requests_total{path="/v1/completions",status="400"} 1.0',
        'chargpt_characters_total{model="hearts"} 15.0',
        'chargpt_prompt_characters_total{model="hearts"} 12.0',
        'chargpt_first_character_seconds_count{model="hearts"} 3.0',
        'chargpt_texts_running{model="hearts"} 0.0',
        'chargpt_texts_waiting{model="hearts"} 0.0',
    ):
        assert line in text


def test_the_api_page_and_document(server: Any) -> None:
    page = httpx.get(server.url + "/docs").text
    assert "/v1/completions" in page and "<script" not in page and "://" not in page
    assert httpx.get(server.url + "/openapi.json").json()["paths"]["/v1/completions"]
