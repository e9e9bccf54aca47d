"""Ranks as copies of one process, which has imported everything and computed nothing: imports cost once, not a rank."""

import os
import sys
import traceback
from collections.abc import Callable

from launch.ports import ReservedPort


def fork_ranks(count: int, work: Callable[[int], int]) -> list[int]:
    """The exit codes of `count` processes that meet as ranks; each calls `work` with its rank, and ends with what that
    returns, or with 1 after an exception.
    """
    with ReservedPort() as reserved:
        children = []
        for rank in range(count):
            if not (child := os.fork()):
                os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{reserved.number}"}
                code = 1
                try:
                    code = work(rank)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
