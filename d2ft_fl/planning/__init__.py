"""The round's knapsack: values of heads, tables of costs, solver, certified plans."""
