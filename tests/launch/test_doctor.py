"""doctor: what it finds here, and what it advises about machines that are not like this one."""

import json
import re
from typing import Any

import pytest

from launch.cli import run
from launch.doctor import advise, examine

SOUND: dict[str, Any] = {
    "operator": {"cpu": "ready", "cuda": "ready"},
    "devices": {"gpus": ["NVIDIA H100"], "torch_sees": ["NVIDIA H100, 85 GB, sm_90"]},
    "packages": dict.fromkeys(("torch", "deepspeed", "timm", "open_clip_torch", "webdataset", "pyarrow"), "1.0"),
    "compilers": {"c++": "g++ 12"},
    "disk": {"folder": "/runs", "free": 10**12},
    "memory": {"shared_free": 10**11},
}


def test_doctor_finds_the_libraries_that_are_imported_here(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import dcnv3

    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found["operator"]) == set(dcnv3.available_backends())
    assert found["operator_default"] == {device: dcnv3.default_backend(device) for device in ("cpu", "cuda")}
    assert found["communication"]["gloo"] is True
    assert found["devices"]["ranks_of_auto"] == max(1, torch.cuda.device_count())


def test_doctor_for_people_has_one_line_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "operator:" in out and "advice" in out


def test_a_sound_machine_gets_no_advice() -> None:
    assert advise(SOUND) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operator": {"error": "ImportError: x"}}, "reinstall the package"),
        ({"operator": {"cpu": "no extension", "cuda": "ready"}}, "C\\+\\+ backend is not built"),
        ({"operator": {"cpu": "ready", "cuda": "no extension"}}, "no CUDA operator"),
        ({"devices": {"gpus": ["A100"], "torch_sees": []}}, "torch does not see"),
        ({"packages": {**SOUND["packages"], "deepspeed": None}}, "pip install deepspeed"),
        ({"compilers": {"c++": None}}, "apt-get install g"),
        ({"disk": {"folder": "/runs", "free": 10**9}}, "/runs has 1 GiB free"),
        ({"memory": {"shared_free": 64 * 2**20}}, "--shm-size"),
    ],
)
def test_what_is_amiss_is_advised_about(change: dict[str, Any], words: str) -> None:
    advice = advise(SOUND | change)
    assert len(advice) == 1
    assert re.search(words, advice[0])


def test_a_broken_operator_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str | None]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("dcnv3.available_backends", broken)
    found = examine()
    assert "libcudart" in found["operator"]["error"]
    assert any("operator cannot be imported" in line for line in found["advice"])
