"""The game of the page: whose picture is the teacher's?"""

import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from visitors import Slow, serving, student, teacher

from distmatch.commands.web_page import ROUNDS
from distmatch.system import rng


@pytest.fixture(scope="module")
def address():
    with serving(student(), teacher()) as where:
        yield where


def deal(address, **wish) -> dict:
    return httpx.post(f"http://{address}/rounds", json=wish).raise_for_status().json()


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes.fromhex(data))))


def test_the_game_shows_both_models_pictures_and_tells_afterwards(address):
    slow, fast = teacher(), student()
    places, right = [], 0
    for seed in range(12):
        dealt = deal(address, seed=seed, label=seed % 3)
        assert dealt.keys() == {"round", "type", "pictures"}  # nothing that gives it away
        z = rng.noise(seed, [0], (1, 8, 8))
        theirs, ours = (p.render(z, p.condition(1, labels=seed % 3))[0, 0].numpy() for p in (slow, fast))
        place = next(i for i, data in enumerate(dealt["pictures"]) if np.array_equal(pixels(data), theirs))
        assert np.array_equal(pixels(dealt["pictures"][1 - place]), ours)
        places.append(place)
        url = f"http://{address}/rounds/{dealt['round']}"
        said = httpx.post(url, json={"teacher": 0}).json()
        assert (said["teacher"], said["right"]) == (place, place == 0)
        assert said["evaluations"][place] == 5
        assert said["evaluations"][1 - place] == 1
        assert min(said["milliseconds"]) > 0
        assert httpx.post(url, json={"teacher": 0}).status_code == 404  # no second try
        right += said["right"]
    assert 0 < right < 12  # 1 in 2048 that twelve coins fall alike
    assert right == places.count(0)


def test_open_rounds_are_bounded(address, monkeypatch):
    monkeypatch.setattr("distmatch.commands.web_page.ROUNDS", 3)
    dealt = [deal(address, seed=i)["round"] for i in range(4)]
    answers = [httpx.post(f"http://{address}/rounds/{name}", json={"teacher": 0}).status_code for name in dealt]
    assert answers == [404, 200, 200, 200]
    assert ROUNDS == 1000


def test_visitors_who_send_no_wish_take_no_place_in_the_game(address, monkeypatch):
    monkeypatch.setattr("distmatch.commands.web_page.PATIENCE", 0.5)
    host, port = address.split(":")
    head = f"POST /rounds HTTP/1.1\r\nHost: {address}\r\nContent-Length: 50\r\n\r\n".encode()
    stalled = [socket.create_connection((host, int(port))) for _ in range(8)]
    for connection in stalled:
        connection.sendall(head)
    assert deal(address)["round"]
    for connection in stalled:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_a_visitor_has_two_rounds_waiting_and_leaves_places_to_others():
    with serving(Slow(0.3), Slow(0.3)) as address, ThreadPoolExecutor(4) as pool:
        url, wish = f"http://{address}/rounds", {"label": 0}
        one = [pool.submit(httpx.post, url, json=wish, timeout=20) for _ in range(3)]
        time.sleep(0.2)
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=20) as other:
            assert other.post(url, json=wish).status_code == 200
        assert sorted(future.result().status_code for future in one) == [200, 200, 429]


def test_without_a_teacher_there_is_no_game():
    with serving(student()) as address:
        assert httpx.get(f"http://{address}/model").json()["teacher"] is None
        assert httpx.post(f"http://{address}/rounds", json={}).status_code == 404
