"""Diagnosis: is the router of a model coupled to its experts?

It is made of runs and of checkpoints, and shown in tables, figures and reports. The measures
themselves are records in `moe_erc/measures/`.
"""
