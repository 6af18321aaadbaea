"""`transformers serve` runs a converted checkpoint by its folder's name, asked by HTTP clients as users have them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_models import TOKENS, byte_tokenizer
from tiny_softmax import softmax_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_linattn
from convert.linearize import LinearizeOptions, linearize

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = "once upon a time"


def test_converted_classes_are_found_in_transformers() -> None:
    assert transformers.LinAttnLlamaForCausalLM is hf_linattn.models.LinAttnLlamaForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'LinAttnNothing'"):
        _ = transformers.LinAttnNothing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "softmax")
    softmax_model("llama", vocab_size=TOKENS).save_pretrained(folder / "softmax")
    options = {"form": "window", "window": 8, "kernel": "quadratic", "decay": "key_head", "input_gate": "token", "output_map": "norm_gate"}
    linearize(folder / "softmax", folder / "linear", LinearizeOptions(**options, keep_softmax=(1,), check=False))
    return folder / "linear"


def transformers_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command of Transformers, and the environment in which it uses one core and this checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *arguments], environment


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Iterator[int]:
    """Of a server in a process of its own, which knows of hf_linattn by the checkpoint alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(number)]
    command, environment = transformers_command("serve", *options)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert server.poll() is None, "the server ended"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", number)) == 0:
                    break
            time.sleep(0.2)
        yield number
    finally:
        server.kill()
        server.wait()


def ask(port: int, what: str, **body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", f"/v1/{what}", json.dumps(body), {"content-type": "application/json"})
    return connection, connection.getresponse()


def told(port: int, what: str, **body: Any) -> Any:
    connection, response = ask(port, what, **body)
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    return json.loads(text)


def expected(checkpoint: Path, prompt: str, tokens: int, chat: bool = False) -> str:
    """Of a chat the template says how it begins, and the tokenizer adds nothing."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_completion_is_what_the_model_generates(checkpoint: Path, port: int) -> None:
    answer = told(port, "completions", model=str(checkpoint), prompt=PROMPT, max_tokens=12)
    assert answer["choices"][0]["text"] == expected(checkpoint, PROMPT, 12)
    assert answer["usage"]["completion_tokens"] == 12


def test_a_chat_is_streamed(checkpoint: Path, port: int) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    connection, response = ask(port, "chat/completions", model=str(checkpoint), messages=messages, max_tokens=12, stream=True)
    lines = [line.removeprefix("data: ") for line in response.read().decode().splitlines() if line.startswith("data: {")]
    connection.close()
    deltas = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
    whole = expected(checkpoint, PROMPT, 12, chat=True).rstrip("\ufffd")  # a letter of which bytes are missing at the end is not streamed
    assert len([delta for delta in deltas if delta]) > 1 and "".join(deltas) == whole


def test_two_clients_at_once_and_one_that_hangs_up(checkpoint: Path, port: int) -> None:
    connection, response = ask(port, "completions", model=str(checkpoint), prompt="gone soon", max_tokens=400, stream=True)
    response.read(20)
    connection.close()
    prompts = ["the first of two", "and the second one"]
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda prompt: told(port, "completions", model=str(checkpoint), prompt=prompt, max_tokens=9), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == [expected(checkpoint, prompt, 9) for prompt in prompts]


@pytest.mark.slow
def test_transformers_chat(checkpoint: Path, port: int) -> None:
    """Types a message, declines to go on behind the last token, and leaves."""
    options = ["chat", str(checkpoint), f"http://127.0.0.1:{port}/v1", "max_new_tokens=12", "do_sample=False"]
    command, environment = transformers_command(*options)
    typed = f"{PROMPT}\nn\n!exit\n"
    chat = subprocess.run(command, env=environment, input=typed, capture_output=True, text=True, timeout=300, check=False)
    assert chat.returncode == 0, chat.stderr
    shown, answer = ("".join(filter(str.isalnum, text)) for text in (chat.stdout, expected(checkpoint, PROMPT, 12, chat=True)))
    assert answer and answer in shown
