"""Ranks that evaluate and embed together, copies of one process that has imported everything but computed nothing.

python sharing_ranks.py RANKS RUN SET FOLDER: FOLDER gets evaluation/top1.json, v.npy and rank-N.log. Ends with the
number of ranks that failed.
"""

import os
import sys
import traceback
from pathlib import Path

from launch.ports import ReservedPort
from pretrain.evaluation import embed, evaluate, shared_by_ranks


def work(number: int, count: int, port: int, run: Path, data: Path, folder: Path) -> None:
    """What one rank does; its process ends here."""
    told: list[str] = []
    placed = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in placed.items()})
    try:
        with shared_by_ranks():
            evaluate(run, data, untrained=False, batch_size=2, output=folder, say=told.append)
            embed(run, data, folder / "v.npy", part_samples=5, say=told.append)
    except BaseException:
        told.append(traceback.format_exc())
        os._exit(1)
    finally:
        (folder / f"rank-{number}.log").write_text("\n".join(told))
    os._exit(0)


if __name__ == "__main__":
    ranks, paths = int(sys.argv[1]), [Path(word) for word in sys.argv[2:]]
    with ReservedPort() as reserved:
        children = []
        for rank in range(ranks):
            if not (child := os.fork()):
                work(rank, ranks, reserved.number, *paths)
            children.append(child)
        sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
