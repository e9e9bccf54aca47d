"""`internimage inspect variants`."""

from launch.commands.options import Json

EXAMPLE = "internimage inspect variants"


def variants(json: Json = False) -> None:
    """The seven variants: parameters and FLOPs, counted without allocating memory."""
    from launch.display import show_table
    from pretrain.analysis.variants import variants_table

    show_table(*variants_table(), json)
