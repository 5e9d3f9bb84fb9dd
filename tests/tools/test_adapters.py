"""Adapters by PEFT on every variant and head: an untrained one changes nothing, a trained one acts at full size, and
merged into the model it says the same."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from variants import VOCAB, assert_equal, over, result_of, runner, words

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
    if kind == "trainable tokens alone":
        return TrainableTokensConfig(token_indices=TOKENS)
    embedded = [] if kind == "trainable tokens" else tables(model)
    tokens = TOKENS if kind == "trainable tokens" else None
    return LoraConfig(r=3, target_modules=maps + embedded, use_dora=kind == "dora", trainable_token_indices=tokens)


@pytest.mark.works("PEFT trainable tokens, DoRA, IA3")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "trainable tokens", "trainable tokens alone"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@over(lambda variant, head: not is_adaptive(variant))
def test_an_untrained_adapter_changes_nothing_and_a_merged_one_neither(variant, head, kind, tied):
    """Nothing at all, but where a tied head has a bias: PEFT's trainable tokens multiply by the table without it, and
    a bias that is added apart rounds once more, 1e-14 of float64."""
    run = runner(variant, head, dtype=torch.float64, tie_word_embeddings=tied)
    output = run.model.get_output_embeddings()
    if not tied and output is None:
        pytest.skip("heads without an output layer have no weights to untie")
    if kind == "trainable tokens alone" and head == "seq2seq" and not tied:
        pytest.skip("PEFT reaches the one table that encoder and decoder no longer share, of BART too")
    bare = says(run, run.model)
    rounds = tied and "tokens" in kind and getattr(output, "bias", None) is not None
    adapted = get_peft_model(run.model, adapter(kind, run.model)).eval()
    torch.testing.assert_close(says(run, adapted), bare, rtol=0, atol=1e-13 if rounds else 0)
    told = says(run, trained(adapted))
    assert (told - bare).abs().max() > 0.01
    if kind in ("lora", "dora") and tied:
        return  # merged into one table, an adapter of the embedding reaches the head too: see below
    assert_equal(says(run, adapted.merge_and_unload()), told)


def causal_head(variant, head):
    return head.auto == "AutoModelForCausalLM" and not is_adaptive(variant)


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).double().eval()


def untie(model):
    """Gives the head a table of its own, the same numbers, as the guide says."""
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@pytest.mark.works("PEFT trainable tokens, DoRA, IA3")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@over(causal_head)
def test_an_adapter_of_a_tied_embedding_merges_once_the_head_is_untied(variant, head, kind, tmp_path):
    """One table cannot hold a sum for the embedding and none for the head: merged into it, an adapter of the embedding
    alone changes what the head says, on Llama too (the next test). Untied before, it merges to 1e-5 and travels."""
    run = runner(variant, head, dtype=torch.float64)
    bare = says(run, run.model)
    untie(run.model)
    adapted = trained(get_peft_model(run.model, adapter(kind, run.model)).eval())
    told = says(run, adapted)
    assert (told - bare).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(says(run, merged), told, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(says(run, again), told, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_llamas_tied_embedding_does_not_merge_either(kind):
    """A model that the test above is held against; PEFT warns of it."""
    model = llama()
    adapted = trained(get_peft_model(model, adapter(kind, model)).eval())
    with torch.no_grad():
        told = adapted(input_ids=prompt()).logits
        assert (adapted.merge_and_unload()(input_ids=prompt()).logits - told).abs().max() > 0.01
        model = llama()
        untie(model)
        adapted = trained(get_peft_model(model, adapter(kind, model)).eval())
        assert_equal(adapted(input_ids=prompt()).logits, adapted.merge_and_unload()(input_ids=prompt()).logits)


@over(lambda variant, head: not is_adaptive(variant) and head.auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM"))
def test_an_embedding_that_is_saved_whole_keeps_its_head(variant, head):
    """PEFT ties a new head to it that has no bias; where the model's has one, that is refused."""
    run = runner(variant, head, dtype=torch.float64)
    bare = says(run, run.model)
    has_bias = run.model.get_output_embeddings().bias is not None
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapted = get_peft_model(run.model, config).eval()
    if has_bias:
        with pytest.raises(ValueError, match="lm_head without its bias.*leave ensure_weight_tying out"):
            says(run, adapted)
    else:
        assert torch.equal(says(run, adapted), bare)
    run = runner(variant, head, dtype=torch.float64)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert torch.equal(says(run, get_peft_model(run.model, config).eval()), bare)


@over(lambda variant, head: not is_adaptive(variant))
def test_a_trained_token_is_the_token_of_a_model_with_that_row(variant, head):
    run = runner(variant, head, dtype=torch.float64)
    size = (len(TOKENS), run.model.config.embedding_width)
    rows = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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
