"""From URL lists, folders and tables to shards. Never imports torch."""
