"""What level L0 looks at besides answers: a plugin's source, the state of a process, the attributes of other packages.

Called by `suite/test_l0_*.py`. Opens no device.
"""
