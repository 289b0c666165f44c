"""Modifiers; importing the package registers them all."""
