"""Text and tokens: tokenizers, incremental detokenization, stop strings, chat templates."""
