"""Every variant, in every setting of tests/variants.py, equals its plain twin: tests/plain/<variant>.py.

The twin reads one row alone, in one go. The model reads it whole, in chunks through its cache, padded beside other
rows, and in training, where gradients stop as the twin's do.
"""

import importlib
from pathlib import Path

import pytest
import torch
from variants import assert_equal, first_marked, over, words

import hf_gallery
from hf_gallery.variants import VARIANTS

N = 23
PADDED = [(0, 7), (5, 0), (2, 3)]  # padding in front of and behind each row


def twin_of(model):
    """The module of the model's twin."""
    return importlib.import_module(f"plain.{model.config.model_type.removeprefix('gallery_')}")


def built(variant, head, **settings):
    """A model in float64 without dropout, and what its twin gives for a row of tokens: f(ids, **more)."""
    model = variant.make(head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0, **settings)
    twin = twin_of(model)
    return model, lambda *ids, **more: (twin.logits if hasattr(model, "lm_head") else twin.hidden_states)(
        model, *ids, **more
    )


def normal(x, model):
    """Logits as log-probabilities, which is what an adaptive softmax gives; hidden states as they are."""
    return x.log_softmax(-1) if hasattr(model, "lm_head") else x


def result(output):
    return output["last_hidden_state"] if "last_hidden_state" in output else output["logits"]


COMPARED = ("causal", "decoder", "encoder", "seq2seq")  # others stand on the same layers
with_twins = over(lambda variant, head: any(variant.heads.get(name) is head for name in COMPARED))
streams_with_twins = over(
    lambda variant, head: head.stream and any(variant.heads.get(name) is head for name in COMPARED)
)


def test_each_variant_has_its_twin():
    """Of few lines, and named in the docstring of the page that it stands beside."""
    for name in VARIANTS:
        path = Path(__file__).with_name(f"{name}.py")
        page = Path(hf_gallery.__file__).parent / "models" / f"modeling_{name}.py"
        assert f"tests/plain/{name}.py" in page.read_text().split('"""')[1], name
        assert page.name in path.read_text().split('"""')[1], name
        assert 45 <= len(path.read_text().splitlines()) <= 75, name


def arguments(variant, head, model, ids, source):
    if not variant.heads[head].source:
        return dict(input_ids=ids)
    source = source.expand(len(ids), -1)
    marked = dict(global_attention_mask=first_marked(source)) if variant.heads[head].marks else {}
    return dict(input_ids=source, decoder_input_ids=ids, **marked)


def plainly(variant, head, plain, ids, source, **more):
    """Results of the twin for a row of tokens, and where the head reads one a source."""
    marked = dict(marked=(0,)) if variant.heads[head].marks else {}
    return plain(ids, source, **marked, **more) if variant.heads[head].source else plain(ids, **more)


@with_twins
@torch.no_grad()
def test_a_whole_text(variant, head):
    model, plain = built(variant, head)
    ids, source = words(1, N), words(1, 9, seed=3)
    expected = plainly(variant, head, plain, ids[0], source[0])
    got = result(model(**arguments(variant, head, model, ids, source)))[0]
    assert_equal(normal(got, model), normal(expected, model))


@pytest.mark.parametrize("cuts", [1, 5, 9], ids=lambda n: f"by {n}")
@streams_with_twins
@torch.no_grad()
def test_through_the_cache(variant, head, cuts):
    model, plain = built(variant, head)
    ids, source = words(1, N), words(1, 9, seed=3)
    expected = plainly(variant, head, plain, ids[0], source[0])
    cache, got = None, []
    for part in ids.split(cuts, dim=1):
        output = model(**arguments(variant, head, model, part, source), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        got.append(result(output)[0])
    assert_equal(normal(torch.cat(got), model), normal(expected, model))


@with_twins
@torch.no_grad()
def test_padded_beside_other_rows(variant, head):
    """Each row of a batch equals the twin's, which has seen no padding and no other row."""
    model, plain = built(variant, head)
    rows = [
        words(N - 7 if i != 1 else N - 5, seed=10 + i)[: N - front - behind]
        for i, (front, behind) in enumerate(PADDED)
    ]
    columns = max(len(row) + sum(padding) for row, padding in zip(rows, PADDED, strict=True))
    ids = torch.full((len(rows), columns), variant.make_config(head).pad_token_id)
    mask = torch.zeros_like(ids)
    for i, (row, (front, _)) in enumerate(zip(rows, PADDED, strict=True)):
        ids[i, front : front + len(row)], mask[i, front : front + len(row)] = row, 1
    source = words(1, 9, seed=3)
    name = "decoder_attention_mask" if variant.heads[head].source else "attention_mask"
    got = result(model(**arguments(variant, head, model, ids, source), **{name: mask}))
    for i, row in enumerate(rows):
        expected = plainly(variant, head, plain, row, source[0])
        assert_equal(normal(got[i][mask[i] == 1], model), normal(expected, model), f"row {i}")


@with_twins
@torch.no_grad()
def test_packed_behind_another_document(variant, head):
    """Documents in one row, whose positions start again: each equals the twin's, which has seen it alone."""
    if variant.heads[head].source:
        pytest.skip("an encoder-decoder's documents have a source each")
    model, plain = built(variant, head)
    documents = [words(n, seed=20 + n) for n in (9, 1, 13)]
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    got = result(model(torch.cat(documents)[None], position_ids=positions[None], use_cache=False))[0]
    for i, (part, document) in enumerate(zip(got.split([len(x) for x in documents]), documents, strict=True)):
        assert_equal(normal(part, model), normal(plain(document), model), f"document {i}")


@pytest.mark.parametrize("cuts", [(N,), (9, 14)], ids=["whole", "two forwards"])
@with_twins
def test_gradients_in_training(variant, head, cuts):
    """Of every weight, over one forward and over two, the second one's cache a constant."""
    if len(cuts) > 1 and not (variant.heads[head].stream and not variant.heads[head].source):
        pytest.skip("no cache, or one that holds the encoder's keys, which only the first forward's loss reaches")
    model, plain = built(variant, head)
    model.train()
    ids, source, starts = words(1, N), words(1, 9, seed=3), [sum(cuts[:i]) for i in range(len(cuts))]
    expected = plainly(variant, head, plain, ids[0], source[0], **starts_of(starts))
    cache, got = None, []
    for part in ids.split(list(cuts), dim=1):
        more = dict(past_key_values=cache, use_cache=True) if len(cuts) > 1 else {}
        output = model(**arguments(variant, head, model, part, source), **more)
        cache = output.get("past_key_values")
        got.append(result(output)[0])
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    grads = []
    for x in (torch.cat(got), expected):
        total = (normal(x, model) * weight).sum()
        grads.append(torch.autograd.grad(total, parameters.values(), allow_unused=True, materialize_grads=True))
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(b.abs().max() + 1), msg=name)


def starts_of(starts):
    return dict(starts=starts) if len(starts) > 1 else {}
