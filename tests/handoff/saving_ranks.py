"""One run saved by two ranks, and by every other number of ranks and stage of ZeRO that goes on from there.

python saving_ranks.py CONFIG FOLDER STAGE:RANKS...   leaves FOLDER/first and FOLDER/zero-STAGE-ranks-RANKS
"""

import shutil
import sys
from pathlib import Path

import deepspeed  # noqa: F401  here, so that its import is not each rank's
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from forked_ranks import fork_ranks

from pretrain.configuration import load_config
from pretrain.training.distributed import leave
from pretrain.training.rank import run


def train(config: str, output: Path, stage: int, ranks: int, *more: str) -> None:
    def work(_: int) -> int:
        torch.set_num_threads(1)
        leave(run(load_config(config, [f"training.zero_stage={stage}", *more]), output))

    codes = fork_ranks(ranks, work)
    if set(codes) - {0, 75}:
        sys.exit(f"ZeRO {stage} on {ranks} ranks ended with {codes}")


if __name__ == "__main__":
    config, folder = sys.argv[1], Path(sys.argv[2])
    train(config, folder / "first", 2, 2)
    for saver in sys.argv[3:]:
        stage, ranks = (int(word) for word in saver.split(":"))
        again = folder / f"zero-{stage}-ranks-{ranks}"
        shutil.copytree(folder / "first", again)
        train(config, again, stage, ranks, "training.stop_after=null")
