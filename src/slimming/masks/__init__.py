"""Soft masks: learnable factors of units, attached to a model for a search."""
