"""Before a run: `plan` says what it needs, `doctor` what this machine has."""

from typing import Annotated

import typer

from data_pipeline.errors import DONE

Json = Annotated[bool, typer.Option("--json", help="For machines.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: internimage plan internimage_h_m3i_427m --gpus 128 --memory 80")(plan)
    app.command(epilog="Example: internimage doctor --json")(doctor)


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the bare name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for pretrain.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 8,
    memory: Annotated[float, typer.Option(min=0.1, help="Memory of one device, GB (1e9 bytes).")] = 80.0,
    mfu: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the peak that the run will reach.")] = 0.3,
    peak: Annotated[float, typer.Option(min=0.001, help="Peak of one device at the run's precision, TFLOP/s.")] = 989.0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of an epoch, where no manifest is at hand.")
    ] = None,
    json: Json = False,
) -> int:
    """Memory per rank by ZeRO stage, FLOPs and days, before a GPU is booked."""
    from launch.display import show
    from launch.planning import plan_run
    from pretrain.configuration import load_config

    run = load_config(config, overrides or ())
    result = plan_run(run, gpus=gpus, memory_gb=memory, mfu=mfu, peak_tflops=peak, epoch_samples=samples)
    if json:
        show(result, as_json=True)
    else:
        from launch.planning import as_text

        typer.echo(as_text(result))
    return DONE


def doctor(json: Json = False) -> int:
    """Versions, devices, operator backends, compilers, memory and disk of this machine."""
    from launch.display import show
    from launch.doctor import examine

    show(examine(), as_json=json)
    return DONE
