"""transformers' pipelines on saved folders: a head gives by its pipeline what it gives by itself, also in batches."""

from threading import Thread

import pytest
import torch
import transformers
from test_trainer import FIVE, five, make
from transformers import AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from variants import VARIANTS, first_marked

from hf_gallery.data import byte_tokenizer

TEXTS = ["the sea is wide", "a hill", "and so on, and so on"]  # of three lengths: a batch of them is padded
TIMES = {"max_new_tokens": 12, "do_sample": False}
# A byte tokenizer takes <mask> for six plain characters unless told that it is the token.
SPECIAL = {"split_special_tokens": False}


def with_head(head):
    """Parametrises over the variants that have it."""
    chosen = [v for v in FIVE if head in v.heads]
    return pytest.mark.parametrize("variant", chosen, ids=[v.name for v in chosen])


SUMMARISING = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name in ("transformer", "longformer_led")], ids=lambda v: v.name
)
SPEAKS = dict(tie_word_embeddings=False, decoder_start_token_id=byte_tokenizer().bos_token_id)


@pytest.fixture
def saved(tmp_path):
    """Saves a variant's model of random weights with the tokenizer; gives its folder and (tokenizer, model) loaded
    from there."""

    def save(variant, head, **settings):
        make(variant, head, **settings).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        auto = getattr(transformers, variant.heads[head].auto)
        return str(tmp_path), AutoTokenizer.from_pretrained(tmp_path), auto.from_pretrained(tmp_path).eval()

    return save


def read(tokenizer, model, text, **options):
    """The model's results for a text, alone and without padding."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", **options))


def continued(tokenizer, model, text, count):
    """The ids of the most likely continuation, the whole text read anew for each."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + count and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.works('pipeline("text-generation")')
@five
def test_text_generation(variant, saved):
    folder, tokenizer, model = saved(variant, "causal", tie_word_embeddings=False)
    say = pipeline("text-generation", folder)
    expected = [continued(tokenizer, model, text, TIMES["max_new_tokens"]) for text in TEXTS]
    for batch_size in (1, 3):
        said = say(TEXTS, batch_size=batch_size, return_tensors=True, **TIMES)
        for (row,), text, new in zip(said, TEXTS, expected, strict=True):
            whole = [*tokenizer(text).input_ids, *new]
            pad = tokenizer.pad_token_id  # a random model says it too
            assert [i for i in row["generated_token_ids"] if i != pad] == [i for i in whole if i != pad]
    whole = say(TEXTS[0], **TIMES)[0]["generated_text"]
    assert whole == TEXTS[0] + say(TEXTS[0], return_full_text=False, **TIMES)[0]["generated_text"]
    assert len(set(expected[0])) > 3, "more than one token said for ever"
    several = say(TEXTS[0], num_return_sequences=2, do_sample=True, max_new_tokens=12, return_tensors=True)
    assert len(several) == 2 and several[0] != several[1]


def streamed(tokenizer, model, **options):
    """The pieces that arrive while another thread generates."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    return pieces


@pytest.mark.works("TextIteratorStreamer")
@five
def test_streamed_text_is_the_text(variant, saved):
    """Piece by piece, and never half of a character that takes several bytes."""
    _, tokenizer, model = saved(variant, "causal", tie_word_embeddings=False)
    prompt = tokenizer(TEXTS[0], return_tensors="pt")
    new = continued(tokenizer, model, TEXTS[0], TIMES["max_new_tokens"])
    assert "".join(streamed(tokenizer, model, **prompt, **TIMES)) == tokenizer.decode(new)

    text = "é, ü and 한"
    forced, start = tokenizer(text).input_ids, prompt.input_ids.shape[1]
    pieces = streamed(
        tokenizer,
        model,
        **prompt,
        max_new_tokens=len(forced),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, ids: [forced[len(ids) - start]],
    )
    assert "".join(pieces) == text
    assert len(pieces) > 1 and "\ufffd" not in "".join(pieces)


@pytest.mark.works('pipeline("fill-mask")')
@with_head("masked")
def test_fill_mask(variant, saved):
    folder, tokenizer, model = saved(variant, "masked")
    fill = pipeline("fill-mask", folder, tokenizer_kwargs=SPECIAL, top_k=4)
    texts = ["the <mask>ea is wide", "<mask> hill", "and so on, and so o<mask>"]
    for found, text in zip(fill(texts, batch_size=3), texts, strict=True):
        ids = tokenizer(text, **SPECIAL).input_ids
        place = ids.index(tokenizer.mask_token_id)
        scores, tokens = read(tokenizer, model, text, **SPECIAL).logits[0, place].softmax(-1).topk(4)
        assert [guess["token"] for guess in found] == tokens.tolist()
        assert [guess["score"] for guess in found] == pytest.approx(scores.tolist(), rel=1e-3)
        filled = [*ids[:place], int(tokens[0]), *ids[place + 1 :]]
        assert found[0]["sequence"] == tokenizer.decode(filled, skip_special_tokens=True)
    two = fill("<mask> hill and <mask> sea")
    assert len(two) == 2, "a list of guesses for each mask"
    chosen = fill("the <mask>ea", targets=["s", "t"])
    assert {guess["token_str"] for guess in chosen} == {"s", "t"}


@pytest.mark.works('pipeline("text-classification")')
@five
def test_text_classification(variant, saved):
    names = {0: "hill", 1: "sea", 2: "neither"}
    folder, tokenizer, model = saved(variant, "sequence", num_labels=3, id2label=names)
    classify = pipeline("text-classification", folder, top_k=None)
    for batch_size in (1, 3):
        for found, text in zip(classify(TEXTS, batch_size=batch_size), TEXTS, strict=True):
            scores = read(tokenizer, model, text).logits[0].softmax(-1).tolist()
            got = {guess["label"]: guess["score"] for guess in found}
            assert got == pytest.approx(dict(zip(names.values(), scores, strict=True)), rel=1e-3)
    best = pipeline("text-classification", folder)(TEXTS[0])
    assert best[0]["label"] == names[int(read(tokenizer, model, TEXTS[0]).logits.argmax())]


@pytest.mark.works('pipeline("token-classification")')
@with_head("tokens")
def test_token_classification(variant, saved):
    names = dict(enumerate(["O", "B-PLACE", "I-PLACE", "B-TIME"]))
    folder, tokenizer, model = saved(variant, "tokens", id2label=names)
    mark = pipeline("token-classification", folder, ignore_labels=[])
    for batch_size in (1, 3):
        for found, text in zip(mark(TEXTS, batch_size=batch_size), TEXTS, strict=True):
            scores = read(tokenizer, model, text).logits[0].softmax(-1)
            assert [token["entity"] for token in found] == [names[i] for i in scores.argmax(-1).tolist()]
            assert [float(token["score"]) for token in found] == pytest.approx(scores.amax(-1).tolist(), rel=1e-3)
            assert [text[token["start"] : token["end"]] for token in found] == list(text)
    for group in pipeline("token-classification", folder, aggregation_strategy="simple")(TEXTS[0]):
        assert group["entity_group"] in ("PLACE", "TIME")
        assert TEXTS[0][group["start"] : group["end"]].strip() == group["word"].strip()


@pytest.mark.works('pipeline("question-answering")')
@with_head("question")
def test_question_answering(variant, saved):
    folder, _, _ = saved(variant, "question")
    if "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"transformers {transformers.__version__} has no such pipeline; the model does it by itself")
    answer = pipeline("question-answering", folder)(question="what is wide?", context=TEXTS[0])
    assert TEXTS[0][answer["start"] : answer["end"]] == answer["answer"]


@pytest.mark.works('pipeline("summarization", "text2text-generation")')
@pytest.mark.parametrize("task", ["summarization", "text2text-generation"])
@SUMMARISING
def test_summarization(variant, task, saved):
    folder, tokenizer, model = saved(variant, "seq2seq", **SPEAKS)
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"transformers {transformers.__version__} has no such pipeline; the model does it by itself")
    say = pipeline(task, folder)
    name = f"{task.removesuffix('ization').removesuffix('-generation').replace('text2text', 'generated')}y_text"
    for (said,), text in zip(say(TEXTS, batch_size=3, **TIMES), TEXTS, strict=True):
        new = model.generate(**tokenizer(text, return_tensors="pt"), **TIMES)[0]
        assert said[name] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.works("summaries of sources")
@SUMMARISING
def test_summaries_are_what_each_source_gives_alone(variant, saved):
    """Does what those pipelines did: sources of unequal length in, texts out, greedy and with beams; where the encoder
    has windows, with and without global attention on the first token, as LED is used."""
    _, tokenizer, model = saved(variant, "seq2seq", **SPEAKS)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    said = []
    for marks in (False, True) if variant.heads["seq2seq"].marks else (False,):
        for beams in (1, 3):

            def write(source, marks=marks, beams=beams):
                given = dict(global_attention_mask=first_marked(**source)) if marks else {}
                return model.generate(**source, **given, num_beams=beams, **TIMES)

            whole = write(batch)
            for row, text in zip(whole, TEXTS, strict=True):
                alone = write(tokenizer(text, return_tensors="pt"))[0]
                assert row[: len(alone)].equal(alone) and (row[len(alone) :] == tokenizer.pad_token_id).all()
            said.append(tokenizer.batch_decode(whole, skip_special_tokens=True))
    assert len({tuple(texts) for texts in said}) >= len(said) / 2


@pytest.mark.works("answering questions")
@with_head("question")
def test_answers_are_read_off_the_text(variant, saved):
    """Does what that pipeline did: a question and a text go in as a pair, an answer is a span of the text."""
    _, tokenizer, model = saved(variant, "question")
    question = "what is wide?"
    pairs = [f"{question}{tokenizer.sep_token}{text}" for text in TEXTS]
    batch = tokenizer(pairs, padding=True, return_offsets_mapping=True, return_tensors="pt", **SPECIAL)
    offsets = batch.pop("offset_mapping")
    begin = len(question) + len(tokenizer.sep_token)
    with torch.no_grad():
        whole = model(**batch)
    for row, (pair, text) in enumerate(zip(pairs, TEXTS, strict=True)):
        alone = read(tokenizer, model, pair, **SPECIAL)
        place = offsets[row, :, 0] >= begin  # of the text's own tokens; a token of the padding is at 0
        assert place.sum() == len(text)
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(whole[name][row, place], alone[name][0, -len(text) :], rtol=1e-4, atol=1e-5)
        scores = whole.start_logits[row, place][:, None] + whole.end_logits[row, place]
        spans = torch.ones_like(scores).triu().bool()  # that end where they begin or later
        first, last = divmod(int(scores.masked_fill(~spans, -torch.inf).argmax()), len(text))
        columns = offsets[row, place]
        assert pair[columns[first, 0] : columns[last, 1]] == text[first : last + 1]
