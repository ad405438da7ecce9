"""What the solver's steps do with a choice, by their rules, with all counted anew each time."""

from itertools import product

import numpy as np

from tests.planning.solver import tiny
from tests.planning.solver.tiny import changed


def repaired(p, choice, case):
    """A choice flipped by the rule of ``repair``, and whether it fits then."""
    choice = np.array(choice)
    while True:
        over = tiny.used(p, choice) - p.capacity
        if (over <= 0).all():
            return choice, True
        found = []
        for i, k in product(range(len(choice)), range(p.value.shape[1])):
            more = tiny.used(p, changed(choice, (i, k))) - tiny.used(p, choice)
            relief = (np.clip(-more, 0, np.maximum(over, 0)) / np.maximum(p.capacity, 1)).sum()
            worse = ((more > 0) & (more + over > 0)).any()
            if k != choice[i] and tiny.allows(p, case, i, k) and not worse and relief > 0:
                loss = max(p.value[i, choice[i]] - p.value[i, k], 0) / relief
                found.append((loss, i, k))
        if not found:
            return choice, False
        choice = changed(choice, min(found)[1:])


def filled(p, prices, choice, case):
    """A choice filled by the rule of ``fill``, and what that is worth."""
    choice, won = np.array(choice), 0.0
    left = [
        (i, k)
        for i, k in product(range(len(choice)), range(p.value.shape[1]))
        if tiny.allows(p, case, i, k) and p.value[i, k] > p.value[i, choice[i]] + 1e-12
    ]
    while True:
        rates = {}
        for i, k in left:
            gain = p.value[i, k] - p.value[i, choice[i]]
            after = tiny.used(p, changed(choice, (i, k)))
            if gain > 1e-12 and (after <= p.capacity).all():
                price = ((after - tiny.used(p, choice)) / np.maximum(p.capacity, 1)) @ prices
                rates[i, k] = gain / max(price, 1e-12)
        if not rates:
            return choice, won
        i, k = max(rates, key=rates.get)
        won += p.value[i, k] - p.value[i, choice[i]]
        choice, left = changed(choice, (i, k)), list(rates)


def regrets(p, prices, choice, case, single=False):
    """(loss at the prices, item, option) of all flips, ascending; of an item the best if single."""
    gain, charge = tiny.gains(p, prices), p.ladder / np.maximum(p.capacity, 1) @ prices
    groups, open_to = np.arange(len(p.ladder)), tiny.tops(p, choice)
    flips = []
    for i, now in enumerate(choice):
        own = []
        for k in range(p.value.shape[1]):
            if k != now and tiny.allows(p, case, i, k):
                after = tiny.tops(p, changed(choice, (i, k)))
                dearer = (charge[groups, after] - charge[groups, open_to]).sum()
                own.append((gain[now, i] - gain[k, i] + dearer, i, k))
        flips += [min(own)] if single and own else own
    return sorted(flips)
