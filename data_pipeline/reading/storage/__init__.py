"""Opens sets and reads their samples by offset, from a disk or through the cache of remote files."""
