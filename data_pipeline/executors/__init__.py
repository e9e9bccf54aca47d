"""Runs work on many items, in order: in the processes of this machine."""
