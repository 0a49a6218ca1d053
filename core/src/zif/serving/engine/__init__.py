"""The engine in a process of its own: messages, channel, the process's loop, and the client that supervises it."""
