"""Saves a checkpoint's tensors in safetensors files, one per process, with `torch.distributed.checkpoint`.

Any number of processes can read them, sharded in any way. Importing this module takes seconds, because of PyTorch: a
process of no group has `single`.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import torch.futures
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from distmatch.system import parallel
from distmatch.system.digests import Damaged
from distmatch.training.single import begin, write_shard


def save(tensors: Mapping[str, Tensor], folder: Path, finish: Callable[[], None]) -> Future:
    """Copy `tensors` to host memory; in the background, all processes write theirs to `folder`, then the first calls
    `finish()`. Each process copies and writes its share of what all of them hold.
    """
    alone = parallel.world() == 1
    mine = dict(tensors) if alone else _share(tensors)
    group = None if alone else parallel.background_group()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by the thread, in a single process
    writer = Writer(folder, finish)
    stager = DefaultStager(StagingOptions(False, False, False, False))  # copy immediately, to ordinary memory
    try:
        saving = async_save(mine, storage_writer=writer, process_group=group, async_stager=stager, no_dist=alone)
    finally:
        stager.close()  # one for each save: up to PyTorch 2.11 it closes itself after the first
    return cast(Future, saving)


def read(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill `tensors` with what `folder` has under their names. Raises `Damaged` for the first error of any process."""
    reader = HuggingFaceStorageReader(path=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process, or that the interface may change
        try:
            load(tensors, storage_reader=reader, no_dist=parallel.world() == 1)
        except CheckpointException as error:
            cause = failure(error)
            raise Damaged(str(cause) or type(cause).__name__) from error


def failure(error: BaseException) -> BaseException:
    """Return the first of the processes' errors that PyTorch has gathered, or the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class Writer(HuggingFaceStorageWriter):
    """Has all processes write shards to the folder `unfinished`, then calls `finish` in the first.

    PyTorch calls it in a thread: `prepare_global_plan` in the first process, `write_data` in all of them, `finish` in
    the first once all have written. An error in one of them is raised in all processes.
    """

    def __init__(self, unfinished: Path, finish: Callable[[], None]):
        super().__init__(path=str(unfinished), save_distributed=True)
        self._folder = unfinished
        self._finish = finish

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        begin(self._folder)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        tensors, offsets, seen = {}, {}, set()
        for item in plan.items:
            name, value = item.index.fqn, cast(Tensor, planner.resolve_data(item))
            storage = value.untyped_storage()
            own = storage.nbytes() == value.nbytes and storage.data_ptr() not in seen
            tensors[name] = value if own else value.clone()  # safetensors allows no views and no tied weights
            offsets[name] = cast(TensorWriteData, item.tensor_data).chunk.offsets
            seen.add(storage.data_ptr())
        if tensors:
            write_shard(self._folder, plan.storage_data["shard_index"], tensors, offsets)
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result([])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish()


def _share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this process writes: its part of sharded tensors, and about an equal share of the replicated ones."""
    written = [0] * parallel.world()
    mine: dict[str, Tensor] = {name: value for name, value in tensors.items() if isinstance(value, DTensor)}
    whole = ((name, value) for name, value in tensors.items() if name not in mine)
    for name, value in sorted(whole, key=lambda item: (-item[1].nbytes, item[0])):
        writer = written.index(min(written))
        written[writer] += value.nbytes
        if writer == parallel.rank():
            mine[name] = value
    return mine
