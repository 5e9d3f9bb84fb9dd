"""Tables and derived state of a cache follow the weights when they change; a saved cache knows its weights.

The reference is the same past in a cache that keeps nothing but the past.
"""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from variants import assert_equal, causal, runner, streams, words

from hf_gallery import GalleryCache
from hf_gallery.models import modeling_block_recurrent_transformer, modeling_memorizing_transformer
from hf_gallery.models.weights import sample_weights

causal_models = streams(of_head=lambda head: head.auto == "AutoModelForCausalLM")


def step_of(name):
    """An optimiser's step on all weights that stand in a model."""

    def step(model):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        kind, options = dict(sgd=(torch.optim.SGD, {}), adam=(torch.optim.AdamW, {}))[name.split("_")[0]]
        if "_" in name:
            options = {name.split("_")[1]: True}
        kind(model.parameters(), lr=0.1, **options).step()
        model.zero_grad()

    return step


def load_state(model):
    model.load_state_dict({name: x + 0.1 * torch.randn_like(x) for name, x in model.state_dict().items()})


def replace_weights(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight + 0.1 * torch.randn_like(module.weight))


def point_elsewhere(model):
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)


def write_to(*endings):
    """A write to the weights of these names, and to no others."""

    @torch.no_grad()
    def write(model):
        for name, x in model.named_parameters():
            if name.endswith(endings):
                x.add_(0.3 * torch.randn_like(x))

    return write


CHANGES = {name: step_of(name) for name in ("sgd", "adam", "adam_foreach", "adam_fused")}
CHANGES |= {"load_state_dict": load_state, "parameters": replace_weights, "data": point_elsewhere}
CHANGES |= {"biases": write_to("relative_bias.table.weight", "r_proj.weight"), "scales": write_to("project.scale")}


def without_derived(cache):
    other = cache.copy()
    other._content = other._content.without_derived()
    return other


@pytest.mark.parametrize("change", CHANGES)
@causal_models
def test_tables_follow_the_weights(variant, head, change):
    """After any change the cache gives what its keys and values give with tables of the new weights."""
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 9))
        run(words(2, 1, seed=1), cache=cache)
    CHANGES[change](run.model)
    with torch.no_grad():
        plain = without_derived(cache)
        for seed in (2, 3):
            more = words(2, 4, seed=seed)
            assert_equal(run(more, cache=cache)[0], run(more, cache=plain)[0])


@causal_models
def test_a_reset_cache_is_as_new_after_a_step(variant, head):
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 9))
        run(words(2, 1, seed=1), cache=cache)
        # Writes that torch does not count, as some optimisers on the GPU make them; a reset still starts anew.
        for p in run.model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        cache.reset_rows([0, 1])
        more = words(2, 9, seed=2)
        assert_equal(run(more, cache=cache)[0], run(more)[0])


def linear_maps(model):
    return sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"})


@causal_models
def test_tables_follow_an_adapter(variant, head):
    """Switched off, on again, merged, taken back: each time the tables are those of what the model now computes."""
    run = runner(variant, head)
    model = get_peft_model(run.model, LoraConfig(r=2, target_modules=linear_maps(run.model), init_lora_weights=False))
    model.eval()

    def go_on():
        with torch.no_grad():
            plain, more = without_derived(cache), words(2, 3, seed=7)
            got, expected = (model(more, past_key_values=c).logits for c in (cache, plain))
        assert_equal(got, expected)
        return got

    with torch.no_grad():
        cache = model(words(2, 9), use_cache=True).past_key_values
    go_on()
    with model.disable_adapter():
        go_on()
    go_on()
    model.merge_adapter()
    go_on()
    model.unmerge_adapter()
    go_on()
    for layer in model.modules():
        if hasattr(layer, "scaling") and "default" in layer.scaling:
            layer.set_scale("default", 3.0)
    go_on()


@causal_models
def test_tables_are_made_once(variant, head):
    """While the weights stay, a token costs no table."""
    run = runner(variant, head)
    projections = [m for name, m in run.model.named_modules() if name.endswith("r_proj")]
    calls = []
    with torch.no_grad():
        _, cache = run(words(2, 9))
        for module in projections:
            module.weight.register_hook(lambda *_: None)  # not a forward's hook: says nothing of what is computed
        count = len(cache._content.tables)
        held = {i: x.data_ptr() for i, x in cache._content.tables.items()}
        for _ in range(3):
            run(words(2, 1), cache=cache)
    keeps = any(name.endswith(("r_proj", "relative_bias")) for name, _ in run.model.named_modules())
    assert count == keeps * run.model.config.num_hidden_layers and not calls
    assert {i: x.data_ptr() for i, x in cache._content.tables.items()} == held


@causal(lambda variant: variant.name in ("memorizing", "block_recurrent"))
def test_a_table_of_very_many_distances_is_not_kept(variant, monkeypatch):
    """A forward makes what it reaches, however long segments or blocks may be."""
    run = runner(variant, "causal")
    expected = run(words(2, 12))[0]
    for module in (modeling_memorizing_transformer, modeling_block_recurrent_transformer):
        monkeypatch.setattr(module, "LARGEST_TABLE", 1)
    with torch.no_grad():
        first, cache = run(words(2, 12)[:, :9])
        second, cache = run(words(2, 12)[:, 9:], cache=cache)
    assert_equal(torch.cat([first, second], 1), expected)
    assert not cache._content.tables


# ---- files


@causal_models
def test_a_saved_cache_is_of_its_weights(variant, head, tmp_path):
    """Another model of the same configuration is refused, unless the caller says that it is meant."""
    run, other = runner(variant, head), runner(variant, head, seed=1)
    with torch.no_grad():
        _, cache = run(words(2, 9))
    cache.save(tmp_path / "book")
    more = words(2, 3, seed=1)
    with torch.no_grad():
        loaded = GalleryCache.load(tmp_path / "book")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"past_key_values.*other weights.*any_weights=True"):
                other(more, cache=loaded)
        loaded.copy().save(tmp_path / "again")  # a file goes on knowing it
        with pytest.raises(ValueError, match="other weights"):
            other(more, cache=GalleryCache.load(tmp_path / "again"))
        assert_equal(run(more, cache=loaded)[0], run(more, cache=cache.copy())[0])
        other(more, cache=GalleryCache.load(tmp_path / "book", any_weights=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@causal_models
def test_the_same_weights_in_another_precision_are_the_same(variant, head, dtype, tmp_path):
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 9))
        cache.save(tmp_path / "book")
        run.model.to(dtype)
        run(words(2, 3, seed=1), cache=GalleryCache.load(tmp_path / "book"))
        with pytest.raises(ValueError, match="other weights"):
            other = runner(variant, head, seed=1, dtype=dtype)
            other(words(2, 3, seed=1), cache=GalleryCache.load(tmp_path / "book"))


@causal_models
def test_an_adapter_makes_other_weights_while_it_is_on(variant, head, tmp_path):
    run = runner(variant, head)
    more = words(2, 3, seed=1)
    with torch.no_grad():
        _, cache = run(words(2, 9))
        cache.save(tmp_path / "book")
        settings = LoraConfig(r=2, target_modules=linear_maps(run.model), init_lora_weights=False)
        model = get_peft_model(run.model, settings).eval()
        with pytest.raises(ValueError, match="other weights"):
            model(more, past_key_values=GalleryCache.load(tmp_path / "book"))
        with model.disable_adapter():
            model(more, past_key_values=GalleryCache.load(tmp_path / "book"))


@pytest.mark.parametrize("change", ["first", "one", "last", "swapped"])
@causal_models
def test_every_row_of_a_table_counts(variant, head, change, tmp_path):
    """Tokens that were read had the rows of another embedding, say one whose new tokens have been trained since."""
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 9))
        cache.save(tmp_path / "book")
        table = next(
            m for m in run.model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings > 8
        ).weight
        if change == "swapped":
            table[[5, 6]] = table[[6, 5]]
        else:
            table[{"first": 1, "one": 6, "last": -1}[change]] += 0.01
        with pytest.raises(ValueError, match="other weights .*differs"):
            run(words(2, 3, seed=1), cache=GalleryCache.load(tmp_path / "book"))


@pytest.mark.parametrize("row", [1, 8_192, 16_384, 32_800, 49_999])
def test_a_row_of_a_large_table_counts(row):
    table = torch.nn.Embedding(50_000, 32)
    torch.nn.init.normal_(table.weight, 0.0, 0.02)
    before = sample_weights(table)
    assert before.difference(sample_weights(table)) is None
    with torch.no_grad():
        table.weight[row] += 0.001
    assert before.difference(sample_weights(table)) is not None


def test_a_grown_vocabulary_is_no_other_model(tmp_path):
    from variants import VARIANTS

    run = runner(VARIANTS[0], "causal")
    with torch.no_grad():
        _, cache = run(words(2, 9))
        cache.save(tmp_path / "book")
        run.model.resize_token_embeddings(120)
        run(words(2, 3, seed=1), cache=GalleryCache.load(tmp_path / "book"))


def test_a_file_without_weights_says_so(tmp_path, caplog):
    """Its model was gone when it was saved, or an earlier version saved it."""
    from variants import VARIANTS

    run = runner(VARIANTS[0], "causal")
    with torch.no_grad():
        _, cache = run(words(2, 9))
    twin = copy.deepcopy(run.model)
    run.model = None
    cache.save(tmp_path / "book")
    with caplog.at_level(logging.WARNING):
        loaded = GalleryCache.load(tmp_path / "book")
    assert len(caplog.records) == 1 and "book" in caplog.text and "weights" in caplog.text
    twin(words(2, 3), past_key_values=loaded)


# ---- precision and inference mode


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@streams()
def test_a_cache_of_inference_is_trained_on(variant, head, mode):
    """Made where nothing is recorded, then continued with gradients; and the other way around."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0)
    text, more = words(2, 15), words(2, 8, seed=1)
    with mode():
        _, cache = run(text)
        run(words(2, 1, seed=2), cache=cache)
        expected, _ = run(more, cache=cache.copy())
    run.model.train()
    result, cache = run(more, cache=cache)
    assert_equal(result.detach(), expected.clone())
    result.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.model.parameters())
    run.model.eval()
    with mode():
        for i in range(9):
            run(words(2, 1, seed=i), cache=cache)
        cache.reset_rows([0]) if not variant.heads[head].source else cache.reorder_cache(torch.tensor([1, 0]))
    run(more, cache=cache)[0].square().mean().backward()


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")], ids=str)
@streams()
def test_a_cache_of_another_precision(variant, head, dtypes, gradients):
    """A model takes the cache that it left before it was cast."""
    first, second = (getattr(torch, name) for name in dtypes)
    run = runner(variant, head, dtype=first, hidden_dropout=0.0, attention_dropout=0.0)
    with torch.no_grad():
        _, cache = run(words(2, 15))
        run(words(2, 1, seed=2), cache=cache)
    run.model.to(second)
    with torch.set_grad_enabled(gradients):
        for n in (8, 1, 7, 1):
            result, cache = run(words(2, n, seed=n), cache=cache)
            assert result.isfinite().all()
