"""Decides what of a set is used, and writes sets anew from what is left. Never imports torch, never decides by chance.

catalogue    the sidecars of some sets as one DuckDB table, out of core
filters, duplicates, takedown    which rows go, and why: Decisions
decisions    written down first, then carried out: a kill at any moment changes nothing of the outcome
repacking    reshard, merge, split: new shards from the bytes of old ones
pictures     contact sheets and the page of statistics
build        a recipe's stages, one after another
"""
