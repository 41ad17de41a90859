"""How a token meets an expert: routing, the experts themselves, and the layer that owns their parameters."""
