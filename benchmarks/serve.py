"""Frames per second that `distmatch serve` draws while a prompt is typed, in a real browser.

    uv run python benchmarks/serve.py [student] [keys per second] [--compile]

Needs a Chromium on the PATH, playwright and the packages of distmatch[serve]. Each key asks for a picture; those that
come while one is being drawn become one.
"""

import argparse
import shutil
import threading
import time

TEXT = "red apple, flat style; a smiling face with glasses, noto style; green car, glossy style; "
SECONDS = 10

TYPING = """async ([text, seconds, pause]) => {
    const prompt = document.getElementById('prompt'), picture = document.getElementById('picture');
    const shown = new Set(), trips = [], began = performance.now();
    for (let i = 0; performance.now() - began < 1000 * seconds; i++) {
        prompt.value = text.slice(0, 1 + i % text.length);
        prompt.dispatchEvent(new Event('input'));
        await new Promise(done => setTimeout(done, pause));
        if (!shown.has(picture.dataset.id)) trips.push(+document.getElementById('answer-ms').textContent);
        shown.add(picture.dataset.id);
    }
    trips.sort((a, b) => a - b);
    return [shown.size / seconds, trips[trips.length >> 1]] }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", default="emoji")
    parser.add_argument("keys", nargs="?", type=float, default=60, help="per second")
    parser.add_argument("--compile", action="store_true", help="as `distmatch serve --compile`")
    given = parser.parse_args()
    measure(given.student, given.keys, given.compile)


def measure(model: str, keys: float, compiled: bool) -> None:
    import torch
    import uvicorn
    from playwright.sync_api import sync_playwright  # not needed to show the help

    from distmatch.commands.web_page import make_app
    from distmatch.evaluation.measure import hardware
    from distmatch.pipeline import DistilledPipeline

    pipe = DistilledPipeline.from_pretrained(model, compile=compiled)
    print({**hardware(torch.device("cpu")), "model": model, "compiled": compiled})
    server = uvicorn.Server(uvicorn.Config(make_app(pipe), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
            page = chromium.new_page()
            page.goto(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
            page.wait_for_function(
                "document.getElementById('picture').dataset.id >= 1", timeout=300_000
            )  # if it is compiled
            began = time.process_time()
            frames, trip = page.evaluate(TYPING, [TEXT, SECONDS, 1000 / keys])
            work = 1000 * (time.process_time() - began) / frames / SECONDS
            chromium.close()
        print(
            f"{frames:.1f} frames a second at {keys:g} keys; round trip {trip:.0f} ms; {work:.0f} ms of CPU per frame"
        )
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
