"""Exported programs give what the model gives: with the state in them, and forward passes without cache, traced or as ONNX."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from transformers import StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM, TorchExportableModuleWithStaticCache

EXPORTED = [
    ("llama", {"decay": "head"}, True),
    ("llama", {}, False),
    ("gpt_neox", {"kernel": "quadratic"}, False),
    ("gemma3", {}, True),  # Transformers' other wrapper, for models with windows
    ("qwen2", {"softmax_layers": [1]}, False),
    pytest.param(("gpt_neox", {"kernel": "quadratic"}, True), marks=pytest.mark.slow),
    pytest.param(("qwen2", {"softmax_layers": [1]}, True), marks=pytest.mark.slow),
]
TRACED = [("llama", {"decay": "head"}), ("gpt_neox", {"kernel": "quadratic"}), ("bert", {})]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=EXPORTED, ids=lambda x: "-".join([x[0], *map(str, x[1]), "strict" if x[2] else "traced"]))
def exportable(request):
    name, options, strict = request.param
    model = tiny_model(name, layers=2 if options.get("softmax_layers") else 1, **options)
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 32}
    return model, strict


@torch.no_grad()
def run(program, ids, lengths):
    position, out = 0, []
    for part in ids.split(lengths, 1):
        positions = torch.arange(position, position + part.shape[1])
        out.append(program(input_ids=part, cache_position=positions))
        position += part.shape[1]
    return torch.cat(out, 1)


@torch.no_grad()
def test_a_program_with_static_cache_decodes_one_text_after_another(exportable):
    model, strict = exportable
    wrapper = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32, device="cpu")
    program = wrapper.export(input_ids=tiny_tokens(1, 1), cache_position=torch.arange(1), strict=strict).module()
    for seed in (1, 2):  # the wrapper has no reset but position 0
        ids = tiny_tokens(1, 9, seed)
        close(run(program, ids, 1), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_program_takes_texts_of_any_length(exportable):
    model, strict = exportable
    length = torch.export.Dim("length", min=3, max=31)
    shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
    wrapper = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32, device="cpu")
    exported = wrapper.export(tiny_tokens(1, 4), cache_position=torch.arange(4), dynamic_shapes=shapes, strict=strict)
    program, ids = exported.module(), tiny_tokens(1, 23)
    for lengths in ([23], [3, 16, 4]):
        close(run(program, ids, lengths), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_gradients_do_not_keep_the_state_out_of_a_program():
    model = tiny_model("llama", layers=1)
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    wrapper = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=32, device="cpu")
    ids = tiny_tokens(1, 6)
    with torch.enable_grad():
        program = torch.export.export(wrapper, (), {"input_ids": ids[:, :1], "cache_position": torch.arange(1)}, strict=True).module()
    close(run(program, ids, 1), model(ids, use_cache=False).logits)


def test_a_state_that_is_not_there_yet_cannot_be_exported():
    model = tiny_model("llama", layers=1)
    cache = StaticCache(config=model.config, max_cache_len=32)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, past_key_values=cache).logits

    with torch.no_grad(), pytest.raises(Exception, match="only a state that is there before it begins"):
        torch.export.export(Decoder(), (tiny_tokens(1, 4),), strict=False)


class Plain(torch.nn.Module):
    """Token ids in, the first output out."""

    def __init__(self, name, options):
        super().__init__()
        self.model = tiny_model(name, layers=1, **options)
        self.causal = name != "bert"
        self.eval()

    def forward(self, ids):
        return self.model(ids, return_dict=False, **({"use_cache": False} if self.causal else {}))[0]


@pytest.mark.parametrize("name, options", TRACED, ids=[name for name, _ in TRACED])
@torch.no_grad()
def test_traced_forward(name, options):
    plain = Plain(name, options)
    traced = torch.jit.trace(plain, (tiny_tokens(2, 9),))
    other = tiny_tokens(2, 9, seed=5)
    close(traced(other), plain(other))


@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param("llama", {"decay": "head"}, id="llama"),
        pytest.param("gpt_neox", {"kernel": "quadratic"}, id="gpt_neox", marks=pytest.mark.slow),
        pytest.param("qwen3", {"normalize_qk": False, "b": 0.2}, id="qwen3", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx_forward_of_any_length(name, options):
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    plain, ids = Plain(name, options), tiny_tokens(2, 13)
    length = torch.export.Dim("length", min=2, max=256)
    exported = torch.onnx.export(plain, (tiny_tokens(2, 9),), dynamo=True, dynamic_shapes={"ids": {1: length}}, verbose=False)
    (out,) = evaluator(exported.model_proto).run(None, {exported.model_proto.graph.input[0].name: ids.numpy()})
    assert isinstance(out, np.ndarray)
    close(torch.from_numpy(out), plain(ids))


def test_onnx_takes_no_cache():
    class Cached(Plain):
        def forward(self, ids):
            return self.model(ids, use_cache=True).logits

    with torch.no_grad(), pytest.raises(Exception, match="without state and without dropout"):
        torch.onnx.export(Cached("llama", {}), (tiny_tokens(2, 9),), dynamo=True, verbose=False)
