"""Raw media to shards: probe, normalise, encode, verify, write."""
