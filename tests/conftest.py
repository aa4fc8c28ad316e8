"""What every test run shares: one thread, and property tests that draw the same examples each time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # these tensors are tiny: waking a second thread costs more than it helps

settings.register_profile("kleash", deadline=None, database=None, derandomize=True, max_examples=50)
settings.load_profile("kleash")
