"""Make plans, which name the units to keep, from scores and a budget."""
