"""Generating compiled: models that have learned something, and what may be changed on them."""

import torch
from generating import generate
from peft import LoraConfig, get_peft_model
from tiny_models import GROUPED, TEXT, tiny_tokens
from transformers import CompileConfig

from hf_linattn import LinAttnConfig, captured, made
from hf_linattn.models import config_class_for, model_class_for

TOKENS = {"max_new_tokens": 16, "min_new_tokens": 16}
MADE = made.MADE
WINDOW = {"form": "window", "window": 5, "sinks": 2, "gate": "token", "decay": "head"}


def converted(name="llama", layers=2, scale=2.0, **options):
    """A converted model that has learned something, its weights `scale` times the usual ones."""
    torch.manual_seed(0)
    sizes = {**TEXT, **GROUPED, "num_hidden_layers": layers, **({"sliding_window": 8} if name == "mistral" else {})}
    config = config_class_for(name)(**sizes, linattn=LinAttnConfig(learnable=True, **options).to_dict())
    model = model_class_for(type(config))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 8)
    return model


def compile_config(**options):
    config = CompileConfig(**{"backend": "eager", "mode": None, **options})
    config._compile_all_devices = True  # generate compiles by itself on accelerators only; the private name is how it is told to do so here
    return config


def generate_compiled(model, ids, mask=None, **options):
    return generate(model, ids, mask, **{"cache_implementation": "static", "compile_config": compile_config(), **TOKENS, **options})


def _learned(model):
    return [p for name, p in model.named_parameters() if "linattn" in name]


def _in_place(model):
    with torch.no_grad():
        for parameter in _learned(model):
            parameter.add_(2.0)


def _behind_the_counter(model):
    for parameter in _learned(model):
        parameter.data = parameter.data + 2.0


def _stepped(model):
    optimizer = torch.optim.AdamW(_learned(model), lr=2.0)
    model(tiny_tokens()).logits.square().mean().backward()
    optimizer.step()
    model.zero_grad()


def _replaced(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if "offset" in name:
                setattr(module, name, torch.nn.Parameter(parameter.detach() + 2.0))


def _adapted(model):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert adapted.base_model.model is model


def _loaded(model):
    model.load_state_dict(converted(scale=1.5, decay="head").state_dict())


def _hooked(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: (out[0] * 3, *out[1:]))


def _replaced_forward(model):
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) * 5


CHANGES = {
    "written in place": _in_place,
    "given other data": _behind_the_counter,
    "an optimizer's step": _stepped,
    "replaced parameters": _replaced,
    "an adapter": _adapted,
    "another state dict": _loaded,
    "another dtype": lambda model: model.to(torch.float64),
    "a hook": _hooked,
    "another forward": _replaced_forward,
    "another option": lambda model: model.config.linattn.update(softmax_layers=[0]),
    "scaling": lambda model: [setattr(layer.input_layernorm, "variance_epsilon", 3.0) for layer in model.model.layers],
    "embeddings": lambda model: model.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.randn(97, 64))),
}


def graphs_as_on_a_gpu(monkeypatch, compiled):
    """A list of the graphs to come; `compiled(backend, graph, inputs, joins)` changes one as it would be there, and returns what runs."""
    torch._dynamo.reset()
    changed = []

    def compile_graph(backend, graph, inputs, joins):
        changed.append(graph)
        return compiled(backend, graph, inputs, joins)

    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)
    monkeypatch.setattr(captured, "the_gpu", lambda now: None)
    monkeypatch.setattr(captured, "compile_graph", compile_graph)
    return changed


def graphs_changed_by(monkeypatch, change):
    """The same, each of them changed by `change(graph)` alone."""

    def compiled(backend, graph, inputs, joins):
        change(graph)
        return captured.Captured(backend(graph, inputs))

    return graphs_as_on_a_gpu(monkeypatch, compiled)


def made_in(graph):
    """What is made once."""
    return [node for node in graph.graph.nodes if node.target is MADE]
