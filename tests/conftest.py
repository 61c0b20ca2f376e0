"""Small tensors run faster on one thread, and results then do not depend on the machine's cores.

Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is
imported.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
