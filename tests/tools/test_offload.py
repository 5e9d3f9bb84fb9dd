"""Models whose parameters lie elsewhere between forwards: accelerate, device_map and FSDP have them so."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from variants import assert_equal, over, result_of, runner, words

MASK = torch.ones(2, 17, dtype=torch.long)
MASK[0, :6] = 0


def outputs(run):
    """The model's results for a padded batch, and where it keeps a cache, for the tokens that follow."""
    results, cache = [], None
    for ids, mask in ((words(2, 17), MASK), (words(2, 5, seed=1), None)):
        inputs = run.inputs(ids, mask) | ({"past_key_values": cache, "use_cache": True} if run.head.stream else {})
        with torch.no_grad():
            out = run.model(**inputs)
        results.append(result_of(out))
        cache = out.get("past_key_values")
    return results


def in_parts(model):
    """A device map of the model's parts: on disk every second layer and all that is no layer, tied maps together."""
    layers, places = 0, dict.fromkeys((name for name, _ in model.named_parameters(recurse=False)), "cpu")

    def place(module, name):
        nonlocal layers
        whole = type(module).__name__ in model._no_split_modules
        if whole or not list(module.children()) or list(module.parameters(recurse=False)):
            layers += whole
            places[name] = "cpu" if whole and layers % 2 else "disk"
        else:
            for child, part in module.named_children():
                place(part, f"{name}.{child}")

    for child, part in model.named_children():
        place(part, child)
    return places


@pytest.mark.works("accelerate offload")
@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched"])
@over()
def test_an_offloaded_model_gives_the_same(variant, head, way, tmp_path):
    """Parameters are read only while their own module's forward runs: between two they are on the meta device."""
    run = runner(variant, head)
    expected = outputs(run)
    if way == "cpu":
        cpu_offload(run.model, execution_device="cpu")
    elif way == "disk":
        disk_offload(run.model, str(tmp_path), execution_device="cpu")
    else:
        dispatch_model(run.model, in_parts(run.model), main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.device.type == "meta" for parameter in run.model.parameters())
    for got, wanted in zip(outputs(run), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.works("accelerate offload")
@over(lambda variant, head: head.auto == "AutoModelForCausalLM")
def test_a_folder_opens_with_a_part_on_disk(variant, head, tmp_path):
    """from_pretrained(device_map=...), as `device_map="auto"` makes one where memory is short; and it generates."""
    run = runner(variant, head)
    expected = outputs(run)
    prompt = words(1, 9, seed=3)
    text = run.model.generate(prompt, max_new_tokens=6, do_sample=False)
    run.model.save_pretrained(tmp_path / "model")
    run.model = type(run.model).from_pretrained(
        tmp_path / "model", device_map=in_parts(run.model), offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.device.type == "meta" for parameter in run.model.parameters())
    for got, wanted in zip(outputs(run), expected, strict=True):
        assert_equal(got, wanted)
    assert torch.equal(run.model.generate(prompt, max_new_tokens=6, do_sample=False), text)


@over()
def test_layers_are_whole_in_their_forward_only(variant, head):
    """As under FSDP, which gathers a layer for its forward and frees it after; the rest is gathered throughout."""
    run = runner(variant, head)
    expected = outputs(run)
    layers = [m for m in run.model.modules() if type(m).__name__ in run.model._no_split_modules]
    assert layers
    for layer in layers:
        whole = {name: p.detach().clone() for name, p in layer.named_parameters()}

        def gather(layer, _, whole=whole):
            for name, p in layer.named_parameters():
                p.data.copy_(whole[name])

        def free(layer, *_):
            for p in layer.parameters():
                p.data.fill_(torch.nan)

        free(layer)
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(free, always_call=True)
    for got, wanted in zip(outputs(run), expected, strict=True):
        assert torch.equal(got, wanted)
