"""Chats, whatever API they came by. The APIs have rooms of their own beside this one, and are built on it.

1. `turn`: what is asked, checked: messages, tools, how to answer. `conversation` builds its messages from pieces.
2. `service`: a turn to a prompt, the engine's answer to text, reasoning and tool calls.
3. `plans`: how an answer is constrained and read back; `formats` is the model's own way, `zif.serving.tools` the rest.
"""
