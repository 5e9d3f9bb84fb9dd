"""The Memorizing and the Block-Recurrent Transformer against the authors' code, google-research/meliad at e8af0543.

golden/meliad/README.md says what was run, and what was changed in it where the gallery departs from it: zero keys at
a document's start are masked, and the Memorizing Transformer has the gallery's local window and exact search.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import hf_gallery as gallery

GOLDEN = Path(__file__).parents[1] / "golden" / "meliad"
CASES = ["brt_fixed_skip", "brt_lstm_dual_feedback", "brt_lstm_single", "mt_exact"]
golden_cases = pytest.mark.parametrize("case", CASES)


def opened(case):
    """The gallery's model of a case, and what the official run of it gave: facts, and tensors by kind and name."""
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["golden"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    of = {kind: {} for kind in ("weight", "logits", "loss", "state", "grad")}
    for name, x in tensors.items():
        kind, _, rest = name.partition(".")
        if kind in of:
            of[kind][rest] = x.float()
    name = {"block_recurrent": "BlockRecurrentTransformer", "memorizing": "MemorizingTransformer"}[facts["model"]]
    config = getattr(gallery, f"Gallery{name}Config")(**facts["config"])
    model = getattr(gallery, f"Gallery{name}ForCausalLM")(config).eval()
    missing = model.load_state_dict(of["weight"], strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    expected = SimpleNamespace(ids=tensors["input_ids"], starts=tensors["start_of_document"].bool(), facts=facts, **of)
    return model, expected


def close(got, expected, message):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{message}: {m}")


def segments(model, expected):
    """Segment by segment: its number, ids (B, T), and the cache to read it with, rows reset whose document begins."""
    cache = gallery.GalleryCache(model.config)
    for i, (ids, starts) in enumerate(zip(expected.ids, expected.starts, strict=True)):
        if i and bool(starts.any()):
            cache.reset_rows(starts.nonzero().flatten())
        yield i, ids, cache


def test_the_cases_are_there():
    assert sorted(path.stem for path in GOLDEN.glob("*.safetensors")) == CASES


@golden_cases
def test_every_case_restarts_a_row_and_wraps_its_memory_round(case):
    model, expected = opened(case)
    assert expected.starts[0].all() and expected.starts[1:].sum() == 1
    if case == "mt_exact":
        before_the_restart = int(expected.starts[:, 1].nonzero()[-1]) * expected.ids.shape[2]
        assert before_the_restart > model.config.memory_size


@pytest.mark.parametrize("cuts", [None, 1, 7], ids=["segments", "tokens", "sevens"])
@golden_cases
@torch.no_grad()
def test_logits_states_and_losses(case, cuts):
    """Of every segment, the cache carried on, however a segment is cut."""
    model, expected = opened(case)
    for i, ids, cache in segments(model, expected):
        parts = ids.split(cuts or ids.shape[1], dim=1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
        close(logits, expected.logits[str(i)], f"logits of segment {i}")
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        close(loss, expected.loss[str(i)][0], f"loss of segment {i}")
        for layer in getattr(model.config, "recurrent_layers", []):
            close(cache.states[layer]["state"], expected.state[f"{i}.{layer}"], f"state after segment {i}")


@golden_cases
def test_gradients_per_segment(case):
    """Of every weight: what came before a segment enters its loss as a constant."""
    model, expected = opened(case)
    for i, ids, cache in segments(model, expected):
        output = model(ids, labels=ids, past_key_values=cache, use_cache=True)
        close(output.logits, expected.logits[str(i)], f"logits of segment {i}")
        close(output.loss, expected.loss[str(i)][0], f"loss of segment {i}")
        if i == expected.facts["grad_segment"]:
            break
    output.loss.backward()
    got = {name: x.grad for name, x in model.named_parameters()}
    assert got.keys() == expected.grad.keys()
    for name, x in expected.grad.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-4 * float(x.abs().max()), msg=name)


SLIPS = [
    ("brt_fixed_skip", dict(block_length=21)),
    ("brt_lstm_single", dict(block_length=21)),
    ("mt_exact", dict(memory_topk=9)),
    ("mt_exact", dict(mem_len=21)),
    ("mt_exact", dict(memory_size=59)),
]


@pytest.mark.parametrize(("case", "slip"), SLIPS, ids=str)
@torch.no_grad()
def test_a_slip_shows(case, slip):
    """A window of one key more, one pair fewer retrieved, a memory one pair smaller: each gives other numbers."""
    model, expected = opened(case)
    other = type(model)(type(model.config)(**expected.facts["config"] | slip)).eval()
    other.load_state_dict(model.state_dict())
    off = [
        other(ids, past_key_values=cache).logits - expected.logits[str(i)]
        for i, ids, cache in segments(other, expected)
    ]
    assert torch.stack(off).abs().max() > 1e-3
