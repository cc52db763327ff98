"""A server of the page for tests, with tiny models, and what its visitors ask."""

import io
import json
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import tiny
import uvicorn
from PIL import Image

from distmatch import DistilledPipeline, TeacherPipeline
from distmatch.commands.web_page import LARGEST, make_app
from distmatch.models.folder import Info
from distmatch.pipeline import Pipeline

INFO = Info((1, 8, 8), ("a", "b", "c"), times=(80.0,))


def student() -> DistilledPipeline:
    return DistilledPipeline(tiny.teacher(), INFO)


def teacher() -> TeacherPipeline:
    return TeacherPipeline(tiny.teacher(1), replace(INFO, times=()), steps=3)


class Slow(Pipeline):
    """A student that takes its time and remembers what it made."""

    def __init__(self, seconds: float):
        fast = student()
        super().__init__(fast.denoiser, fast.info, fast.make, 1)
        self.seconds, self.made = seconds, []

    def render(self, z, cond=None, noise_of=None):
        time.sleep(self.seconds)
        self.made.append(int(cond.label[0]))
        return super().render(z, cond)


@contextmanager
def serving(*pipelines):
    """`host:port` of a server of its own thread."""
    server = uvicorn.Server(uvicorn.Config(make_app(*pipelines), port=0, log_level="error", ws_max_size=4 * LARGEST))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def picture(message: bytes) -> tuple[dict, np.ndarray]:
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), np.asarray(Image.open(io.BytesIO(message[4 + length :])))


def ask(socket, **wish):
    socket.send(json.dumps(wish))
    return picture(socket.recv())
