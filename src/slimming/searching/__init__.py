"""The search: train weights and soft masks together."""
