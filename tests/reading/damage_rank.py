"""One of two real ranks: reads every case of a folder in step with the other and writes down what it saw.

python damage_rank.py RANK FOLDER          FOLDER/CASE/ is a set; FOLDER/RANK.json is written
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from reading_sets import tokenize

from data_pipeline.errors import UserError
from data_pipeline.reading import DataConfig, ImageText, Reader
from data_pipeline.reading.faults import FaultLog

# One case of each way in which a sample is lost is read in processes of their own; these take seconds to start.
IN_WORKERS = {"cut_tar", "missing_text", "bomb", "shard_missing", "damaged_bytes", "limit_few"}


def read_case(folder: Path, rank: int, max_bad_rate: float) -> dict:
    """Two epochs at least, all ranks stopping after the same step."""
    events: list[dict] = []
    settings = DataConfig(
        sources=[{"path": str(folder)}], image_size=32, context_length=8, workers=int(folder.name in IN_WORKERS),
        prefetch=2, block_shards=2, max_bad_rate=max_bad_rate, max_pixels=10_000_000,
    )  # fmt: skip
    seen: dict = {"events": events, "steps": 0, "samples": [], "error": "", "exit_code": 0}
    try:
        with Reader(
            settings,
            ImageText(tokenize, 8),
            batch_size=16,
            rank=rank,
            world_size=2,
            events=events.append,
            enforce_bad_rate=False,
        ) as reader:
            steps = -(-2 * reader.epoch_samples // 16)
            for batch in reader.batches(0):
                steps_of_all = torch.zeros(2, dtype=torch.int64)
                steps_of_all[rank] = batch.step + 1
                dist.all_reduce(steps_of_all)
                assert steps_of_all.tolist() == [batch.step + 1] * 2
                assert batch.views.shape == (8, 2, 32, 32, 3)
                seen["samples"] += [
                    [sample.shard, sample.key, bool(text)]
                    for sample, text in zip(batch.samples, batch.targets.has_text, strict=True)
                ]
                seen["steps"] = batch.step + 1
                judge_together(reader.faults)
                if batch.step + 1 == steps:
                    break
    except UserError as error:
        seen |= {"error": str(error), "exit_code": error.exit_code}
    return seen


def judge_together(faults: FaultLog) -> None:
    """As training does at each step boundary."""
    sums = torch.tensor([faults.seen, faults.bad], dtype=torch.float64)
    dist.all_reduce(sums)
    if faults.too_many(*sums.tolist()):
        worst: list = [None, None]
        dist.all_gather_object(worst, faults.worst())
        raise faults.error(*sums.tolist(), worst)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    found = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        dist.barrier()
        found[case.name] = read_case(case, rank, max_bad_rate=0.01 if case.name.startswith("limit") else 1.0)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
