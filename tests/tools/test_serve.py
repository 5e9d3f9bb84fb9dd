"""`transformers serve` on saved causal models, asked by the client that most of its users have."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from test_trainer import FIVE, make

from hf_gallery.data import byte_tokenizer

REMEDY = 'pip install "transformers[serving]"'


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address that a server listens at. It has the code that the folders carry, and never imports this package."""
    for needed in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(needed, reason=f"{needed} is not installed; {REMEDY}")
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--trust-remote-code", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=log.parent, env=environment)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        else:
            pytest.fail(f"the server does not answer: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.works("transformers serve", *(variant.name for variant in FIVE))
def test_a_server_says_what_the_model_says(address, tmp_path):
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none", timeout=120, max_retries=0)
    tokenizer = byte_tokenizer()
    prompt = "the sea is wide"
    for variant in FIVE:
        folder = tmp_path / variant.name
        model = make(variant, tie_word_embeddings=False)
        # Plain letters: of a random model's bytes many are no character, and a stream keeps back what may become one.
        model.generation_config.suppress_tokens = list(range(128, len(tokenizer)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(new, skip_special_tokens=True)
        asked = dict(model=str(folder), prompt=prompt, max_tokens=12, temperature=0)
        whole = client.completions.create(**asked)
        assert whole.choices[0].text == expected, variant.name
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (ids.shape[1], len(new))
        pieces = [part.choices[0].text for part in client.completions.create(**asked, stream=True) if part.choices]
        assert "".join(pieces) == expected, variant.name
