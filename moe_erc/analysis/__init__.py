"""What a compiled program costs: its operations, its buffers and its memory."""
