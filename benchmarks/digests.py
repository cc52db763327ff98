"""What the digests of files of numbers cost: the rate of SHA-256 against other sums and against reading the file.

The fastest of several rounds counts, which keeps other load on the machine out of it; of what computes, the time of its
core. A cold read is one from the disk, after the system was asked to forget the file.

    python benchmarks/digests.py [--megabytes 256] [--rounds 5] [--folder .]
"""

import argparse
import hashlib
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from distmatch.system import digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk to read from")
    options = parser.parse_args()
    size = options.megabytes * 10**6
    content = os.urandom(size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "numbers.safetensors"
        digests.save_file({"numbers": torch.frombuffer(bytearray(content), dtype=torch.float32)}, file)
        os.sync()

        def cold() -> None:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while opened.read(2**24):
                    pass

        ways: dict[str, Callable[[], object]] = {
            "SHA-256": lambda: hashlib.sha256(content),
            "BLAKE2b": lambda: hashlib.blake2b(content),
            "CRC-32": lambda: zlib.crc32(content),
            "read, cold": cold,
            "read, cached": file.read_bytes,
            "load, not compared": lambda: load_file(file)["numbers"].sum(),
            "load, compared": lambda: digests.load_file(file)["numbers"].sum(),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            for name, way in ways.items():
                clock = time.perf_counter if name.startswith("read") else time.process_time
                start = clock()
                way()
                best[name] = min(best[name], clock() - start)
    print(f"{platform.system()}, {platform.machine()}, {options.megabytes} MB, one thread")
    for name, seconds in best.items():
        print(f"{name:20}{size / seconds / 1e9:8.2f} GB/s")


if __name__ == "__main__":
    main()
