"""The compiled inner loops of :mod:`d2ft_fl.planning.knapsack`, one client at a time.

Plain Python over arrays, compiled by numba without ``fastmath``, so that a plan does not depend on
the processor; with ``NUMBA_DISABLE_JIT=1`` the same code runs interpreted, which is the reference.
What has to fit is counted in the caller's integers; what is priced, in shares of capacity. Caps
count steps and nodes, never time; ties go to the lowest index.

I items lie in G groups and take one of K options each; R resources; a group is open to one of M
levels or closed; S cases give each group a mode, which says what its items may take.

``instance``: the arrays. ``prices``: the dual. ``choices``: one choice, what it uses, what fits.
``moves``: local search. ``search``: one client. ``many``: all of them, what Python calls. Where
that finds nothing that fits: ``feasible``, flips under rising weights, and ``exact`` search.
"""
