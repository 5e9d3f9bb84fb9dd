"""Makes the checkpoints and outputs in tests/golden/transformer_xl with transformers 4.35.2, which has Transformer-XL.

    python3.11 -m venv golden
    golden/bin/pip install transformers==4.35.2 torch==2.13.0 "numpy<2" sacremoses safetensors
    golden/bin/python tests/golden/make_transformer_xl.py

Each case is a folder as save_pretrained writes it, with outputs.safetensors beside the weights: the ids of three
segments of 8 tokens in 2 rows, and for each segment, its memory carried from the one before, log-probabilities, hidden
states and loss; the gradient of the last loss by the first layer's projection; a greedy continuation.

vocabulary/ holds the files of a tokenizer, and in texts.json what it makes of texts. vocab.pkl is as save_vocabulary
writes it, vocab.bin as torch.save of old wrote it.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from loud import loud
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    TransfoXLConfig,
    TransfoXLForSequenceClassification,
    TransfoXLLMHeadModel,
    TransfoXLTokenizer,
)

OUT = Path(__file__).parent / "transformer_xl"
SMALL = dict(
    vocab_size=97, d_model=16, d_embed=16, n_head=2, d_head=6, d_inner=20, n_layer=2, clamp_len=-1, same_length=False
)
CASES = {
    # as transfo-xl-wt103: a memory longer than the segment, shared projections but for the first, and a torch file
    "wt103": dict(
        cutoffs=[13, 29, 60], div_val=4, d_embed=64, clamp_len=15, same_length=True, mem_len=20, untie_r=True
    ),
    "div_2": dict(cutoffs=[20, 50], div_val=2, mem_len=5, untie_r=False),
    "div_1": dict(cutoffs=[20, 50], div_val=1, mem_len=11, untie_r=False),
    "div_1_projected": dict(cutoffs=[20, 50], div_val=1, d_embed=10, mem_len=11, untie_r=True),
    "plain": dict(cutoffs=[], div_val=1, mem_len=8, untie_r=False, proj_share_all_but_first=False),
    "plain_projected": dict(cutoffs=[], div_val=2, mem_len=8, untie_r=True),
    "plain_same_length": dict(cutoffs=[], div_val=1, same_length=True, clamp_len=3, mem_len=5, untie_r=False),
    "clamp": dict(cutoffs=[20], div_val=2, clamp_len=6, mem_len=13, untie_r=True),
    "pre_lnorm": dict(cutoffs=[20], div_val=2, mem_len=13, untie_r=True, pre_lnorm=True),
    "no_memory": dict(cutoffs=[20], div_val=2, mem_len=0, untie_r=True),
    "nothing_tied": dict(
        cutoffs=[20, 50],
        div_val=2,
        mem_len=9,
        untie_r=False,
        tie_word_embeddings=False,
        proj_share_all_but_first=False,
    ),
    "same_length": dict(cutoffs=[20, 50], div_val=1, same_length=True, mem_len=13, untie_r=True),
    "div_2_same_length": dict(cutoffs=[20, 50], div_val=2, same_length=True, clamp_len=4, mem_len=5, untie_r=False),
}
ROWS, SEGMENT, SEGMENTS, PROMPT, NEW = 2, 8, 3, 7, 12


def greedy(model, prompt, whole):
    """The continuation of prompt (B, T); the prompt read at once, or token by token."""
    mems, tokens = None, []
    for part in [prompt] if whole else prompt.split(1, dim=1):
        output = model(part, mems=mems)
        mems = output.mems
    for _ in range(NEW):
        token = output.prediction_scores[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        output = model(token, mems=mems)
        mems = output.mems
    return torch.cat(tokens, dim=1)


def language_model(name, settings, seed):
    config = TransfoXLConfig(**{**SMALL, **settings})
    model = loud(TransfoXLLMHeadModel(config), seed)
    ids = torch.randint(
        1, config.vocab_size, (ROWS, SEGMENT * SEGMENTS), generator=torch.Generator().manual_seed(seed)
    )
    labels = ids.clone()
    labels[1, 3::5] = -100
    outputs, mems = {"ids": ids, "labels": labels}, None
    for i in range(SEGMENTS):
        part, wanted = (x[:, i * SEGMENT : (i + 1) * SEGMENT] for x in (ids, labels))
        output = model(part, mems=mems, output_hidden_states=True)
        loss = model(part, mems=mems, labels=wanted.clone()).loss
        outputs[f"log_probabilities.{i}"] = output.prediction_scores
        outputs[f"hidden_states.{i}"] = torch.stack(output.hidden_states)
        outputs[f"loss.{i}"] = loss
        mems = output.mems
    model.zero_grad()
    loss.backward()
    outputs["gradient"] = model.transformer.layers[0].dec_attn.qkv_net.weight.grad
    with torch.no_grad():
        outputs["greedy"] = greedy(model, ids[:, :PROMPT], config.same_length)
    save(name, model, outputs, safetensors=name != "wt103")


def classifier(seed=99):
    """Three rows, padded on the right with pad_token_id."""
    config = TransfoXLConfig(**SMALL, cutoffs=[20], div_val=2, mem_len=12, num_labels=5, pad_token_id=96)
    model = loud(TransfoXLForSequenceClassification(config), seed)
    ids = torch.randint(1, 96, (3, 10), generator=torch.Generator().manual_seed(seed))
    ids[0, 6:] = ids[2, 9:] = 96
    ids[1, -1] = 96
    labels = torch.tensor([4, 0, 2])
    output = model(ids, labels=labels)
    save("classifier", model, {"ids": ids, "labels": labels, "logits": output.logits, "loss": output.loss})


TEXTS = [
    "The city's population was 23,000 people, each 1.80 m tall.",
    "Mr. Smith, who lived in the U.S. since Jan. 1990, paid $5,000.50 (about 4,200 €) for No. 7 of the series.",
    '"Don\'t go," he said. "It\'s a well-known, state-of-the-art trap!"',
    "She asked: 'Why is that so?' -- and left...",
    "A,B,C and 5,3,2; x.y.z e.g. this, i.e. that etc. and so on.",
    "The 1980's music at 90% volume; rock'n'roll's dogs' bones.",
    "He “quoted” – and — dashed… «French» quotes.",
    "Visit http://example.com/a_b?c=d or mail me@x.org. See p. 5 vs. pp. 12-14",
    "No. Not at all. No. 5 is alive. Art. 3 says so. St. Louis v. Board of Ed.",
    "Tabs\tand\nnewlines  and   spaces. ",
    "(see [1], {2}; <b>). 3 - 2 = 1, a - b, x-1, 10-20, -5. A '-' or '.' apart, ' too.'",
    "日本語 and 한국어 text, naïve café Ünïcode. 12\u00a0000 at 20\u00a0%",
    "",
    "...",
    "'",
    "5,",
    ",5",
    "the end <eos> the start of a <formula> and <unk>ed words <eos>",
    'He said "no". She said "yes", and ended with "maybe"...',
    "it 's already @-@ split 5 @,@ 000 @.@ 1",
    "zebras unheard-of xylophones",
]


def vocabulary():
    """A vocabulary of the texts' words, but for the last text's; ids and words of every text, and its way back."""
    folder = OUT / "vocabulary"
    folder.mkdir()
    special = ["<eos>", "<unk>", "<formula>"]
    (folder / "vocab.txt").write_text("\n".join(special))
    empty = TransfoXLTokenizer(vocab_file=str(folder / "vocab.txt"))
    words = [word for text in TEXTS[:-1] for word in empty.tokenize(text)]
    symbols = list(dict.fromkeys(special + words))
    (folder / "vocab.txt").write_text("\n".join(symbols) + "\n", encoding="utf-8")
    tokenizer = TransfoXLTokenizer(vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_vocabulary(str(folder))
    content = {name: getattr(tokenizer, name) for name in ("counter", "idx2sym", "sym2idx", "lower_case", "delimiter")}
    torch.save(content, folder / "vocab.bin", _use_new_zipfile_serialization=False)
    results = [
        {"text": text, "ids": tokenizer(text)["input_ids"], "decoded": tokenizer.decode(tokenizer(text)["input_ids"])}
        for text in TEXTS
    ]
    (folder / "texts.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save(name, model, outputs, safetensors=True):
    model.save_pretrained(OUT / name, safe_serialization=safetensors)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    save_file({k: x.detach().contiguous() for k, x in outputs.items()}, OUT / name / "outputs.safetensors")


def main():
    assert transformers.__version__ == "4.35.2", transformers.__version__
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, settings) in enumerate(CASES.items()):
        language_model(name, settings, seed)
    classifier()
    vocabulary()


if __name__ == "__main__":
    main()
