"""Law 2. A row in a left- or right-padded batch gives the logits that it gives alone. Its segments, blocks and memory
start at its own first token, not at the batch's first column. The same holds for documents packed in a row."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from renamed import checkpoint_activations
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from variants import COLUMNS, VARIANTS, WORDS, ask, assert_equal, causal, over, result_of, runner, streams, words

from hf_gallery.models.documents import Documents
from hf_gallery.models.rows import Rows

LENGTHS = (23, 9, 1, 16)
five_causal = causal(lambda variant: variant.name in COLUMNS)


def padded(lengths, kind, width=None, seed=0):
    """A mask (B, width): each row's tokens on the right, on the left, in the middle, or scattered."""
    width = width or max(lengths) + 2
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        start = {"left": width - n, "right": 0, "middle": (width - n) // 2}.get(kind)
        at = torch.randperm(width, generator=g)[:n] if start is None else torch.arange(start, start + n)
        row[at] = 1
    return mask


def scatter(rows, mask, seed=0):
    """The rows' tokens where the mask has ones; the padding holds plain tokens, which nobody must read."""
    ids = words(*mask.shape, seed=seed + 77)
    for i, row in enumerate(rows):
        ids[i, mask[i].bool()] = row
    return ids


def alone(run, rows):
    with torch.no_grad():
        return [run(row[None], rows=[i])[0][0] for i, row in enumerate(rows)]


def assert_rows(run, result, mask, expected):
    for i, want in enumerate(expected):
        got = result[i] if run.head.pooled else result[i, mask[i].bool()]
        assert_equal(got, want, f"row {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["left", "right", "middle", "holes"])
@over()
def test_batch_anyhow(variant, head, kind, dtype):
    run = runner(variant, head, dtype=dtype)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    with torch.no_grad():
        result, _ = run(scatter(rows, mask), mask)
    assert_rows(run, result, mask, alone(run, rows))


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@over(lambda variant, head: head.stream)
def test_batch_anyhow_with_gradients(variant, head, kind):
    """Also the gradients of the weights are those of the rows alone, summed."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    def gradients(total):
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    result, _ = run(scatter(rows, mask), mask)
    got = gradients(sum(result[i, mask[i].bool()].square().sum() for i in range(len(rows))))
    expected = gradients(sum(run(row[None], rows=[i])[0].square().sum() for i, row in enumerate(rows)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1))


@over()
def test_padding_columns_are_zero(variant, head):
    """Hidden states of padding are zero; what a language model's map makes of them is its bias."""
    if head not in ("decoder", "encoder"):
        return
    run = runner(variant, head)
    mask = padded(LENGTHS, "holes")
    result, _ = run(scatter([words(n, seed=n) for n in LENGTHS], mask), mask)
    assert (result[mask == 0] == 0).all() and (result[mask == 1] != 0).all()


@over()
def test_no_mask_means_no_padding(variant, head):
    """Without a mask a pad token is a token like any other."""
    run = runner(variant, head)
    ids = words(2, 23)
    ids[0, 3:6] = run.model.config.pad_token_id
    with torch.no_grad():
        assert_equal(run(ids)[0], run(ids, torch.ones_like(ids))[0])


@pytest.mark.parametrize("form", ["new columns", "all columns"])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@streams()
def test_padding_in_every_chunk(variant, head, kind, form):
    """The mask may be given for the new columns or for all columns since the cache began."""
    run = runner(variant, head, dtype=torch.float64)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    ids = scatter(rows, mask)
    results, cache, done = [], None, 0
    with torch.no_grad():
        for part in ids.split([4, 1, 13, 1, 6], dim=1):
            end = done + part.shape[1]
            given_mask = mask[:, done:end] if form == "new columns" else mask[:, :end]
            result, cache = run(part, given_mask, cache)
            results.append(result)
            done = end
    assert cache.get_seq_length() == mask.shape[1]
    assert cache.seen.tolist() == list(LENGTHS)
    assert_rows(run, torch.cat(results, dim=1), mask, alone(run, rows))


@streams()
def test_left_padded_prompt_then_decoding(variant, head):
    """generate() with prompts of unequal length."""
    run = runner(variant, head)
    rows = [words(n + 8, seed=n) for n in (11, 4, 1)]
    mask = torch.cat([padded((11, 4, 1), "left", 11), torch.ones(3, 8, dtype=torch.long)], dim=1)
    ids = scatter(rows, mask)
    with torch.no_grad():
        result, cache = run(ids[:, :11], mask[:, :11])
        results = [result]
        for t in range(11, 19):
            result, cache = run(ids[:, t : t + 1], mask[:, : t + 1], cache)
            results.append(result)
    assert_rows(run, torch.cat(results, dim=1), mask, alone(run, rows))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@over(lambda variant, head: variant.config.model_type == "gallery_transformer")
def test_batch_anyhow_on_both_backends(variant, head, implementation):
    run = runner(variant, head, dtype=torch.float64, attn_implementation=implementation)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, "holes")
    with torch.no_grad():
        result, _ = run(scatter(rows, mask), mask)
    assert_rows(run, result, mask, alone(runner(variant, head, dtype=torch.float64), rows))


@given(data=st.data())
@causal()
def test_any_padding_in_any_chunks(variant, data):
    """Rows that stand still for a chunk, chunks with no token at all, masks of either form."""
    run = runner(variant, "causal", dtype=torch.float64)
    b = data.draw(st.integers(1, 4), label="rows")
    widths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5), label="chunks")
    bits = data.draw(st.lists(st.integers(0, 2 ** sum(widths) - 1), min_size=b, max_size=b), label="masks")
    mask = torch.tensor([[n >> i & 1 for i in range(sum(widths))] for n in bits])
    rows = [words(int(m.sum()), seed=i) for i, m in enumerate(mask)]
    ids = scatter(rows, mask)
    results, cache, done = [], None, 0
    for width in widths:
        end = done + width
        given_mask = mask[:, done:end] if data.draw(st.booleans(), label="new columns only") else mask[:, :end]
        with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients")):
            result, cache = run(ids[:, done:end], given_mask, cache)
        results.append(result.detach())
        done = end
    result = torch.cat(results, dim=1)
    assert result.isfinite().all()
    filled = [i for i, row in enumerate(rows) if len(row)]
    expected = alone(run, [rows[i] for i in filled])
    for i, want in zip(filled, expected, strict=True):
        assert_equal(result[i, mask[i].bool()], want, f"row {i}")


# ---- what a causal loss counts


@pytest.mark.parametrize("kind", ["left", "right", "middle", "holes"])
@causal()
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(variant, kind):
    """Each token but a row's first is predicted, by the token before it, and never by padding. So the loss is the mean
    over all rows' predictions, however they are padded."""
    run = runner(variant, "causal", dtype=torch.float64)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    ids = scatter(rows, mask)
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        loss = run.model(ids, attention_mask=mask, labels=labels).loss
        one_by_one = [run.model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows if len(row) > 1]
        summed = run.model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(loss, sum(one_by_one) / sum(n - 1 for n in LENGTHS), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(summed, sum(one_by_one) / 7, rtol=1e-6, atol=1e-6)


def test_where_the_loss_of_a_padded_batch_differs_from_llamas():
    """Llama has the padding before a row predict its first token: one prediction more, which that row alone has not.
    Without a label for it (-100) both count the same."""
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).eval()
    rows = [words(n, seed=n) for n in LENGTHS]
    ours = runner(next(v for v in VARIANTS if v.name == "transformer"), "causal").model

    def predictions(model, kind, first_too):
        """The number of predictions that the loss is a mean of."""
        mask = padded(LENGTHS, kind, max(LENGTHS) + 2)
        ids = scatter(rows, mask)
        labels = ids.masked_fill((mask == 0) | ((mask.cumsum(1) == 1) & (not first_too)), -100)
        given = dict(input_ids=ids, attention_mask=mask, labels=labels)
        with torch.no_grad():
            mean, total = model(**given).loss, model(**given, num_items_in_batch=1).loss
        return round(float(total / mean))

    alone = sum(n - 1 for n in LENGTHS)
    assert [predictions(llama, "right", first) for first in (True, False)] == [alone, alone]
    assert [predictions(llama, "left", first) for first in (True, False)] == [alone + len(rows), alone]
    for kind in ("left", "right"):
        assert [predictions(ours, kind, first) for first in (True, False)] == [alone, alone]


# ---- packing: documents one behind another in a row give what they give alone

FORMS = ("position_ids", "cu_seq_lens", "seq_idx", "all of them")


@dataclass
class Packed:
    """Documents laid into rows (B, columns): `texts` by document, `row` of each, `at` the columns of its tokens."""

    texts: list
    row: list
    at: list
    ids: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict

    def of(self, x):
        """x (B, columns, ...) by document."""
        return [x[row, at] for row, at in zip(self.row, self.at, strict=True)]

    def lay(self, pieces, fill):
        """Lays what the documents' tokens hold, (tokens,) each, into (B, columns)."""
        x = torch.full(self.ids.shape, fill, dtype=pieces[0].dtype)
        for row, at, piece in zip(self.row, self.at, pieces, strict=True):
            x[row, at] = piece
        return x


def pack(rows, form="position_ids", kind="right", extra=0, question=False):
    """rows: lengths of the documents of each row. extra: columns of padding in the longest row."""
    lengths = [sum(row) for row in rows]
    width = max(lengths) + extra
    mask = padded(lengths, kind, width)
    texts, row_of, at, places, numbers = [], [], [], [], []
    for i, row in enumerate(rows):
        columns, start = mask[i].nonzero().squeeze(1), 0
        for length in row:
            text = words(length, seed=100 + len(texts))
            texts.append(ask(text[None])[0] if question else text)
            row_of.append(i)
            at.append(columns[start : start + length])
            places.append(torch.arange(length))
            numbers.append(torch.full((length,), len(texts)))
            start += length
    whole = Packed(texts, row_of, at, words(len(rows), width, seed=5), None if mask.all() else mask, {})
    whole.ids = torch.where(mask == 1, whole.lay(texts, 0), whole.ids)
    cu = torch.tensor([0, *[len(text) for text in texts]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(len(text) for text in texts)
    by_form = {
        "position_ids": dict(position_ids=whole.lay(places, 3)),
        "cu_seq_lens": dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest),
        "seq_idx": dict(seq_idx=whole.lay(numbers, 0).int()),
    }
    forms = by_form if form == "all of them" else {form: by_form[form]}
    whole.arguments = {name: value for some in forms.values() for name, value in some.items()}
    return whole


def labels_for(run, whole, g):
    """Labels of each document, and how many of them its loss is a mean of; None where the head has no loss."""
    kind = run.head.auto
    if kind == "AutoModelForSequenceClassification":
        labels = [torch.randint(run.model.config.num_labels, (1,), generator=g) for _ in whole.texts]
        return labels, [1] * len(labels)
    if kind not in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification"):
        return None
    most = run.model.config.num_labels if "Token" in kind else WORDS
    labels = [torch.randint(most, text.shape, generator=g) for text in whole.texts]
    labels = [x.masked_fill(torch.rand(x.shape, generator=g) < 0.2, -100) for x in labels]
    first = 1 if kind == "AutoModelForCausalLM" else 0
    return labels, [int((x[first:] != -100).sum()) for x in labels]


def assert_packed(run, whole, seed=0):
    """Results, loss and gradients of packed documents are those of the documents alone."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    labelled = labels_for(run, whole, torch.Generator().manual_seed(seed))

    def gradients(total):
        return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)

    def call(ids, **arguments):
        given = dict(input_ids=ids, **arguments) | (dict(use_cache=False) if run.head.stream else {})
        output = run.model(**given)
        return result_of(output), output.get("loss")

    more, counts, losses = {}, None, []
    if labelled is not None:
        labels, counts = labelled
        more = dict(labels=torch.cat(labels) if run.head.pooled else whole.lay(labels, -100))
    result, loss = call(whole.ids, attention_mask=whole.mask, **whole.arguments, **more)
    alone_results = []
    for i, text in enumerate(whole.texts):
        one = {} if labelled is None else dict(labels=labels[i] if run.head.pooled else labels[i][None])
        own, own_loss = call(text[None], **one)
        alone_results.append(own[0])
        if counts and counts[i]:
            losses.append(own_loss * counts[i])
    results = result if run.head.pooled else whole.of(result)
    for i, (got, want) in enumerate(zip(results, alone_results, strict=True)):
        assert_equal(got, want, f"document {i}")
    got = gradients(sum(x.square().sum() for x in results))
    expected = gradients(sum(x.square().sum() for x in alone_results))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1))
    if losses:
        own_loss = sum(losses) / sum(counts)
        torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=1e-6)  # transformers' loss is in float32
        for a, b in zip(gradients(loss), gradients(own_loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max() + 1))


@pytest.mark.works("packing")
@pytest.mark.parametrize("form", FORMS)
@over(lambda variant, head: not head.source)
def test_packed_documents(variant, head, form):
    """A document packed among others gives the result, the loss and the gradients that it gives alone."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    assert_packed(run, pack([[9, 1, 16, 5], [31], [3, 3, 25]], form, question=run.head.question))


@pytest.mark.parametrize("kind", ["left", "right", "middle", "holes"])
@over(lambda variant, head: not head.source)
def test_packed_documents_with_padding(variant, head, kind):
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    assert_packed(run, pack([[9, 2, 12], [8], [1, 7]], kind=kind, extra=3, question=run.head.question))


@given(data=st.data())
@over(lambda variant, head: not head.source)
def test_packed_anyhow(variant, head, data):
    """Documents packed anyhow: any lengths, any rows, any padding, told in any way."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    some = st.lists(st.integers(1, 17), min_size=1, max_size=5).filter(lambda row: sum(row) <= 40)
    rows = data.draw(st.lists(some, min_size=1, max_size=3), label="lengths")
    form = data.draw(st.sampled_from(FORMS), label="told by")
    kind = data.draw(st.sampled_from(["left", "right", "holes"]), label="padding")
    extra = data.draw(st.integers(0, 3), label="columns of padding")
    assert_packed(run, pack(rows, form, kind, extra, question=run.head.question))


@pytest.mark.works("packing")
@streams(of_head=lambda head: not head.source)
def test_packed_documents_go_on_in_a_cache(variant, head):
    """The first document of a row goes on from the row's past, a restart begins anew, and the cache keeps each row's
    last document, whether it began before or not."""
    run = runner(variant, head, dtype=torch.float64)
    texts = [words(n, seed=n) for n in (21, 9, 18, 30, 26)]
    a, b, c, d, e = texts
    first = torch.stack([a[:12], torch.cat([b, c[:3]]), d[:12]])
    second = torch.stack([torch.cat([a[12:], e[:4]]), c[3:16], e[:13]])
    places = [
        torch.stack([torch.arange(12), torch.cat([torch.arange(9), torch.arange(3)]), torch.arange(12)]),
        torch.stack([torch.cat([torch.arange(12, 21), torch.arange(4)]), torch.arange(3, 16), torch.arange(13)]),
    ]
    third = torch.stack([e[4:10], torch.cat([c[16:], a[:4]]), e[13:19]])
    wanted = [run(text[None])[0][0] for text in texts]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            result, cache = run(first, position_ids=places[0])
            assert cache.seen.tolist() == [12, 3, 12]
            assert_equal(result[1], torch.cat([wanted[1], wanted[2][:3]]))
            result, cache = run(second, None, cache, position_ids=places[1])
            assert cache.seen.tolist() == [4, 16, 13] and cache.get_seq_length() == 25
            assert_equal(result[0], torch.cat([wanted[0][12:], wanted[4][:4]]))
            assert_equal(result[1], wanted[2][3:16])
            assert_equal(result[2], wanted[4][:13])
            seq_idx = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1], [7] * 6])
            result, cache = run(third, None, cache, seq_idx=seq_idx)
            assert cache.seen.tolist() == [10, 4, 19]
            assert_equal(result[0], wanted[4][4:10])
            assert_equal(result[1], torch.cat([wanted[2][16:], wanted[0][:4]]))
            assert_equal(result[2], wanted[4][13:19])
            rest = torch.stack([e[10:14], a[4:8], e[19:23]])
            result, cache = run(rest, None, cache)
            assert_equal(result[1], wanted[0][4:8])


@given(data=st.data())
@causal()
def test_packed_in_any_chunks(variant, data):
    """Documents that follow one another in lanes, cut into chunks anywhere, with padding in every chunk."""
    run = runner(variant, "causal", dtype=torch.float64)
    b = data.draw(st.integers(1, 3), label="rows")
    lengths = [data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4), label="documents") for _ in range(b)]
    lanes = [[words(n, seed=10 * i + j) for j, n in enumerate(row)] for i, row in enumerate(lengths)]
    width = max(sum(row) for row in lengths)
    mask = padded([sum(row) for row in lengths], data.draw(st.sampled_from(["left", "right", "holes"])), width)
    ids, places = scatter([torch.cat(row) for row in lanes], mask), torch.zeros_like(mask)
    for i, row in enumerate(lengths):
        places[i, mask[i] == 1] = torch.cat([torch.arange(n) for n in row])
    results, cache, done = [], None, 0
    while done < width:
        end = min(width, done + data.draw(st.integers(1, 15), label="chunk"))
        with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients")):
            part = slice(done, end)
            result, cache = run(ids[:, part], mask[:, part], cache, position_ids=places[:, part])
        results.append(result.detach())
        done = end
    result = torch.cat(results, dim=1)
    for i, row in enumerate(lanes):
        assert_equal(result[i, mask[i] == 1], torch.cat(alone(run, row)), f"row {i}")


# ---- what stands in padding is nobody's


@pytest.mark.parametrize("attends", [False, True], ids=["", "attentions"])
@over()
def test_padding_may_hold_anything(variant, head, attends):
    """NaN and infinity in the embeddings of padding, a source's too, change no result, no loss and no gradient."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    if attends and variant.one_by_one:
        pytest.skip("its blocks run one after another, so there is no single map of attention")
    lengths = (19, 8, 3, 13)
    parameters = list(run.model.parameters())
    for kind in ("left", "right", "holes"):
        mask = padded(lengths, kind, 22)
        texts = {"": (scatter([words(n, seed=n) for n in lengths], mask), mask)}
        more = {}
        if run.head.source:
            texts = {"": run.sources(range(4)), "decoder_": texts[""]}
        if run.seeks_question:  # it is not found in embeddings
            more["global_attention_mask"] = mask * (mask.cumsum(1) <= 2)
        outcomes = []
        for value in (0.0, torch.nan, torch.inf):
            given, masks = [], {}
            for prefix, (ids, some) in texts.items():
                embeds = run.model.get_input_embeddings()(ids).detach()
                given.append(embeds.masked_fill((some == 0)[..., None], value).requires_grad_())
                masks |= {f"{prefix}inputs_embeds": given[-1], f"{prefix}attention_mask": some}
            output = run.model(**masks, **more, output_attentions=attends)
            result = result_of(output)
            seen = result if run.head.pooled else result[mask == 1]  # logits of an answer are least at padding
            gradients = torch.autograd.grad(seen.square().sum(), [*given, *parameters], allow_unused=True)
            outcomes.append((result, *(output.get("attentions") or ()), *gradients))
        for other in outcomes[1:]:
            assert all(torch.equal(x, y) for x, y in zip(other, outcomes[0], strict=True) if x is not None)


@streams(of_head=lambda head: not head.source)
def test_padding_may_hold_anything_in_every_chunk(variant, head):
    run = runner(variant, head, dtype=torch.float64)
    mask = padded((19, 8, 1, 13), "holes", 22)
    embeds = run.model.get_input_embeddings()(scatter([words(n, seed=n) for n in (19, 8, 1, 13)], mask)).detach()
    outcomes = []
    for value in (0.0, torch.nan):
        cache, results = None, []
        for part in embeds.masked_fill((mask == 0)[..., None], value).split(5, dim=1):
            some = mask[:, cache.get_seq_length() if cache else 0 :][:, : part.shape[1]]
            with torch.no_grad():
                result, cache = run(None, some, cache, embeds=part)
            results.append(result)
        outcomes.append(torch.cat(results, dim=1))
    assert torch.equal(*outcomes)


@given(lengths=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=12), min_size=1, max_size=6))
def test_few_columns_of_packed_documents_are_padding(lengths):
    """Each batch of documents has at most half as many columns again as tokens, and each document is in one."""
    whole = pack(lengths)
    rows = Rows(*whole.ids.shape, None if whole.mask is None else whole.mask == 1, None)
    documents = Documents(rows, *starts_of(whole, rows))
    batches = documents.alike(torch.ones(len(documents), dtype=torch.bool))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(whole.texts)))
    for some in batches:
        columns = documents.rows(some).width * len(some)
        assert columns <= 1.5 * int(documents.lengths[some].sum())
    (together,) = documents.alike(torch.ones(len(documents), dtype=torch.bool), together=True)
    assert together.tolist() == list(range(len(documents)))  # where ranks must call the layers equally often


def starts_of(whole, rows):
    starts = torch.cat([torch.arange(len(text)) == 0 for text in whole.texts])
    return starts, torch.zeros(rows.batch, dtype=torch.bool)


@five_causal
def test_packed_documents_with_dropout_and_checkpoints(variant):
    """Packed documents train with dropout, and checkpointed layers give the gradients that the others give."""
    whole, gradients = pack([[9, 1, 16, 5], [31], [3, 3, 25]]), []
    labels = whole.lay(whole.texts, -100)
    for checkpoints in (False, True):
        run = runner(variant, "causal", dtype=torch.float64)
        run.model.train()
        if checkpoints:
            checkpoint_activations(run.model, {"use_reentrant": False})
        torch.manual_seed(1)
        run.model(whole.ids, attention_mask=whole.mask, labels=labels, **whole.arguments).loss.backward()
        gradients.append([p.grad for p in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@five_causal
def test_hidden_states_of_packed_documents(variant):
    """They lie in the input's columns, of every layer."""
    run = runner(variant, "causal", dtype=torch.float64)
    whole = pack([[9, 1, 16, 5], [3, 3, 25]], extra=2)
    with torch.no_grad():
        states = run.model(
            whole.ids, attention_mask=whole.mask, output_hidden_states=True, **whole.arguments
        ).hidden_states
        for i, text in enumerate(whole.texts):
            for got, want in zip(states, run.model(text[None], output_hidden_states=True).hidden_states, strict=True):
                assert_equal(whole.of(got)[i], want[0])


@five_causal
def test_packed_documents_in_remote_code(variant, tmp_path):
    """A saved folder's own code keeps documents apart as the package does."""
    run = runner(variant, "causal")
    run.model.save_pretrained(tmp_path)
    kind = get_class_from_dynamic_module(run.model.config.auto_map["AutoModelForCausalLM"], str(tmp_path))
    loaded = kind.from_pretrained(tmp_path)
    assert not type(loaded).__module__.startswith("hf_gallery.")
    whole = pack([[9, 1, 16, 5], [3, 3, 25]], "all of them", extra=2)
    with torch.no_grad():
        arguments = dict(input_ids=whole.ids, attention_mask=whole.mask, **whole.arguments)
        assert_equal(loaded.eval()(**arguments).logits, run.model(**arguments).logits)
