"""Seeing the coupling: measures of router and gate matrices, and the tables that show them."""
