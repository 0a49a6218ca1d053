"""The `zif` command: arguments in, text out. It adds no ability that the library lacks.

One module per command; each builds its arguments from light modules and imports the engine when it runs.
"""
