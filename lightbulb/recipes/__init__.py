"""Recipes: chains of stages, each a command of its own, from corpora to a finished model."""
