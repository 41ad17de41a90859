"""Two methods at once; any other pair that makes sense is a flag away."""
