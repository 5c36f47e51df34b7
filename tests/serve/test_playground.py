"""The page of the server, over a real socket: write, stop, branch, compare, watch a run train."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browsers import settled, watched, write
from conftest import QUICK, SMALL
from serving import running, wait_until

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.serve.live import reload
from chargpt.serve.models import load_served
from chargpt.serve.settings import ServeSettings
from chargpt.serve.writing import PageText
from chargpt.train import TrainResult, train

SHORT = "#prompt=the+king&length=40"  # a first text that is written quickly


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many short documents."""
    folder, text = tmp_path_factory.mktemp("names"), "ann\nbob\ncy\n" * 200
    return make_run(folder, text, separator="\n", run="names").run


def make_run(
    folder: Path, text: str, *, separator: str = "", name: str = "text.txt", run: str = "run"
) -> TrainResult:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return train(
        str(file), model_config=SMALL, train_config=QUICK,
        data_config=DataConfig(document_separator=separator), out=folder / run, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(result: TrainResult, names: Path) -> Iterator[Any]:
    with running(result.run, names) as started:
        yield started


@pytest.fixture
def open_url(browser: Any) -> Iterator[Callable[[str], Any]]:
    """Return a function that opens an address; afterwards, nothing else was asked or failed."""
    with watched(browser, "http://127.0.0.1:") as (context, _):

        def open_it(url: str) -> Any:
            page = context.new_page()
            page.goto(url)
            return page

        yield open_it


@pytest.fixture
def page(server: Any, open_url: Callable[[str], Any]) -> Any:
    opened = open_url(f"{server.url}/{SHORT}")
    settled(opened)
    return opened


def test_the_same_seed_writes_the_same_and_branches_survive_a_refresh(page: Any) -> None:
    text = write(page, "the king", seed=5, length=100, temperature=1)
    assert text.startswith("the king")
    assert len(text) == len("the king") + 100
    page.click("#go")
    assert settled(page) == text
    page.click("#another")
    assert settled(page) != text
    page.locator("#pick").fill("30")
    page.locator('#inside-body[data-index="30"]').wait_for()
    page.locator("#odds-body .bars button").nth(2).click()
    branched = settled(page)
    page.click("#more")
    longer = settled(page)
    assert longer.startswith(branched)
    assert len(longer) == 31 + 200
    page.reload()
    assert settled(page) == longer
    last = page.locator(".lens tbody tr").last.locator("td .number")
    last.first.wait_for()
    odds = page.locator("#odds-body .number").all_text_contents()
    assert last.all_text_contents() == odds[:5]


def test_a_text_continued_from_any_place_is_the_same(server: Any, page: Any) -> None:
    """Each character is drawn by its own random number, from a context that its index decides."""
    whole = write(page, "the king", seed=5, length=120, temperature=1)
    write(page, "the king", seed=5, length=60, temperature=1)
    page.click("#more")
    assert settled(page) == whole


STOP = """(button) => {
  document.getElementById(button).click();
  const text = document.getElementById("text");
  new MutationObserver((_, observer) => {
    if (text.childElementCount <= 20) return;
    observer.disconnect();
    document.getElementById("stop").click();
  }).observe(text, { childList: true });
}"""


def test_stop_ends_the_computation(server: Any, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, closed = server.served["hearts"].worker, []
    close = PageText.close
    monkeypatch.setattr(
        PageText, "close", lambda text: (closed.append(worker.n_characters), close(text))
    )
    page.fill("#prompt", "O")
    page.locator("#settings").evaluate("details => { details.open = true; }")
    page.fill("#length", "20000")
    page.evaluate(STOP, "go")
    page.locator("#status", has_text="then stopped").wait_for()
    stopped = settled(page)
    wait_until(lambda: worker.n_running == 0)
    assert 20 < len(stopped) < 20_000
    assert worker.n_characters - closed[0] <= 2
    page.reload()
    assert settled(page) == stopped


def test_documents_follow_each_other(server: Any, open_url: Callable[[str], Any]) -> None:
    page = open_url(f"{server.url}/?model=names{SHORT}")
    settled(page)
    assert page.locator("#models").input_value() == "names"
    text = write(page, "a", temperature=1, length=60, seed=1)
    n_ends = text.count("∎\n")
    assert n_ends > 2
    status = page.locator("#status").text_content()
    assert f"{60 - n_ends} characters written in {n_ends + 1} texts" in status
    page.locator("#pick").fill(str(text.replace("∎\n", "∎").index("∎")))
    page.get_by_text("ended the text here").wait_for()
    page.reload()
    assert settled(page) == text


def test_two_side_by_side(server: Any, open_url: Callable[[str], Any]) -> None:
    page = open_url(f"{server.url}/compare{SHORT}")
    left, right = (page.frame_locator("iframe").nth(i) for i in (0, 1))
    settled(left), settled(right)
    page.locator("[id='right.model']").select_option("hearts")
    page.fill("#prompt", "the queen")
    page.fill("#length", "60")
    page.click("#go")
    left.locator("#status", has_text="60 characters").wait_for()
    same = settled(left)
    assert same.startswith("the queen")
    wait_until(lambda: settled(right) == same)
    page.locator("[id='right.temperature']").fill("2")
    page.keyboard.press("Enter")
    wait_until(lambda: settled(right) != same)
    different = settled(right)
    assert settled(left) == same
    page.reload()
    wait_until(lambda: settled(right) == different)


def test_a_run_that_is_training_is_shown_live(
    result: TrainResult, tmp_path: Path, open_url: Callable[[str], Any]
) -> None:
    run = tmp_path / "hearts"
    shutil.copytree(result.run, run)
    (run / "summary.json").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = [row for row in rows if int(re.search(r'"step": (\d+)', row)[1]) <= 5]
    (run / "metrics.jsonl").write_text("".join(early))
    with running(run) as server:
        page = open_url(f"{server.url}/{SHORT}")
        text = settled(page)
        page.locator("#lead", has_text="trained 5 steps so far").wait_for()
        page.get_by_text("after the second evaluation").wait_for()
        old = server.served["hearts"].worker
        replace_checkpoint(run)
        (run / "metrics.jsonl").write_text("".join(rows))
        page.locator("#lead", has_text="trained 12 steps so far").wait_for()
        page.locator(".scrub input").wait_for()
        assert "After 12 steps" in page.locator(".at").text_content()
        assert settled(page) == text
        assert server.served["hearts"].worker is not old
        page.click("#go")
        wait_until(lambda: settled(page) != text)
        page.close()


def replace_checkpoint(run: Path) -> None:
    """Save another model as the best one, as training does."""
    import torch

    from chargpt.runs.checkpoint import MODEL, save_checkpoint
    from chargpt.runs.weights import read_tensors

    tensors = read_tensors(run / "best" / MODEL)
    torch.manual_seed(0)
    changed = {name: tensor + torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_checkpoint(run, "best", {MODEL: changed}, {})


def test_an_api_key_is_asked_for_once(result: TrainResult, browser: Any) -> None:
    with (
        running(
            result.run, settings=ServeSettings(api_key="open sesame", log_requests=False)
        ) as server,
        watched(browser, server.url) as (context, troubles),
    ):
        assert httpx.get(server.url + "/page/facts").status_code == 401
        assert server.post({}, "/page/write").status_code == 401
        assert server.post({}, "/page/inspect").status_code == 401
        page = context.new_page()
        page.goto(f"{server.url}/{SHORT}")
        page.locator("#key").wait_for()
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        assert axe.Axe().run(page).violations_count == 0
        for key in ("wrong", "open sesame"):
            page.fill("#key", key)
            page.get_by_role("button", name="Open").click()
        settled(page)
        page.reload()
        settled(page)
        page.goto(f"{server.url}/compare{SHORT}")
        settled(page.frame_locator("iframe").nth(1))
        refused = [each for each in troubles if "status of 401" in each]
        assert len(refused) == 2  # the browser says so itself
        troubles[:] = [each for each in troubles if each not in refused]


def test_a_lost_server_is_said_and_forgotten(result: TrainResult, browser: Any) -> None:
    with watched(browser, "http://127.0.0.1:") as (context, troubles):
        page = context.new_page()
        with running(result.run) as server:
            page.goto(f"{server.url}/{SHORT}")
            text = settled(page)
        page.click("#go")
        page.locator("#trouble", has_text="does not answer").wait_for()
        page.route("**/page/write", lambda route: route.fulfill(status=429, body="{}"))
        page.click("#go")
        page.locator("#trouble", has_text="busy").wait_for()
        page.unroute("**/page/write")
        with running(result.run) as again:
            page.route(server.url + "/**", lambda route: route.continue_(
                url=route.request.url.replace(server.url, again.url)))  # fmt: skip
            page.click("#go")
            assert settled(page) == text
            assert page.locator("#trouble").is_hidden()
        troubles.clear()  # the browser's own lines about these requests


HOSTILE = [
    "<script>hacked=1</script>", "</script><img src=x onerror=hacked=1>", "&amp;", "\"'`",
    "{{facts}}", "<!--", "\u2028", "\u202e", "\x1b[31m", "${hacked=1}", '{"index":1}\n',
]  # fmt: skip


def test_hostile_texts_and_names_are_only_text(
    tmp_path: Path, open_url: Callable[[str], Any]
) -> None:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(HOSTILE) + "\n" for _ in range(300))
    name = "<img src=x onerror=hacked=1>\u202e"
    run = make_run(tmp_path, text, name="a<b onclick=hacked=1>&'\u202e.txt", run=name).run
    with running(run) as server:
        page = open_url(f"{server.url}/{SHORT}")
        settled(page)
        prompt = "".join(HOSTILE)
        written = write(page, prompt, length=100, temperature=2)
        assert written.startswith(prompt[:20])
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.locator("img, #text script, h1 b").count() == 0
        assert page.locator("h1").text_content() == name.replace("\u202e", "U+202E")
        page.reload()
        assert settled(page) == written
        page.close()


@pytest.mark.parametrize("path", ["", "compare"])
def test_only_this_server_may_be_asked_and_may_frame_it(server: Any, path: str) -> None:
    headers = httpx.get(f"{server.url}/{path}").headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("connect-src", "frame-src", "frame-ancestors")} == {"'self'"}
    assert "unsafe" not in str(policy)
    assert headers["X-Frame-Options"] == "SAMEORIGIN"


SETTINGS = {"temperature": 1, "topK": 0, "topP": 1, "minP": 0, "seed": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": [99]}, {"ids": [-1]}, {"from": 2}, {"n": 10**9}, {"model": "x"}, {"ids": "text"},
        {"settings": SETTINGS | {"temperature": -1}}, {"settings": SETTINGS | {"seed": 2**60}},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_is_refused(server: Any, wrong: dict[str, Any]) -> None:
    task = {"ids": [1], "from": 0, "n": 1, "settings": SETTINGS}
    assert server.post(task, "/page/write").status_code == 200
    answer = server.post(task | wrong, "/page/write")
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]
    answer = server.post({"ids": [1] * 17, "first": 1}, "/page/inspect")
    assert answer.status_code == 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(server: Any, page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.emulate_media(color_scheme=scheme)
    page.locator("#inside-body .lens").wait_for()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.goto(f"{server.url}/compare{SHORT}")
    settled(page.frame_locator("iframe").nth(1))
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("path", ["", "compare"])
def test_nothing_is_wider_than_a_phone(server: Any, page: Any, path: str) -> None:
    page.set_viewport_size({"width": 320, "height": 800})
    page.goto(f"{server.url}/{path}{SHORT}")
    settled(page.frame_locator("iframe").nth(1) if path else page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_run_that_was_trained_again_otherwise_is_not_swapped_in(
    result: TrainResult, names: Path
) -> None:
    served = load_served(result.run)
    model, worker = served.model, served.worker
    served.run = names
    # A thread of its own: the browser's driver has an event loop in this one.
    with (
        ThreadPoolExecutor() as pool,
        pytest.raises(UserError, match="start the server again"),
    ):
        pool.submit(asyncio.run, reload(served)).result()
    assert (served.model, served.worker) == (model, worker)
    worker.stop()
