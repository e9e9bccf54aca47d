"""`python -m launch` is `internimage`, also where the package is not installed.

The processes that a command starts import this module anew: so that they need not load the command line, it does when
called, not when imported.
"""

from typing import NoReturn


def main() -> NoReturn:
    from launch import cli

    cli.main()


if __name__ == "__main__":
    main()
