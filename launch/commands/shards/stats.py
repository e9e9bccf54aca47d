"""`internimage shards stats`."""

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, SetFolder, Workers

EXAMPLE = "internimage shards stats shards/mine --json"


def stats(folder: SetFolder, index_folder: IndexFolder = None, workers: Workers = None, json: Json = False) -> None:
    """Counts, sizes, captions and labels of a set."""
    from data_pipeline import preparation
    from launch.display import show
    from launch.progress import progress

    with progress("reading sidecars") as report:
        summary = preparation.stats(folder, index_folder=index_folder, workers=workers, progress=report)
    show(summary, as_json=json)
