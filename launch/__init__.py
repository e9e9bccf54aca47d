"""The command line and the ways to start processes. Imports nothing heavy until a command runs."""
