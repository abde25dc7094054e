"""One thread per test process: two processes of two threads each on two cores slow each other five- to tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
