"""`internimage plan`: what a run needs, before a GPU is booked."""

from typing import Annotated

import typer

from launch.commands.options import Config, Json, Overrides

EXAMPLE = "internimage plan internimage_h_m3i_427m --gpus 128 --memory 80"


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 8,
    memory: Annotated[float, typer.Option(min=0.1, help="Memory of one device, GB (1e9 bytes).")] = 80.0,
    mfu: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the peak that the run will reach.")] = 0.3,
    peak: Annotated[float, typer.Option(min=0.001, help="Peak of one device at the run's precision, TFLOP/s.")] = 989.0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of an epoch, where no manifest is at hand.")
    ] = None,
    json: Json = False,
) -> None:
    """Memory per rank by ZeRO stage, FLOPs and days, before a GPU is booked."""
    from launch.display import show
    from launch.planning import as_text, plan_run
    from pretrain.configuration import load_config

    run = load_config(config, overrides or ())
    result = plan_run(run, gpus=gpus, memory_gb=memory, mfu=mfu, peak_tflops=peak, epoch_samples=samples)
    if json:
        show(result, as_json=True)
    else:
        typer.echo(as_text(result))
