"""Bad input gets a ValueError that names the argument and its value, before anything is computed; a cache that was
given stays as it was and goes on."""

import inspect
import logging

import pytest
import torch
from test_law_6_layers_pure import assert_unchanged, snapshot
from transformers import AutoModel, DynamicCache, LlamaConfig, PreTrainedModel
from variants import VARIANTS, VOCAB, assert_equal, causal, over, result_of, runner, streams, words

import hf_gallery as gallery
from hf_gallery import GalleryCache, GalleryLongformerConfig, GalleryTransformerConfig, GalleryTransformerXLConfig

# Faults of 6 more tokens for a cache of 2 rows that has seen 11 columns, and what the message must say.
INPUTS = {
    "id at vocab_size": (dict(bad_id=VOCAB), rf"input_ids.*\b{VOCAB}\b.*vocab"),
    "id far away": (dict(bad_id=10**9), r"input_ids.*1000000000.*vocab"),
    "id below 0": (dict(bad_id=-100), r"input_ids.*-100.*vocab"),
    "ids of another type": (dict(ids=torch.zeros(2, 6)), r"input_ids.*float32"),
    "ids without rows": (dict(ids=torch.zeros(6, dtype=torch.long)), r"input_ids.*\(6,\)"),
    "ids of three dimensions": (dict(ids=torch.zeros(2, 6, 1, dtype=torch.long)), r"input_ids.*\(2, 6, 1\)"),
    "no tokens": (dict(ids=torch.zeros(2, 0, dtype=torch.long)), r"input_ids.*\(2, 0\)"),
    "no rows": (dict(ids=torch.zeros(0, 6, dtype=torch.long)), r"input_ids.*\(0, 6\)"),
    "other rows than the cache": (dict(ids=words(3, 6)), r"past_key_values.*\b2\b.*\b3\b"),
    "mask too long": (dict(mask=torch.ones(2, 7)), r"attention_mask.*\(2, 7\).*\(2, 6\).*\(2, 17\)"),
    "mask of the past only": (dict(mask=torch.ones(2, 11)), r"attention_mask.*\(2, 11\).*\(2, 6\).*\(2, 17\)"),
    "mask of other rows": (dict(mask=torch.ones(1, 6)), r"attention_mask.*\(1, 6\).*\(2, 6\)"),
    "mask of four dimensions": (dict(mask=torch.ones(2, 1, 6, 17)), r"attention_mask.*\(2, 1, 6, 17\)"),
    "mask of one dimension": (dict(mask=torch.ones(6)), r"attention_mask.*\(6,\)"),
    "additive mask": (dict(mask=torch.full((2, 6), -torch.inf)), r"attention_mask.*-inf"),
    "mask of other numbers": (dict(mask=torch.full((2, 6), 2)), r"attention_mask.*\b2\b"),
    "a cache of transformers": (dict(cache="dynamic"), r"past_key_values.*DynamicCache"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@streams()
def test_bad_input(variant, head, gradients):
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train(gradients)
    more = words(2, 6, seed=1)
    with torch.set_grad_enabled(gradients):
        _, cache = run(words(2, 11))
        expected, _ = run(more, None, cache.copy())
        before = snapshot(cache)
        for what, (wrong, message) in INPUTS.items():
            ids = wrong.get("ids", more).clone()
            if "bad_id" in wrong:
                ids[1, 4] = wrong["bad_id"]
            if run.head.source:
                message = message.replace("input_ids", "decoder_input_ids")
                message = message.replace("attention_mask", "decoder_attention_mask")
            given = DynamicCache() if wrong.get("cache") else cache
            with pytest.raises(ValueError) as error:
                run(ids, wrong.get("mask"), given, rows=[0, 1])
            assert error.match(message), what
            assert len(str(error.value)) < 400
            assert_unchanged(cache, before)
        result, _ = run(more, None, cache)
    assert torch.equal(result, expected)


@over(lambda variant, head: not head.stream)
def test_bad_input_without_a_cache(variant, head):
    run = runner(variant, head)
    for what in (
        "id at vocab_size",
        "id below 0",
        "ids of another type",
        "no tokens",
        "no rows",
        "mask of one dimension",
        "mask of four dimensions",
        "additive mask",
        "mask of other rows",
    ):
        wrong, message = INPUTS[what]
        ids = wrong.get("ids", words(2, 6)).clone()
        if "bad_id" in wrong:
            ids[1, 4] = wrong["bad_id"]
        with pytest.raises(ValueError, match=message):
            run(ids, wrong.get("mask"))


@over(lambda variant, head: not head.source)
def test_ids_and_embeddings(variant, head):
    model = variant.make(head)
    ids = words(2, 6)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model()
    width = embeds.shape[-1]
    with pytest.raises(ValueError, match=rf"inputs_embeds.*\b{width - 1}\b.*\b{width}\b"):
        model(inputs_embeds=embeds[..., :-1])
    with pytest.raises(ValueError, match=rf"inputs_embeds.*\(2, {width}\)"):
        model(inputs_embeds=embeds[:, 0])


OTHER_SETTINGS = [
    dict(segment_length=9),
    dict(mem_len=4),
    dict(clamp_len=3),
    dict(attention_window=8),
    dict(attention_dilation=4),
    dict(memory_size=30),
    dict(memory_layers=[0]),
    dict(block_length=6),
    dict(recurrent_layers=[0]),
    dict(num_state_vectors=2),
    dict(num_memory_tokens=1),
    dict(memory_attention="causal"),
    dict(gate_type="lstm"),
    dict(recurrence_type="dual"),
    dict(recurrence_type="single"),
    dict(normalize_qk=False),
    dict(norm_type="layer"),
    dict(norm_position="pre"),
    dict(pre_lnorm=True),
    dict(untie_r=True),
    dict(initial_memory="zeros"),
    dict(position_embedding_type="none"),
]


def may_be_another(config, name):
    """Tells whether models like it have the setting, and more than one value of it: a Longformer's windows over
    segments are not dilated, a memory stands before segments, and these are a decoder's alone."""
    if config.model_type == "gallery_longformer" and name in ("segment_length", "mem_len", "attention_dilation"):
        in_segments = config.segment_length is not None
        return dict(
            segment_length=not config.is_encoder_decoder, mem_len=in_segments, attention_dilation=not in_segments
        )[name]
    return hasattr(config, name)


@streams()
def test_the_cache_of_another_model(variant, head):
    """Another variant's, another size's, another setting's: all that would be read wrongly."""
    run = runner(variant, head)
    others = [v.make(name) for v in VARIANTS if v.name != variant.name for name, h in v.heads.items() if h.stream]
    shallow = dict(num_hidden_layers=2) | variant.shallow
    if run.head.source:
        shallow |= dict(num_decoder_layers=2)
    others += [variant.make(head, **x) for x in (shallow, dict(num_attention_heads=6), dict(head_dim=8))]
    refused = 0
    for other in others:
        cache = GalleryCache(other.config)
        if cache.identity == GalleryCache(run.model.config).identity:
            continue  # a setting that leaves no trace in the cache, say where the norms stand
        with pytest.raises(ValueError, match="past_key_values"):
            run(words(2, 6), None, cache)
        assert cache.get_seq_length() == 0
        refused += 1
    assert refused >= 3
    for setting in OTHER_SETTINGS:
        (name,) = setting
        if may_be_another(run.model.config, name) and getattr(run.model.config, name) != setting[name]:
            plain = dict(attention_dilation=1) if "segment_length" in setting and "longformer" in variant.name else {}
            cache = GalleryCache(variant.make_config(head, **setting | plain))
            with pytest.raises(ValueError, match=f"past_key_values.*{name}"):
                run(words(2, 6), None, cache)


@over(lambda variant, head: variant.limit and not head.source)
def test_longer_than_learned_positions(variant, head):
    run = runner(variant, head)
    run(words(2, variant.limit))
    with pytest.raises(ValueError, match=rf"\b{variant.limit + 1}\b.*max_position_embeddings.*\b{variant.limit}\b"):
        run(words(2, variant.limit + 1))
    mask = torch.ones(2, variant.limit + 4, dtype=torch.long)
    mask[:, :4] = 0
    run(words(2, variant.limit + 4), mask)  # padding takes no position


@causal(lambda v: v.limit)
def test_longer_than_learned_positions_with_a_cache(variant):
    run = runner(variant, "causal")
    cache = None
    with torch.no_grad():
        _, cache = run(words(2, variant.limit - 1))
        before = snapshot(cache)
        with pytest.raises(
            ValueError, match=rf"\b{variant.limit + 1}\b.*max_position_embeddings.*\b{variant.limit}\b"
        ):
            run(words(2, 2), None, cache)
        assert_unchanged(cache, before)
        run(words(2, 1), None, cache)
        with pytest.raises(ValueError, match="max_position_embeddings"):
            run(words(2, 1), None, cache)
    run.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="max_position_embeddings"):
        run.model.generate(words(1, 50), max_new_tokens=20, do_sample=False)


@causal()
def test_bad_labels(variant):
    for training in (False, True):
        run = runner(variant, "causal")
        run.model.train(training)
        _, cache = run(words(2, 11))
        before = snapshot(cache)
        for name in ("labels", "shift_labels"):
            for labels, message in (
                (words(2, 5), r"\(2, 5\).*\(2, 6\)"),
                (words(3, 6), r"\(3, 6\).*\(2, 6\)"),
                (torch.full((2, 6), VOCAB), rf"\b{VOCAB}\b"),
                (torch.full((2, 6), -7), "-7"),
            ):
                with pytest.raises(ValueError, match=f"{name}.*{message}"):
                    run(words(2, 6), None, cache, **{name: labels})
                assert_unchanged(cache, before)


@over(lambda variant, head: head.pooled)
def test_a_row_with_nothing_to_classify(variant, head):
    model = variant.make("sequence")
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"attention_mask.*\[1\]"):
        model(words(3, 6), mask)


def test_bad_input_of_the_encoder_decoder():
    variant = next(v for v in VARIANTS if "seq2seq" in v.heads)
    model = variant.make("seq2seq")
    source, target = words(2, 9), words(2, 6)
    encoded = model.get_encoder()(input_ids=source)
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 8\).*\(2, 9\)"):
        model(source, torch.ones(2, 8), decoder_input_ids=target)
    with pytest.raises(ValueError, match=rf"input_ids.*\b{VOCAB}\b"):
        model(torch.full((2, 9), VOCAB), decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"decoder_attention_mask.*\(2, 5\).*\(2, 6\)"):
        model(source, decoder_input_ids=target, decoder_attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=rf"decoder_input_ids.*\b{VOCAB}\b"):
        model(source, decoder_input_ids=torch.full((2, 6), VOCAB))
    with pytest.raises(ValueError, match=r"encoder_outputs.*\b29\b.*\b30\b"):
        model(encoder_outputs=(encoded[0][..., :29],), decoder_input_ids=target)
    with pytest.raises(TypeError, match="encoder_outputs is a Tensor"):
        model(encoder_outputs=encoded[0], decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"encoder_outputs have shape \(2, 30\)"):
        model(encoder_outputs=(encoded[0][:, 0],), decoder_input_ids=target)
    with pytest.raises(ValueError, match="position_ids.*encoder-decoder"):
        model.model(source, decoder_input_ids=target, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match=r"encoder_outputs.*\b2\b.*\b3\b"):
        model(encoder_outputs=encoded, decoder_input_ids=words(3, 6))
    with pytest.raises(ValueError, match="input_ids"):
        model(decoder_input_ids=target)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(source)
    with pytest.raises(ValueError, match="is_encoder_decoder"):
        gallery.GalleryTransformerForCausalLM(model.config)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        bare = variant.make("seq2seq", decoder_start_token_id=None, bos_token_id=None)
        bare(source, labels=target)


def test_position_ids_and_token_types():
    model = next(v for v in VARIANTS if v.limit).make("causal", type_vocab_size=2)
    ids = words(2, 6)
    with pytest.raises(ValueError, match=r"position_ids.*\(2, 7\).*\(2, 6\)"):
        model(ids, position_ids=torch.arange(7).expand(2, 7))
    with pytest.raises(ValueError, match=r"position_ids.*-1"):
        model(ids, position_ids=torch.arange(-1, 5).expand(2, 6))
    with pytest.raises(ValueError, match=r"\b61\b"):
        model(ids, position_ids=torch.arange(56, 62).expand(2, 6))
    with pytest.raises(ValueError, match=r"token_type_ids.*\b2\b"):
        model(ids, token_type_ids=torch.full((2, 6), 2))
    with pytest.raises(ValueError, match=r"token_type_ids.*-1"):
        model(ids, token_type_ids=torch.full((2, 6), -1))
    with pytest.raises(ValueError, match=r"token_type_ids.*\(2, 5\)"):
        model(ids, token_type_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="token_type_ids.*float32"):
        model(ids, token_type_ids=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="token_type_ids.*type_vocab_size"):
        VARIANTS[0].make("encoder")(ids, token_type_ids=torch.zeros(2, 6, dtype=torch.long))


@streams(of_head=lambda head: not head.source)
def test_position_ids_of_models_that_know_distances_only(variant, head):
    """They may say what is so, and nothing else: ignoring them would mix the texts that they keep apart."""
    run = runner(variant, head)
    if getattr(run.model.config, "position_embedding_type", "relative") not in ("relative", "none"):
        pytest.skip("positions are embedded")
    ids, mask = words(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    right = (mask.cumsum(1) - 1).clamp(min=0)
    expected, cache = run(ids, mask)
    assert torch.equal(run(ids, mask, position_ids=right)[0], expected)
    before = snapshot(cache)
    for wrong, message in (
        (right + 1, r"position_ids differ"),  # the second six tokens stand elsewhere
        (right[:, :5], r"position_ids.*\(2, 5\).*\(2, 6\)"),
        (right.float(), r"position_ids.*float32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(ids, mask, cache, position_ids=wrong)
        assert_unchanged(cache, before)


@over(lambda variant, head: not head.stream and not head.pooled)
def test_an_encoder_takes_no_cache(variant, head):
    run = runner(variant, head)
    with pytest.raises(ValueError, match=r"past_key_values.*GalleryCache.*encoder"):
        run.model(**run.inputs(words(2, 6)), past_key_values=GalleryCache(run.model.config))


@over(lambda variant, head: not head.source)
def test_embeddings_of_another_type(variant, head):
    model = variant.make(head)
    embeds = model.get_input_embeddings()(words(2, 6))
    with pytest.raises(ValueError, match=r"inputs_embeds.*float64.*float32"):
        model(inputs_embeds=embeds.double())


@over(lambda variant, head: head.pooled and not head.choices)
def test_labels_that_name_no_class(variant, head):
    model = variant.make(head, num_labels=3)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=rf"labels.*{max(labels, key=abs)}.*num_labels 3"):
            model(words(2, 6), labels=torch.tensor(labels))
    assert model(words(2, 6), labels=torch.tensor([0, -100])).loss.isfinite()


@streams(of_head=lambda head: not head.source)
def test_either_name_of_the_cache(variant, head):
    model = variant.make(head)
    first, second = (GalleryCache(model.config) for _ in range(2))
    with torch.no_grad():
        for part in words(2, 12).split(6, dim=1):
            a, b = model(part, past_key_values=first), model(part, cache=second)
    assert torch.equal(a[0], b[0]) and second.get_seq_length() == 12
    with pytest.raises(ValueError, match="past_key_values and cache"):
        model(words(2, 6), past_key_values=first, cache=second)


@streams(of_head=lambda head: not head.source)
def test_rows_that_are_not_there(variant, head):
    run = runner(variant, head)
    _, cache = run(words(2, 11))
    before = snapshot(cache)
    for rows in ([2], [-3], [0, 5]):
        with pytest.raises(ValueError, match=rf"rows.*{rows[-1]}"):
            cache.reset_rows(rows)
        assert_unchanged(cache, before)
    with pytest.raises(ValueError, match="rows.*3"):
        cache.reset_rows(torch.tensor([True, False, False]))
    assert_unchanged(cache, before)


# ------------------------------------------------------------------------------------------------------------- configs

KINDS = list({v.config: None for v in VARIANTS})
CONFIGS = [
    *[(kind, dict(vocab_size=0), r"vocab_size.*\b0\b") for kind in KINDS],
    *[(kind, dict(hidden_size=0), r"hidden_size.*\b0\b") for kind in KINDS],
    *[(kind, dict(hidden_size=30.5), r"hidden_size.*30\.5") for kind in KINDS],
    *[(kind, dict(num_hidden_layers=0), r"num_hidden_layers.*\b0\b") for kind in KINDS],
    *[(kind, dict(num_attention_heads=-2), r"num_attention_heads.*-2") for kind in KINDS],
    *[(kind, dict(hidden_size=100, num_attention_heads=8), r"hidden_size.*\b100\b.*\b8\b") for kind in KINDS],
    *[
        (kind, dict(hidden_size=33, num_attention_heads=3), r"hidden_size.*\b33\b.*even")
        for kind in (GalleryTransformerConfig, GalleryTransformerXLConfig)
    ],
    *[(kind, dict(head_dim=0), r"head_dim.*\b0\b") for kind in KINDS],
    *[(kind, dict(intermediate_size=0), r"intermediate_size.*\b0\b") for kind in KINDS],
    *[(kind, dict(hidden_act="gello"), "hidden_act.*gello") for kind in KINDS],
    *[(kind, dict(hidden_dropout=1.0), r"hidden_dropout.*1\.0") for kind in KINDS],
    *[(kind, dict(attention_dropout=-0.1), r"attention_dropout.*-0\.1") for kind in KINDS],
    *[(kind, dict(layer_norm_eps=0.0), "layer_norm_eps.*0") for kind in KINDS],
    *[(kind, dict(initializer_range=-1.0), "initializer_range.*-1") for kind in KINDS],
    *[(kind, dict(pad_token_id=262), r"pad_token_id.*\b262\b.*vocab_size") for kind in KINDS],
    *[(kind, dict(eos_token_id="a"), "eos_token_id.*'a'") for kind in KINDS],
    *[(kind, dict(use_cache="yes"), "use_cache.*yes") for kind in KINDS],
    *[(kind, dict(num_labels=0), r"num_labels.*\b0\b") for kind in KINDS],
    *[(kind, dict(num_labels=True), "num_labels is True") for kind in KINDS],
    *[(kind, dict(problem_type="ranking"), "problem_type.*ranking.*regression") for kind in KINDS],
    *[(kind, dict(layer_norm_eps=float("nan")), "layer_norm_eps is nan") for kind in KINDS],
    *[(kind, dict(initializer_range=float("inf")), "initializer_range is inf") for kind in KINDS],
    *[(kind, dict(eos_token_id=True), "eos_token_id is True") for kind in KINDS],
    *[(kind, dict(pad_token_id=[1, 2]), r"pad_token_id is \[1, 2\]") for kind in KINDS],
    (gallery.GalleryMemorizingTransformerConfig, dict(initial_scale=float("nan")), "initial_scale is nan"),
    (GalleryTransformerConfig, dict(decoder_start_token_id=500), r"decoder_start_token_id.*\b500\b"),
    (gallery.GalleryMemorizingTransformerConfig, dict(initial_scale=0.0), r"initial_scale.*0\.0"),
    (gallery.GalleryBlockRecurrentTransformerConfig, dict(initial_scale=-1.0), r"initial_scale.*-1\.0"),
    (GalleryTransformerConfig, dict(classifier_dropout=2.0), r"classifier_dropout.*2\.0"),
    (
        GalleryTransformerConfig,
        dict(position_offset=5000, position_embedding_type="learned"),
        "position_offset.*5000.*max_position_embeddings",
    ),
    (gallery.GalleryLongformerConfig, dict(attention_window=2**21), "attention_window.*2097152.*1048576"),
    (
        gallery.GalleryLongformerConfig,
        dict(attention_window=2**19, attention_dilation=4),
        "attention_dilation.*4.*1048576",
    ),
    (gallery.GalleryBlockRecurrentTransformerConfig, dict(block_length=2**21), "block_length.*1048576"),
    (GalleryTransformerXLConfig, dict(mem_len=2**21), "mem_len.*1048576"),
    (GalleryTransformerXLConfig, dict(same_length="yes"), "same_length.*yes"),
    (GalleryTransformerXLConfig, dict(cutoffs=5), "cutoffs.*5.*list"),
    (GalleryTransformerXLConfig, dict(cutoffs=[1.5]), r"cutoffs.*1\.5"),
    (GalleryTransformerXLConfig, dict(cutoffs=[50], tie_projs=True), "tie_projs.*True.*list"),
    *[(kind, dict(eos_token_id=[3, -1]), r"eos_token_id.*-1") for kind in KINDS],
    *[(kind, dict(vocab_size=100, pad_token_id=256), r"pad_token_id.*\b256\b.*\b100\b") for kind in KINDS],
    (GalleryTransformerConfig, dict(norm_position="middle"), "norm_position.*middle.*post"),
    (GalleryTransformerConfig, dict(position_embedding_type="rotary"), "position_embedding_type.*rotary.*sinusoidal"),
    (GalleryTransformerConfig, dict(max_position_embeddings=0), "max_position_embeddings.*0"),
    (GalleryTransformerConfig, dict(segment_length=0), "segment_length.*0"),
    (GalleryTransformerConfig, dict(num_encoder_layers=0), "num_encoder_layers.*0"),
    (
        GalleryTransformerConfig,
        dict(segment_length=7, is_encoder_decoder=True),
        "segment_length.*7.*is_encoder_decoder",
    ),
    (
        GalleryTransformerConfig,
        dict(segment_length=70, max_position_embeddings=60, position_embedding_type="learned"),
        "segment_length.*70.*max_position_embeddings.*60",
    ),
    (GalleryTransformerXLConfig, dict(segment_length=0), "segment_length.*0"),
    (GalleryTransformerXLConfig, dict(segment_length=None), "segment_length.*None"),
    (GalleryTransformerXLConfig, dict(mem_len=-1), "mem_len.*-1"),
    (GalleryTransformerXLConfig, dict(mem_len=0, same_length=True), "same_length.*mem_len.*0"),
    (GalleryTransformerXLConfig, dict(clamp_len=0), "clamp_len.*0"),
    (GalleryTransformerXLConfig, dict(clamp_len=-5), "clamp_len.*-5"),
    (GalleryTransformerXLConfig, dict(div_val=0), "div_val.*0"),
    (GalleryTransformerXLConfig, dict(cutoffs=[50, 50]), r"cutoffs.*50, 50"),
    (GalleryTransformerXLConfig, dict(cutoffs=[100, 50]), r"cutoffs.*100, 50"),
    (GalleryTransformerXLConfig, dict(cutoffs=[50, 262]), r"cutoffs.*262"),
    (GalleryTransformerXLConfig, dict(cutoffs=[0, 50]), r"cutoffs.*0, 50"),
    (GalleryTransformerXLConfig, dict(cutoffs=[10, 20, 30], div_val=10), "div_val.*10"),
    (GalleryTransformerXLConfig, dict(cutoffs=[50], tie_projs=[True]), r"tie_projs.*1.*2"),
    (GalleryTransformerXLConfig, dict(cluster_order="sideways"), "cluster_order.*sideways"),
    (GalleryTransformerXLConfig, dict(embedding_size=0), "embedding_size.*0"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), CONFIGS, ids=[f"{k.model_type}-{s}" for k, s, _ in CONFIGS])
def test_bad_config(kind, settings, message, tmp_path):
    """In the constructor, and when such a file is read."""
    with pytest.raises(ValueError, match=message):
        kind(**settings)
    good = kind()
    with pytest.raises(ValueError, match=message):
        kind.from_dict(good.to_dict() | ({"head_dim": None} | settings))


def test_a_misspelt_argument_is_noticed(caplog):
    """transformers keeps unknown names without a word."""
    logging.getLogger("hf_gallery").propagate = True
    with caplog.at_level(logging.WARNING):
        GalleryTransformerXLConfig(mem_length=64)
    assert "mem_length" in caplog.text and "mem_len" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        GalleryTransformerXLConfig(id2label={0: "a"}, output_attentions=True, something_else=3)
    assert "GalleryTransformerXLConfig has no argument" not in caplog.text


@causal()
def test_unknown_attention(variant):
    """In transformers' words, and then what there is; when a model is built, and of one that stands."""
    kind, model = variant.heads["causal"].kind, variant.make("causal")
    for implementation in ("flash_attention_2", "flex"):
        message = f'Specified `attn_implementation="{implementation}"` is not supported.*{kind.__name__} has .eager'
        with pytest.raises(ValueError, match=message):
            kind._from_config(variant.make_config("causal"), attn_implementation=implementation)
        with pytest.raises(ValueError, match=message):
            model.set_attn_implementation(implementation)
    assert kind(variant.make_config("causal")).config._attn_implementation == "eager"


@over()
def test_attention_is_declared_as_it_is_and_set_on_a_built_model(variant, head):
    run = runner(variant, head)
    kind, ids = type(run.model), words(2, 17)
    assert kind._supports_sdpa == ("sdpa" in kind.implementations) and not kind._supports_flash_attn
    assert kind._supports_flex_attn == ("flex_attention" in kind.implementations)
    expected = run(ids)[0]
    for implementation in [name for name in ("sdpa", "eager") if name in kind.implementations]:
        run.model.set_attn_implementation(implementation)
        parts = [m for m in run.model.modules() if isinstance(m, PreTrainedModel)]
        assert {m.config._attn_implementation for m in parts} == {implementation}
        assert_equal(run(ids)[0], expected)


@pytest.mark.parametrize("kind", [GalleryTransformerConfig, GalleryLongformerConfig])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "relative", "none"])
def test_max_position_embeddings_is_kept_as_given(kind, positions, tmp_path):
    """It bounds the input of learned positions alone."""
    if positions not in kind.position_embedding_types:
        return
    config = kind(max_position_embeddings=512, position_embedding_type=positions, position_offset=0)
    config.save_pretrained(tmp_path)
    assert config.max_position_embeddings == kind.from_pretrained(tmp_path).max_position_embeddings == 512
    assert config.longest_input == (512 if positions == "learned" else None)
    assert isinstance(
        kind(position_embedding_type=positions, max_position_embeddings=None).max_position_embeddings, int
    )


@causal(lambda v: v.config.model_type != "gallery_transformer")
def test_sdpa_is_for_plain_attention_only(variant, tmp_path):
    """Refused when the model is built, in every way of asking, and not silently replaced."""
    config = variant.make_config("causal")
    with pytest.raises(ValueError, match="sdpa.*eager"):
        variant.heads["causal"].kind._from_config(config, attn_implementation="sdpa")
    model = variant.make("causal")
    with pytest.raises(ValueError, match="sdpa.*eager"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sdpa.*eager"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")


@over()
def test_an_argument_that_there_is_not(variant, head):
    """A misspelt argument is refused by name, and the right name is given; what would be lost in silence is worst."""
    run = runner(variant, head)
    ids = words(2, 6)
    arguments = run.inputs(ids)
    for model in dict.fromkeys([run.model, getattr(run.model, "model", run.model)]):
        for wrong, right in (("atention_mask", "attention_mask"), ("input_embeds", "inputs_embeds")):
            with pytest.raises(TypeError, match=rf"{type(model).__name__}.*'{wrong}'.*did you mean '{right}'"):
                model(**arguments, **{wrong: torch.ones(2, 6)})
        with pytest.raises(TypeError, match="'num_logits_kept'"):
            model(**arguments, num_logits_kept=1)
    if not run.head.question and "labels" in inspect.signature(run.model.forward).parameters:
        with pytest.raises(TypeError, match="'lables'.*did you mean 'labels'"):
            run.model(**arguments, lables=ids)


@over()
def test_what_tools_give_unasked(variant, head):
    """return_dict of PEFT, None for what is not there, zeros for the types of a tokenizer, num_items_in_batch of the
    Trainer, cache_position of older transformers."""
    run = runner(variant, head)
    arguments = run.inputs(words(2, 6))
    expected = result_of(run.model(**arguments))
    plain = {"return_dict": True, "use_cache": False} | dict.fromkeys(("head_mask", "position_ids", "seq_idx"))
    assert torch.equal(result_of(run.model(**arguments, **plain)), expected)
    assert torch.equal(run.model(**arguments, return_dict=False, use_cache=False)[0], run.model(**arguments)[0])
    if run.head.stream:
        assert torch.equal(result_of(run.model(**arguments, cache_position=torch.arange(6))), expected)
        with pytest.raises(ValueError, match="cache_position is not 0 to 5"):
            run.model(**arguments, cache_position=torch.arange(1, 7))
    if not run.head.source and not getattr(run.model.config, "type_vocab_size", None):
        types = torch.zeros(2, 6, dtype=torch.long)
        kind = variant.config.model_type
        if run.head.auto == "AutoModelForCausalLM" or kind not in ("gallery_transformer", "gallery_longformer"):
            assert torch.equal(result_of(run.model(**arguments, token_type_ids=types)), expected)


TOKEN_LABELS = tuple(f"AutoModelFor{x}" for x in ("CausalLM", "MaskedLM", "TokenClassification", "Seq2SeqLM"))


@over(lambda variant, head: head.auto in TOKEN_LABELS)
def test_types_of_labels(variant, head):
    """int32 is taken as int64; anything that is no whole number, a list or an array is refused by name."""
    run = runner(variant, head)
    arguments = run.inputs(words(2, 6))
    labels = torch.randint(0, 2, (2, 6))
    expected = run.model(**arguments, labels=labels).loss
    assert torch.equal(run.model(**arguments, labels=labels.int()).loss, expected)
    for wrong, error, message in (
        (labels.float(), ValueError, "labels.*float32"),
        (labels == 1, ValueError, "labels.*bool"),
        (labels.tolist(), TypeError, "labels is a list"),
        (labels.numpy(), TypeError, "labels is a ndarray"),
    ):
        with pytest.raises(error, match=message):
            run.model(**arguments, labels=wrong)
        if run.head.auto == "AutoModelForCausalLM":
            with pytest.raises(error, match=f"shift_{message}"):
                run.model(**arguments, shift_labels=wrong)


@over(lambda variant, head: head.pooled and not head.choices)
def test_types_of_classes(variant, head):
    run = runner(variant, head, num_labels=3)
    ids, labels = words(2, 6), torch.tensor([2, 0])
    assert torch.equal(run.model(ids, labels=labels.int()).loss, run.model(ids, labels=labels).loss)
    for wrong, error, message in (
        (labels == 2, ValueError, "labels.*bool"),
        (labels.tolist(), TypeError, "labels is a list"),
        (labels[:1], ValueError, r"labels.*\(1,\).*\(2,\)"),
        (labels.float(), ValueError, r"labels.*float32.*\(2,\).*\(2, 3\)"),
        (torch.ones(2, 3).long(), ValueError, r"labels.*int64.*\(2, 3\).*\(2,\)"),
    ):
        with pytest.raises(error, match=message):
            run.model(ids, labels=wrong)
    several = runner(variant, head, num_labels=3, problem_type="multi_label_classification").model
    values = runner(variant, head, num_labels=3, problem_type="regression").model
    for model in (several, values):
        assert model(ids, labels=torch.ones(2, 3)).loss.isfinite()
        with pytest.raises(ValueError, match=r"labels.*int64.*\(2,\)"):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"labels.*int64.*a floating type \(2, 3\)"):
        several(ids, labels=torch.ones(2, 3).long())


@over()
def test_lists_and_arrays(variant, head):
    """Models read tensors; what is none is named."""
    run = runner(variant, head)
    arguments = run.inputs(words(2, 6), torch.ones(2, 6, dtype=torch.long))
    for name, value in arguments.items():
        odd = [("ids", "str"), ({"full_attention": None}, "dict")] if "mask" in name else [("ids", "str")]
        for wrong, kind in ((value.tolist(), "list"), (value.numpy(), "ndarray"), *odd):
            with pytest.raises(TypeError, match=f"{name} is a {kind}"):
                run.model(**arguments | {name: wrong})


@over(lambda variant, head: head.auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"))
def test_logits_to_keep(variant, head):
    run = runner(variant, head)
    arguments = run.inputs(words(2, 6))
    whole = run.model(**arguments).logits
    for given, columns in (
        (0, range(6)), (1, [5]), (6, range(6)), (torch.tensor([4, 1]), [4, 1]), (torch.tensor([-1]), [5]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
    ):  # fmt: skip
        assert_equal(run.model(**arguments, logits_to_keep=given).logits, whole[:, list(columns)])
    for wrong, error, message in (
        (7, ValueError, "logits_to_keep is 7"),
        (-1, ValueError, "logits_to_keep is -1"),
        (torch.tensor([6]), ValueError, "logits_to_keep.*6"),
        (torch.tensor([0.5]), ValueError, "logits_to_keep.*float32"),
        (torch.tensor([True]), ValueError, "logits_to_keep.*bool"),
        ([1], TypeError, "logits_to_keep is a list"),
    ):
        with pytest.raises(error, match=message):
            run.model(**arguments, logits_to_keep=wrong)
    labels = words(2, 6)
    assert torch.equal(
        run.model(**arguments, labels=labels, logits_to_keep=6).loss, run.model(**arguments, labels=labels).loss
    )
    for wrong in () if variant.settings.get("cutoffs") else (3, torch.arange(6)):  # whose loss scores by itself
        with pytest.raises(ValueError, match="logits_to_keep is .*labels are given.*all 6 columns"):
            run.model(**arguments, labels=labels, logits_to_keep=wrong)


def takes_marks(variant, head):
    return variant.config.model_type == "gallery_longformer" and not variant.settings.get("segment_length")


def test_global_tokens_beside_segments():
    variant = next(v for v in VARIANTS if v.name == "longformer_xl")
    with pytest.raises(ValueError, match="global_attention_mask is given, and segment_length is 7"):
        variant.make()(words(1, 6), global_attention_mask=torch.zeros(1, 6))


@over(takes_marks)
def test_global_tokens_are_marked_by_ones(variant, head):
    run = runner(variant, head)
    inputs = run.inputs(words(2, 6))
    for wrong in (2, -1, 0.5, torch.nan):
        mask = torch.zeros(inputs["input_ids"].shape)
        mask[0, 2] = wrong
        with pytest.raises(ValueError, match="global_attention_mask holds values from .* 1 at global tokens"):
            run.model(**inputs | dict(global_attention_mask=mask))
    ones = torch.zeros_like(inputs["input_ids"])
    ones[:, 2] = 1
    expected = result_of(run.model(**inputs | dict(global_attention_mask=ones)))
    for mask in (ones.float(), ones == 1, ones.int()):
        assert torch.equal(result_of(run.model(**inputs | dict(global_attention_mask=mask))), expected)


@pytest.mark.parametrize("config", [None, "transformer", LlamaConfig()], ids=["None", "a name", "Llama's"])
def test_a_cache_of_no_gallery_model(config):
    with pytest.raises(TypeError, match=r"config is a .*give the configuration of a gallery model"):
        GalleryCache(config)


LAYING = {
    "positions that jump": (dict(position_ids=torch.tensor([[0, 1, 2, 4, 5, 6]])), r"position_ids differ"),
    "a document in two rows": (dict(cu_seq_lens_q=[0, 8, 12], cu_seq_lens_k=[0, 8, 12]), r"cu_seq_lens_q.*row 0.*1"),
    "too few tokens": (dict(cu_seq_lens_q=[0, 6], cu_seq_lens_k=[0, 6]), r"cu_seq_lens_q is \[0, 6\].*12"),
    "falling": (dict(cu_seq_lens_q=[0, 7, 6, 12], cu_seq_lens_k=[0, 7, 6, 12]), r"cu_seq_lens_q.*rise"),
    "other keys": (dict(cu_seq_lens_q=[0, 6, 12], cu_seq_lens_k=[0, 5, 12]), r"cu_seq_lens_q and cu_seq_lens_k"),
    "no keys": (dict(cu_seq_lens_q=[0, 6, 12]), r"cu_seq_lens_k is missing"),
    "floats": (dict(cu_seq_lens_q=torch.zeros(2), cu_seq_lens_k=torch.zeros(2)), r"cu_seq_lens_q.*float32"),
    "too short": (
        dict(cu_seq_lens_q=[0, 6, 12], cu_seq_lens_k=[0, 6, 12], max_length_q=5), r"max_length_q is 5.*\b6\b",
    ),
    "a length alone": (dict(max_length_q=6), r"max_length_q.*cu_seq_lens_q"),
    "numbers of another shape": (dict(seq_idx=torch.zeros(2, 5).long()), r"seq_idx.*\(2, 5\).*\(2, 6\)"),
    "in disagreement": (
        dict(seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]]), cu_seq_lens_q=[0, 6, 12], cu_seq_lens_k=[0, 6, 12]),
        r"seq_idx and cu_seq_lens_q differ",
    ),
    "positions in disagreement": (
        dict(seq_idx=torch.zeros(2, 6).long(), position_ids=torch.arange(3).repeat(2)[None]),
        r"position_ids.*seq_idx",
    ),
}  # fmt: skip


@over(lambda variant, head: not head.source)
def test_documents_laid_wrongly(variant, head):
    run = runner(variant, head)
    embeds = getattr(run.model.config, "position_embedding_type", "relative") in ("sinusoidal", "learned")
    ids = words(2, 6)
    for what, (arguments, message) in LAYING.items():
        if what == "positions that jump" and embeds:
            continue
        given = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in arguments.items()}
        with pytest.raises(ValueError, match=message):
            run.model(**run.inputs(ids), **given)
    with pytest.raises(ValueError, match="output_attentions.*packed"):
        run.model(**run.inputs(torch.cat([ids, ids], dim=1)), output_attentions=True, **packing_of_two(run))
    with pytest.raises(TypeError, match="seq_idx is a list"):
        run.model(**run.inputs(ids), seq_idx=[[0] * 6] * 2)


def packing_of_two(run):
    if run.seeks_question:  # each document needs a question
        return dict(position_ids=torch.arange(6).repeat(2)[None], global_attention_mask=torch.zeros(2, 12).long())
    return dict(position_ids=torch.arange(6).repeat(2)[None])


def test_an_encoder_decoder_takes_no_packed_documents():
    model = next(v for v in VARIANTS if "seq2seq" in v.heads).make("seq2seq")
    for name, value in (("seq_idx", torch.zeros(2, 6).long()), ("position_ids", torch.arange(6)[None])):
        with pytest.raises(ValueError, match=f"{name}.*encoder-decoder"):
            model(words(2, 9), decoder_input_ids=words(2, 6), **{name: value})


@over(lambda variant, head: head.question and not head.choices)
def test_places_of_answers(variant, head):
    """Columns of tokens, one a row, in whole numbers; a column behind the input is left out, as in transformers. What
    its loss would take for column 0, or turn into the logarithm of nothing, is refused."""
    run = runner(variant, head)
    inputs = run.inputs(words(2, 20), torch.ones(2, 20, dtype=torch.long))
    inputs["attention_mask"][1, 15:] = 0
    start, end = torch.tensor([4, 5]), torch.tensor([6, 20])
    expected = run.model(**inputs, start_positions=start, end_positions=end).loss
    same = dict(start_positions=start.int()[:, None], end_positions=torch.tensor([6, 99]))
    assert expected.isfinite() and torch.equal(run.model(**inputs, **same).loss, expected)
    for name, other in (("start_positions", "end_positions"), ("end_positions", "start_positions")):
        for wrong, error, message in (
            (start.float(), ValueError, "float32"),
            (start == 4, ValueError, "bool"),
            (start.tolist(), TypeError, "is a list"),
            (start.numpy(), TypeError, "is a ndarray"),
            (start[:1], ValueError, r"\(1,\).*2 rows"),
            (torch.tensor(4), ValueError, r"\(\).*2 rows"),
            (torch.tensor([-1, 4]), ValueError, "holds -1.*20"),
            (torch.tensor([15, 15]), ValueError, "holds 15 for row 1.*padding"),
        ):
            with pytest.raises(error, match=f"{name}.*{message}"):
                run.model(**inputs, **{name: wrong, other: start})
        with pytest.raises(ValueError, match=f"{other} is missing"):
            run.model(**inputs, **{name: start})


@over(lambda variant, head: variant.config.model_type == "gallery_memorizing_transformer")
def test_packed_retrievals_are_refused(variant, head):
    run = runner(variant, head)
    with pytest.raises(ValueError, match="output_retrievals is True, and documents are packed"):
        run.model(words(2, 12), output_retrievals=True, **packing_of_two(run))


@over(lambda variant, head: head.question and not head.choices)
def test_packed_answers_are_refused(variant, head):
    run = runner(variant, head)
    ids = torch.cat([run.inputs(words(2, 6))["input_ids"]] * 2, dim=1)
    with pytest.raises(ValueError, match="start_positions.*packed.* a row of its own, padded: leave out padding_free"):
        given = dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([2, 3]))
        run.model(ids, position_ids=torch.arange(6).repeat(2)[None], **given)


@over(lambda variant, head: head.auto not in ("AutoModel", "AutoModelForSeq2SeqLM"))
def test_a_head_on_one_stack_refuses_an_encoder_decoders_config(variant, head):
    """By its own name, and says which head takes it where the architecture has one."""
    config, kind = variant.make_config(head), variant.heads[head].kind
    config.is_encoder_decoder = True
    other = kind.auto_classes.get("AutoModelForSeq2SeqLM", "leave it False")
    with pytest.raises(ValueError, match=rf"{kind.__name__} has one stack.*is_encoder_decoder is True.*{other}"):
        kind(config)
