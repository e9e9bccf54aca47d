"""`internimage inspect`: look at variants, batches, the loader's speed and checkpoints."""

import typer

from launch.commands.inspect import ablations, batch, checkpoint, costs, figures, loader, runs, search_space, variants

app = typer.Typer(
    help="Look at model variants, a run's batches and reading speed, a checkpoint, what a model has learnt.",
    epilog="Example: internimage inspect variants",
    no_args_is_help=True,
)
app.command(epilog=f"Example: {variants.EXAMPLE}")(variants.variants)
app.command("search-space", epilog=f"Example: {search_space.EXAMPLE}")(search_space.search_space)
app.command(epilog=f"Example: {ablations.EXAMPLE}")(ablations.ablations)
app.command(epilog=f"Example: {costs.EXAMPLE}")(costs.costs)
app.command(epilog=f"Example: {batch.EXAMPLE}")(batch.batch)
app.command(epilog=f"Example: {loader.EXAMPLE}")(loader.loader)
app.command(epilog=f"Example: {checkpoint.EXAMPLE}")(checkpoint.checkpoint)
app.command(epilog=f"Example: {figures.ERF_EXAMPLE}")(figures.erf)
app.command(epilog=f"Example: {figures.SAMPLING_EXAMPLE}")(figures.sampling)
app.command(epilog=f"Example: {figures.FEATURES_EXAMPLE}")(figures.features)
app.command(epilog=f"Example: {runs.EXAMPLE}")(runs.runs)
