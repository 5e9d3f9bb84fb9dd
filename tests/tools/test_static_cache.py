"""GalleryStaticCache: a decode step is one graph, the same at every token, and gives what a GalleryCache gives.

Also caches of both kinds as pytrees, which torch.export takes."""

import io
import re
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils import _pytree as pytree
from variants import COLUMNS, VARIANTS, assert_equal, causal, runner, streams, words

from hf_gallery import GalleryCache, GalleryStaticCache
from hf_gallery.models.cache_tree import register_gallery_cache_export_support

LENGTH = 61  # of texts; past every ring of a bounded cache


def holds(variant):
    """Tells whether a static cache can hold what its layers keep."""
    return variant.make_config(next(iter(variant.heads))).why_no_static_cache is None


def plain(variant):
    return variant.name in COLUMNS and holds(variant)


def small(variant):
    """A causal model of two layers: what is compiled takes a while."""
    return runner(variant, "causal", num_hidden_layers=2, **variant.shallow)


def caches(run, length=LENGTH):
    return GalleryCache(run.model.config), GalleryStaticCache(run.model.config, length)


def left_padded(*shape):
    """Row i begins 3 i columns late."""
    return (torch.arange(shape[1]) >= 3 * torch.arange(shape[0])[:, None]).long()


@streams(holds)
def test_results_are_those_of_a_growing_cache(variant, head):
    """Of a padded prompt, of steps past the end of every ring with padding among them, of a longer piece between."""
    run = runner(variant, head)
    growing, static = caches(run)
    texts = words(3, 52)
    pieces = [(texts[:, :11], left_padded(3, 11))]
    pieces += [(texts[:, i : i + 1], None if i % 5 else torch.tensor([[1], [0], [1]])) for i in range(11, 30)]
    pieces += [(texts[:, 30:37], left_padded(3, 7))] + [(texts[:, i : i + 1], None) for i in range(37, 52)]
    with torch.no_grad():
        for i, (ids, mask) in enumerate(pieces):
            expected, _ = run(ids, mask, growing)
            found, _ = run(ids, mask, static)
            assert_equal(found, expected, f"piece {i}")
    assert static.get_seq_length() == growing.get_seq_length() and static.seen.tolist() == growing.seen.tolist()
    assert_equal(run(texts[:, :3], None, static.growing())[0], run(texts[:, :3], None, growing)[0], "grown on")


@streams(lambda variant: holds(variant) and "faiss" not in variant.name, lambda head: head.auto != "AutoModel")
@pytest.mark.works("generate with a static cache")
def test_generate_gives_the_same_tokens(variant, head):
    run = runner(variant, head)
    ids = run.sources(range(3))[0] if run.head.source else words(3, 11)
    mask = run.sources(range(3))[1] if run.head.source else left_padded(3, 11)
    options = dict(attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=90)
    expected = run.model.generate(ids, **options)
    assert torch.equal(run.model.generate(ids, **options, cache_implementation="static"), expected)
    beams = options | dict(num_beams=2, max_new_tokens=5)
    found = run.model.generate(ids, **beams, cache_implementation="static")
    assert torch.equal(found, run.model.generate(ids, **beams))


@pytest.mark.works("generate with a static cache")
@causal(holds, others_slow=True)
def test_a_decode_step_is_one_graph(variant):
    """It is compiled once, and serves every token, and texts after a reset."""
    run = small(variant)
    growing, static = caches(run)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(run.model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(2):
            texts = words(2, 40, seed=seed)
            growing.reset(), static.reset()
            run(texts[:, :5], None, growing), run(texts[:, :5], None, static)
            for i in range(5, 40 if seed == 0 else 10):
                expected, _ = run(texts[:, i : i + 1], None, growing)
                found = step(input_ids=texts[:, i : i + 1].clone(), past_key_values=static)
                assert_equal(found.logits, expected, f"token {i}")
                assert found.past_key_values is static
    assert counter.frame_count == 1


@pytest.mark.slow
@causal(plain)
def test_a_padded_decode_step_is_one_graph(variant):
    run = small(variant)
    growing, static = caches(run)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(run.model, fullgraph=True, backend=counter)
    with torch.no_grad():
        run(words(3, 7), left_padded(3, 7), growing), run(words(3, 7), left_padded(3, 7), static)
        for i in range(20):
            ids, mask = words(3, 1, seed=i), torch.tensor([[1], [int(i % 3 > 0)], [1]])
            expected, _ = run(ids, mask, growing)
            assert_equal(step(input_ids=ids, attention_mask=mask, past_key_values=static).logits, expected, f"{i}")
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch's inductor needs on a CPU")
@causal(lambda variant: plain(variant) and variant.name != "recurrent_memory")  # which joins a segment's columns
def test_a_compiled_step_copies_no_ring(variant):
    """Inductor writes a token's column where the ring lies: its code makes no buffer of a ring's shape."""
    run = small(variant)
    growing, static = caches(run)
    torch.compiler.reset()
    with torch.no_grad():
        run(words(2, 20), None, growing), run(words(2, 20), None, static)
        expected, _ = run(words(2, 1, seed=1), None, growing)
        step = torch.compile(run.model, fullgraph=True)
        found, code = run_and_get_code(step, input_ids=words(2, 1, seed=1), past_key_values=static)
    assert_equal(found.logits, expected)
    rings = {tuple(x.tensor.shape) for state in static._content.states for x in state.values() if x.kind == "ring"}
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code[0])
    made = {tuple(map(int, re.findall(r"\d+", shape))) for shape in shapes}
    assert len(code) == 1 and made and rings and not rings & made
    assert not re.search(r"torch\.ops\.aten\.(clone|index_put|scatter)", code[0])  # left to torch


@pytest.mark.works("generate with a static cache")
@causal(holds, others_slow=True)
def test_a_decode_step_is_exported(variant):
    """The program advances the cache that it is given; saved and loaded it still does."""
    register_gallery_cache_export_support()
    run = small(variant)
    growing, static = caches(run)
    with torch.no_grad():
        run(words(2, 5), None, growing), run(words(2, 5), None, static)
        program = torch.export.export(run.model, (), dict(input_ids=words(2, 1), past_key_values=static.copy()))
        program.example_inputs = None  # they are no part of what is saved
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for i, step in enumerate([program.module()] * 20 + [torch.export.load(file).module()] * 3):
            ids = words(2, 1, seed=i)
            expected, _ = run(ids, None, growing)
            assert_equal(step(input_ids=ids, past_key_values=static)["logits"], expected, f"token {i}")
    assert static.seen.tolist() == growing.seen.tolist() and static.get_seq_length() == 28


# ---- the cache as an object


@streams()
def test_a_cache_is_a_pytree(variant, head):
    """Taken apart and put together again it goes on as before: growing, recording, static."""
    register_gallery_cache_export_support()
    run = runner(variant, head)
    made = [GalleryCache(run.model.config), GalleryCache(run.model.config)]
    made[1].activate_past_recording()
    made += [GalleryStaticCache(run.model.config, LENGTH)] if holds(variant) else []
    for cache in made:
        empty = pytree.tree_unflatten(*pytree.tree_flatten(cache))
        assert type(empty) is type(cache) and not empty.is_initialized
        with torch.no_grad():
            run(words(3, 18), left_padded(3, 18), cache)
            leaves, spec = pytree.tree_flatten(cache)
            assert all(isinstance(x, torch.Tensor) for x in leaves)
            assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
            again = pytree.tree_unflatten([x.clone() for x in leaves], spec)
            assert again.nbytes <= cache.nbytes and again.is_croppable == cache.is_croppable
            for i in range(9):
                ids = words(3, 1, seed=i)
                assert torch.equal(run(ids, None, again)[0], run(ids, None, cache)[0])
            if cache.is_croppable:
                again.crop(-9), cache.crop(-9)
                assert torch.equal(run(words(3, 2), None, again)[0], run(words(3, 2), None, cache)[0])


@causal(plain)
def test_rows_move_and_start_anew(variant):
    run = runner(variant, "causal")
    growing, static = caches(run)
    with torch.no_grad():
        for cache in (growing, static):
            run(words(3, 17), left_padded(3, 17), cache)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            cache.reset_rows([1])
        places = [x.data_ptr() for state in static.states for x in state.values()]
        for i in range(12):
            ids = words(3, 1, seed=i)
            assert_equal(run(ids, None, static)[0], run(ids, None, growing)[0], f"token {i}")
    assert places == [x.data_ptr() for state in static.states for x in state.values()]


@causal(plain)
def test_copies_and_files_go_on_by_themselves(variant, tmp_path):
    run = runner(variant, "causal")
    _, static = caches(run)
    with torch.no_grad():
        run(words(2, 15), None, static)
        static.save(tmp_path / "book")
        copy, loaded = static.copy(), GalleryCache.load(tmp_path / "book")
        run(words(2, 1, seed=1), None, static)
        for cache in (copy, loaded):
            assert cache.get_seq_length() == 15
        for i in range(9):
            ids = words(2, 1, seed=i)
            assert_equal(run(ids, None, copy)[0], run(ids, None, loaded)[0], f"token {i}")


@causal(plain)
def test_steps_outside_of_graphs_follow_the_weights(variant):
    """Tables, and all that follows from weights alone, are made anew when they have changed."""
    run = runner(variant, "causal")
    growing, static = caches(run)
    with torch.no_grad():
        for i, ids in enumerate([words(2, 9), *(words(2, 1, seed=i) for i in range(4))]):
            if i == 2:
                for parameter in run.model.parameters():
                    parameter.mul_(1.1)
            assert_equal(run(ids, None, static)[0], run(ids, None, growing)[0], f"piece {i}")


@causal(holds)
@pytest.mark.parametrize("length", [9, 45], ids=["rings that are not full", "rings that are"])
def test_a_forward_that_fails_leaves_the_cache(variant, length):
    """In what a step reads, in what a longer piece does, and in a growing cache made of it."""
    run = runner(variant, "causal")
    growing, static = caches(run)
    with torch.no_grad():
        run(words(2, length), None, growing), run(words(2, length), None, static)
        handle = run.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(words(2, 1, seed=5), None, static)
        handle.remove()
        assert static.get_seq_length() == length
        for pieces in ((1, 1), (4,), (1, 7, 1)):
            step, piece, grown = static.copy(), growing.copy(), static.growing()
            for i, count in enumerate(pieces):
                ids = words(2, count, seed=i)
                expected, _ = run(ids, None, piece)
                assert_equal(run(ids, None, step)[0], expected, f"{pieces}, piece {i}")
                assert_equal(run(ids, None, grown)[0], expected, f"{pieces}, piece {i}, grown on")


@causal(lambda variant: not holds(variant))
def test_who_has_no_static_cache_says_so(variant):
    model = runner(variant, "causal").model
    for make in (
        lambda: GalleryStaticCache(model.config, 9),
        lambda: model.generate(words(1, 3), max_new_tokens=2, cache_implementation="static"),
    ):
        with pytest.raises(ValueError, match="has no static cache: .*use a GalleryCache"):
            make()


def test_what_a_static_cache_cannot_do_is_refused():
    run = runner(next(v for v in VARIANTS if v.name == "transformer"), "causal")
    with pytest.raises(ValueError, match="max_cache_len is None, and gallery_transformer keeps every token"):
        GalleryStaticCache(run.model.config)
    with pytest.raises(ValueError, match="max_cache_len is 0; it must be a whole number"):
        GalleryStaticCache(run.model.config, 0)
    cache = GalleryStaticCache(run.model.config, 9)
    with pytest.raises(ValueError, match=r"gradients are recorded; run the forward under torch.no_grad\(\)"):
        run(words(2, 5), None, cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="reaches 10 tokens, and past_key_values was made with max_cache_len=9"):
            run(words(2, 10), None, cache)
        run(words(2, 8), None, cache)
        run(words(2, 1), None, cache)
        with pytest.raises(ValueError, match="max_cache_len=9, and a row has read as many tokens"):
            run(words(2, 1), None, cache)
        with pytest.raises(ValueError, match="output_attentions is True, and past_key_values is a GalleryStaticCache"):
            cache.reset_rows([0, 1])
            run(words(2, 1), None, cache, output_attentions=True)
    for call, said in (
        (lambda: cache.crop(-1), "cannot take back -1 columns of a GalleryStaticCache"),
        (lambda: cache.batch_select_indices([0]), "names 1 rows of 2; a GalleryStaticCache keeps its number of rows"),
        (lambda: cache.batch_repeat_interleave(2), "repeats is 2; a GalleryStaticCache keeps its number of rows"),
        (cache.activate_past_recording, "records nothing"),
        (lambda: GalleryStaticCache.load("book"), "GalleryCache.load reads files"),
        (
            lambda: run.model.generate(words(2, 3), cache_implementation="quantized"),
            "is 'quantized'",
        ),
        (
            lambda: run.model.generate(words(2, 3), cache_implementation="static", past_key_values=cache),
            'cache_implementation is "static" and a GalleryStaticCache is given',
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_graph_refuses_what_it_cannot_hold():
    run = runner(next(v for v in VARIANTS if v.name == "transformer"), "causal")
    cache = GalleryStaticCache(run.model.config, 9)
    torch.compiler.reset()
    step = torch.compile(run.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        run(words(2, 7), None, cache)
        step(input_ids=words(2, 1), past_key_values=cache)
        step(input_ids=words(2, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="max_cache_len=9, and a row has read as many tokens"):
            step(input_ids=words(2, 1), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_global_tokens_are_refused():
    run = runner(next(v for v in VARIANTS if v.name == "longformer"), "causal")
    cache, marks = GalleryStaticCache(run.model.config), torch.tensor([[1, 0, 0]])
    with pytest.raises(ValueError, match="global_attention_mask is given, and past_key_values is"):
        with torch.no_grad():
            run(words(1, 3), None, cache, global_attention_mask=marks)
