"""What a compiled program costs, read from its HLO: nothing of it is run."""
