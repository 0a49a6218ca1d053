"""A byte-level tokenizer made on the spot: any text encodes, some tokens are several bytes, nothing is downloaded."""

import json
from pathlib import Path

_ENGLISH = ("th", "in", "er", "an", "the", "ing", "and", "Ġt", "Ġthe", "Ġa", "Ġs", "on", "re", "Ġw")
_PARTS_OF_CHARACTERS = ("Ã©", "ä\u00b8", "ä\u00b8Ń")
_MERGED = (*_ENGLISH, *_PARTS_OF_CHARACTERS)
_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>")

BOS_ID = 256 + len(_MERGED)
EOS_ID = BOS_ID + 1
PAD_ID = BOS_ID + 2
VOCAB_SIZE = 288
"""Of the models; the last ids have no token."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _pieces(token: str) -> tuple[str, str]:
    """Split a merged token into the last merge that makes it: longest known head, then the rest."""
    for cut in range(len(token) - 1, 0, -1):
        head, tail = token[:cut], token[cut:]
        if all(len(part) == 1 or part in _MERGED for part in (head, tail)):
            return head, tail
    raise ValueError(f"no merge makes {token!r}")


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *_MERGED])}
    merges = [_pieces(token) for token in _MERGED]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|bos|>",
                "eos_token": "<|eos|>",
                "pad_token": "<|pad|>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 512,
            }
        )
    )
