"""Studies: arms, seeds, rows of finished runs, intervals and a verdict."""
