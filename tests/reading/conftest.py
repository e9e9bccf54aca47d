"""CC12M's sample, where it lies beside the checkout."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # for reading_sets

settings.register_profile("reading", deadline=None, derandomize=True)
settings.load_profile("reading")

CC12M = Path(__file__).resolve().parents[2].parent / "shared/data/cc12m-sample.tar"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The node's cache of these tests alone, which they leave behind nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("node"))
        patch.setenv("TMPDIR", folder)  # of processes that tests start
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def cc12m_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the CC12M sample in it, unindexed."""
    if not CC12M.is_file():
        pytest.skip("the CC12M sample (../shared/data/cc12m-sample.tar) is not there")
    folder = tmp_path_factory.mktemp("cc12m")
    (folder / CC12M.name).symlink_to(CC12M)
    return folder
