"""Sweeps: grids and random searches over options and seeds, each trial a whole federation.

``spec.py`` says what a sweep's file holds and ``reading.py`` reads it, ``draws.py`` draws,
``trials.py`` works out the trials and their ids, ``folder.py`` keeps what is known of them on disk,
``remote.py`` is a trial in a worker process, ``engine.py`` runs trials with Ray Tune, ``ledger.py``
takes what they report to the folder and to ``show.py``, the terminal, ``results.py`` makes tables,
and ``command.py`` is ``d2ft sweep``.
"""
