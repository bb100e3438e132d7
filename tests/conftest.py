"""What every test shares: few threads, and property tests that try the same examples each time."""

import hypothesis
import torch

# More threads only make small tensors slower and the timings of other jobs worse.
torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
