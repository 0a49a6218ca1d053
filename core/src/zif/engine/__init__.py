"""The engine: planning, the step loop, and the offline interface `LLM`."""
