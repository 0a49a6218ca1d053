"""Tiny random models: checkpoints of each layer kind, what Transformers computes with them, and steps planned by hand.

Called by the tests of L4 and L5. Nothing is downloaded, and nothing is imported from here by the rest of the suite.
"""
