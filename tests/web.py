"""A web server to test with, in a thread of this process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Site(ThreadingHTTPServer):
    """Serves `files` by their paths; of those in `cut` it announces all and sends so many bytes."""

    def __init__(self, files: Mapping[str, bytes], cut: Mapping[str, int]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cut, self.asked = dict(files), dict(cut), []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path.partition("?")[0])
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut.get(self.path, len(content))])

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(files: Mapping[str, bytes], cut: Mapping[str, int] | None = None) -> Iterator[Site]:
    site = Site(files, cut or {})
    Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
