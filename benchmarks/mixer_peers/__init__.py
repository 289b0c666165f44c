"""Peers of the mixers, measured side by side; ``benchmarks/mixers.py`` runs them all."""
