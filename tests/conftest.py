"""What is decided before torch is imported: one thread per process, and that Python keeps what it compiles."""

import gc
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # spinning OpenMP threads cost more than they save
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every new process would compile torch for seconds

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have jobs in the background ignore

# To look for garbage again and again among the million objects that are imported takes a tenth of the suite's time, and
# in forked processes the memory that they share.
gc.disable()  # while files are collected, that is: imported
gc.set_threshold(10_000, 10, 10)

SLOW = {
    *("test_checkpoint", "test_cli", "test_compare", "test_damage", "test_disk_full", "test_distill", "test_engine"),
    *("test_evaluation", "test_examples", "test_kill", "test_networks_spread", "test_pair_builder", "test_pairs"),
    *("test_parallel", "test_plan", "test_recipes", "test_serve", "test_stages", "test_teach", "test_text_training"),
    *("test_benchmarks", "test_game", "test_toy2d", "test_two_runs", "test_watch"),
    *("test_flow_teachers", "test_folders", "test_pixart", "test_pixel_teachers", "test_stable"),
    "test_results_table",
}
"""Files of tests that start processes, or train, for minutes in all."""

LONGEST = ["test_recipes", "test_networks_spread", "test_engine", "test_plan", "test_kill", "test_compare"]
"""They come first: one of them at the end would leave all processes but one without work."""


def pytest_collection_modifyitems(items):
    import torch  # not above: the process that only hands out tests to others would wait for it, and they for that one

    torch.set_num_threads(1)  # also where a plugin has imported torch before
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def only_what_is_new_is_looked_through():
    """Put aside what the tests before have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def planner():
    """A process that plans; see `test_plan`."""
    import torch

    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield lambda task, *arguments: pool.submit(task, *arguments).result()


def pytest_sessionfinish():
    gc.unfreeze()  # what is left when Python ends is reported as leaked by packages that count their objects


@pytest.fixture
def published_modules(monkeypatch):
    """The modules that published pickles refer to, for the pickler to find."""
    from pickles import publish  # with torch: not above

    publish(monkeypatch)


@pytest.fixture
def sentinel(tmp_path):
    """A file that comes into being when anything in a pickle is executed."""
    return tmp_path / "executed"
