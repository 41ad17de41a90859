"""The decoder: its sizes, its attention, its stack of layers."""
