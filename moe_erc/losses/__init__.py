"""Losses: pure functions of arrays, one paper a file, unweighted; `objective.py` alone weighs and sums them."""
