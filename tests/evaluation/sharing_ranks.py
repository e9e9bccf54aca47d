"""Ranks that evaluate and embed together: python sharing_ranks.py RANKS RUN SET FOLDER.

FOLDER gets evaluation/top1.json, v.npy and rank-N.log. Ends with the number of ranks that failed.
"""

import sys
from pathlib import Path

from forked_ranks import fork_ranks

from pretrain.evaluation import embed, evaluate, shared_by_ranks

run, data, folder = (Path(word) for word in sys.argv[2:])


def work(rank: int) -> int:
    told: list[str] = []
    with shared_by_ranks():
        evaluate(run, data, untrained=False, batch_size=2, output=folder, say=told.append)
        embed(run, data, folder / "v.npy", part_samples=5, say=told.append)
    (folder / f"rank-{rank}.log").write_text("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(sum(code != 0 for code in fork_ranks(int(sys.argv[1]), work)))
