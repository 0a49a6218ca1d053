"""Processes that may be killed, for work that strangers shape: compiling grammars, rendering chat templates.

`pool` is what handlers call; `child` is the process, `tasks` what it can do, `messages` what crosses between the two.
"""
