"""The next token of each row of logits, by the native library. Called by `zif_cpu.operators`."""

from ctypes import CDLL
from struct import Struct

import numpy as np
import torch

from zif.contract import ChosenTokens, DrawOptions

_choice = Struct("8P3q").pack  # zif_cpu_choice of zif_cpu.h


def choose_tokens(raw: CDLL, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens:
    """Choose as `OpTable.choose_tokens` says. logits: [S, V], float32, in this process's memory."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    columns = [
        np.ascontiguousarray(column, dtype)
        for column, dtype in (
            (options.temperature, np.float32),
            (options.min_p, np.float32),
            (options.top_k, np.int64),
            (options.top_p, np.float64),
            (options.fractions, np.int64),
        )
    ]
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    peaks = torch.empty(num_rows, dtype=torch.float32)
    inputs = logits.data_ptr(), *(column.ctypes.data for column in columns)
    outputs = token_ids.data_ptr(), peaks.data_ptr()
    raw.zif_cpu_choose(_choice(*inputs, *outputs, logits.stride(0), num_rows, vocab_size))
    return ChosenTokens(token_ids, peaks)
