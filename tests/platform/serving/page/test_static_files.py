"""static_files: the page over HTTP, and in headless Chromium with synthetic services behind it."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from reference.synthetic_gateway import USAGE, Engine, Features, Server, check_error, keys, stored_medium
from reference.tiny_serving import write_video
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import (
    AnswerDelta,
    FeatureReference,
    GenerateRequest,
    MediaSource,
    Refusal,
    StoredFeatures,
    StoredMedium,
)
from timeviper_platform.serving.page.static_files import FOLDER, PATHS

ANSWER = "From 1 to 2.5 seconds: <img src=x onerror=alert(1)>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_the_page_needs_no_key_but_its_calls_do(tmp_path: Path) -> None:
    http = Server(tmp_path, api_keys=keys("a")).http
    for path in PATHS:
        answer = http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    check_error(http.get("/v1/videos"), 401, "invalid_api_key")
    check_error(http.get("/", headers={"Origin": "https://evil.example"}), 403, "origin_not_allowed")


def test_the_page_loads_nothing_from_other_servers_and_writes_no_html() -> None:
    for path in FOLDER.glob("*.[hjc]*"):
        text = path.read_text()
        assert not re.search(r"https?:|//[a-z0-9-]+\.", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|\bstyle=", text), (
            path
        )


def test_links_begin_with_the_applications_prefix(server: Server) -> None:
    assert '<base href="/">' in server.http.get("/").text
    below = TestClient(server.http.app, base_url="http://localhost", client=("127.0.0.1", 1), root_path="/film's")
    assert '<base href="/film&#x27;s/">' in below.get("/film's/").text
    assert below.get("/film's/page/app.js").status_code == 200


class StoredVideos(Features):
    """Stored media of 3 s, the first with a file."""

    def __init__(self, film: Path) -> None:
        super().__init__()
        self.stored = [
            replace(stored_medium(media_id, str(film)), duration_seconds=3.0, num_frames=3)
            for media_id in ("films/a b#1", *(f"films/{number}" for number in range(60)))
        ]
        self.stored = sorted(self.stored, key=lambda medium: medium.media_id)

    async def features(self, source: MediaSource, **limits: Any) -> FeatureReference | Refusal:
        is_stored = isinstance(source, StoredFeatures) and source.media_id in {one.media_id for one in self.stored}
        return await super().features(StoredFeatures(media_id="known") if is_stored else source, **limits)

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        found = await super().medium(media_id)
        times = {"pts_seconds": (0.0, 1.25, 2.5), "selected": (0, 2)}
        return found if isinstance(found, Refusal) else replace(found, **times)  # type: ignore[arg-type]


class Answers(Engine):
    def __init__(self) -> None:
        super().__init__()
        self.is_slow = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        self.requests.append(request)
        try:
            yield AnswerDelta(index=0, text=ANSWER[:9])
            while self.is_slow:
                yield AnswerDelta(index=0, text=".")
                await asyncio.sleep(0.05)
            yield AnswerDelta(index=0, text=ANSWER[9:], finish_reason="stop", usage=replace(USAGE, cached_tokens=7))
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine; .ci/browser installs Debian's as root")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def served(folder: Path, **config: Any) -> Iterator[tuple[str, StoredVideos, Answers]]:
    (folder / "films").mkdir()
    film = write_video(folder / "films" / "a.mp4", seconds=3)
    features, engine = StoredVideos(film), Answers()
    gateway = GatewayConfig(media_root=str(folder / "media"), allowed_local_media=(str(film.parent),), **config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(gateway, features, engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://localhost:{listener.getsockname()[1]}/", features, engine
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    page = browser.new_page(**options)
    page.set_default_timeout(30_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
    page.goto(url)
    yield page
    page.close()
    assert problems == []


def ask(page: Any, text: str, *, count: int = 1) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(f"#log .assistant .facts:not(.error) >> nth={count - 1}")


def check_accessibility(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []


def test_a_stored_video_is_chosen_asked_about_and_followed_by_keyboard(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path) as (url, _, engine), opened(browser, url) as page:
        page.click("#more")
        page.wait_for_selector("#videos li >> nth=60")
        page.fill("#prefix", "films/a")
        page.wait_for_selector("#videos li >> nth=1", state="detached")
        page.focus("#videos button")
        page.keyboard.press("Enter")
        page.wait_for_selector("#frames canvas >> nth=1")
        assert page.locator("#frames button").all_inner_texts() == ["0.0 s", "2.5 s"]  # the frames a question sees
        page.wait_for_selector("#player")
        ask(page, "when?")
        assert ANSWER in page.inner_text("#log")  # as text
        assert page.locator("#log img").count() == 0
        assert "7 of 9 prompt tokens cached" in page.inner_text("#log")
        assert "first token after" in page.inner_text("#log")
        page.focus("#spans button")
        assert page.get_attribute("#spans button", "aria-label") == "1 to 2.5 seconds"
        page.keyboard.press("Enter")
        page.wait_for_selector("#now >> text=1.0 s")
        assert page.evaluate("document.getElementById('player').currentTime") == pytest.approx(1.0, abs=0.05)
        ask(page, "again?", count=2)
        turns = engine.requests[-1].turns
        assert [(turn.role, turn.text, len(turn.media)) for turn in turns] == [
            ("user", "when?", 1),
            ("assistant", ANSWER, 0),
            ("user", "again?", 0),
        ]
        engine.is_slow = True
        page.fill("#question", "slow?")
        page.press("#question", "Enter")
        page.wait_for_selector("#log .assistant >> nth=2 >> text=....")
        page.click("#stop")
        page.wait_for_selector("#log .error >> text=stopped")
        deadline = time.monotonic() + 10
        while engine.closed < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_file_is_uploaded_with_a_key_that_stays_in_memory(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, api_keys=keys("a")) as (url, features, _), opened(browser, url) as page:
        page.wait_for_selector("#status.error >> text=API key is required")
        page.fill("#key", "key-a")
        page.press("#key", "Enter")
        page.wait_for_selector("#videos li")
        page.set_input_files("#file", tmp_path / "films" / "a.mp4")
        page.wait_for_selector("#frames canvas >> nth=2")
        texts = page.locator("#frames button").all_inner_texts()
        assert [float(text.split()[0]) for text in texts] == pytest.approx([0.0, 1.0, 2.0], abs=0.3)
        ask(page, "when?")
        assert features.sources[-1].modality == "video"  # type: ignore[union-attr]
        page.click("#videos button >> nth=0")  # its file comes with the key, too
        page.wait_for_selector("#frames button >> nth=2", state="detached")
        page.wait_for_selector("#frames canvas >> nth=1")
        large = {"Content-Range": "bytes 0-0/3000000000"}  # before, all of it went into the browser's memory
        page.route("**/content", lambda route: route.fulfill(status=206, headers=large, body="x"))
        page.click("#videos button >> nth=1")
        page.wait_for_selector("#no-picture >> text=too large")
        page.wait_for_selector("#frames button >> nth=1")
        page.reload()
        page.wait_for_selector("#status.error >> text=API key is required")
        assert page.input_value("#key") == ""
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 360)])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(
    browser: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}, "bypass_csp": True}
    with served(tmp_path) as (url, _, _), opened(browser, url, **options) as page:
        page.wait_for_selector("#videos li")
        check_accessibility(page)
        page.click("#videos button >> nth=0")
        page.wait_for_selector("#frames canvas >> nth=1")
        ask(page, "when?")
        check_accessibility(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
