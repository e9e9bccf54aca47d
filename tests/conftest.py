"""What every test stands on."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

# A shell starts background commands with SIGINT ignored, children inherit that, and tests that send it wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so does nohup with SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


_OF_A_RANK = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


@pytest.fixture(autouse=True)
def a_run_leaves_nothing_in_the_process_of_the_tests() -> Iterator[None]:
    """A run in this process names itself a rank, and DeepSpeed's stage 3 puts another F.linear in place for good: the
    tests that come after, in whatever order, find neither.
    """
    yield
    for name, value in _OF_A_RANK.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if "deepspeed" in sys.modules:
        torch = sys.modules["torch"]
        torch.nn.functional.linear = torch._C._nn.linear


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-runs", type=Path, help="a JSON file that keeps each test's last date, commit and result")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the tests that ran just now into the file; what it says of other tests stays."""
    file: Path | None = config.getoption("--record-runs")
    if file is None:
        return
    git = ["git", "-C", str(config.rootpath), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    day = datetime.now(UTC).date().isoformat()
    runs = json.loads(file.read_text()) if file.exists() else {}
    for result in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(result):
            seconds = round(report.duration)
            runs[report.nodeid] = {"date": day, "commit": commit, "result": result, "seconds": seconds}
    file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The name of a script in benchmarks/ -> it as a module, with its siblings in reach as when it is run."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture(scope="session")
def embedded_set(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the embedded set by split, as the demo draws it, of 64 px. Nobody writes to them."""
    from data_pipeline.preparation.sources.openmoji import build_openmoji

    return build_openmoji(tmp_path_factory.mktemp("embedded"), image_size=64, drawings_a_concept=3, workers=2)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Path]:
    """A configuration that two CPU ranks train in seconds, over 24 small pictures with captions; takes overrides."""

    def make(*overrides: str) -> Path:
        import numpy
        import yaml
        from PIL import Image

        from data_pipeline.preparation import pack
        from pretrain.configuration.loading import dump_config, load_config

        source, shards = tmp_path / "pictures", tmp_path / "shards"
        source.mkdir()
        for number in range(24):
            pixels = numpy.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(source / f"{number:02d}.png")
            (source / f"{number:02d}.txt").write_text(f"picture number {number}")
        pack(source, shards, rows_per_shard=12, workers=1)
        body = {
            "model": {
                "name": "custom",
                "overrides": {
                    "channels": 16,
                    "depths": [1, 1, 1, 1],
                    "groups": [1, 2, 4, 8],
                    "clip_embed_dim": 32,
                    "clip_heads": 2,
                },
            },
            "task": {
                "embed_dim": 32,
                "decoder": {"dim": 32, "layers": 1, "heads": 2},
                "text": {"width": 32, "layers": 1, "heads": 2},
            },
            "data": {"image_size": 64, "context_length": 16, "workers": 0, "sources": [{"path": str(shards)}]},
            "schedule": {"steps": 12},
            "training": {"batch_size": 8, "precision": "fp32", "log_every": 2},
            "checkpoint": {"every_steps": 5},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(body))
        if overrides:
            path.write_text(dump_config(load_config(str(path), overrides)))
        return path

    return make
