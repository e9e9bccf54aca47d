"""`python -m launch` is `internimage`, also where the package is not installed."""

from launch.cli import main

main()
