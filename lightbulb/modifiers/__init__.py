"""Modifiers; importing the package registers them all."""

from lightbulb.modifiers import denseformer, mixture_of_depths

__all__ = ["denseformer", "mixture_of_depths"]
