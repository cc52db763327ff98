"""A process that stands still, as if its machine were gone, takes the job down with its number."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from distmatch.system import heartbeat, parallel

fork = multiprocessing.get_context("fork")


def _enter(rank, world, port, silent, log) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    heartbeat.EVERY, heartbeat.SILENCE = 0.1, 1.5
    with parallel.process_group():
        parallel.barrier()
        if rank == silent:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(4.0 if silent is None else 0.0)  # work, of much longer than the silence
        parallel.barrier()


def start(tmp_path, world, silent) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        fork.Process(target=_enter, args=(rank, world, port, silent, tmp_path / f"{rank}.log")) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_silent_process_is_named_by_all_others(tmp_path, silent):
    processes = start(tmp_path, 3, silent)
    others = [process for rank, process in enumerate(processes) if rank != silent]
    for process in others:
        process.join(20)
    assert [process.exitcode for process in others] == [1, 1]
    processes[silent].kill()
    for rank in {0, 1, 2} - {silent}:
        told = (tmp_path / f"{rank}.log").read_text()
        assert f"process {rank} of 3 lost process {silent} of this job: no sign of life" in told
        assert "The last checkpoint is kept" in told


def test_work_of_any_length_is_no_silence(tmp_path):
    processes = start(tmp_path, 3, None)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
