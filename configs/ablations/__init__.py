"""ERC with one thing changed; each file is its parent plus one line."""
