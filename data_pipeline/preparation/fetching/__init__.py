"""Fetches the images of a list of URLs."""
