"""`internimage shards`: from URL lists, folders and tables to indexed, verified shards."""

import typer

from launch.commands.shards import (
    build,
    dedup,
    fetch,
    filter,
    finish,
    index,
    merge,
    openmoji,
    pack,
    publish,
    reshard,
    show,
    split,
    stats,
    takedown,
    undrop,
    verify,
)

app = typer.Typer(
    help="Fetch, pack, index, verify, describe and curate image-text shards.",
    epilog="Example: internimage shards pack captions.csv shards/mine",
    no_args_is_help=True,
)
app.command(epilog=f"Example: {pack.EXAMPLE}")(pack.pack)
app.command(epilog=f"Example: {fetch.EXAMPLE}")(fetch.fetch)
app.command(epilog=f"Example: {index.EXAMPLE}")(index.index)
app.command(epilog=f"Example: {verify.EXAMPLE}")(verify.verify)
app.command(epilog=f"Example: {stats.EXAMPLE}")(stats.stats)
app.command("filter", epilog=f"Example: {filter.EXAMPLE}")(filter.filter_)
app.command(epilog=f"Example: {dedup.EXAMPLE}")(dedup.dedup)
app.command(epilog=f"Example: {takedown.EXAMPLE}")(takedown.takedown)
app.command(epilog=f"Example: {undrop.EXAMPLE}")(undrop.undrop)
app.command(epilog=f"Example: {reshard.EXAMPLE}")(reshard.reshard)
app.command(epilog=f"Example: {merge.EXAMPLE}")(merge.merge)
app.command(epilog=f"Example: {split.EXAMPLE}")(split.split)
app.command(epilog=f"Example: {show.EXAMPLE}")(show.show)
app.command(epilog=f"Example: {build.EXAMPLE}")(build.build)
app.command(epilog=f"Example: {finish.EXAMPLE}")(finish.finish)
app.command(epilog=f"Example: {publish.EXAMPLE}")(publish.publish)
app.command(epilog=f"Example: {openmoji.EXAMPLE}")(openmoji.openmoji)
