"""A byte-level tokenizer: every text in every language, 256 ids, no training, no file to fetch."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "sep_token": "<sep>",
    "cls_token": "<cls>",
}

# No end, and said as a number: lm-eval takes transformers' own word for it, 1e30, for "not known" and would cut every
# text to 2,048 tokens. Above 1e20 it is no length to transformers, which pads and cuts nothing to it.
UNLIMITED = 2**70


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer whose id of byte b is b, with the specials after: pad 256, bos 257, eos 258, mask 259, sep 260,
    cls 261.

    It adds no special tokens by itself, pads on the left, and takes a special token's name in a text for plain text;
    `split_special_tokens=False` lets it mean the token. save_pretrained writes a plain tokenizers file that travels
    with a model.

    Decoding puts U+FFFD for bytes that are no UTF-8; the ids themselves lose nothing. The printable characters that
    stand for bytes in its vocabulary are GPT-2's (Radford et al. 2019, encoder.py of the official code).
    """
    characters = _characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: b for b, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=UNLIMITED,
        **SPECIAL_TOKENS,
    )


def encode_bytes(text: str) -> np.ndarray:
    """The ids of byte_tokenizer() for a text, (bytes,) int64, straight from its utf-8: for long documents.

    Raises UnicodeEncodeError, a ValueError, for a lone surrogate, which has no utf-8.
    """
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)


def _characters() -> list[str]:
    """The printable character that stands for each byte in ByteLevel (Radford et al. 2019): itself where it prints,
    else one of those from 256 on, in order."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in prints else chr(next(others)) for b in range(256)]
