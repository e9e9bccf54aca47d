"""Turns images into shards."""
