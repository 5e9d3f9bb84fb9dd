"""Multiple choice: every choice is scored as its text alone is, in whatever company; losses are transformers'."""

import pytest
import torch
import torch.nn.functional as F
from test_convert_longformer import longformer
from test_convert_transformer import ours_of
from test_law_2_batch_anyhow import padded
from transformers import DataCollatorForMultipleChoice
from variants import SEP, assert_equal, over, runner, words

from hf_gallery.data import byte_tokenizer

choosing = over(lambda variant, head: head.choices)
QUIET = dict(dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)


def model_of(variant, head, **settings):
    return runner(variant, head, **QUIET | settings).model


def text(n, seed):
    """n tokens, the third a separator."""
    ids = words(n, seed=seed)
    ids[2] = SEP
    return ids


def alone(model, ids):
    """The score of one text, read by itself."""
    return model(ids[None]).logits[0, 0]


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@choosing
def test_padded_choices(variant, head, kind):
    """Scores, loss and gradients of questions whose choices differ in length are those of the texts alone."""
    model = model_of(variant, head)
    lengths = (19, 8, 3, 13, 5, 16)  # two questions with three choices
    texts = [text(n, seed=n) for n in lengths]
    mask = padded(lengths, kind, 22)
    ids = torch.full((6, 22), SEP).masked_scatter(mask == 1, torch.cat(texts))
    labels = torch.tensor([2, 0])
    output = model(ids.view(2, 3, 22), mask.view(2, 3, 22), labels=labels)
    expected = torch.stack([alone(model, ids) for ids in texts]).view(2, 3)
    assert_equal(output.logits, expected)
    loss = F.cross_entropy(expected, labels)
    assert_equal(output.loss, loss)
    parameters = list(model.parameters())
    for a, b in zip(
        *(torch.autograd.grad(x, parameters, allow_unused=True) for x in (output.loss, loss)), strict=True
    ):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@choosing
@torch.no_grad()
def test_embeddings_types_and_positions(variant, head):
    """All inputs that have rows have choices, too."""
    model = model_of(variant, head)
    ids = torch.stack([text(9, seed=i) for i in range(6)]).view(2, 3, 9)
    expected = model(ids).logits
    assert expected.shape == (2, 3)
    positions = torch.arange(9).expand(2, 3, 9)
    assert_equal(model(ids, position_ids=positions).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    more = {}
    if "global_attention_mask" in model.model.arguments():
        more["global_attention_mask"] = (torch.arange(9) > 2).long().expand(2, 3, 9)
        assert_equal(model(ids, **more).logits, expected)
    assert_equal(model(inputs_embeds=embeds, **more).logits, expected)


@pytest.mark.parametrize("told", ["position_ids", "seq_idx", "cu_seq_lens"])
@choosing
@torch.no_grad()
def test_packed_questions(variant, head, told):
    """The first documents of a question's rows are one question's choices, the second ones another's."""
    model = model_of(variant, head)
    lengths = [[[5, 9], [7, 4], [3, 8]], [[6, 6], [4, 4], [12, 3]]]  # rows, choices, documents
    texts = [[[text(n, seed=7 * n + i) for i, n in enumerate(row)] for row in choices] for choices in lengths]
    width = max(sum(row) for choices in lengths for row in choices)
    ids, mask, places = (
        torch.full((2, 3, width), SEP),
        torch.zeros(2, 3, width).long(),
        torch.zeros(2, 3, width).long(),
    )
    number = places.clone()
    for b, choices in enumerate(texts):
        for c, row in enumerate(choices):
            n = sum(map(len, row))
            ids[b, c, :n], mask[b, c, :n] = torch.cat(row), 1
            places[b, c, :n] = torch.cat([torch.arange(len(x)) for x in row])
            number[b, c, :n] = torch.cat([torch.full((len(x),), i) for i, x in enumerate(row)])
    ends = torch.tensor([0] + [n for choices in lengths for row in choices for n in row]).cumsum(0)
    packing = {
        "position_ids": dict(position_ids=places),
        "seq_idx": dict(seq_idx=number),
        "cu_seq_lens": dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends),
    }[told]
    labels = torch.tensor([0, 2, 1, -100])
    output = model(ids, mask, **packing, labels=labels)
    asked = [[texts[b][c][k] for c in range(3)] for b in range(2) for k in range(2)]
    expected = torch.stack([torch.stack([alone(model, ids) for ids in choices]) for choices in asked])
    assert_equal(output.logits, expected)
    assert_equal(output.loss, F.cross_entropy(expected, labels))
    # A row of the second question with one document fewer.
    number[1, 2] = 0
    with pytest.raises(ValueError, match=r"choices of row 1 hold \[2, 2, 1\] documents; .* must be the same"):
        model(ids, mask, seq_idx=number)


@choosing
def test_the_loss_of_batches_that_add_up(variant, head):
    """num_items_in_batch, which Trainer gives under gradient accumulation: the questions of all batches."""
    model = model_of(variant, head)
    ids = torch.stack([text(9, seed=i) for i in range(8)]).view(4, 2, 9)
    labels = torch.tensor([1, 0, -100, 1])
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i], labels=labels[i], num_items_in_batch=3).loss for i in (slice(0, 1), slice(1, 4))]
    assert_equal(sum(parts), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([0, 3])), "labels.*from 0 to 3.*below the choices' 3"),
        (dict(labels=torch.tensor([0])), r"labels.*\(1,\); 2 questions need \(2,\)"),
        (dict(labels=torch.tensor([0.0, 1.0])), "labels has type torch.float32.*whole numbers"),
        (dict(attention_mask=torch.ones(2, 9).long()), r"attention_mask has shape \(2, 9\).*\(2, 3\)"),
        (dict(attention_mask=torch.ones(2, 4, 9).long()), r"attention_mask has shape \(2, 4, 9\).*\(2, 3\)"),
        (dict(position_ids=torch.arange(9)[None]), r"position_ids has shape \(1, 9\).*\(2, 3\)"),
    ],
    ids=str,
)
@choosing
def test_wrong_input(variant, head, change, message):
    model = model_of(variant, head)
    ids = torch.stack([text(9, seed=i) for i in range(6)]).view(2, 3, 9)
    with pytest.raises(ValueError, match=message):
        model(ids, **change)
    for few in (ids[:, :1], ids[:, 0]):  # whatever is learned of one choice, its loss is 0
        with pytest.raises(ValueError, match="labels are given, and the input has .* choice.*nothing can be learned"):
            model(few, labels=torch.tensor([0, 0]))


@pytest.mark.parametrize("marked", [False, True], ids=["default", "given"])
@torch.no_grad()
def test_equals_transformers_longformer(marked, tmp_path):
    """By default the tokens behind the question's two separators are global: scores, loss and hidden states."""
    theirs = longformer("choice")
    ours = ours_of(theirs, tmp_path)
    ids = words(6, 23).clamp(min=3)
    ids[:, [5, 6, 22]] = SEP  # theirs wants three
    mask = padded((23,) * 6, "right", 23)
    mask[1, 20:] = 0
    more = {} if not marked else dict(global_attention_mask=(ids % 5 == 0).long().view(2, 3, 23))
    given = dict(attention_mask=mask.view(2, 3, 23), labels=torch.tensor([2, 1]), output_hidden_states=True, **more)
    got, expected = (model(ids.view(2, 3, 23), **given) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss, expected.loss)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_equal(a[mask == 1], b[mask == 1])


@choosing
@torch.no_grad()
def test_transformers_collator(variant, head):
    """Its batches are (B, C, T) with labels."""
    tokenizer = byte_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None)
    model = model_of(
        variant, head, **sizes, **{} if variant.name == "transformer" else dict(sep_token_id=tokenizer.sep_token_id)
    )
    pairs = [["today", "there"], ["a hill", "on and on"]]
    ids = [[[*b"when?", tokenizer.sep_token_id, *x.encode()] for x in row] for row in pairs]
    rows = [{"input_ids": x, "labels": i} for i, x in enumerate(ids)]
    output = model(**DataCollatorForMultipleChoice(tokenizer)(rows))
    assert output.logits.shape == (2, 2) and output.loss.isfinite()
    assert_equal(output.logits[1, 0], alone(model, torch.tensor(ids[1][0])))
