"""What every test shares: few threads, and property tests that try the same examples each time."""

import os

import hypothesis
import torch

# More threads only make small tensors slower and the timings of other jobs worse, here and in programs of the tests.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
