"""What a model returns beside its result, hidden states and attentions, asked for in the call or in the config."""

import pytest
import torch
from transformers import AutoConfig
from variants import over, runner, words


def fields(output, kind):
    return {name: value for name, value in output.items() if name.endswith(kind) and value is not None}


def shows(variant, run, kind):
    """Whether this setting has maps of attention to show at all."""
    return kind == "hidden_states" or not getattr(run.model.config, "feedback", False)


@pytest.mark.works("config.output_hidden_states and output_attentions")
@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
@over()
def test_what_the_config_asks_for_is_returned(variant, head, kind, tmp_path):
    """config.output_hidden_states and config.output_attentions ask as the arguments do, also from from_pretrained; an
    argument has the last word."""
    run = runner(variant, head)
    if not shows(variant, run, kind):
        pytest.skip("blocks run one by one, so there is no one map")
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
                assert all(torch.equal(x, y) for x, y in zip(got[field], tensors, strict=True))
            assert not fields(model(**inputs, **{name: False}), kind)


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@over(lambda variant, head: not head.source and not variant.settings.get("feedback"))
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
