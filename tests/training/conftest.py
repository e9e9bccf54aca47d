import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """As the ranks have: other sums give other bits. By module, so that it stands before the runs modules share."""
    import torch

    torch.set_num_threads(1)
