"""`internimage shards reshard`."""

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards reshard shards/web shards/clean --samples-per-shard 5000 --shuffle 0"


def reshard(
    folder: options.SetFolder,
    output: options.Output,
    samples_per_shard: options.SamplesPerShard = 1000,
    shuffle: options.Shuffle = None,
    index_folder: options.IndexFolder = None,
    part: options.PartOf = None,
    executor: options.Executor = options.ExecutorName.processes,
    workers: options.Workers = None,
    memory_gb: options.MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Write the samples that are used into shards of equal size; the images' bytes are copied."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.resharding import reshard_set
    from launch.display import show
    from launch.progress import progress

    with progress("writing shards") as report:
        summary = reshard_set(
            SetPath(folder, index_folder),
            output,
            samples_per_shard=samples_per_shard,
            shuffle=shuffle,
            running=options.running(part, executor, workers, memory_gb, report),
        )
    show(summary, as_json=json)
