"""`zif conform new-plugin NAME`: a working plugin to begin from, made of the reference platform's own sources.

There is no second copy of them that could rot: what is written passes the suite because its origin does.
"""
