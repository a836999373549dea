"""What a batch reads and writes: rows, the files that they lie in, and the shards that they end in."""
