"""The operator's steps of the GPU check: their arithmetic and what they read of other tools' output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def load(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The name of a script in benchmarks/gpu -> it as a module; rows go to the file that `results` reads."""
    monkeypatch.syspath_prepend(GPU)
    return load_benchmark


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    file = tmp_path / "results.json"
    monkeypatch.setenv("CHECK_OUT", str(file))
    return lambda step: json.loads(file.read_text())["steps"][step]["rows"]


def test_a_floor_moves_every_tensor_once(load: Callable[[str], ModuleType]) -> None:
    case = load("cases").Case("T", 3, "bfloat16", 2)
    i = case.inputs(torch.device("cpu"))
    inputs = sum(t.numel() * t.element_size() for t in (i.value, i.offset, i.mask))
    output = i.gradient.numel() * 2
    # backward: the inputs and the output's gradient in, three gradients out
    packed = (i.value.numel() + i.packed.numel()) * 2
    assert case.bytes_moved() == {
        "forward": inputs + output,
        "backward": 2 * inputs + output,
        "packed forward": packed + output,
        "packed backward": 2 * packed + output,
    }
    assert case.points == i.mask.numel()
    assert torch.ops.dcnv3.forward(i.value, i.offset, i.mask, *case.geometry).shape == i.gradient.shape
    assert torch.equal(i.packed[..., : i.offset.shape[-1]], i.offset) and i.packed.shape[-1] % 8 == 0
    assert torch.ops.dcnv3.packed_forward(i.value, i.packed, *case.geometry, True).shape == i.gradient.shape
    assert 1.3 < float(i.offset.float().std()) < 1.7


def test_the_stages_are_those_of_internimage(load: Callable[[str], ModuleType]) -> None:
    cases = load("cases").stages("float16")
    sizes = {(c.model, c.stage): (c.size, c.groups * c.group_channels) for c in cases}
    assert len(cases) == len(sizes) == 8
    assert sizes["T", 1] == (56, 64) and sizes["T", 4] == (7, 512)
    assert sizes["H", 1] == (56, 320) and sizes["H", 3] == (14, 1280)


def test_a_turn_is_as_many_calls_as_fill_it(load: Callable[[str], ModuleType]) -> None:
    calls = load("timing").calls_for
    assert [calls(one, 10.0) for one in (0.05, 1.0, 50.0, 0.0)] == [200, 10, 1, 1000]


def test_a_contender_that_fails_is_recorded_beside_the_others(load: Callable[[str], ModuleType]) -> None:
    timing = load("timing")

    def fails() -> None:
        raise TypeError("no such type\nmore")

    contenders = {"ours": [lambda: torch.ones(50_000).sum()] * 2, "fails": [fails]}
    found = timing.compare(contenders, torch.device("cpu"), 3, turn=0.5)
    assert found["fails"] == {"error": "no such type"}
    low, high = found["ours"]["quartiles"]
    assert 0 < low <= found["ours"]["ms"] <= high
    assert timing.ratios({"ours": {"ms": 2.0}, "a": {"ms": 5.0}, "b": {"error": ""}}) == {"a": 2.5}


def test_deform_conv2d_is_called_so_that_it_computes_the_same(
    load: Callable[[str], ModuleType], make_call: Any
) -> None:
    pytest.importorskip("torchvision")
    call = make_call(group_channels=8)
    output = load("beside").by_deform_conv2d(call.value, call.offset, call.mask, 2)
    torch.testing.assert_close(output.double(), call.run("reference")["output"], atol=1e-5, rtol=1e-5)


def test_peers_are_built_compared_and_recorded(
    load: Callable[[str], ModuleType], results: Callable[[str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "good.py").write_text(
        "from dcnv3 import dcnv3\n"
        "name, activated, built = 'weights', True, []\n"
        "def build(): built.append(1)\n"
        "def operator(value, offset, mask, groups):\n"
        "    assert built\n"
        "    return dcnv3(value, offset, mask, groups=groups, mask_activation='none')\n"
    )
    (folder / "broken.py").write_text("def build(): raise OSError('no compiler')\n")
    (folder / "wrong.py").write_text("def operator(value, offset, mask, groups): return value * 2 + 0 * offset.sum()\n")
    found = load("beside").peers(folder, torch.device("cpu"))
    assert set(found) == {"weights", "wrong"}
    broken, good, wrong = results("beside")
    assert broken == {"peer": "broken", "error": "OSError: no compiler"}
    assert good["peer"] == "weights" and good["difference_float32"] < 1e-5 and good["difference_float16"] < 1e-2
    assert wrong["peer"] == "wrong" and "error" in wrong  # no gradient for the mask


def test_the_rows_of_reductions_are_those_that_backward_adds_to(load: Callable[[str], ModuleType]) -> None:
    """Ones scattered to the rows of points inside: what the gradient of a sum of sampled corners touches."""
    case = load("cases").Case("T", 4, "float32", 2)
    torch.manual_seed(0)
    rows = load("ceilings").corner_rows(case, torch.device("cpu")).long()
    torch.manual_seed(0)
    i = case.inputs(torch.device("cpu"))
    assert rows.shape == (case.points * 4,)
    value = i.value.requires_grad_()
    torch.ops.dcnv3.forward(value, i.offset, i.mask, *case.geometry).sum().backward()
    assert value.grad is not None
    touched = value.grad.view(-1, case.group_channels).abs().sum(-1) > 0
    assert not bool((touched & ~torch.zeros_like(touched).index_fill(0, rows, True)).any())
    inside = torch.zeros(len(touched)).index_add(0, rows, torch.ones(len(rows)))
    assert float(torch.corrcoef(torch.stack([inside, touched.float()]))[0, 1]) > 0 or bool(touched.all())


def test_what_a_sanitizer_says_is_counted(load: Callable[[str], ModuleType]) -> None:
    summary = load("sanitized").summary
    assert summary("120 calls\n========= ERROR SUMMARY: 0 errors\n") == (0, "")
    assert summary("========= ERROR SUMMARY: 1 error\n") == (1, "")
    found = summary("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n")
    assert found == (2, "displayed (1 error, 1 warning)")
    assert summary("========= Target application returned an error\n") is None


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in the place of a tool that only machines with a GPU have, and such a GPU in torch's."""

    def make(name: str, body: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(sys, "argv", ["step"])

    return make


@pytest.mark.parametrize(
    ("tells", "errors", "whole"),
    [
        ("echo 120 calls; echo '========= ERROR SUMMARY: 0 errors'", 0, True),
        ("echo 120 calls; echo '========= ERROR SUMMARY: 3 errors'", 3, True),
        ("echo '========= ERROR SUMMARY: 0 errors'", 0, False),
        ("echo '========= Error: no device'; exit 1", None, False),
        ("echo 120 calls; sleep 60", None, True),
    ],
)
def test_a_sanitizer_is_believed_after_all_calls_alone(
    tells: str,
    errors: int | None,
    whole: bool,
    load: Callable[[str], ModuleType],
    tool: Callable[[str, str], None],
    results: Callable[[str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sanitized = load("sanitized")
    tool("compute-sanitizer", f"exec 2>&1; {tells}")
    monkeypatch.setattr(sanitized, "TOOLS", {"memcheck": 1.0})
    if errors == 0 and whole:
        sanitized.main()
    else:
        with pytest.raises(SystemExit, match="Error: memcheck"):
            sanitized.main()
    (row,) = results("sanitizer")
    assert (row["errors"], row["all_calls_made"]) == (errors, whole)


def test_the_counters_of_every_kernel_are_rows_and_a_file(
    load: Callable[[str], ModuleType],
    tool: Callable[[str, str], None],
    results: Callable[[str], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """Also where the first form is refused for a counter that this ncu does not know."""
    lines = ['"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"', '"","","ns","register"']
    names = ["forward", "backward", "tile", "forward", "backward"]
    lines += [f'"{n}","{name}_kernel","{1000 * (n + 1)}","40"' for n, name in enumerate(names)]
    (tmp_path / "page.csv").write_text("\n".join(lines))
    tool(
        "ncu",
        f"""if [[ "$*" == *--import* ]]; then cat {tmp_path}/page.csv; exit; fi
        if [[ "$*" == *--metrics* ]]; then echo '==ERROR== no such metric'; exit 1; fi
        while [ "$1" != -o ]; do shift; done; touch "$2.ncu-rep" """,
    )
    load("kernel_counters").main()
    rows = results("counters")
    assert [(row["model"], row["kernel"], row["ns"]) for row in rows] == [
        ("T", "forward_kernel", 1000),
        ("T", "backward_kernel", 2000),
        ("T", "tile_kernel", 3000),
        ("H", "forward_kernel", 4000),
        ("H", "backward_kernel", 5000),
    ]
    assert (tmp_path / "ncu.csv").read_text() == "\n".join(lines)


def test_counters_that_may_not_be_read_are_no_failure(
    load: Callable[[str], ModuleType], tool: Callable[[str, str], None], results: Callable[[str], list[dict[str, Any]]]
) -> None:
    tool("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    with pytest.raises(SystemExit) as ended:
        load("kernel_counters").main()
    assert ended.value.code == load("record").NOT_HERE


def test_every_reduction_is_timed_on_every_pattern(
    load: Callable[[str], ModuleType], results: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings, calls = load("ceilings"), []
    functions = SimpleNamespace(reductions=lambda *call: calls.append(call) or 0)
    small = load("cases").Case("T", 4, "bfloat16", 1)
    monkeypatch.setattr(ceilings, "Case", lambda *which: small)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    found = ceilings.reductions(functions, torch.device("cpu"))
    assert len(found) == len(results("ceilings")) == 15 and "as backward, v4.f32" in found
    assert {(call[0], call[4]) for call in calls} == {(0, 4), (1, 3), (2, 2), (3, 3), (4, 1)}  # pieces of a row, log2
    functions.reductions = lambda *call: 98
    with pytest.raises(RuntimeError, match="CUDA error 98"):
        ceilings.reductions(functions, torch.device("cpu"))


def test_the_sanitized_calls_take_every_dtype_and_shape(load: Callable[[str], ModuleType]) -> None:
    assert load("sanitized").calls(torch.device("cpu")) == 120


def test_counters_are_read_of_the_raw_page(load: Callable[[str], ModuleType]) -> None:
    counters = load("kernel_counters")
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread"]
    names += [stall.format(word) for word in ("wait", "lg_throttle", "wait_not_issued")]
    lines = [names, ["", "", "ns", "register/thread", "inst", "inst", "inst"]]
    lines += [["0", "void forward_kernel<float, 4>(Arguments)", "1,234.5", "40", "1.5", "7.25", "9"]]
    page = "==PROF== Disconnected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    (kernel,) = counters.rows(page)
    row = counters.chosen(kernel)
    assert row["kernel"] == "void forward_kernel<float, 4>(Arguments)"
    assert row["ns"] == 1234.5 and row["registers"] == 40
    assert row["stalls_warps_an_issue"] == {"lg_throttle": 7.25, "wait": 1.5}
    assert counters.rows("==ERROR== no kernels were profiled") == []


def test_counts_are_those_of_the_report(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    tests = load("gpu_tests")
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3" time="2.5">'
        '<testcase classname="a.b" name="t[x]" time="1"><failure message="assert 1 == 2">long</failure></testcase>'
        '<testcase classname="a.b" name="u" time="0.5"><skipped message="no"/></testcase>'
        '<testcase classname="a.b" name="v" time="0.1"/></testsuite></testsuites>'
    )
    part = tests.Part("cuda", "golden", ("test_golden.py",))
    row = tests.ended(part, 1, report)
    assert (row["tests"], row["failures"], row["skipped"], row["seconds"]) == (3, 1, 1, 2.5)
    assert row["failed"] == [{"test": "a.b.t[x]", "message": "assert 1 == 2"}]
    gone = tests.ended(tests.Part("triton", "golden", ()), None, tmp_path / "none.xml")
    assert gone["failed"] == [{"test": "golden", "message": "time limit"}]
    assert tests.words([row, gone]) == "cuda: 1 of 2 passed, first t[x]; triton: none ran, first golden"


@pytest.mark.parametrize("missing", [None, "not built"])
def test_missing_cuda_kernels_fail_and_tritons_are_tested(
    missing: str | None,
    load: Callable[[str], ModuleType],
    results: Callable[[str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tests = load("gpu_tests")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tests, "available_backends", lambda: {"cuda": missing})
    monkeypatch.setattr(tests, "start", lambda part, report: subprocess.Popen(["true"]))
    with pytest.raises(SystemExit, match="Error: "):
        tests.main()  # parts without a report have failed
    kernels = [row["kernels"] for row in results("tests")]
    assert kernels.count("triton") == 5
    assert kernels.count("cuda") == (1 if missing else 3)
