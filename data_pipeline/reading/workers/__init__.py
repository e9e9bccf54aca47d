"""Fills batches, in this process or in others, and hands them on in order."""
