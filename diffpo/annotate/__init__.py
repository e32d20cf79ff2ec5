"""Votes of people on pictures: what each person is shown, the page and its server, the store, agreement and export.

Imports `data`, `config` and `common`. The verb of the command line and arms of an evaluation are in `commands`.
"""
