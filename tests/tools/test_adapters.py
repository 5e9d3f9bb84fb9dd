"""Adapters by PEFT on every variant and head: an untrained one changes nothing, a trained one acts at full size, and
merged into the model it says the same."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from variants import assert_equal, over, result_of, runner, words

TOKENS = [3, 14, 15, 92]
MASK = torch.ones(2, 17, dtype=torch.long)
MASK[1, :4] = 0


def says(run, model):
    with torch.no_grad():
        return result_of(model(**run.inputs(prompt(), MASK)))


def prompt():
    ids = words(2, 17)
    ids[:, 5:8] = torch.tensor(TOKENS[:3])
    return ids


def is_adaptive(variant):
    return bool(variant.settings.get("cutoffs"))


def tables(model):
    """The names of the tables that tokens are embedded by."""
    ends = ("embed_tokens", "tables.0", "tables.1", "tables.2")
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding) and name.endswith(ends)]


def trained(adapted):
    """Gives every parameter of the adapter a size that shows."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if any(word in name for word in ("lora_", "ia3_", "trainable_tokens_delta")):
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def adapter(kind, model):
    maps = ["q_proj", "v_proj", "down_proj"]
    if kind == "ia3":
        return IA3Config(target_modules=["k_proj", *maps[1:]], feedforward_modules=["down_proj"])
    embedded = [] if kind == "trainable tokens" else tables(model)
    tokens = TOKENS if kind == "trainable tokens" else None
    return LoraConfig(r=3, target_modules=maps + embedded, use_dora=kind == "dora", trainable_token_indices=tokens)


@pytest.mark.works("PEFT trainable tokens, DoRA, IA3")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "trainable tokens"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@over(lambda variant, head: not is_adaptive(variant))
def test_an_untrained_adapter_changes_nothing_and_a_merged_one_neither(variant, head, kind, tied):
    run = runner(variant, head, dtype=torch.float64, tie_word_embeddings=tied)
    if not tied and run.model.get_output_embeddings() is None:
        pytest.skip("has nothing to tie")
    bare = says(run, run.model)
    adapted = get_peft_model(run.model, adapter(kind, run.model)).eval()
    if kind in ("dora", "trainable tokens"):  # the norm of a row, and a bias that is added apart, round once more
        assert_equal(says(run, adapted), bare)
    else:
        assert torch.equal(says(run, adapted), bare)
    told = says(run, trained(adapted))
    assert (told - bare).abs().max() > 0.01
    if kind in ("lora", "dora") and tied:
        return  # merged into one table, an adapter of the embedding reaches the head too: PEFT warns of it
    assert_equal(says(run, adapted.merge_and_unload()), told)


@over(lambda variant, head: not is_adaptive(variant))
def test_a_trained_token_is_the_token_of_a_model_with_that_row(variant, head):
    run = runner(variant, head, dtype=torch.float64)
    rows = torch.randn(len(TOKENS), run.model.config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    other = copy.deepcopy(run.model)
    with torch.no_grad():
        other.get_input_embeddings().weight[TOKENS] = rows
    adapted = get_peft_model(run.model, adapter("trainable tokens", run.model)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(rows)
    assert_equal(says(run, adapted), says(run, other))


@over(lambda variant, head: is_adaptive(variant))
def test_tables_of_an_adaptive_embedding_take_lora(variant, head):
    run = runner(variant, head, dtype=torch.float64, tie_word_embeddings=False)
    bare = says(run, run.model)
    adapted = get_peft_model(run.model, adapter("lora", run.model)).eval()
    assert torch.equal(says(run, adapted), bare)
    told = says(run, trained(adapted))
    assert (told - bare).abs().max() > 0.01
    assert_equal(says(run, adapted.merge_and_unload()), told)


@over(lambda variant, head: is_adaptive(variant))
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS),
    ],
    ids=["lora", "trainable tokens"],
)
def test_an_adaptive_embedding_as_a_whole_is_refused(variant, head, config):
    run = runner(variant, head, dtype=torch.float64)
    refused = "AdaptiveEmbedding|cannot be applied to modules of type|wraps an unknown layer type"
    with pytest.raises((ValueError, AttributeError, TypeError), match=refused):
        says(run, get_peft_model(run.model, config))
