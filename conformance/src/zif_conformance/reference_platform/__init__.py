"""A platform that implements the whole contract in plain torch, on virtual devices in one machine.

It is the first subject of the suite and the template of a vendor's plugin: each file is one part of the contract, short
enough to be read in one sitting. Not fast, and run only when named. `plugin` is the entry point.
"""
