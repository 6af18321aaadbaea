"""Training recipes, run from a checkout of the project."""
