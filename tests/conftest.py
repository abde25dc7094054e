"""One thread per test process: two processes of two threads each on two cores slow each other five- to tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "short", max_examples=150, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "long", settings.get_profile("short"), max_examples=25_000, derandomize=False, database=None, print_blob=True
)
settings.load_profile("short")
