"""torch.compile(fullgraph=True): a forward without a cache is one graph, padded or not, and so is a training step.
They give what the model gives without it, and refuse the same inputs."""

import pytest
import torch
from renamed import checkpoint_activations
from variants import (
    COLUMNS,
    VARIANTS,
    assert_equal,
    assert_trains_alike_in_one_graph,
    causal,
    missing,
    result_of,
    runner,
    words,
)


def cases(condition=lambda variant, head: True):
    """The causal head of each architecture; among the slow tests its other heads."""
    found = []
    for variant in VARIANTS:
        for head in variant.heads if variant.name in COLUMNS else ():
            marks = [*missing(variant), *([] if head == "causal" else [pytest.mark.slow])]
            if condition(variant, head):
                found.append(pytest.param(variant, head, id=f"{variant.name}-{head}", marks=marks))
    return found


def whole(model, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def mask_of(*shape):
    """Padding before, behind and in the midst of texts; every row has a token."""
    mask = (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) > 0.3).long()
    mask[:, shape[1] // 2] = 1
    return mask


def has_globals(variant, head):
    """Tells whether the head marks global tokens unasked; they decide how much there is to do, so a forward is several
    graphs."""
    return variant.name == "longformer" and head in ("sequence", "question", "choice")


@pytest.mark.works("torch.compile, one graph")
@pytest.mark.parametrize(("variant", "head"), cases(lambda variant, head: not has_globals(variant, head)))
def test_a_forward_is_one_graph(variant, head):
    run = runner(variant, head)
    run.model.config.use_cache = False  # decoders under a classifier keep one by themselves
    graph = whole(run.model)
    with torch.no_grad():
        for mask in (None, mask_of(2, 17)):
            inputs = run.inputs(words(2, 17), mask)
            assert_equal(result_of(graph(**inputs)), result_of(run.model(**inputs)), f"padded: {mask is not None}")


@pytest.mark.works("torch.compile, one graph")
@causal(others_slow=True)
def test_a_training_step_is_one_graph(variant):
    """Rows are padded."""
    run = runner(variant, "causal", hidden_dropout=0.0, attention_dropout=0.0)
    assert_trains_alike_in_one_graph(run.model.train(), words(2, 17), mask_of(2, 17))


@pytest.mark.slow
@causal(lambda variant: variant.name in COLUMNS)
def test_checkpointed_layers_are_in_the_graph(variant):
    model, ids = runner(variant, "causal", hidden_dropout=0.0, attention_dropout=0.0).model.train(), words(2, 17)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    checkpoint_activations(model, {"use_reentrant": False})
    whole(model)(input_ids=ids, labels=ids).loss.backward()
    for name, x in model.named_parameters():
        assert_equal(x.grad, expected[name], name)


@pytest.mark.slow
@causal(lambda variant: variant.name in COLUMNS and "recurrent" not in variant.name)
def test_a_graph_serves_other_lengths(variant):
    """More of them than the compiler would make graphs for; those that read block after block are of one length."""
    model = runner(variant, "causal").model
    graph = whole(model, backend="eager")
    with torch.no_grad():
        for length in range(14, 14 + torch._dynamo.config.recompile_limit + 2):
            ids = words(2, length)
            found, expected = graph(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits
            assert_equal(found, expected, f"{length} tokens")


def test_a_graph_refuses_what_the_model_refuses():
    """Ids and labels outside the vocabulary, at once, with what was found."""
    run = runner(next(v for v in VARIANTS if v.name == "transformer"), "causal")
    model, ids = run.model.train(), words(2, 9)
    graph, wrong = whole(model), words(2, 9)
    wrong[1, 3] = 5000
    graph(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match=r"input_ids holds ids outside the vocabulary.*found \[5000\]"):
        graph(input_ids=wrong, labels=ids)
    with pytest.raises(ValueError, match=r"labels holds others.*found \[5000\]"):
        graph(input_ids=ids, labels=wrong)
