"""The round's knapsack: scores of heads, tables of costs, solver, certified plans."""
