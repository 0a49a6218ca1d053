"""What a model wrote, taken apart: text, reasoning and tool calls, by formats that are data.

`parser.Parser` goes through an answer as it arrives and gives `events`; a format of `formats/` tells it how. Serving
has one for each sample. It neither runs tools nor judges them: a call of an unknown tool is passed on.

How to add a family:

1. Copy the file in `formats/` that is closest. A format is a set of states. Each `reads` one kind of thing
   (`formats.Reads`) and has `markers`, the fixed strings that end it, with the state that each leads to. A marker under
   `before` is left for that state to read. Blanks have an `else`; a JSON object ends by itself, and has a `then`.
2. Name the states that matter: `start`, `text` (where attempts at calls that fail end), `reasoning` (where answers
   start whose prompt ends with `reasoning_prompt`), and `broken`, which reads what is left of a call whose JSON is
   invalid.
3. Say `needs_special_tokens = true` if a marker is a token that decoding leaves out (`"special": true` in the
   tokenizer's files). The server then asks for text that has them; markers are never shown.
4. List under `templates` what only chat templates of this family contain. `detection` guesses by it.
5. Give `[written]`, what a call, reasoning and text look like. Tests write answers by it and read them back, so a new
   file is tested by being there; add answers from the family's documents to `core/tests/parsing/test_families.py`.
"""
