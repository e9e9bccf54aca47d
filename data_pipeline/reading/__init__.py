"""From shards to batches: order -> read -> decode -> views -> batch."""
