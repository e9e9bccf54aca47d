"""The shard contract: WebDataset tars, their Parquet sidecars, the set's manifest."""
