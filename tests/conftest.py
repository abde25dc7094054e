"""One thread per test process: two processes of two threads each on two cores slow each other five- to tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 - the variable is read when torch is loaded

torch.set_num_threads(1)
