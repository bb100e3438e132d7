"""Plain data shared by all steps: groups, plans, budgets, cost formulas; and atomic, checksummed files."""
