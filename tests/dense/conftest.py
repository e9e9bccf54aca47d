import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """As the ranks have: other sums give other bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def coco_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of eight small pictures with objects; see dense_sets.shapes."""
    from dense_sets import pack_shapes

    return pack_shapes(tmp_path_factory.mktemp("coco"), pictures=8)


@pytest.fixture(scope="session")
def label_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures with label maps."""
    from dense_sets import pack_shapes

    return pack_shapes(tmp_path_factory.mktemp("labels"), pictures=8, label_maps=True)


@pytest.fixture
def coco_files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes pictures and their instances JSON, after `change` of its content: (folder, file)."""
    from dense_sets import write_coco

    def make(change: Callable[[dict], None] = lambda content: None, pictures: int = 4) -> tuple[Path, Path]:
        return write_coco(tmp_path, pictures, change)

    return make
