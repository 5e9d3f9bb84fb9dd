"""generate() on every causal variant: the same tokens as a plain loop without a cache, in all its modes."""

import pytest
import torch
from test_law_2_batch_anyhow import padded, scatter
from transformers.generation.streamers import BaseStreamer
from variants import COLUMNS, EOS, PAD, VARIANTS, assert_equal, causal, words

from hf_gallery.data import byte_tokenizer

PROMPT, NEW = 11, 17  # with the learned positions of the pre-norm variant, 61 columns would be too many


def lively(model):
    """A random model falls into saying one word for ever. With sharp attention and no biases it does so less."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "o_proj.weight" in name:
                p.mul_(3.0 if "q_proj" in name else 2.0)
            elif p.dim() == 1 and name.endswith("bias"):
                p.zero_()
    model.generation_config.eos_token_id = None  # random models say it at any moment
    return model


def model_of(variant):
    return lively(variant.make("causal", tie_word_embeddings=False))


def forward(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, mask, use_cache=False).logits


def greedy(model, prompt, count=NEW):
    """The most likely token, again and again, with the whole input read anew each time."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, forward(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


OPTIONS = dict(max_new_tokens=NEW, do_sample=False)


@pytest.mark.works("generate")
@causal()
def test_greedy(variant):
    model = model_of(variant)
    prompt = words(3, PROMPT)
    expected = greedy(model, prompt)
    assert torch.equal(model.generate(prompt, **OPTIONS), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **OPTIONS), expected)
    assert len(set(greedy(model, prompt, 30)[:, PROMPT:].flatten().tolist())) > 3


@causal()
@pytest.mark.parametrize("beams", [1, 2])
def test_a_tokenizer_for_generate_is_not_for_the_model(variant, beams):
    """As `transformers serve` gives it, and whoever stops at strings: generate hands it on to the forward."""
    model, ids = variant.make(), words(1, 9)
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
    assert torch.equal(model.generate(ids, **settings, tokenizer=byte_tokenizer()), model.generate(ids, **settings))


@causal()
def test_stops_at_the_end_and_pads(variant):
    model = model_of(variant)
    prompt = words(3, PROMPT)
    free = greedy(model, prompt)
    end = int(free[0, PROMPT + 4])
    got = model.generate(prompt, eos_token_id=end, **OPTIONS)
    for row, want in zip(got, free, strict=True):
        new = want[PROMPT:].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert row[PROMPT : PROMPT + len(new)].tolist() == new
        assert (row[PROMPT + len(new) :] == PAD).all()
    assert model.config.eos_token_id == EOS


@causal()
def test_sampling(variant):
    """A seed gives the same text again; temperature near 0 gives greedy."""
    model = model_of(variant)
    prompt = words(2, PROMPT)
    options = dict(max_new_tokens=NEW, do_sample=True)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(prompt, **options))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), texts[0])
    assert torch.equal(model.generate(prompt, temperature=1e-4, **options), greedy(model, prompt))


@pytest.mark.works("generate, beams")
@causal()
def test_beam_search(variant):
    """Beams move between rows: the cache must follow. Against the search that reads all anew."""
    model = model_of(variant)
    prompt = words(2, PROMPT)
    for options in (dict(num_beams=4), dict(num_beams=3, num_return_sequences=3, length_penalty=0.5)):
        options = OPTIONS | options | dict(eos_token_id=int(greedy(model, prompt)[1, PROMPT + 5]))
        got = model.generate(prompt, **options)
        assert got.shape[0] == 2 * options.get("num_return_sequences", 1)
        assert torch.equal(got, model.generate(prompt, use_cache=False, **options))


@causal()
def test_beam_search_of_padded_prompts(variant):
    model = model_of(variant)
    lengths = (PROMPT, 4, 7)
    rows, mask = [words(n, seed=n) for n in lengths], padded(lengths, "left", PROMPT)
    got = model.generate(scatter(rows, mask), attention_mask=mask, num_beams=3, **OPTIONS)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], num_beams=3, **OPTIONS)[0]
        assert torch.equal(got[i, PROMPT:], alone[len(row) :]), i


@causal()
def test_several_samples_of_one_prompt(variant):
    model = model_of(variant)
    prompt = words(2, PROMPT)
    torch.manual_seed(3)
    got = model.generate(prompt, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert got.shape == (6, PROMPT + NEW)
    assert torch.equal(got[:, :PROMPT], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in got}) == 6


@causal()
def test_a_padded_batch_equals_rows_alone(variant):
    model = model_of(variant)
    lengths = (PROMPT, 3, 8, 1)
    rows, mask = [words(n, seed=n) for n in lengths], padded(lengths, "left", PROMPT)
    got = model.generate(scatter(rows, mask), attention_mask=mask, **OPTIONS)
    for i, row in enumerate(rows):
        assert torch.equal(got[i, PROMPT:], greedy(model, row[None])[0, len(row) :]), i


@pytest.mark.works("generate, chunked prefill")
@pytest.mark.parametrize("size", [1, 4, 7, 30])
@causal()
def test_chunked_prefill(variant, size):
    model = model_of(variant)
    lengths = (26, 9)
    rows, mask = [words(n, seed=n) for n in lengths], padded(lengths, "left", 26)
    ids = scatter(rows, mask)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **OPTIONS), expected)


@causal()
def test_going_on_from_a_returned_cache(variant):
    """generate, then generate with its cache and the text so far: as if in one go."""
    model = model_of(variant)
    prompt = words(2, PROMPT)
    expected = greedy(model, prompt, 20)
    first = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(first.sequences, expected[:, : PROMPT + 8])
    assert first.past_key_values.get_seq_length() == PROMPT + 7  # the last token was not read yet
    kept = first.past_key_values.copy()
    # All are tokens: without a mask generate() takes those that the model said of the padding's id for padding.
    every = dict(attention_mask=torch.ones_like(first.sequences), do_sample=False)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=12, **every)
    assert torch.equal(second, expected)
    # and with more text from the user in between, from the copy
    more = torch.cat([first.sequences, words(2, 5, seed=9)], dim=1)
    every["attention_mask"] = torch.ones_like(more)
    got = model.generate(more, past_key_values=kept, max_new_tokens=6, **every)
    assert torch.equal(got, greedy(model, more, 6))


@causal()
def test_a_prompt_read_once_serves_many(variant):
    model = model_of(variant)
    prompt = words(1, PROMPT)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    for seed in range(2):
        question = torch.cat([prompt, words(1, 4, seed=seed)], dim=1)
        got = model.generate(question, past_key_values=cache.copy(), **OPTIONS)
        assert torch.equal(got, greedy(model, question))
    assert cache.get_seq_length() == PROMPT


@causal()
def test_going_on_with_padded_rows(variant):
    model = model_of(variant)
    lengths = (PROMPT, 4)
    rows, mask = [words(n, seed=n) for n in lengths], padded(lengths, "left", PROMPT)
    first = model.generate(
        scatter(rows, mask), attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    second = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=9, do_sample=False
    )
    for i, row in enumerate(rows):
        assert torch.equal(second[i, PROMPT:], greedy(model, row[None])[0, len(row) :]), i


@causal()
def test_from_embeddings(variant):
    model = model_of(variant)
    prompt = words(2, PROMPT)
    embeds = model.get_input_embeddings()(prompt).detach()
    expected = greedy(model, prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, **OPTIONS), expected[:, PROMPT:])
    assert torch.equal(model.generate(prompt, inputs_embeds=embeds, **OPTIONS), expected)


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@causal()
def test_streaming(variant):
    model, streamer = model_of(variant), Collector()
    prompt = words(1, PROMPT)
    got = model.generate(prompt, streamer=streamer, **OPTIONS)
    assert streamer.ended and streamer.pieces == [prompt[0].tolist()] + [[t] for t in got[0, PROMPT:].tolist()]


@causal()
def test_scores_are_the_logits_of_one_forward(variant):
    model = model_of(variant).double()  # in float32 the two ways round apart by more than a tolerance near zero
    prompt = words(2, PROMPT)
    got = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **OPTIONS)
    expected = forward(model, got.sequences[:, :-1])[:, PROMPT - 1 :]
    assert_equal(torch.stack(got.logits, dim=1), expected.float())  # generate() gives logits in float32


@pytest.mark.works("generate, assisted decoding")
@pytest.mark.parametrize("helper", ["another model", "a good model", "prompt lookup", "early exit"])
@causal()
def test_assisted_decoding(variant, helper):
    """The assistant's tokens are taken back where the model disagrees: caches are cropped, the text is greedy's."""
    model = model_of(variant)
    prompt = words(1, PROMPT)
    prompt[:, -3:] = prompt[:, :3]  # something to look up
    if helper == "prompt lookup":
        options = dict(prompt_lookup_num_tokens=3)
    elif helper == "early exit":
        options = dict(assistant_early_exit=1)
    else:
        assistant = model_of(variant)
        if helper == "another model":
            with torch.no_grad():
                for p in assistant.parameters():
                    p.add_(0.02 * torch.randn_like(p))
        options = dict(assistant_model=assistant)
    expected = greedy(model, prompt, 30)
    assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False, **options), expected)


@causal(lambda variant: variant.name in COLUMNS)
def test_an_assistant_of_another_architecture_and_a_text_read_before(variant):
    """A cache that is given goes on, is as greedy search leaves it, and records no longer."""
    model, other, prompt = model_of(variant), model_of(VARIANTS[0]), words(1, PROMPT)
    cache = model(prompt[:, :6], use_cache=True).past_key_values
    plain, expected = cache.copy(), greedy(model, prompt, 20)
    options = dict(max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(prompt, past_key_values=plain, **options), expected)
    assert torch.equal(model.generate(prompt, past_key_values=cache, assistant_model=other, **options), expected)
    assert not cache.recording and cache.seen.tolist() == plain.seen.tolist()
    with torch.no_grad():
        got, wanted = (model(expected[:, -1:], past_key_values=x).logits for x in (cache, plain))
    assert_equal(got, wanted)
    expected = greedy(other, prompt, 20)
    assert torch.equal(other.generate(prompt, assistant_model=model, **options), expected)


@causal(lambda variant: variant.name in COLUMNS)
def test_assisted_decoding_by_sampling(variant):
    """Near temperature 0 it is greedy search; a seed gives the same text again, and hot texts are others."""
    model, assistant, prompt = model_of(variant), model_of(VARIANTS[0]), words(1, PROMPT)
    options = dict(max_new_tokens=NEW, do_sample=True, assistant_model=assistant)
    assert torch.equal(model.generate(prompt, temperature=1e-4, **options), greedy(model, prompt))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(prompt, temperature=2.0, **options))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@causal(lambda v: v.name in COLUMNS)
def test_assisted_decoding_takes_one_text_at_a_time(variant):
    with pytest.raises(ValueError, match="batch_size = 1"):
        model_of(variant).generate(words(2, PROMPT), prompt_lookup_num_tokens=3, **OPTIONS)


@causal(lambda v: v.name in COLUMNS)
def test_layers_that_draft(variant, monkeypatch):
    """Only as many as are asked for run, and all of them again when the draft is done, however it ends."""
    model, prompt = model_of(variant), words(1, PROMPT)
    for wrong in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match=f"assistant_early_exit is {wrong}.*from 1 to this model's 3"):
            model.generate(prompt, assistant_early_exit=wrong, **OPTIONS)
    (decoder,) = (x for x in model.modules() if hasattr(x, "exit_after"))
    ran = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(list(decoder.layers).index(layer)))
    expected = model.generate(prompt, **OPTIONS)
    ran.clear()
    assert torch.equal(model.generate(prompt, assistant_early_exit=2, **OPTIONS), expected)
    assert ran.count(0) == ran.count(1) > ran.count(2) > 0

    def fail(*arguments, **keywords):
        raise RuntimeError("no memory")

    monkeypatch.setattr(decoder.layers[0], "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.generate(prompt, assistant_early_exit=2, **OPTIONS)
    assert decoder.exit_after is None


@causal()
def test_logits_processors(variant):
    """A logits processor sees what a plain forward gives."""
    model = model_of(variant)
    prompt = words(2, PROMPT)
    options = OPTIONS | dict(repetition_penalty=1.7, no_repeat_ngram_size=2)
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


@causal(lambda v: v.limit is None)
def test_far_beyond_the_horizon(variant):
    """More new tokens than segments and memory hold."""
    model = model_of(variant)
    prompt = words(1, PROMPT)
    expected = greedy(model, prompt, 60)
    assert torch.equal(model.generate(prompt, max_new_tokens=60, do_sample=False), expected)


SEQ2SEQ = pytest.mark.parametrize("variant", [v for v in VARIANTS if "seq2seq" in v.heads], ids=lambda v: v.name)


def translate(model, source, count=NEW):
    ids = torch.full((1, 1), model.config.decoder_start_token_id)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@SEQ2SEQ
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_seq2seq(variant, kind):
    """Sources of unequal length in one batch: each row as alone, greedy and with beams."""
    model = lively(variant.make("seq2seq", tie_word_embeddings=False))
    lengths = (12, 5, 8)
    rows, mask = [words(n, seed=n) for n in lengths], padded(lengths, kind, 13)
    ids = scatter(rows, mask)
    got = model.generate(ids, attention_mask=mask, **OPTIONS)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **OPTIONS)
    for i, row in enumerate(rows):
        assert torch.equal(got[i], translate(model, row[None])[0]), i
        alone = model.generate(row[None], num_beams=3, num_return_sequences=2, use_cache=False, **OPTIONS)
        assert torch.equal(beams[2 * i : 2 * i + 2], alone), i


@SEQ2SEQ
def test_seq2seq_from_encoder_outputs_and_prefix(variant):
    model = lively(variant.make("seq2seq", tie_word_embeddings=False))
    source = words(1, 12)
    expected = translate(model, source, 20)
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=source)
    got = model.generate(encoder_outputs=encoded, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, expected)
    got = model.generate(source, decoder_input_ids=expected[:, :6], max_new_tokens=15, do_sample=False)
    assert torch.equal(got, expected)
    first = model.generate(source, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    # a mask as long as decoder_input_ids says that they are all, not only the new ones
    text, options = first.sequences, dict(max_new_tokens=12, do_sample=False)
    mask = torch.ones_like(text)
    options |= dict(past_key_values=first.past_key_values, decoder_attention_mask=mask)
    assert torch.equal(model.generate(source, decoder_input_ids=text, **options), expected)
    for helper in (dict(assistant_model=model), dict(assistant_early_exit=1), dict(prompt_lookup_num_tokens=3)):
        assert torch.equal(model.generate(source, max_new_tokens=20, do_sample=False, **helper), expected), helper


@SEQ2SEQ
def test_seq2seq_samples_and_streams(variant):
    model = lively(variant.make("seq2seq", tie_word_embeddings=False))
    source, texts = words(1, 12), []
    for options in (dict(), dict(use_cache=False), dict(streamer=Collector())):
        torch.manual_seed(1)
        texts.append(model.generate(source, max_new_tokens=NEW, do_sample=True, temperature=2.0, **options))
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[0])
    assert not torch.equal(texts[0], translate(model, source))
    streamer = options["streamer"]
    assert streamer.ended and streamer.pieces == [[token] for token in texts[0][0].tolist()]


def test_what_a_gallery_cache_cannot_be():
    """Quantised and offloaded caches are transformers' own: asking for one is refused, not ignored."""
    model = model_of(VARIANTS[0])
    for kind in ("quantized", "offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=f"cache_implementation.*{kind}"):
            model.generate(words(1, 5), cache_implementation=kind, max_new_tokens=3)
