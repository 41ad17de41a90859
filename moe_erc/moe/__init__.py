"""How a token meets an expert: routing, the experts, and the layer that owns the parameters."""
