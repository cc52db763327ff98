"""Serves the page of `distmatch serve`, which draws as you drag or type and plays the paper's Figure 1: which is which?

One thread runs the models. A visitor has at most one place in its queue, whatever they send, and when their turn comes
their newest request is drawn: frames are dropped rather than queued, and visitors are served in turn. All rounds of the
game together have one place in that queue.
"""

import asyncio
import io
import ipaddress
import json
import logging
import secrets
import socket
import struct
import time
import webbrowser
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import torch
from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from distmatch.data.prompts import read_prompts
from distmatch.diffusion.denoiser import Cond
from distmatch.models.info import Info
from distmatch.pipeline import Output, Pipeline
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.paths import ASSETS, named
from distmatch.system.screen import console

log = logging.getLogger("uvicorn.error")
Result = TypeVar("Result")
Asked = TypeVar("Asked", bound=BaseModel)

LOSSLESS = 128
"""Images with sides up to this many pixels are sent as PNG; larger ones as JPEG, which encodes many times faster."""

ROUNDS = 1000
"""Maximum number of open rounds of the game; the oldest are dropped."""

WAITING = 8
"""Maximum number of rounds that wait for the models; further ones are refused until there is room."""

SHARE = 2
"""Maximum number of waiting rounds per address."""

PATIENCE = 10.0
"""Seconds within which a request's body must have arrived."""

LARGEST = 16_384
"""Maximum size of a message or a request body, in bytes."""

EXAMPLES = 8
"""Maximum number of prompts that the page suggests."""

Seed = Annotated[int, Field(ge=0, lt=2**53)]


class Wish(BaseModel):
    """A picture that the page requests: between the noises `seed` and `other` at `mix`, under a condition."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: Annotated[int, Field(ge=0, lt=2**53)] = 0
    prompt: Annotated[str, Field(max_length=1000)] | None = None
    label: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    guidance: float | None = None
    seed: Seed = 0
    other: Seed = 1
    mix: Annotated[float, Field(ge=0, le=1)] = 0.0


class Guess(BaseModel):
    """Which of the round's two pictures, 0 or 1, is the teacher's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    teacher: Annotated[int, Field(ge=0, le=1)]


def read(kind: type[Asked], text: str | bytes) -> Asked:
    """Parse a message or a body. Raises `UserError` with the first mistake in it, never quoting the input."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}") from error


@dataclass
class Studio:
    """The models, and the thread that runs them."""

    student: Pipeline
    teacher: Pipeline | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "models"))
    rounds: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)
    waiting: Counter[str] = field(default_factory=Counter)
    cut: bool = False
    conditions: dict[tuple[int, str, float | None], Cond | None] = field(default_factory=dict)
    dealing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return `work()`, run in the models' thread after everything requested before it."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    def draw(self, pipe: Pipeline, wish: Wish) -> tuple[Tensor, float]:
        """Return `(pixels u8[1,C,H,W], milliseconds)`. Raises `UserError` for an unsuitable condition."""
        began = time.perf_counter()
        prompts = [wish.prompt or ""] if pipe.info.text else None if wish.prompt is None else [wish.prompt]
        scale = wish.guidance if pipe.info.guidance is not None else None
        if wish.prompt and pipe.parts.encode is not None and not self.cut:
            self.cut = bool(pipe.parts.encode.cut([wish.prompt]))  # notify once, not at every keystroke
        cond = self.condition(pipe, wish, prompts, scale)
        z = noise(pipe.info.shape, wish.seed, wish.other, wish.mix)
        pixels = pipe.render(z, cond, pipe.noise_of(wish.seed, [0]))
        return pixels, 1000 * (time.perf_counter() - began)

    def condition(self, pipe: Pipeline, wish: Wish, prompts: list[str] | None, scale: float | None) -> Cond | None:
        """Return the condition of a request. That of the newest prompt is kept: sliders do not change it."""
        if prompts is None or wish.label is not None:
            return pipe.condition(1, labels=wish.label, prompts=prompts, guidance_scale=scale)
        key = (id(pipe), prompts[0], scale)
        if key not in self.conditions:
            made = pipe.condition(1, prompts=prompts, guidance_scale=scale)
            self.conditions = {key: made}
        return self.conditions[key]

    def new_round(self, wish: Wish) -> dict[str, Any]:
        """Return both models' pictures for one request, in random order. Which is which stays here until the guess."""
        assert self.teacher is not None
        made = [(*self.draw(pipe, wish), pipe.nfe) for pipe in (self.student, self.teacher)]
        teacher = secrets.randbelow(2)
        name, order = secrets.token_urlsafe(12), [made[1], made[0]] if teacher == 0 else made
        self.rounds[name] = {
            "teacher": teacher,
            "milliseconds": [ms for _, ms, _ in order],
            "evaluations": [nfe for _, _, nfe in order],
        }
        while len(self.rounds) > ROUNDS:
            self.rounds.popitem(last=False)
        pictures = [encode(pixels) for pixels, _, _ in order]
        return {"round": name, "type": pictures[0][0], "pictures": [data.hex() for _, data in pictures]}


def noise(shape: tuple[int, ...], seed: int, other: int, mix: float) -> Tensor:
    """Return the noise f[1,*D] on the great circle from that of `seed` (mix 0) to that of `other` (mix 1)."""
    a = rng.noise(seed, [0], shape)
    if mix == 0 or seed == other:
        return a
    b = rng.noise(other, [0], shape)
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - mix) * angle) * a + torch.sin(mix * angle) * b) / torch.sin(angle)


def examples(info: Info) -> list[str]:
    """Return a prompt for each ending, such as ", flat style", of the prompts in the package that the model learnt."""
    name = named(info.source)
    if not info.text or name == info.source:
        return []
    prompts = read_prompts(ASSETS / name / "prompts.txt")
    mixed = (prompts[i] for i in rng.shuffled(0, len(prompts), 0, len(prompts)))
    by_ending: dict[str, str] = {}
    for prompt in mixed:
        by_ending.setdefault(prompt.rpartition(", ")[2] if ", " in prompt else "", prompt)
    return list(by_ending.values())[:EXAMPLES]


def encode(pixels: Tensor) -> tuple[str, bytes]:
    """Return `(media type, file)` of one picture u8[1,C,H,W]."""
    kind = "png" if max(pixels.shape[2:]) <= LOSSLESS else "jpeg"
    file = io.BytesIO()
    options = {"compress_level": 1} if kind == "png" else {"quality": 95}
    Output(pixels).images[0].save(file, kind, **options)
    return f"image/{kind}", file.getvalue()


class OwnPage:
    """Middleware that admits only this server's own page, over HTTP and websockets.

    Browsers let any page open a websocket to any server, so the server has to check where a request comes from:
    `Origin` is the page's address and must be ours. A foreign page may have its own name resolved to this machine (DNS
    rebinding), and then `Host` matches `Origin`; so the host must be an address, which cannot be rebound, or one of our
    `names`.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...]):
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._ours(Headers(scope=scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before accepting: the client gets a 403
        else:
            await PlainTextResponse("open the address that distmatch serve printed", 403)(scope, receive, send)

    def _ours(self, headers: Headers) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            known = name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:  # neither one of our names nor an address, or malformed
            return False
        return known and origin in (None, f"http://{host}", f"https://{host}")


def make_app(student: Pipeline, teacher: Pipeline | None = None, names: tuple[str, ...] = ()) -> FastAPI:
    """Return the app that serves the page and its requests.

    Args:
        names: the server's names, in addition to "localhost" and addresses; see `OwnPage`.

    Raises `UserError` if the student does not make images, or if the teacher makes images of another kind.
    """
    if len(student.info.shape) != 3:
        raise UserError(f"this model makes samples of shape {student.info.shape}, not images; there is nothing to show")
    if teacher is not None and (ours := _kind(student)) != (theirs := _kind(teacher)):
        raise UserError(f"the teacher is another student's: it makes {theirs}, this student {ours}")
    studio, shown = Studio(student, teacher), examples(student.info)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        studio.thread.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.middleware("http")
    async def small(request: Request, call_next: Callable[[Request], Any]) -> Any:
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST or "transfer-encoding" in request.headers:
            return JSONResponse({"detail": f"at most {LARGEST} bytes, of a stated length"}, 413)
        return await call_next(request)

    app.add_middleware(OwnPage, names=names)  # the middleware added last runs first

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    @app.get("/model")
    def model() -> dict[str, Any]:
        info = student.info
        return {
            "classes": info.classes,
            "prompts": info.text,
            "examples": shown,
            "guidance": info.guidance,
            "evaluations": student.nfe,
            "teacher": None if teacher is None else teacher.nfe,
        }

    @app.post("/rounds")
    async def new_round(request: Request) -> dict[str, Any]:
        if teacher is None:
            raise HTTPException(404, "no teacher is served; start with --teacher")
        wish = await _asked(Wish, request)  # before it takes a place, or a client that sends nothing would keep one
        visitor = request.client.host if request.client else ""
        if studio.waiting.total() >= WAITING or studio.waiting[visitor] >= SHARE:
            raise HTTPException(429, "too many rounds are waiting; try again")
        studio.waiting[visitor] += 1
        try:
            async with studio.dealing:  # the others wait here, so that visitors who draw are not queued behind them
                return await studio.run(lambda: studio.new_round(wish))
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            studio.waiting[visitor] -= 1
            studio.waiting += Counter()  # drops addresses with no waiting rounds

    @app.post("/rounds/{name}")
    async def guess(name: str, request: Request) -> dict[str, Any]:
        guess = await _asked(Guess, request)
        answer = studio.rounds.pop(name, None)
        if answer is None:
            raise HTTPException(404, "this round is not open: unknown, answered, or too long ago")
        return {**answer, "right": guess.teacher == answer["teacher"]}

    @app.websocket("/draw")
    async def draw(socket: WebSocket) -> None:
        await socket.accept()
        await _visitor(socket, studio)

    return app


async def _asked(kind: type[Asked], request: Request) -> Asked:
    """Parse a request's body. Raises `HTTPException` if it cannot be read, or if it arrives too slowly."""
    try:
        return read(kind, await asyncio.wait_for(request.body(), PATIENCE))
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not here within {PATIENCE:.0f} seconds") from error
    except UserError as error:
        raise HTTPException(422, str(error)) from error


def _kind(pipe: Pipeline) -> str:
    """Return what the two models of a round must have in common."""
    made = "x".join(map(str, pipe.info.shape))
    classes = f" of {len(pipe.info.classes)} classes" if pipe.info.classes else ""
    prompts = " of prompts" if pipe.info.text else ""
    return made + classes + prompts


async def _visitor(socket: WebSocket, studio: Studio) -> None:
    """Draw what one visitor requests, newest first, until they leave."""
    newest: deque[Wish] = deque(maxlen=1)
    arrived = asyncio.Event()

    def answer() -> dict[str, Any]:
        """Draw the visitor's newest request; runs in the models' thread when their turn has come."""
        wish = newest.pop()
        try:
            pixels, ms = studio.draw(studio.student, wish)
        except UserError as error:
            return _refusal(wish.id, 422, str(error))
        except Exception as error:  # e.g. a GPU out of memory: the next request may succeed
            log.exception("a picture failed")
            return _refusal(wish.id, 500, f"{type(error).__name__}: {error}")
        kind, picture = encode(pixels)
        header = json.dumps({"id": wish.id, "milliseconds": ms, "type": kind}).encode()
        return {"type": "websocket.send", "bytes": struct.pack(">I", len(header)) + header + picture}

    async def draw() -> None:
        while True:
            await arrived.wait()
            arrived.clear()
            if newest:  # unless the previous turn took it already
                await socket.send(await studio.run(answer))

    drawing = asyncio.create_task(draw())
    try:
        while (message := await socket.receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            if text is None or len(text) > LARGEST:
                await socket.send(_refusal(None, 400, f"expected text of at most {LARGEST} characters"))
                continue
            try:
                newest.append(read(Wish, text))
                arrived.set()
            except UserError as error:
                await socket.send(_refusal(None, 422, str(error)))
    except WebSocketDisconnect:
        pass
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


def _refusal(number: int | None, status: int, why: str) -> dict[str, Any]:
    return {"type": "websocket.send", "text": json.dumps({"id": number, "status": status, "error": why})}


def serve(student: Pipeline, teacher: Pipeline | None, host: str, port: int, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C, at `port` or, if it is taken, at a free one.

    Raises `UserError` for an invalid port or host, and for models that `make_app` refuses.
    """
    import uvicorn

    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: expected 0 to 65535; 0 takes any free one")
    app = make_app(student, teacher, (host, socket.gethostname()))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as taken:
            try:
                listener.bind((host, 0))
            except OSError:
                raise UserError(f"--host {host}: {taken.strerror}; give an address of this machine") from taken
        listener.listen()  # from here on, a browser that opens the address waits for the page instead of being refused
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}"
        console.print(f"Look at {address} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(address)
        config = uvicorn.Config(app, log_level="warning", ws_max_size=4 * LARGEST, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])
