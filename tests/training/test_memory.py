"""What a rank's live tensors weigh, against the plan's formula: 1, 2 and 4 ranks, every stage, fp32 and bf16.

Weighed between the last backward pass and the update, when gradients, weights, optimizer, average and teacher are all
there, and those buckets that the plan calls `standing`. Asynchronous checkpoints' copy is weighed after one was saved.
"""

import json
from pathlib import Path

import pytest
from memory_rank import WIDTH
from training_fakes import FakeTask, configuration, logs, run_ranks

from pretrain.analysis.plan import Sizes, rank_memory

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
SCRIPT = str(Path(__file__).with_name("memory_rank.py"))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_live_tensors_weigh_what_the_formula_says_within_a_tenth(tmp_path: Path, ranks: int) -> None:
    task = FakeTask(WIDTH)
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    sizes = Sizes(trainable, task.frozen.numel(), sum(p.numel() for p in task.body.parameters()))
    work = {
        tmp_path / f"{stage}-{precision}-{saving}": configuration(
            training__zero_stage=stage,
            training__precision=precision,
            schedule__steps=3,
            schedule__warmup_steps=0,
            checkpoint__every_steps=1 if saving else None,  # once, before the step that is weighed
        )
        for stage in STAGES
        for precision in PRECISIONS
        for saving in (False, True)
        if not saving or precision == "fp32"
    }
    assert run_ranks(work, tmp_path / "all", ranks, 400, script=SCRIPT) == [0] * ranks, logs(tmp_path / "all")[-3000:]
    off, table = {}, []
    for output, config in work.items():
        stage, precision = config.training.zero_stage, config.training.precision
        saved = config.checkpoint.every_steps is not None
        formula = rank_memory(
            sizes, stage=stage, ranks=ranks, precision=precision, asynchronous=saved, reduction_bytes=4.0
        )
        expected = formula.states + formula.standing + formula.host
        for rank in range(ranks):
            weighed = json.loads((output / f"memory-{rank}.json").read_text())["before"]
            table.append(f"stage {stage} {precision} rank {rank}: {weighed} weighed, {expected:.0f} expected")
            if abs(weighed - expected) > 0.1 * expected:
                off[output.name, rank] = weighed / expected
    assert not off, "\n".join(table)
