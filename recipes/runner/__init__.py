"""Runs the recipes: settings from TOML become the literal command of a training, once or many times.

``../run.py`` is the command. ``tasks`` reads recipes and resolves settings, ``commands`` fills in a command, ``translation``
and ``images`` compute what it needs beside the settings, ``training`` runs it once, ``runs`` and ``sweeping`` run many.
"""
