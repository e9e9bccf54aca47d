"""`internimage inspect search-space`."""

from launch.commands.options import Json

EXAMPLE = "internimage inspect search-space"


def search_space(json: Json = False) -> None:
    """The paper's 30 candidates under its stacking rules."""
    from launch.display import show_table
    from pretrain.analysis.variants import search_space_table

    show_table(*search_space_table(), json)
