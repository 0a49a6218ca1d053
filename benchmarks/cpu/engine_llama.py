"""llama.cpp through llama-cpp-python's binding of its C interface. Runs in llama.cpp's environment.

The high-level class answers one request at a time, so this drives batched decoding itself, as llama.cpp's server does:
sequences in one unified KV memory, one batch a step with a token of every running request and as much of waiting
prompts as fits. A prompt's computed beginning is shared with the sequence that holds the longest match.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp as llama
import numpy as np

from cpu.protocol import serve

MAX_SEQUENCES = 33
"""32 run at once and one keeps the last finished prompt for those that begin like it."""
KEPT = MAX_SEQUENCES - 1
BATCH_TOKENS = 2048


class Slot:
    """A request in a sequence: its tokens, how many are in KV memory, and how many it still generates."""

    def __init__(self, index: int, prompt: list[int], num_output: int) -> None:
        self.index, self.tokens, self.num_prompt, self.num_missing = index, list(prompt), len(prompt), num_output
        self.num_computed = 0


class Stepped:
    """A context with up to 32 running sequences."""

    def __init__(self, context: Any, num_vocabulary: int) -> None:
        self._context, self._num_vocabulary = context, num_vocabulary
        self._memory = llama.llama_get_memory(context)
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._waiting: list[Slot] = []
        self._running: dict[int, Slot] = {}
        self._kept: list[int] = []

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        self._waiting.append(Slot(index, prompt, num_output))

    def step(self) -> Sequence[tuple[int, int]]:
        self._admit()
        sampled = self._fill()
        if llama.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed; the context may be too small for the requests")
        changed = []
        for row, place in sampled:
            logits = llama.llama_get_logits_ith(self._context, row)
            token = int(np.ctypeslib.as_array(logits, (self._num_vocabulary,)).argmax())
            sequence = self._running[place]
            sequence.tokens.append(token)
            sequence.num_missing -= 1
            changed.append((sequence.index, 1))
            if not sequence.num_missing:
                self._finish(place)
        return changed

    def _admit(self) -> None:
        free = [place for place in range(KEPT) if place not in self._running]
        for place in free[: len(self._waiting)]:
            sequence = self._waiting.pop(0)
            num_shared = _common(self._kept, sequence.tokens[:-1])
            if num_shared:
                llama.llama_memory_seq_cp(self._memory, KEPT, place, 0, num_shared)
                sequence.num_computed = num_shared
            self._running[place] = sequence

    def _fill(self) -> list[tuple[int, int]]:
        """Put a step's tokens into the batch; return the rows to sample with their sequences' places."""
        batch, self._batch.n_tokens = self._batch, 0
        sampled = []
        decoding_first = sorted(self._running.items(), key=lambda item: item[1].num_computed < item[1].num_prompt)
        for place, sequence in decoding_first:
            pending = sequence.tokens[sequence.num_computed :][: BATCH_TOKENS - batch.n_tokens]
            for offset, token in enumerate(pending):
                row = batch.n_tokens
                batch.token[row], batch.pos[row] = token, sequence.num_computed + offset
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, place, 0
                batch.n_tokens += 1
            sequence.num_computed += len(pending)
            if pending and sequence.num_computed == len(sequence.tokens):
                batch.logits[batch.n_tokens - 1] = 1
                sampled.append((batch.n_tokens - 1, place))
        return sampled

    def _finish(self, place: int) -> None:
        """Free the sequence's memory; its prompt stays as the one that later requests may begin with."""
        sequence = self._running.pop(place)
        llama.llama_memory_seq_rm(self._memory, KEPT, -1, -1)
        self._kept = sequence.tokens[: sequence.num_prompt]
        llama.llama_memory_seq_cp(self._memory, place, KEPT, 0, sequence.num_prompt)
        llama.llama_memory_seq_rm(self._memory, place, -1, -1)


def _common(first: list[int], second: list[int]) -> int:
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def load(options: Mapping[str, Any]) -> tuple[Stepped, dict[str, Any]]:
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(options["model"].encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {options['model']!r}; standard error says why")
    params = llama.llama_context_default_params()
    params.n_ctx = options["context_tokens"]
    params.n_batch, params.n_ubatch = BATCH_TOKENS, options.get("ubatch", 512)
    params.n_seq_max, params.kv_unified = MAX_SEQUENCES, True
    params.n_threads = params.n_threads_batch = options["threads"]
    params.no_perf = True
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context; standard error says why")
    num_vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    fields = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "flash_attn_type", "kv_unified")
    about = {name: getattr(params, name) for name in fields}
    about["system"] = ctypes.string_at(llama.llama_print_system_info()).decode()
    versions = {"llama-cpp-python": llama.__version__}
    return Stepped(context, num_vocabulary), {"versions": versions, "configuration": about}


if __name__ == "__main__":
    serve(load)
