"""Read a long text once, keep what is left in memory, and go on from it as often as you like.

    python examples/ask_a_book.py my_model book.txt "Chapter 1" "The end of" --cache book.cache

The first run reads the text in chunks and writes its cache (safetensors), with a hash of the text and the model in its
name: book.0123456789abcdef.cache. Later runs load it and read nothing; another text or model is read anew. Each prompt
goes on from a copy, so that none sees another.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gallery import GalleryCache


@torch.no_grad()
def read(model, ids, chunk=2048):
    """The cache of a model that has read ids (1, T)."""
    cache = GalleryCache(model.config)
    for part in ids.split(chunk, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def hash_of(model, ids):
    """16 hex digits that change with the tokens and with every weight and setting of the model."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    for tensor in (ids, *model.state_dict().values()):
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def go_on(model, tokenizer, cache, prompt, tokens):
    """The model's continuation of the text in the cache and the prompt."""
    asked = tokenizer(prompt, return_tensors="pt").input_ids
    # generate() counts columns: those of the text are in the cache, so what stands in them here is not looked at.
    ids = torch.cat([asked.new_zeros(1, cache.get_seq_length()), asked], dim=1)
    mask = torch.ones_like(ids)
    said = model.generate(
        ids, attention_mask=mask, past_key_values=cache.copy(), max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(said[0, ids.shape[1] :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--cache", type=Path, default=Path("book.cache"))
    parser.add_argument("--tokens", type=int, default=80)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    ids = tokenizer(arguments.book.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    kept = arguments.cache.with_suffix(f".{hash_of(model, ids)}{arguments.cache.suffix}")
    if kept.exists():
        cache = GalleryCache.load(kept)
    else:
        cache = read(model, ids)
        cache.save(kept)
    print(f"{cache.get_seq_length():,} tokens read, {cache.nbytes / 2**20:.1f} MiB kept")
    for prompt in arguments.prompts:
        print(f"{prompt}|{go_on(model, tokenizer, cache, prompt, arguments.tokens)}")


if __name__ == "__main__":
    main()
