"""Modifiers; importing the package registers them all."""

from lightbulb.modifiers import bitlinear, denseformer, lora, mixture_of_depths

__all__ = ["bitlinear", "denseformer", "lora", "mixture_of_depths"]
