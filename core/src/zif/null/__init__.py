"""A platform without compute: the next token is a hash of the request's whole history, read through its blocks.

Any mix-up of blocks or rows changes the text, so whoever knows the prompt can tell. It runs the complete engine.
"""
