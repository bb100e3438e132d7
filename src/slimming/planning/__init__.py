"""From scores and a budget to a plan: which units stay."""
