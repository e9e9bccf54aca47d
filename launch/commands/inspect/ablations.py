"""`internimage inspect ablations`."""

from launch.commands.options import Json

EXAMPLE = "internimage inspect ablations"


def ablations(json: Json = False) -> None:
    """The paper's ablations of the operator: what they cost, and what sharing weights saves."""
    from launch.display import show_table
    from pretrain.analysis.variants import ablation_table

    show_table(*ablation_table(), json)
