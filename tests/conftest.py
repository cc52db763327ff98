"""One thread per process, decided before torch is imported: spinning OpenMP threads cost more than they save."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
