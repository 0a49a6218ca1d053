"""One thread for all tests: their arrays are small, and several test processes share the cores."""

import torch

torch.set_num_threads(1)
