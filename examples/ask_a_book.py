"""Read a long text once, keep what is left in memory, and go on from it as often as you like.

    python examples/ask_a_book.py zoo/block_recurrent_transformer book.txt "Chapter 1" "The end of" --cache book.cache

The first run reads the text in chunks and writes its cache (safetensors), with a hash of the text and the model in its
name: book.0123456789abcdef.cache. Later runs load it and read nothing; another text or model is read anew. Each prompt
goes on from a copy, so that none sees another. Prompt and continuation are parted by |.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

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


def go_on(model, tokenizer, cache, prompt, tokens, temperature):
    """The model's continuation of the text in the cache and the prompt; the likeliest at temperature 0."""
    asked = tokenizer(prompt, return_tensors="pt").input_ids
    # generate() counts columns: those of the text are in the cache, so what stands in them here is not looked at.
    ids = torch.cat([asked.new_zeros(1, cache.get_seq_length()), asked], dim=1)
    sampling = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache.copy(),
        max_new_tokens=tokens,
        **sampling,
    )
    # The last character may be cut, where a token is a byte.
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--cache", type=Path, default=Path("book.cache"))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.6, help="small models repeat themselves at 0")
    parser.add_argument("--seed", type=int, default=0)
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
    print(f"{ids.shape[1]:,} tokens read, {cache.nbytes / 2**20:.1f} MiB kept in {kept}")
    for prompt in arguments.prompts:
        set_seed(arguments.seed)
        print(f"\n{prompt}|{go_on(model, tokenizer, cache, prompt, arguments.tokens, arguments.temperature)}")


if __name__ == "__main__":
    main()
