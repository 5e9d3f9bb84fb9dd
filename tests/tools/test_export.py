"""torch.export and ONNX: one graph of a forward serves other batches and lengths than those that it was traced with,
padded or not, and gives what the model gives."""

import numpy as np
import pytest
import torch
from variants import COLUMNS, VARIANTS, assert_equal, missing, over, result_of, runner, words

BATCH = torch.export.Dim("batch", min=1, max=64)
LOOKING = ("longformer", True)  # it looks for the question's end
TOKENS = torch.export.Dim("tokens", min=2, max=512)


def exported(run, arguments, tokens=TOKENS):
    """The graph of a model's forward, whose arguments may grow in both dimensions. tokens: None for a fixed length."""
    shapes = {name: {0: BATCH} | ({1: tokens} if tokens else {}) for name in arguments}
    if "decoder_input_ids" in arguments:
        source = torch.export.Dim("source", min=2, max=32)  # which all encoders can read
        shapes |= {name: {0: BATCH, 1: source} for name in arguments if not name.startswith("decoder")}
    return torch.export.export(run.model, (), arguments, dynamic_shapes=shapes).module()


def recurrent(variant):
    """Tells whether it reads block after block, and is exported for one length."""
    return "recurrent" in variant.name


def mask_of(*shape):
    """Padding before, behind and in the midst of texts; every row has a token."""
    mask = (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) > 0.3).long()
    mask[:, shape[1] // 2] = 1
    return mask


def plain_and_slow():
    """Every head of the plain variants, padded; among the slow tests one head of each without padding, and one of each
    other variant, which differ below the heads."""
    for variant in VARIANTS:
        plain = variant.name in COLUMNS
        for head in variant.heads if plain else list(variant.heads)[:1]:
            for padded in (True, False) if plain and head == next(iter(variant.heads)) else (True,):
                marks = [*missing(variant), *([] if plain and padded else [pytest.mark.slow])]
                name = f"{variant.name}-{head}-{'padded' if padded else 'whole'}"
                yield pytest.param(variant, head, padded, id=name, marks=marks)


@pytest.mark.works("torch.export")
@pytest.mark.parametrize(("variant", "head", "padded"), list(plain_and_slow()))
def test_a_graph_serves_all_shapes(variant, head, padded):
    run = runner(variant, head)

    def inputs(*shape):
        return run.inputs(words(*shape, seed=shape[1]), mask_of(*shape) if padded else None)

    first, others = (2, 17), [(2, 17), (3, 40), (1, 5)]
    if recurrent(variant):  # one length
        others = [(2, 17), (3, 17)]
    if variant.limit is not None:
        others = [(b, min(t, variant.limit)) for b, t in others]
    graph = exported(run, inputs(*first), None if recurrent(variant) else limited(variant))
    with torch.no_grad():
        for shape in others:
            assert_equal(result_of(graph(**inputs(*shape))), result_of(run.model(**inputs(*shape))), str(shape))


def limited(variant):
    return TOKENS if variant.limit is None else torch.export.Dim("tokens", min=2, max=variant.limit)


@over(lambda variant, head: variant.name in COLUMNS and head.auto == "AutoModelForCausalLM")
def test_what_a_graph_cannot_hold_is_refused(variant, head):
    run = runner(variant, head)
    ids = words(2, 9)
    for more, said in (
        ({"use_cache": True}, "use_cache"),
        ({"position_ids": torch.arange(9).expand(2, -1)}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 18]), "cu_seq_lens_k": torch.tensor([0, 9, 18])}, "cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=f"{said} is given under torch.export"):
            torch.export.export(run.model, (), {"input_ids": ids} | more)


@over(lambda variant, head: variant.name in COLUMNS and not head.source and head.auto != "AutoModel")
def test_labels_are_refused(variant, head):
    run = runner(variant, head)
    ids = run.inputs(words(2, 9))["input_ids"]
    labels = torch.zeros(2, dtype=torch.long) if run.head.pooled else ids
    more = {"labels": labels}
    if run.head.question and not run.head.choices:
        more = {"start_positions": torch.ones(2, dtype=torch.long), "end_positions": torch.ones(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"{next(iter(more))} is given under torch.export"):
        torch.export.export(run.model, (), {"input_ids": ids} | more)


def test_an_index_is_no_graph():
    variant = next(v for v in VARIANTS if v.name == "memorizing")
    run = runner(variant, "causal", memory_backend="faiss_hnsw")
    with pytest.raises(ValueError, match="whose index no graph can hold"):
        torch.export.export(run.model, (), {"input_ids": words(2, 29)})


@over(lambda variant, head: variant.name in COLUMNS and (head.pooled or (variant.name, head.question) == LOOKING))
def test_rows_that_say_nothing_are_asserted(variant, head):
    run, mask = runner(variant, head), torch.ones(2, 9, dtype=torch.long)
    graph = exported(run, run.inputs(words(2, 9), mask), None if recurrent(variant) else limited(variant))
    if run.seeks_question:
        with pytest.raises(RuntimeError, match="without a sep_token_id"):
            graph(input_ids=words(2, 9), attention_mask=mask)
    else:
        mask[1] = 0
        with pytest.raises(RuntimeError, match="rows without a token"):
            graph(input_ids=words(2, 9), attention_mask=mask)


@over(lambda variant, head: variant.name in COLUMNS and head.auto == "AutoModelForCausalLM")
def test_a_model_in_training_is_refused(variant, head):
    """Its dropout would be left out of attention."""
    with pytest.raises(ValueError, match="call model.eval\\(\\) first"):
        torch.export.export(runner(variant, head).model.train(), (), {"input_ids": words(2, 9)})


@over(lambda variant, head: head.auto == "AutoModelForCausalLM" and not recurrent(variant))
def test_a_graph_asserts_its_input(variant, head):
    run = runner(variant, head)
    graph = exported(run, {"input_ids": words(2, 9), "attention_mask": mask_of(2, 9)}, limited(variant))
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        graph(input_ids=torch.full((2, 9), 1000), attention_mask=mask_of(2, 9))
    with pytest.raises(RuntimeError, match="1 at tokens and 0 at padding"):
        graph(input_ids=words(2, 9), attention_mask=torch.full((2, 9), 3))


@over(lambda variant, head: variant.name in COLUMNS and head.auto == "AutoModelForMaskedLM")
def test_token_types_are_in_the_graph(variant, head):
    run = runner(variant, head, type_vocab_size=2)
    types = (torch.arange(9) > 4).long().expand(2, -1)
    graph = exported(run, {"input_ids": words(2, 9), "token_type_ids": types}, limited(variant))
    with torch.no_grad():
        other = {"input_ids": words(3, 6), "token_type_ids": torch.ones(3, 6, dtype=torch.long)}
        assert_equal(graph(**other).logits, run.model(**other).logits)
    with pytest.raises(RuntimeError, match="types that there are not"):
        graph(input_ids=words(3, 6), token_type_ids=torch.full((3, 6), 2))


@over(
    lambda variant, head: variant.name in ("longformer", "longformer_dilated") and head.auto == "AutoModelForCausalLM"
)
def test_global_tokens_of_a_decoder_are_in_the_graph(variant, head):
    def inputs(*shape):
        marks = (torch.arange(shape[1]) % 7 == 1).long().expand(shape)
        return {"input_ids": words(*shape, seed=shape[1]), "global_attention_mask": marks}

    run = runner(variant, head)
    graph = exported(run, inputs(2, 17), limited(variant))
    with torch.no_grad():
        assert_equal(graph(**inputs(3, 40)).logits, run.model(**inputs(3, 40)).logits)


@over(lambda variant, head: head.auto == "AutoModelForCausalLM" and recurrent(variant))
def test_blocks_that_follow_one_another_have_one_length(variant, head):
    with pytest.raises(ValueError, match="export it for one length"):
        exported(runner(variant, head), {"input_ids": words(2, 9)})


# ---- ONNX


@pytest.mark.slow
@pytest.mark.works("torch.onnx")
@over(lambda variant, head: variant.name in COLUMNS and not head.source)
def test_onnxruntime_says_the_same(variant, head, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run = runner(variant, head)
    tokens = None if recurrent(variant) else limited(variant)

    def inputs(*shape):
        return run.inputs(words(*shape, seed=shape[1]), mask_of(*shape))

    shapes = {name: {0: BATCH} | ({1: tokens} if tokens else {}) for name in inputs(2, 17)}
    program = torch.onnx.export(run.model, (), kwargs=inputs(2, 17), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in [(2, 17), (3, 17)] if recurrent(variant) else [(2, 17), (3, 29)]:
        found = session.run(None, {name: x.numpy() for name, x in inputs(*shape).items()})
        with torch.no_grad():
            expected = result_of(run.model(**inputs(*shape)))
        two = run.head.question and not run.head.choices  # the logits of an answer's start and end
        found = torch.from_numpy(np.stack(found[:2], axis=-1) if two else found[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
