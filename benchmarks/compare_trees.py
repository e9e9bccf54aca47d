"""Two checkouts against each other on the CPU, in turns: the operator, InternImage-T, a small model made as H is.

    git worktree add ../before COMMIT      # and build or copy its extension
    python benchmarks/compare_trees.py ../before . [--rounds 9] [--threads 1]

A process of each checkout waits for the name of a case and answers with the CPU seconds, of all threads, that one run
took; the parent asks them in turns, so that a slow minute of the machine meets both. The figure is the median over the
rounds of new / old, with the quartiles. CPU seconds leave out what other programs take, but not what sharing their
caches costs: the quartiles tell how much that is. More threads than cores that are free count the time they wait.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = ("operator forward", "operator step", "T forward", "T step", "H-like forward", "H-like step")


def serve(threads: int) -> None:
    """Run the cases named on standard input; imports are the checkout's, from PYTHONPATH."""
    import torch
    from torch import nn

    import dcnv3
    from pretrain.models import InternImage

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def moved(model: nn.Module) -> nn.Module:
        for key, parameter in model.named_parameters():
            # At initialisation the sampling would be an aligned copy. Both names that these layers have had.
            if any(name in key for name in ("offset_mask.", ".offset.", ".mask.")):
                nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 1.0)
        return model

    layer = [torch.randn(8, 28, 28, size, requires_grad=True) for size in (128, 8 * 18, 8 * 9)]
    models = {
        "T": moved(InternImage(64, layer_scale=1.0, drop_path_rate=0.1)),
        "H-like": moved(InternImage(64, (2, 2, 6, 2), dw_kernel_size=5, res_post_norm=True, center_feature_scale=True)),
    }
    images = torch.randn(4, 3, 224, 224)

    def run(case: str) -> None:
        what, kind = case.split()
        given = layer if what == "operator" else [images]
        function: Callable[..., torch.Tensor] = lambda *t: dcnv3.dcnv3(*t, groups=8)  # noqa: E731
        if what != "operator":
            function = models[what].train(kind == "step")
        if kind == "forward":
            with torch.inference_mode():
                function(*given)
        else:
            function(*given).square().mean().backward()

    print("ready", flush=True)
    for line in sys.stdin:
        started = time.process_time()
        run(line.strip())
        print(time.process_time() - started, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.threads)
    workers = []
    for tree in (options.old.resolve(), options.new.resolve()):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, __file__, ".", ".", "--serve", "--threads", str(options.threads)]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=tree, env=environment))
    found: dict[str, dict[str, float]] = {}
    for worker in workers:
        if answer(worker) != "ready":
            raise SystemExit("a checkout does not start; is its extension built?")
    for case in CASES:
        seconds: list[list[float]] = [[], []]
        for round_ in range(options.rounds + 1):
            for worker, times in zip(workers, seconds, strict=True):
                assert worker.stdin is not None
                print(case, file=worker.stdin, flush=True)
                took = float(answer(worker))
                if round_:  # the first round warms up
                    times.append(took)
        low, middle, high = statistics.quantiles([b / a for a, b in zip(*seconds, strict=True)])
        old, new = (statistics.median(times) for times in seconds)
        found[case] = {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "old": old, "new": new}
        print(f"{case:18} new / old {middle:5.3f} ({low:.3f} to {high:.3f})   {old:.3f} s, {new:.3f} s", flush=True)
    for worker in workers:
        worker.terminate()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def answer(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


if __name__ == "__main__":
    main()
