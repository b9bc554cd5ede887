"""Trained weights that stay frozen, and what is added to them: one paper, one file."""
