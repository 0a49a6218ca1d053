"""Several ranks at once: processes that open a device each and do what a test asks of them.

`fleet.py` starts and asks them, `work.py` is what they can do. Called by level L6 and the rank faults of L7.
"""
