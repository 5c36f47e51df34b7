"""The same seed gives the same bytes, whatever else the server does."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

N_SLOTS = 8


def bodies(n_prompts: int) -> list[dict[str, Any]]:
    """Return requests of mixed lengths, temperatures and filters."""
    rng = random.Random(0)
    words = "the king and queen of hearts said: no! O Romeo".split()
    filters: list[dict[str, Any]] = [
        {}, {"top_p": 0.9}, {"top_k": 5, "temperature": 1.3}, {"frequency_penalty": 0.5},
        {"stop": ["he"]}, {"logprobs": 2},
    ]  # fmt: skip
    return [
        {
            "model": "hearts",
            "prompt": " ".join(rng.choices(words, k=rng.randrange(1, 8))),
            "max_tokens": rng.choice([1, 3, 15, 40]),
            "seed": seed,
        }
        | rng.choice(filters)
        for seed in range(n_prompts)
    ]


def answer(client: Any, body: dict[str, Any], n: int, stream: bool) -> list[str]:
    """Return the text of each choice; filters of ours go into the body."""
    extra = {"top_k": body["top_k"]} if "top_k" in body else {}
    asked = {key: value for key, value in body.items() if key != "top_k"}
    reply = client.completions.create(**asked, n=n, stream=stream, extra_body=extra)
    texts = [""] * n
    for part in reply if stream else [reply]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    return texts


def check(server: Any, n_prompts: int) -> None:
    with server.client() as client:
        asked = bodies(n_prompts)
        expected = [answer(client, body, 3, False) for body in asked]
        assert len({texts[0] for texts in expected}) > n_prompts / 2
        for at_once, stream, n in itertools.product([1, 2, 4, 8], [False, True], [1, 3]):
            with ThreadPoolExecutor(at_once) as pool:
                jobs = [pool.submit(answer, client, body, n, stream) for body in asked]
            for job, texts in zip(jobs, expected, strict=True):
                assert job.result() == texts[:n], (at_once, stream, n)


def test_same_seed_same_bytes(serve: Any, run: Any, kernels: Any) -> None:
    with serve(run, n_slots=N_SLOTS, kernels=kernels) as server:
        check(server, 4)


@pytest.mark.slow
def test_same_seed_same_bytes_for_100_prompts(serve: Any, run: Any, kernels: Any) -> None:
    with serve(run, n_slots=N_SLOTS, kernels=kernels) as server:
        check(server, 100)
