"""Image-text data: `preparation` makes shards, `format` describes them, `reading` turns them into batches."""
