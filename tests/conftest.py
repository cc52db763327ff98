"""One thread per process, decided before torch is imported: spinning OpenMP threads cost more than they save."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)  # also where a plugin has imported torch before
