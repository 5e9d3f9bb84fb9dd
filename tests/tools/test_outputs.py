"""Hidden states and attentions, which a model returns beside its result: asked for in the call or in the config."""

import pytest
import torch
from renamed import checkpoint_activations
from transformers import AutoConfig
from variants import COLUMNS, assert_equal, over, result_of, runner, words


def fields(output, kind):
    return {name: value for name, value in output.items() if name.endswith(kind) and value is not None}


def shows(variant, run, kind):
    """Tells whether this setting has maps of attention to show at all."""
    return kind == "hidden_states" or not variant.one_by_one


@pytest.mark.works("config.output_hidden_states and output_attentions")
@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
@over()
def test_what_the_config_asks_for_is_returned(variant, head, kind, tmp_path):
    """config.output_hidden_states and config.output_attentions ask as the arguments do, also from from_pretrained; an
    argument has the last word."""
    run = runner(variant, head)
    if not shows(variant, run, kind):
        pytest.skip("its blocks run one after another, so there is no single map of attention")
    inputs, name = run.inputs(words(2, 9)), f"output_{kind}"
    with torch.no_grad():
        assert not fields(run.model(**inputs), kind)
        expected = fields(run.model(**inputs, **{name: True}), kind)
        run.model.save_pretrained(tmp_path)
        loaded = type(run.model).from_pretrained(tmp_path, **{name: True})
        run.model.config = AutoConfig.from_pretrained(tmp_path)
        for model in (loaded, variant.make(head, **{name: True})):
            got = fields(model.eval()(**inputs), kind)
            assert got.keys() == expected.keys() and got
            for field, tensors in expected.items():
                for x, y in zip(got[field], tensors, strict=True):
                    assert_equal(x, y)  # products round by where weights lie in memory
            assert not fields(model(**inputs, **{name: False}), kind)


@over()
def test_a_config_that_asks_for_tuples_gets_them(variant, head):
    """Of the whole output; Llama hands the setting on to its inner model and fails on what comes back."""
    run = runner(variant, head)
    inputs = run.inputs(words(2, 9))
    expected = run.model(**inputs).to_tuple()
    run.model.config.return_dict = False
    found = run.model(**inputs)
    assert type(found) is tuple and len(found) == len(expected)
    assert torch.equal(found[0], expected[0])
    assert run.model(**inputs, return_dict=True).to_tuple()[0].equal(expected[0])


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@over(lambda variant, head: not head.source and not variant.one_by_one)
def test_gradients_are_retained_on_hidden_states(variant, head, padding):
    """Each hidden state that is returned lies on the way to the result, whose gradient it can keep."""
    run = runner(variant, head)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 1 - padding
    states = (output := run.model(**run.inputs(words(2, 9), mask), output_hidden_states=True)).hidden_states
    for state in states[:-1]:
        state.retain_grad()
    output[0].square().sum().backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in states[:-1])


# 23 tokens cross the borders of segments and blocks; the heads bring cross-attention and global tokens.
shows_maps = over(lambda variant, head: not variant.one_by_one)


def looked_at(variant, head, padding, parts):
    """A model in training without dropout, and the outputs of a text read in `parts`, with attentions and without."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :3] = mask[1, 9] = 1 - padding
    outputs = []
    for asked in (True, False):
        found, cache = [], None
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        for start, end in zip([0, *ends], ends, strict=False):
            inputs = run.inputs(words(2, 23)[:, start:end], mask[:, start:end])
            if run.head.stream:
                inputs |= dict(past_key_values=cache, use_cache=len(parts) > 1)
            found.append(run.model(**inputs, output_attentions=asked))
            cache = found[-1].get("past_key_values")
        outputs.append(found)
    return run.model, *outputs


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


def maps_of(output):
    return [x for tensors in fields(output, "attentions").values() for x in tensors]


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@shows_maps
def test_gradients_are_retained_on_attentions(variant, head, padding):
    """Each map that is returned lies on the way to the result, whose gradient it can keep; a loss on the maps reaches
    the parameters that made them."""
    model, (output,), _ = looked_at(variant, head, padding, (23,))
    for probabilities in maps_of(output):
        probabilities.retain_grad()
    result_of(output).square().sum().backward(retain_graph=True)
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps_of(output)) and maps_of(output)
    learned = gradients(model, sum(x.square().sum() for x in maps_of(output)))
    for name in ("q_proj", "k_proj"):
        own = [g for key, g in learned.items() if f"attn.{name}.weight" in key or f"attn.project.{name}.weight" in key]
        assert own and all(g is not None and g.abs().sum() > 0 for g in own)


@pytest.mark.parametrize("parts", [(23,), (9, 1, 13)], ids=str)
@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@shows_maps
def test_attentions_change_neither_result_nor_gradients(variant, head, padding, parts):
    """With output_attentions results are the same, and so are the gradients of all parameters: none is counted twice,
    and none passes the border of a segment."""
    if len(parts) > 1 and not variant.heads[head].stream:
        pytest.skip("reads its input at once")
    model, shown, plain = looked_at(variant, head, padding, parts)
    for got, expected in zip(shown, plain, strict=True):
        assert_equal(result_of(got), result_of(expected))
    got, expected = (gradients(model, sum(result_of(o).square().sum() for o in found)) for found in (shown, plain))
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-9 * float(gradient.abs().max()) + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@shows_maps
def test_attentions_under_autocast_are_as_exact(variant, head, dtype):
    """The probabilities are in float32 and make the same result as without them."""
    run = runner(variant, head)
    inputs = run.inputs(words(2, 23))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        output, plain = (run.model(**inputs, output_attentions=asked) for asked in (True, False))
    assert all(x.dtype == torch.float32 for x in maps_of(output))
    difference = (result_of(output).float() - result_of(plain).float()).abs().max()
    assert difference <= 8 * torch.finfo(dtype).eps * result_of(plain).float().abs().max()


@shows_maps
def test_dropout_leaves_the_attentions_that_are_returned(variant, head):
    """Dropout acts on the probabilities that weigh the values, not on those that are returned."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.5)
    inputs = run.inputs(words(2, 9))
    with torch.no_grad():
        whole = run.model(**inputs, output_attentions=True)
        run.model.train()
        torch.manual_seed(0)
        dropped = run.model(**inputs, output_attentions=True)
    assert_equal(maps_of(dropped)[0], maps_of(whole)[0])  # of the first layer, which no dropout stands before
    assert (result_of(dropped) - result_of(whole)).abs().max() > 1e-3


def learned(model, inputs, call):
    """Result, maps and all gradients of a loss on both."""
    model.zero_grad()
    output = call(**inputs, output_attentions=True)
    (result_of(output).square().sum() + sum(x.square().sum() for x in maps_of(output))).backward()
    found = [result_of(output), *maps_of(output), *(p.grad for p in model.parameters())]
    return [x.detach().clone() if x is not None else torch.zeros(0) for x in found]


def in_training(variant, head, **settings):
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0, **settings)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :3] = 0
    return run.model.train(), run.inputs(words(2, 23), mask) | ({"use_cache": False} if run.head.stream else {})


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@shows_maps
def test_a_loss_on_attentions_passes_checkpoints(variant, head, reentrant):
    """Activations computed again give the same maps, and what is learned from them is the same too. A gradient is
    retained on none of them by reentrant checkpoints, which compute without a graph at first; nor is it on Llama's."""
    model, inputs = in_training(variant, head, dtype=torch.float64)
    expected = learned(model, inputs, model)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    for got, want in zip(learned(model, inputs, model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.works("torch.compile")
@over(lambda variant, head: variant.name in COLUMNS and "LM" in head.auto and variant.name != "recurrent_memory")
def test_a_loss_on_attentions_of_a_compiled_model(variant, head):
    """Compiled forward and backward give the maps and the gradients that the model gives."""
    torch.compiler.reset()
    model, inputs = in_training(variant, head, dtype=torch.float64)
    expected = learned(model, inputs, model)
    for got, want in zip(learned(model, inputs, torch.compile(model, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
