"""`internimage inspect`: look at variants, batches, the loader's speed and checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch import exits

app = typer.Typer(
    help="Look at model variants, a run's batches and reading speed, a checkpoint.",
    epilog="Example: internimage inspect variants",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command(epilog="Example: internimage inspect variants")
def variants(json: Json = False) -> int:
    """The seven variants: parameters and FLOPs, counted without allocating memory."""
    from pretrain.analysis.variants import variants_table

    return _table(*variants_table(), json)


@app.command(name="search-space", epilog="Example: internimage inspect search-space")
def search_space(json: Json = False) -> int:
    """The paper's 30 candidates under its stacking rules."""
    from pretrain.analysis.variants import search_space_table

    return _table(*search_space_table(), json)


@app.command(epilog="Example: internimage inspect ablations")
def ablations(json: Json = False) -> int:
    """The paper's ablations of the operator: what they cost, and what sharing weights saves."""
    from pretrain.analysis.variants import ablation_table

    return _table(*ablation_table(), json)


@app.command(epilog="Example: internimage inspect costs internimage_h_m3i_427m --batch 16")
def costs(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the bare name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as data.image_size=384.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward and backward pass.")] = 16,
    json: Json = False,
) -> int:
    """Kernel launches, bytes and FLOPs of a step of a run's image model: a block, a stage, all of it."""
    from pretrain.analysis.traffic import costs_table
    from pretrain.configuration import load_config

    return _table(*costs_table(load_config(config, overrides or ()), batch), json)


@app.command(epilog="Example: internimage inspect batch runs/h --step 1000")
def batch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option(min=0, help="Global step.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the pictures.")] = None,
    json: Json = False,
) -> int:
    """The samples of one global batch: shard, key, URL, caption."""
    from launch.display import show
    from pretrain.analysis.batch import inspect_batch

    show(inspect_batch(run, step, output=output), as_json=json)
    return exits.DONE


@app.command(epilog="Example: internimage inspect loader internimage_h_m3i_427m --samples-per-second 150 --processes 8")
def loader(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the bare name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as data.image_size=384.", show_default=False),
    ] = None,
    samples_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="What each process trains (images_per_second of a run / its ranks).")
    ] = None,
    processes: Annotated[str, typer.Option(help="Ranks on this machine: a number, or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to measure for.")] = 5.0,
    json: Json = False,
) -> int:
    """How fast a core reads a run's shards, and the data.workers that its training needs."""
    from launch import machine, preflight
    from launch.display import show
    from pretrain.configuration import load_config

    run = load_config(config, overrides or ())
    for source in run.data.sources:
        preflight.check_source(source.path)
    count = machine.resolve_processes(processes)
    from data_pipeline.reading.advice import advise
    from pretrain.objectives import build_tokenizer

    tokenizer = build_tokenizer(run.data.context_length, run.objective.text.vocab_size)
    found = advise(
        run.data, tokenizer=tokenizer, samples_per_second=samples_per_second, processes=count, seconds=seconds
    )
    show(found, as_json=json)
    return exits.DONE


@app.command(epilog="Example: internimage inspect checkpoint runs/h")
def checkpoint(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run directory, or one of its checkpoints.")],
    json: Json = False,
) -> int:
    """Step, sizes and digests of a checkpoint, checked."""
    from launch.display import show
    from pretrain.training.checkpoints import describe

    show(describe(path), as_json=json)
    return exits.DONE


def _table(rows: list[dict[str, Any]], table: Any, json: bool) -> int:
    if json:
        from launch.display import show

        show(rows, as_json=True)
    else:
        from rich.console import Console

        # A table of numbers cut to fit is no table; a wider line can be scrolled.
        Console(width=max(Console().width, 160)).print(table)
    return exits.DONE
