"""Models: from a checkpoint's configuration to a decoder that computes, natively or through transformers.

Import the submodules; this package imports no array library by itself. Called by the engine (description) and the
torch runner (loading).
"""
