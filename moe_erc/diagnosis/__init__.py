"""Diagnosis: is the router of a model coupled to its experts? Measured of runs and of checkpoints, shown in tables,
figures and reports. What the measures are is said in `moe_erc/measures/`."""
