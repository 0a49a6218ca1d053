"""Log-probabilities of tokens under the model's raw logits: before bias, penalties and temperature, as vLLM has them.

The sampler calls it for sampled tokens, the runner for the positions of a prompt.
"""

import torch

from zif.contract.step import TokenLogprobs

CHUNK_ELEMENTS = 2**23
"""Logits handled at once: 32 MB of float32 per temporary, whatever the number of rows."""


def prompt_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of `token_ids` and of the `k` most likely tokens at each position.

    logits: [P, V], float32: row i predicts token_ids[i]. token_ids: [P], int64. k above V means V.
    """
    return token_logprobs(logits, token_ids, [k] * len(token_ids))


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Return the log-probabilities of one token per row and of the `num_top[i]` most likely ones of row i.

    logits: [R, V], float32. token_ids: [R], int64. The rank of a token is one plus the number of likelier tokens.
    """
    rows_at_once = max(1, CHUNK_ELEMENTS // logits.shape[1])
    out: list[TokenLogprobs] = []
    for begin in range(0, len(num_top), rows_at_once):
        end = begin + rows_at_once
        out += _chunk_logprobs(logits[begin:end], token_ids[begin:end], num_top[begin:end])
    return out


def _chunk_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    own = logits.gather(1, token_ids.unsqueeze(1))
    ranks = ((logits > own).sum(dim=1) + 1).tolist()
    top = logits.topk(min(max(num_top), logits.shape[1]), dim=1)
    columns = torch.cat([own, top.values], dim=1) - logits.logsumexp(dim=1, keepdim=True)
    ids = torch.cat([token_ids.unsqueeze(1), top.indices], dim=1)
    lines = zip(ids.tolist(), columns.tolist(), num_top, ranks, strict=True)
    return [TokenLogprobs(i[: 1 + k], values[: 1 + k], rank) for i, values, k, rank in lines]
