"""One optimizer step and what surrounds it: state, optimizer, checkpoints, metrics, signals."""
