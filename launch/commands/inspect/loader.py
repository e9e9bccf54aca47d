"""`internimage inspect loader`."""

from typing import Annotated

import typer

from launch.commands.options import Config, Json, Overrides

EXAMPLE = "internimage inspect loader internimage_h_m3i_427m --samples-per-second 150 --processes 8"


def loader(
    config: Config,
    overrides: Overrides = None,
    samples_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="What each process trains (images_per_second of a run / its ranks).")
    ] = None,
    processes: Annotated[str, typer.Option(help="Ranks on this machine: a number, or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to measure for.")] = 5.0,
    json: Json = False,
) -> None:
    """How fast a core reads a run's shards, and the data.workers that its training needs."""
    from launch import machine, preflight
    from launch.display import show
    from pretrain.configuration import load_config

    run = load_config(config, overrides or ())
    for source in run.data.sources:
        preflight.check_source(source.path)
    count = machine.resolve_processes(processes)
    from data_pipeline.reading.advice import recommend_workers
    from pretrain.tasks.task import task_of

    targets = task_of(run).target_spec(run.data)
    found = recommend_workers(
        run.data, targets, samples_per_second=samples_per_second, processes=count, seconds=seconds
    )
    show(found, as_json=json)
