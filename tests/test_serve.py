"""The page's server, asked by well- and ill-behaved visitors, and the page in a real browser."""

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny
import torch
import websockets
from forked import start
from PIL import Image
from visitors import INFO, Slow, ask, picture, serving, student, teacher
from websockets.sync.client import connect

from distmatch import DistilledPipeline, TeacherPipeline
from distmatch.commands.web_page import LARGEST, Studio, Wish, encode, examples, make_app, noise, serve
from distmatch.data.prompts import read_prompts
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.library import components, find_model
from distmatch.system import rng


@pytest.fixture(scope="module")
def address():
    with serving(student(), teacher()) as where:
        yield where


def test_a_wish_gives_the_pipelines_pixels(address):
    pipe = student()
    with connect(f"ws://{address}/draw") as socket:
        for label, seed in ((0, 0), (2, 0), (2, 12345)):
            header, pixels = ask(socket, id=seed, label=label, seed=seed)
            expected = pipe.render(rng.noise(seed, [0], (1, 8, 8)), pipe.condition(1, labels=label))
            assert np.array_equal(pixels, expected[0, 0].numpy())
            assert header["id"] == seed
            assert header["milliseconds"] > 0
        ends = [ask(socket, label=1, seed=s)[1] for s in (3, 4)]
        for mix, end in zip((0.0, 1.0), ends, strict=True):
            assert np.abs(ask(socket, label=1, seed=3, other=4, mix=mix)[1].astype(int) - end).max() <= 1


def test_a_text_model_answers_every_prompt(tmp_path):
    denoiser, info = find_model(f"diffusers:{write_tiny_sd(tmp_path)}", "teacher")
    info = replace(info, times=(999.0,))
    pipe = DistilledPipeline(denoiser, info, components(info))
    with serving(pipe) as address, connect(f"ws://{address}/draw") as socket:
        for prompt in ("", "a", "a cat", "ünïcödé 猫"):
            expected = pipe.render(rng.noise(5, [0], info.shape), pipe.condition(1, prompts=[prompt]))
            assert np.array_equal(ask(socket, prompt=prompt, seed=5)[1], expected[0].permute(1, 2, 0).numpy())
        socket.send('{"label": 1}')
        assert json.loads(socket.recv())["status"] == 422


def test_the_page_suggests_prompts_in_the_styles_that_the_model_learnt():
    emoji = DistilledPipeline.from_pretrained("emoji")
    with serving(emoji) as address:
        suggested = httpx.get(f"http://{address}/model", timeout=30).json()["examples"]
    styles = {"blob style", "firefox style", "flat style", "glossy style", "noto style"}
    assert {prompt.rpartition(", ")[2] for prompt in suggested if ", " in prompt} == styles
    assert len(suggested) == len(styles) + 1  # one names no style
    assert set(suggested) <= set(read_prompts(Path("emoji")))
    assert examples(replace(emoji.info, source="")) == examples(replace(emoji.info, source="somebody/else")) == []


def test_a_prompt_is_encoded_once_while_a_slider_is_dragged(tmp_path):
    denoiser, info = find_model(f"diffusers:{write_tiny_sd(tmp_path)}", "teacher")
    info = replace(info, times=(999.0,))
    pipe = DistilledPipeline(denoiser, info, components(info))
    studio, asked = Studio(pipe), []
    condition = pipe.condition
    pipe.condition = lambda *args, **how: asked.append(how["prompts"]) or condition(*args, **how)
    drawn = [("a cat", 1), ("a cat", 2), ("a cats", 2), ("a cat", 2), ("a cat", 3)]
    for prompt, seed in drawn:
        expected = pipe.render(rng.noise(seed, [0], info.shape), condition(1, prompts=[prompt]))
        assert torch.equal(studio.draw(pipe, Wish(prompt=prompt, seed=seed))[0], expected)
    assert asked == [["a cat"], ["a cats"], ["a cat"]]


def test_noise_between_two_seeds_stays_noise():
    """The great circle: of unit variance all along, a straight line would lose half of it in the middle."""
    shape = (3, 64, 64)
    for mix in (0.0, 0.25, 0.5, 1.0):
        z = noise(shape, 1, 2, mix)
        assert z.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(noise(shape, 1, 2, 0.0), rng.noise(1, [0], shape))
    assert torch.allclose(noise(shape, 1, 2, 1.0), rng.noise(2, [0], shape), atol=1e-5)
    a, b, middle = noise(shape, 1, 2, 0.0), noise(shape, 1, 2, 1.0), noise(shape, 1, 2, 0.5)
    assert (middle * a).sum().item() == pytest.approx((middle * b).sum().item(), rel=0.02)


def test_small_pictures_are_lossless_and_large_ones_are_not():
    small, large = torch.randint(0, 256, (1, 3, 64, 64)).byte(), torch.randint(0, 256, (1, 3, 256, 256)).byte()
    kind, data = encode(small)
    assert kind == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), small[0].permute(1, 2, 0).numpy())
    assert encode(large)[0] == "image/jpeg"


# Several wishes, several visitors


def test_frames_are_dropped_rather_than_queued():
    slow = Slow(0.1)
    with serving(slow) as address, connect(f"ws://{address}/draw") as socket:
        for i in range(30):
            socket.send(json.dumps({"id": i, "label": i % 3}))
        last = 0
        while last != 29:
            last = picture(socket.recv(timeout=10))[0]["id"]
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.4)
    assert len(slow.made) <= 4  # the first, the newest after it, one or two in between
    assert slow.made[-1] == 29 % 3


def test_a_flood_of_one_visitor_does_not_starve_another():
    slow = Slow(0.05)

    async def visit(address) -> int:
        """How many pictures a quiet visitor gets, while a greedy one sends without waiting."""
        uri = f"ws://{address}/draw"
        async with websockets.connect(uri) as greedy, websockets.connect(uri) as quiet:

            async def flood():
                while True:
                    await greedy.send(json.dumps({"label": 0}))
                    await asyncio.sleep(0.001)

            async def drain():
                while True:
                    await greedy.recv()

            noise = [asyncio.create_task(flood()), asyncio.create_task(drain())]
            await asyncio.sleep(0.2)
            waits = []
            for _ in range(8):
                began = time.perf_counter()
                await quiet.send(json.dumps({"label": 1}))
                await quiet.recv()
                waits.append(time.perf_counter() - began)
            for task in noise:
                task.cancel()
            return sorted(waits)[4]

    with serving(slow) as address:
        # At most one picture of the other's is before his own: two at 50 ms, with room for a busy machine.
        assert asyncio.run(visit(address)) < 0.25
    assert slow.made.count(0) >= 6


def test_a_visitor_who_waits_gets_his_newest_wish():
    """While another's picture is drawn his wishes replace each other: the older one is never drawn."""
    slow = Slow(0.3)
    with (
        serving(slow) as address,
        connect(f"ws://{address}/draw") as first,
        connect(f"ws://{address}/draw") as second,
    ):
        first.send('{"label": 0}')
        time.sleep(0.1)
        second.send('{"id": 1, "label": 1}')
        time.sleep(0.1)
        second.send('{"id": 2, "label": 2}')
        assert picture(second.recv(timeout=10))[0]["id"] == 2
        first.recv(timeout=10)
        with pytest.raises(TimeoutError):
            second.recv(timeout=0.5)
    assert slow.made == [0, 2]


def test_a_flood_of_rounds_does_not_starve_a_visitor_who_draws():
    stop = threading.Event()

    def play(address):
        while not stop.is_set():
            httpx.post(f"http://{address}/rounds", json={"label": 0})

    with serving(Slow(0.05), Slow(0.05)) as address:
        players = [threading.Thread(target=play, args=(address,)) for _ in range(8)]
        for player in players:
            player.start()
        time.sleep(0.5)
        waits = []
        with connect(f"ws://{address}/draw") as visitor:
            for _ in range(7):
                began = time.perf_counter()
                ask(visitor, label=1)
                waits.append(time.perf_counter() - began)
        stop.set()
        for player in players:
            player.join()
    # One round, two pictures of 50 ms, is before his own; eight rounds would be 0.85 s.
    assert sorted(waits)[3] < 0.4


def test_a_model_that_fails_ends_neither_the_visitor_nor_the_server():
    class Failing(Slow):
        def render(self, z, cond=None, noise_of=None):
            if int(cond.label[0]) == 2:
                raise RuntimeError("out of memory")
            return super().render(z, cond)

    with serving(Failing(0)) as address, connect(f"ws://{address}/draw") as visitor:
        visitor.send('{"id": 4, "label": 2}')
        answer = json.loads(visitor.recv(timeout=10))
        assert (answer["id"], answer["status"]) == (4, 500)
        assert answer["error"] == "RuntimeError: out of memory"
        assert ask(visitor, id=5, label=1)[0]["id"] == 5


# Bad input


BAD = [
    "{",
    "[]",
    '"text"',
    '{"seed": -1}',
    '{"seed": 1e300}',
    '{"seed": 99999999999999999999999}',
    '{"seed": "1"}',
    '{"seed": 1.5}',
    '{"mix": NaN}',
    '{"mix": 1.5}',
    '{"label": 3}',
    '{"label": -1}',
    '{"label": 99999999999999999999999}',
    '{"label": true}',
    '{"prompt": "a cat"}',
    json.dumps({"prompt": "a" * 2000}),
    '{"other": null}',
    '{"unknown": 1}',
    "a" * (LARGEST + 1),
    b"\x00\x01",
]


@pytest.mark.parametrize("message", BAD, ids=lambda m: repr(m)[:30])
def test_bad_messages_are_refused_and_the_next_one_is_answered(address, message):
    with connect(f"ws://{address}/draw") as socket:
        socket.send(message)
        refusal = json.loads(socket.recv(timeout=10))
        assert 400 <= refusal["status"] < 500
        assert refusal["error"]
        assert ask(socket, id=7, label=1)[0]["id"] == 7


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nothing", b"", 404),
        ("GET", "/../../etc/passwd", b"", 404),
        ("GET", "/draw", b"", 404),
        ("POST", "/rounds", b"{", 422),
        ("POST", "/rounds", b'{"label": 9}', 422),
        ("POST", "/rounds", b'{"prompt": "a"}', 422),
        ("POST", "/rounds", b'{"seed": -4}', 422),
        ("POST", "/rounds", b'{"mix": NaN}', 422),
        ("POST", "/rounds", b'{"mix": 1e400}', 422),
        ("POST", "/rounds", b'{"guidance": Infinity}', 422),
        ("POST", "/rounds", b'{"prompt": "\\ud800"}', 422),
        ("POST", "/rounds", b'{"\\ud800": 1}', 422),
        ("POST", "/rounds", b'{"label": 99999999999999999999999}', 422),
        ("POST", "/rounds", b"[" * 8000, 422),
        ("POST", "/rounds", b"\xff\xfe", 422),
        ("POST", "/rounds/none", b'{"teacher": NaN}', 422),
        ("POST", "/rounds", b"a" * (LARGEST + 1), 413),
        ("POST", "/rounds/none", b'{"teacher": 0}', 404),
        ("POST", "/rounds/none", b'{"teacher": 2}', 422),
        ("DELETE", "/rounds", b"", 405),
    ],
)
def test_bad_requests_get_a_4xx(address, method, path, content, status):
    headers = {"content-type": "application/json"}
    assert httpx.request(method, f"http://{address}{path}", content=content, headers=headers).status_code == status
    assert httpx.get(f"http://{address}/model").status_code == 200


def test_bodies_without_a_length_are_refused(address):
    def endless():
        yield b'{"seed": 1}'

    assert httpx.post(f"http://{address}/rounds", content=endless()).status_code == 413


def test_huge_messages_end_the_connection_and_not_the_server(address):
    with connect(f"ws://{address}/draw") as socket:
        socket.send("a" * (5 * LARGEST))
        with pytest.raises(websockets.ConnectionClosed):
            socket.recv(timeout=10)
    with connect(f"ws://{address}/draw") as socket:
        assert ask(socket, id=1)[0]["id"] == 1


def handshake(address: str, host: str) -> int:
    """The status that a websocket gets which calls the server `host`, in one header (`connect` would send two)."""
    name, port = address.split(":")
    with socket.create_connection((name, int(port)), timeout=10) as line:
        key = "AAAAAAAAAAAAAAAAAAAAAA=="
        head = f"GET /draw HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        line.sendall(f"{head}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
        return int(line.recv(64).split()[1])


def test_other_pages_and_other_names_are_refused(address):
    for origin in ("http://evil.example", "null", "https://127.0.0.1:1", "http://[x", ""):
        with pytest.raises(websockets.InvalidStatus, match="403"):
            connect(f"ws://{address}/draw", origin=origin)
        assert httpx.post(f"http://{address}/rounds", json={"label": 0}, headers={"origin": origin}).status_code == 403
    with connect(f"ws://{address}/draw", origin=f"http://{address}") as socket:
        assert ask(socket, id=2)[0]["id"] == 2
    assert handshake(address, address) == 101
    assert handshake(address, "evil.example") == 403
    assert httpx.get(f"http://{address}/", headers={"host": "evil.example"}).status_code == 403


def test_a_server_for_the_network_knows_its_names():
    """An address cannot be rebound, a name can: only the server's own ones count, wherever it listens."""
    with serving(student(), None, ("box.local",)) as address:

        def status(host: str) -> int:
            return httpx.get(f"http://{address}/model", headers={"host": host}).status_code

        for host in ("box.local", "BOX.local:80", "localhost:7", "192.168.1.5:7860", "[::1]:7860"):
            assert status(host) == 200
        for host in ("evil.example", "box.local.evil.example", "127.0.0.1.evil.example", "[x", ""):
            assert status(host) == 403


def test_models_that_do_not_fit_are_refused():
    points = DistilledPipeline(tiny.teacher(), replace(INFO, shape=(2,)))
    with pytest.raises(ValueError, match=r"shape \(2,\), not images"):
        make_app(points)
    for changed in ({"shape": (1, 16, 16)}, {"classes": ()}, {"classes": ("a", "b")}):
        with pytest.raises(ValueError, match="another student's"):
            make_app(student(), TeacherPipeline(tiny.teacher(1), replace(INFO, times=(), **changed), steps=3))


# The command


def test_a_port_out_of_range_is_named():
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=f"--port {port}: expected 0 to 65535"):
            serve(student(), None, "127.0.0.1", port)


def test_the_command_finds_a_free_port_and_ends_with_ctrl_c():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serving = start("serve", "mnist", "--port", port)
        serving.wait(lambda: "\n" in serving.stdout)
        address = re.search(r"http://(127\.0\.0\.1:\d+)", serving.stdout)[1]
        assert not address.endswith(f":{port}")
        # No waiting here: what is printed can be opened.
        assert httpx.get(f"http://{address}/model", timeout=30).json()["classes"] == list("0123456789")
        with connect(f"ws://{address}/draw") as visitor:
            ask(visitor, label=7)
            serving.kill(signal.SIGINT)
            assert serving.end() in (0, 130)
    assert "Traceback" not in serving.stderr


# The page


def browser():
    """A Chromium of this machine, or none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_nothing_of_the_page_is_cut_off_on_a_telephone():
    from playwright.sync_api import sync_playwright

    pipe = student()
    pipe.info = replace(pipe.info, classes=("automobile", "a-long-name-of-a-class", "another"))
    with serving(pipe, teacher()) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 380, "height": 800})
        page.goto(f"http://{address}/")
        page.wait_for_function("document.getElementById('picture').dataset.id >= 1")
        cut = """() => [...document.querySelectorAll('body *')]
            .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
            .map(e => e.id || e.tagName)"""
        assert page.evaluate(cut) == []
        page.click("#tab-game")
        page.wait_for_function("game.round !== null")
        assert page.evaluate(cut) == []
        assert page.evaluate("document.documentElement.scrollWidth") == 380


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_the_page_in_a_browser():
    """It draws what the pipeline makes, answers to buttons and sliders, and plays a round, without an error."""
    from playwright.sync_api import sync_playwright

    pipe = DistilledPipeline.from_pretrained("mnist")
    read = """() => { const c = document.getElementById('picture');
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 == 0) }"""

    def shown() -> np.ndarray:
        return np.array(page.evaluate(read), dtype=np.uint8).reshape(28, 28)

    def expected(label: int, seed: int) -> np.ndarray:
        return pipe.render(rng.noise(seed, [0], (1, 28, 28)), pipe.condition(1, labels=label))[0, 0].numpy()

    with serving(pipe, TeacherPipeline.from_pretrained("mnist", steps=4)) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        page, errors = chromium.new_page(), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://{address}/")
        page.wait_for_function("document.getElementById('picture').dataset.id >= 1")
        assert np.array_equal(shown(), expected(0, 0))

        before = page.evaluate("document.getElementById('picture').dataset.id")
        page.click("#classes button[data-label='7']")
        page.wait_for_function(f"+document.getElementById('picture').dataset.id > {before}")
        assert np.array_equal(shown(), expected(7, 0))

        frames = page.evaluate("""async () => {
            const slider = document.getElementById('seed'), seen = new Set();
            const picture = document.getElementById('picture');
            for (let i = 1; i <= 60; i++) {
                slider.value = i;
                slider.dispatchEvent(new Event('input'));
                await new Promise(r => setTimeout(r, 16));
                seen.add(picture.dataset.id);
            }
            await new Promise(r => setTimeout(r, 500));
            return seen.size }""")
        assert frames >= 5
        assert np.array_equal(shown(), expected(7, 60))
        assert int(page.inner_text("#fps")) >= 1
        assert float(page.inner_text("#model-ms")) > 0

        page.click("#tab-game")
        page.wait_for_function("game.round !== null")
        assert page.inner_text("#left-caption") == ""
        page.click("#left")
        page.wait_for_function("game.played === 1")
        captions = {page.inner_text("#left-caption"), page.inner_text("#right-caption")}
        assert any("teacher" in c and "7 evaluations" in c for c in captions)
        assert any("student" in c and "1 evaluation" in c for c in captions)
        assert page.inner_text("#score") in ("0 of 1 right", "1 of 1 right")
        page.click("#next")
        page.wait_for_function("game.round !== null")
        chromium.close()
    assert not errors
