"""What the ranks of a run need of a node, from its configuration. Pure."""

from pretrain.configuration import RunConfig

_BESIDE_THE_WORKERS = 2  # cores of a rank: Python's own, and the threads that write checkpoints and feed the device
_GIB_A_CORE = 4  # decoded pictures of a worker's prefetched batches, and the rank's copy for asynchronous checkpoints


def cores_per_rank(config: RunConfig) -> int:
    """Cores that a rank keeps busy."""
    return config.data.workers + _BESIDE_THE_WORKERS


def node_memory(cores: int, ranks: int) -> str:
    """For `--mem`: a rule of thumb by the cores asked for, where the user gives no figure."""
    return f"{_GIB_A_CORE * cores * ranks}G"
