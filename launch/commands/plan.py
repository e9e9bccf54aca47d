"""`internimage plan`: what a run needs, before a GPU is booked."""

from typing import Annotated

import typer

from launch.commands.options import Config, Json, Overrides

EXAMPLE = "internimage plan internimage_h_m3i_427m --gpus 128 --gpu h100"


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="Their kind: v100, a100-40, a100, h100, h200, b200.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of one device, GB (1e9 bytes). [default: by --gpu]")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.001, max=1.0, help="Share of the peak that the run reaches. [default: a measured range]"),
    ] = None,
    peak: Annotated[
        float | None, typer.Option(min=0.001, help="Peak of one device, TFLOP/s. [default: by --gpu and precision]")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    node_network: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s from a node to the others. [default: by --gpu]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of an epoch, where no manifest is at hand.")
    ] = None,
    json: Json = False,
) -> None:
    """Memory per rank by ZeRO stage, communication, FLOPs and days, before a GPU is booked."""
    from launch.display import show
    from launch.plan_text import as_text
    from launch.planning import Machine, plan_run
    from pretrain.configuration import load_config

    run = load_config(config, overrides or ())
    machine = Machine.of(run, gpu, memory, peak, mfu, gpus_per_node, node_network)
    result = plan_run(run, gpus=gpus, machine=machine, epoch_samples=samples)
    if json:
        show(result, as_json=True)
    else:
        typer.echo(as_text(result))
