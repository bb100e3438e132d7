"""Train pruned models: one by one, progressively, or all budgets together with shared weights."""
