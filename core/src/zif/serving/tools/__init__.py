"""Calls of tools: the grammars that hold answers to them, and the parsers of answers that are no model's own way.

Calls that must be made are JSON, whatever the model; those that may be made are written in the model's own words, as
the formats of `zif.parsing` say. `zif.serving.chat.plans` chooses between the two. To be read in this order:

1. `schemas`: the schemas of functions, as grammars take them.
2. `forced`: calls that must be made, their grammar and their parsers.
3. `lark`: how rules of a grammar are put together.
4. `parameters`: what a schema allows each parameter, where a family writes them one by one.
5. `arguments`: the arguments of a call as rules of a grammar.
6. `grammar`: calls that may be made, among text or in its place.
7. `form_or_calls`: the parser of answers that are text of a form, or calls instead.
"""
