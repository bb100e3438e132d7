"""What every test shares: few threads, and property tests that try the same examples each time."""

import hypothesis
import torch

# Two cores are enough for the suite; more threads only make small tensors slower and timings of other jobs worse.
torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
