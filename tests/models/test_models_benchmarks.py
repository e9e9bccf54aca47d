"""The benchmarks of the models run and write what they promise; their figures are for idle machines alone."""

import json

import pytest


def test_the_gpu_benchmark_compares_with_a_peer_and_survives_one_that_fails(load_benchmark, tmp_path, monkeypatch):
    (tmp_path / "benchmark_peers.py").write_text(
        "import timm\n"
        "from torch import nn\n"
        "def good(name, size):\n"
        "    return timm.create_model('test_resnet') if name != 'internimage_h' else None\n"
        "def bad(name, size):\n"
        "    return nn.Linear(1, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "results" / "models_gpu.json"
    options = "--device cpu --tiny --batch 2 --size 64 --rounds 2 --models T H --dtype float32"
    peers = "--peer good=benchmark_peers:good --peer bad=benchmark_peers:bad"
    load_benchmark("models_gpu").main([*options.split(), *peers.split(), "--output", str(out)])
    found = json.loads(out.read_text())
    assert "load_average_before" in found["machine"]
    t, h = found["rows"]
    assert (t["model"], h["model"]) == ("internimage_t", "internimage_h")
    for row in (t, h):
        for kind in ("forward", "step"):
            assert (
                row[kind]["ours"]["images_per_second"] > 0 and "shapes cannot be multiplied" in row[kind]["bad_error"]
            )
    low, high = t["step"]["good"]["quartiles"]
    assert low <= t["step"]["good"]["takes_of_ours"] <= high and "good" not in h["step"]


def test_the_cpu_benchmark_gives_ratios_with_quartiles(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("models_cpu")
    if benchmark.available_backends()["cpu"]:
        pytest.skip("the compiled CPU operator is not here")
    monkeypatch.setattr(benchmark, "NAMES", {"internimage_t": "internimage_t", "convnext_tiny": "test_convnext"})
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda count: None)
    out = tmp_path / "models_cpu.json"
    benchmark.main(["--batch", "1", "--rounds", "3", "--size", "64", "--out", str(out)])
    found = json.loads(out.read_text())
    for kind in ("forward", "step"):
        low, high = found[kind]["convnext_tiny"]["quartiles"]
        assert low <= found[kind]["convnext_tiny"]["internimage_t_takes"] <= high
        assert found[kind]["internimage_t"]["quartiles"] == [1.0, 1.0]
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "1"])
