"""Plain data that every step shares: groups, plans, budgets, cost formulas, and safe files."""
