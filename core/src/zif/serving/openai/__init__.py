"""The OpenAI API: models, completions, chat completions, and what callers ask of tokens. Source: its API reference.

Parameters beyond it that clients of other servers send have the names that vLLM gave them.
"""
