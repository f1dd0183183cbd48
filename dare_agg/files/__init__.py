"""What touches the disk: the cache folder, memory-mapped pages, files replaced as one."""
