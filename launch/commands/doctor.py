"""`internimage doctor`: what this machine has."""

from launch.commands.options import Json

EXAMPLE = "internimage doctor --json"


def doctor(json: Json = False) -> None:
    """Versions, devices, operator backends, compilers, memory and disk of this machine."""
    from launch.display import show
    from launch.doctor import examine

    show(examine(), as_json=json)
