"""OpenAI's API as its own client sees it, over a real socket."""

import json
from typing import Any

import httpx
import openai
import pytest
import torch

import chargpt
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.config import SampleConfig

PROMPT = "the king "


def options(**changes: Any) -> dict[str, Any]:
    return {"model": "hearts", "prompt": PROMPT, "max_tokens": 5, "seed": 7} | changes


def streamed(client: openai.OpenAI, **changes: Any) -> list[Any]:
    return list(client.completions.create(**options(**changes), stream=True))


def whole(client: openai.OpenAI, **changes: Any) -> Any:
    return client.completions.create(**options(**changes))


def joined(chunks: list[Any], index: int = 0) -> str:
    parts = (choice for chunk in chunks for choice in chunk.choices)
    return "".join(part.text for part in parts if part.index == index)


def test_a_completion_has_usage_reason_id_and_model(client: Any) -> None:
    answer = whole(client)
    assert (answer.model, answer.object) == ("hearts", "text_completion")
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, len(choice.text)) == (0, "length", 5)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 5, 14)


def test_the_text_is_the_one_of_the_library(client: Any, run: Any) -> None:
    """The seed, the temperature, the filters and the stop strings mean the same."""
    model, tokenizer = chargpt.load(run)
    settings = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.5}
    config = SampleConfig(max_new_tokens=60, stop=("qu", "he"), top_k=12, **settings)
    seeds = [derive_seed(3, SAMPLE, i) for i in range(4)]
    expected = chargpt.complete(model, tokenizer, [PROMPT, "O"], config, seeds=seeds)
    asked = {"prompt": [PROMPT, "O"], "max_tokens": 60, "stop": ["qu", "he"], "seed": 3, "n": 4}
    answer = whole(client, **asked, **settings, extra_body={"top_k": 12})
    assert [c.text for c in answer.choices] == [c.text for c in expected]
    assert [c.index for c in answer.choices] == list(range(8))
    reasons = {c.finish_reason for c in answer.choices}
    assert reasons <= {"stop", "length"} and "stop" in reasons


def test_a_stream_is_the_answer_in_parts(client: Any) -> None:
    for seed in range(20):
        asked = {"seed": seed, "max_tokens": 30, "stop": ["en", " r"]}
        chunks = streamed(client, **asked)
        assert joined(chunks) == whole(client, **asked).choices[0].text
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) <= {None}


def test_a_stream_ends_with_done(server: Any) -> None:
    text = server.post(options(stream=True)).text
    assert text.endswith("data: [DONE]\n\n") and text.count("[DONE]") == 1


def test_usage_in_a_stream_comes_last_without_choices(client: Any) -> None:
    *others, last = streamed(client, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in others)
    with pytest.raises(openai.BadRequestError):
        whole(client, stream_options={"include_usage": True})


@pytest.mark.parametrize("logprobs", [0, 1, 5])
def test_logprobs(client: Any, run: Any, logprobs: int) -> None:
    model, tokenizer = chargpt.load(run)
    answer = whole(client, logprobs=logprobs, echo=True)
    [choice] = answer.choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and choice.text.startswith(PROMPT)
    assert found.text_offset == list(range(len(choice.text)))
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    ids = torch.tensor(tokenizer.encode(choice.text).tolist())
    with torch.no_grad():
        scores = model(ids[None, :-1])[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    assert found.token_logprobs[1:] == pytest.approx(scores.tolist(), abs=1e-4)
    for token, p, top in list(
        zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )[1:]:
        assert top[token] == p and logprobs <= len(top) <= logprobs + 1


def test_too_many_logprobs_are_refused_and_the_server_works_on(client: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        whole(client, logprobs=10_000)
    assert whole(client).choices[0].text


def test_streamed_logprobs_are_those_of_the_answer(client: Any) -> None:
    asked = {"logprobs": 2, "echo": True, "max_tokens": 40, "stop": ["qu"]}
    expected = whole(client, **asked).choices[0].logprobs
    parts = [c.logprobs for chunk in streamed(client, **asked) for c in chunk.choices]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [x for part in parts for x in getattr(part, name)] == getattr(expected, name)


def test_n_texts_differ_and_come_side_by_side(client: Any) -> None:
    asked = {"n": 3, "seed": 42, "max_tokens": 200}
    texts = [choice.text for choice in whole(client, **asked).choices]
    assert len(set(texts)) == 3
    chunks = streamed(client, **asked)
    assert [joined(chunks, i) for i in range(3)] == texts
    order = [choice.index for chunk in chunks for choice in chunk.choices]
    assert order.index(2) < len(order) - 1 - order[::-1].index(0), "interleaved"


def test_forms_of_a_prompt(client: Any, run: Any) -> None:
    tokenizer = chargpt.load(run).tokenizer
    ids = tokenizer.encode(PROMPT).tolist()
    expected = whole(client).choices[0].text
    for prompt in (PROMPT, ids, [ids]):
        assert whole(client, prompt=prompt).choices[0].text == expected
    for prompts in ([PROMPT, PROMPT], [ids, ids]):
        assert [c.text for c in whole(client, prompt=prompts).choices] == [expected] * 2


def test_an_empty_prompt_and_no_new_characters(client: Any) -> None:
    assert len(whole(client, prompt="").choices[0].text) == 5
    answer = whole(client, max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_logit_bias_takes_ids_as_strings(client: Any, run: Any) -> None:
    tokenizer = chargpt.load(run).tokenizer
    bias = {str(tokenizer.encode("q")[0]): 100}
    assert whole(client, logit_bias=bias).choices[0].text == "qqqqq"
    with pytest.raises(openai.BadRequestError):
        whole(client, logit_bias={"1000": 1})


def test_a_seed_is_chosen_and_answered(client: Any) -> None:
    """Without a seed each request has another one, and it gives the same text again."""
    answers = [whole(client, seed=None, max_tokens=40) for _ in range(3)]
    assert len({answer.seed for answer in answers}) == 3
    for answer in answers:
        again = whole(client, seed=answer.seed, max_tokens=40)
        assert again.choices[0].text == answer.choices[0].text
        assert again.system_fingerprint == answer.system_fingerprint


def test_chat_continues_the_conversation_as_text(client: Any) -> None:
    messages = [
        {"role": "system", "content": "the king"},
        {"role": "user", "content": [{"type": "text", "text": "said: "}]},
        {"role": "assistant", "content": "no!"},
        {"role": "user", "content": "O "},
    ]
    asked = {"model": "hearts", "messages": messages, "seed": 7, "max_tokens": 30}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = answer.choices[0].message.content
    prompt = "the king\nsaid: no!\nO "
    assert text == whole(client, prompt=prompt, max_tokens=30).choices[0].text
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == text
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["hearts"]
    assert client.models.retrieve("hearts").owned_by == "chargpt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("spades")
    assert whole(client, model="gpt-3.5-turbo-instruct").model == "hearts", "one model: any name"


def test_langchain(server: Any, client: Any) -> None:
    from langchain_openai import OpenAI

    asked = {"model": "hearts", "seed": 7, "max_tokens": 30, "temperature": 0.8}
    chain = OpenAI(base_url=f"{server.url}/v1", api_key="any", **asked)
    text = chain.invoke(PROMPT)
    assert text == whole(client, **asked).choices[0].text
    assert "".join(chain.stream(PROMPT)) == text


# --- errors


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": "naïve"}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a" * 70_000}, "prompt"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias"),
    ],
)
def test_a_wrong_value_is_named(server: Any, changes: dict[str, Any], param: str) -> None:
    response = server.post(options(**changes))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_unknown_characters_are_named(server: Any) -> None:
    message = error_of(server.post(options(prompt="the naïve Ω")))["message"]
    assert "'ï'" in message and "'Ω'" in message and "--" not in message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 200_000, b'{"prompt":' + b"[" * 90_000]
    + [json.dumps(options(temperature=float(x))).encode() for x in ("nan", "inf", "-inf")],
    ids=lambda body: body[:12],
)  # fmt: skip
def test_a_body_that_is_no_request(server: Any, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    url = server.url + "/v1/completions"
    response = httpx.post(url, content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    error_of(response)


def test_other_errors_have_the_same_shape(server: Any) -> None:
    url = server.url
    answers = [
        (httpx.get(url + "/v2/nothing"), 404),
        (httpx.get(url + "/v1/completions"), 405),
        (httpx.post(url + "/v1/completions", data={"prompt": "a"}), 415),
        (server.post(options(prompt="a" * 10_000_000)), 413),
    ]
    for response, status in answers:
        assert response.status_code == status
        error_of(response)
