"""Image-text data: shards are prepared (`preparation`), described (`format`) and read (`reading`)."""
