"""Small tokenizers of the kinds that models use, written to a folder. Nothing is downloaded.

Beside the byte-level one of `tiny_tokenizer`.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from support.tiny_tokenizer import write_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write_byte_level(folder: Path) -> None:
    """As GPT-2, Llama 3 and Qwen: tokens are bytes."""
    write_tokenizer(folder)


def write_byte_fallback(folder: Path) -> None:
    """As Llama 2, Mistral and Gemma: spaces are part of words, unknown characters become byte tokens."""
    pieces = ["▁", "a", "b", "c", "h", "e", "l", "o", ".", "é", "中", "▁h", "ll", "▁he", "▁hell", "▁hello", "▁a", "▁▁"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [("▁", "h"), ("l", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o"), ("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    _write(folder, tokenizer, bos=True)


def write_metaspace(folder: Path) -> None:
    """As T5 and the older sentencepiece conversions: unigrams with spaces as a letter."""
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "▁": -2.0, "▁hello": -1.5, "▁wor": -3.0, "ld": -3.0, "▁▁": -3.0}
    scores |= dict.fromkeys("helowrdabc.é中", -6.0)
    tokenizer = Tokenizer(Unigram(list(scores.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _write(folder, tokenizer)


def write_word_level(folder: Path) -> None:
    """Whole words, joined by spaces, which decoding then removes before punctuation."""
    words = ["hello", "world", ".", ",", "!", "?", "'", "n't", "'m", "'s", "'ve", "'re", "n", "t", "do", "中"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _write(folder, tokenizer, clean_up_tokenization_spaces=True)


def write_word_piece(folder: Path) -> None:
    """As BERT: words in pieces."""
    pieces = ["hel", "##lo", "##o", "world", ".", ",", "'", "##s", "s", "é", "##中"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _write(folder, tokenizer)


def write_python_vocabulary(folder: Path) -> None:
    """GPT-2's files without tokenizer.json: only transformers reads them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "he", "ll", "hell", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


KINDS = {
    "byte level": write_byte_level,
    "byte fallback": write_byte_fallback,
    "metaspace": write_metaspace,
    "word level": write_word_level,
    "word piece": write_word_piece,
}


def _write(folder: Path, tokenizer: Tokenizer, bos: bool = False, **config) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
