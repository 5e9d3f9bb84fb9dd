"""GalleryCache as an object: copies, files, tokens taken back, what transformers asks of a Cache."""

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_law_2_batch_anyhow import padded, scatter
from transformers import Cache
from variants import COLUMNS, VARIANTS, assert_equal, causal, over, runner, streams, words

from hf_gallery import GalleryCache

LENGTHS = (13, 6)


def read(run, gradients=False, record=False):
    """A cache that read two left-padded rows, and the rows."""
    rows, mask = [words(n, seed=n) for n in LENGTHS], padded(LENGTHS, "left", 13)
    cache = GalleryCache(run.model.config)
    if record:
        cache.activate_past_recording()
    with torch.set_grad_enabled(gradients):
        _, cache = run(scatter(rows, mask), mask, cache)
    return cache, rows


def go_on(run, cache, seed=5):
    with torch.no_grad():
        return torch.cat([run(words(2, 4, seed=seed + i), None, cache)[0] for i in range(3)], dim=1)


def test_an_empty_cache():
    for variant in VARIANTS:
        cache = GalleryCache(variant.make_config(next(iter(variant.heads))))
        assert isinstance(cache, Cache)
        assert (cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, -1)
        assert not cache.is_compileable
        cache.reset()
        cache.detach()
        assert cache.copy().get_seq_length() == 0


@streams()
def test_what_a_cache_tells(variant, head):
    run = runner(variant, head)
    cache, _ = read(run)
    assert isinstance(cache, GalleryCache)
    assert (cache.get_seq_length(), cache.batch_size, cache.seen.tolist()) == (13, 2, list(LENGTHS))
    assert isinstance(cache.get_seq_length(), int) and isinstance(cache.nbytes, int)
    assert not cache.is_compileable and cache.get_max_length() == -1
    assert variant.config.model_type in repr(cache)


@streams()
def test_a_given_cache_is_advanced_in_place(variant, head):
    run = runner(variant, head)
    cache, _ = read(run)
    with torch.no_grad():
        _, returned = run(words(2, 3), None, cache)
    assert returned is cache and cache.get_seq_length() == 16


def test_when_a_model_keeps_a_cache():
    """use_cache=None: config.use_cache, but not in training, unless a cache is given."""
    model = VARIANTS[0].make("causal")
    ids = words(1, 3)
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.config.use_cache = True
    model.train()
    assert model(ids).past_key_values is None
    cache = model(ids, use_cache=True).past_key_values
    assert model(ids, past_key_values=cache).past_key_values is cache and cache.get_seq_length() == 6


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@streams()
def test_a_copy_goes_its_own_way(variant, head, gradients, how):
    run = runner(variant, head)
    cache, _ = read(run, gradients)
    other = cache.copy() if how == "copy" else copy.deepcopy(cache)
    assert type(other) is GalleryCache and other.nbytes <= cache.nbytes  # without the room for tokens to come
    expected, nbytes = go_on(run, cache), cache.nbytes
    cache.reset_rows([0]) if not variant.heads[head].source else cache.reorder_cache(torch.tensor([1, 0]))
    assert other.get_seq_length() == 13 and other.seen.tolist() == list(LENGTHS)
    assert torch.equal(go_on(run, other), expected) and other.nbytes == nbytes


def test_copies_of_an_empty_cache_share_nothing():
    run = runner(VARIANTS[0], "seq2seq")
    first = GalleryCache(run.model.config)
    second = first.copy()
    with torch.no_grad():
        a, _ = run(words(1, 5), cache=first, rows=[0])
        b, _ = run(words(1, 5), cache=second, rows=[1])
        assert_equal(run(words(1, 5), rows=[1])[0], b)
        assert_equal(run(words(1, 5), rows=[0])[0], a)
    assert second.get_seq_length() == 5


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@streams()
def test_a_saved_cache_goes_on(variant, head, gradients, tmp_path):
    run = runner(variant, head)
    cache, _ = read(run, gradients)
    path = tmp_path / "book.safetensors"
    cache.save(path)
    assert os.listdir(tmp_path) == ["book.safetensors"]
    loaded = GalleryCache.load(path)
    assert loaded.get_seq_length() == 13 and loaded.seen.tolist() == list(LENGTHS) and loaded.nbytes <= cache.nbytes
    expected = go_on(run, cache)
    assert torch.equal(go_on(run, loaded), expected) and loaded.nbytes == cache.nbytes
    again = GalleryCache.load(str(path))
    again.reorder_cache(torch.tensor([1, 1]))
    assert again.seen.tolist() == [6, 6]


def test_saving_replaces_at_once_or_not_at_all(tmp_path, monkeypatch):
    run = runner(VARIANTS[0], "causal")
    cache, _ = read(run)
    path = tmp_path / "book.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    go_on(run, cache)
    monkeypatch.setattr("hf_gallery.models.cache_file.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["book.safetensors"]


def test_files_that_are_no_cache(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors.*GalleryCache"):
        GalleryCache.load(tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("no cache at all, but long enough to have a header")
    with pytest.raises(ValueError, match="text.*GalleryCache"):
        GalleryCache.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        GalleryCache.load(tmp_path / "nowhere")


def test_a_loaded_cache_of_another_model(tmp_path):
    """The file knows what it was made for."""
    cache, _ = read(runner(VARIANTS[0], "causal"))
    cache.save(tmp_path / "book")
    other = next(v for v in VARIANTS if v.config is not VARIANTS[0].config).make("causal")
    with pytest.raises(ValueError, match="past_key_values"):
        other(words(2, 3), past_key_values=GalleryCache.load(tmp_path / "book"))


@streams()
def test_tokens_are_taken_back(variant, head):
    """While the cache records, any number of columns; what follows is as if they had never been read."""
    run = runner(variant, head, dtype=torch.float64)
    for count in (1, 4, 9):
        cache, _ = read(run, record=True)
        mask = torch.ones(2, count, dtype=torch.long)
        mask[0, 0] = 0  # padding is taken back too
        with torch.no_grad():
            run(words(2, count, seed=8), mask, cache)
        assert cache.is_croppable
        with pytest.raises(ValueError, match=rf"tokens_to_remove is {count}.*-{count}"):
            cache.crop(count)  # the length to keep, for some
        cache.crop(torch.tensor(-count) if count == 4 else -count)  # as transformers before 5.18 says it
        assert cache.get_seq_length() == 13 and cache.seen.tolist() == list(LENGTHS)
        assert_equal(go_on(run, cache), go_on(run, read(run)[0]))


@streams(lambda v: v.horizon is not None and v.limit is None)
def test_a_bounded_cache_is_bounded_again_after_the_crop(variant, head):
    run = runner(variant, head)
    plain, recording = (GalleryCache(run.model.config) for _ in range(2))
    text = words(2, 60)
    with torch.no_grad():
        run(text, None, plain)
        run(text[:, :57], None, recording)
        recording.activate_past_recording()
        run(words(2, 3, seed=1), None, recording)
        recording.crop(-3)
        recording.crop(0)
        run(text[:, 57:], None, recording)
        recording.crop(0)
    assert recording.nbytes <= plain.nbytes + 3 * 2 * 2 * 30 * 4 * run.model.config.num_hidden_layers
    assert_equal(go_on(run, recording), go_on(run, plain))


@streams(lambda v: v.horizon is not None)
def test_what_was_forgotten_cannot_be_taken_back(variant, head):
    """Not croppable, says so, and is unharmed."""
    run = runner(variant, head)
    for recorded in (0, 19):
        cache = GalleryCache(run.model.config)
        with torch.no_grad():
            run(words(2, 40 - recorded), None, cache)
            if recorded:
                cache.activate_past_recording()
                run(words(2, recorded), None, cache)
        twin = cache.copy()
        assert cache.is_croppable == bool(recorded)
        with pytest.raises(ValueError, match=r"20.*activate_past_recording.*copy\(\)"):
            cache.crop(-20)
        assert cache.get_seq_length() == 40
        assert torch.equal(go_on(run, cache), go_on(run, twin))


@causal()
def test_more_is_taken_back_than_there_is(variant):
    run = runner(variant, "causal")
    cache, _ = read(run, record=True)
    twin = cache.copy()
    with pytest.raises(ValueError, match="14"):
        cache.crop(-14)
    assert torch.equal(go_on(run, cache), go_on(run, twin))


ROWS = 2


@settings(max_examples=6)
@given(data=st.data())
@causal()
def test_any_reading_and_taking_back(variant, data):
    """As speculative decoding does: read some in pieces, take some back, and so on. Rows have padding anywhere, so
    that they take back different numbers of tokens; they move, are emptied, and go on from copies. Each gives what it
    gives alone, of what remains."""
    run = runner(variant, "causal", dtype=torch.float64)
    cache, texts, seed = GalleryCache(run.model.config), [torch.zeros(0, dtype=torch.long)] * ROWS, 0
    longest = 60 if variant.limit is None else variant.limit - 3
    for _ in range(data.draw(st.integers(1, 4), label="rounds")):
        before = data.draw(st.sampled_from([0, 0, 1, 9]), label="read before, unrecorded")
        recorded: list[torch.Tensor] = []
        for piece in range(2 + data.draw(st.integers(0, 2), label="pieces")):
            n = before if piece == 0 else data.draw(st.integers(1, 13), label="columns")
            if piece == 1:
                cache.activate_past_recording()
            if not n or max(map(len, texts)) + n > longest:
                continue
            seed += 1
            ids, mask = words(ROWS, n, seed=seed), torch.ones(ROWS, n, dtype=torch.long)
            if data.draw(st.booleans(), label="padded"):
                mask = torch.rand(ROWS, n, generator=torch.Generator().manual_seed(seed)).gt(0.4).long()
            with torch.set_grad_enabled(data.draw(st.sampled_from([False, False, True]), label="gradients")):
                result, cache = run(ids, mask, cache)
            for i in range(ROWS):
                texts[i] = torch.cat([texts[i], ids[i, mask[i] == 1]])
                if new := int(mask[i].sum()):
                    with torch.no_grad():
                        assert_equal(result[i, mask[i] == 1].detach(), run(texts[i][None])[0][0, -new:], f"row {i}")
            if piece:
                recorded.append(mask)
        columns = torch.cat([torch.zeros(ROWS, 0, dtype=torch.long), *recorded], dim=1)
        if data.draw(st.booleans(), label="moved"):
            order = torch.tensor(data.draw(st.permutations(range(ROWS)), label="order"))
            if cache.seen is not None:
                cache.reorder_cache(order)
                texts, columns = [texts[i] for i in order], columns[order]
        if data.draw(st.booleans(), label="copied"):
            cache = cache.copy()
        back = data.draw(st.integers(0, columns.shape[1]), label="taken back")
        cache.crop(-back)
        for i, gone in enumerate(columns[:, columns.shape[1] - back :].sum(1).tolist()):
            texts[i] = texts[i][: len(texts[i]) - gone]
        assert cache.seen is None or cache.seen.tolist() == [len(text) for text in texts]
        cache.deactivate_past_recording()
        if cache.seen is not None and data.draw(st.sampled_from([False, False, True]), label="emptied"):
            cache.reset_rows([1])
            texts[1] = texts[1][:0]


@causal()
def test_tokens_of_the_last_of_packed_documents_are_taken_back(variant):
    """Also where a row was in the midst of another document before, whose record is not this one's."""
    run = runner(variant, "causal", dtype=torch.float64)
    cache = GalleryCache(run.model.config)
    cache.activate_past_recording()
    ids, places = words(2, 20, seed=3), torch.arange(20)
    with torch.no_grad():
        run(words(2, 16), None, cache)
        run(
            ids, None, cache, position_ids=torch.stack([torch.where(places < 4, 16 + places, places - 4), 16 + places])
        )
        cache.crop(-9)
        assert cache.seen.tolist() == [7, 27]
        more = words(2, 8, seed=4)
        result, _ = run(more, None, cache)
        for row, before in enumerate((ids[0, 4:11], torch.cat([words(2, 16)[1], ids[1, :11]]))):
            expected, _ = run(torch.cat([before, more[row]])[None])
            assert_equal(result[row], expected[0, -8:], f"row {row}")


@streams(lambda v: v.horizon is not None)
def test_what_is_recorded_is_dropped_by_a_crop_and_never_made_unasked(variant, head):
    """Not recording, a cache holds no more than one that was never asked to; recording, it holds what was read."""
    run = runner(variant, head)
    plain, recording = (GalleryCache(run.model.config) for _ in range(2))
    with torch.no_grad():
        run(words(2, 30), None, plain)
        run(words(2, 30), None, recording)
        assert plain.nbytes == recording.nbytes
        recording.activate_past_recording()
        run(words(2, 9, seed=1), None, recording)
        grown = recording.nbytes
        recording.crop(-9)
        assert recording.nbytes < grown
        recording.deactivate_past_recording()
        for seed in (2, 3):
            run(words(2, 9, seed=seed), None, recording)
            run(words(2, 9, seed=seed), None, plain)
    assert recording.nbytes == plain.nbytes
    assert_equal(go_on(run, recording), go_on(run, plain))


@causal()
def test_a_file_saved_while_recording_opens(variant, tmp_path):
    """The record stays behind: the loaded cache goes on, and takes back what it records itself."""
    run = runner(variant, "causal")
    cache, _ = read(run, record=True)
    with torch.no_grad():
        run(words(2, 9, seed=3), None, cache)
    cache.save(tmp_path / "book")
    loaded = GalleryCache.load(tmp_path / "book")
    assert not loaded.recording
    expected = go_on(run, cache.copy())
    assert_equal(go_on(run, loaded), expected)
    again = GalleryCache.load(tmp_path / "book")
    again.activate_past_recording()
    with torch.no_grad():
        run(words(2, 9, seed=4), None, again)
    again.crop(-9)
    assert_equal(go_on(run, again), expected)


@streams()
def test_moved_and_detached(variant, head):
    run = runner(variant, head)
    cache, _ = read(run)
    twin = cache.copy()
    assert cache.to("cpu") is cache and cache.detach() is cache
    assert torch.equal(go_on(run, cache), go_on(run, twin))


# ---- encoder and decoder


@over(lambda variant, head: head.source)
def test_a_source_that_was_read_is_not_read_again(variant, head):
    """Its keys are in the cache: a step needs the decoder's ids and the cache alone, and never calls the encoder."""
    run = runner(variant, head)
    ids = words(2, 9)
    with torch.no_grad():
        expected, _ = run(ids)
        _, cache = run(ids[:, :5])
        again = cache.copy()
        calls = []
        run.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
        alone = run.model(decoder_input_ids=ids[:, 5:], past_key_values=cache).logits
        besides, _ = run(ids[:, 5:], cache=again)  # a source beside it, as `generate` gives it, is left aside
    assert not calls
    assert_equal(alone, expected[:, 5:])
    assert_equal(besides, expected[:, 5:])


@streams(lambda variant: variant.name in COLUMNS)
def test_what_is_pickled_is_what_the_cache_holds(variant, head):
    """And not the spare columns of its memory, which nobody has written."""
    run = runner(variant, head)
    cache = GalleryCache(run.model.config)
    with torch.no_grad():
        for count in (40, 1, 1):
            run(words(2, count), None, cache)
    opened = pickle.loads(pickle.dumps(cache))
    for state, expected in zip(opened.states, cache.states, strict=True):
        for name, x in state.items():
            assert torch.equal(x, expected[name]) and x.untyped_storage().nbytes() == x.nbytes, name
    with torch.no_grad():
        assert_equal(run(words(2, 3), None, opened)[0], run(words(2, 3), None, cache)[0])
