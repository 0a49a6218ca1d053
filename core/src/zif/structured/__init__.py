"""Answers that keep a form: grammars compiled for a model's vocabulary, and where each request stands in its own.

The runner applies the masks that come from here; serving compiles here, too, in a process that may be killed. Knows no
tensor library. llguidance is imported with the first grammar.
"""

from zif.structured.compiler import GrammarCompiler, TokenVocabulary

__all__ = ["GrammarCompiler", "TokenVocabulary"]
