"""A converted checkpoint in vLLM itself, where it is installed (tried with 0.33.0, which needs another torch than this project does): what
vLLM does on any machine up to the building of the model. The words of the refusal are held without vLLM by `test_refusals.py`."""

from importlib.metadata import entry_points

import pytest
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from hf_linattn import LinAttnConfig
from hf_linattn.models import config_class_for


def test_vllm_is_given_a_function_to_call():
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "hf_linattn")
    assert found.load()() is None


def test_a_converted_checkpoint_is_known_to_vllm_and_refused(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.plugins import load_general_plugins

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = CONFIGS["llama"]().to_diff_dict() | {"linattn": LinAttnConfig(learnable=True, decay="head").to_dict()}
    AutoModelForCausalLM.from_config(config_class_for("llama")(**sizes)).save_pretrained(tmp_path / "model")
    load_general_plugins()
    # no trust_remote_code: the plugin has made the architecture known
    model = ModelConfig(model=str(tmp_path / "model"), skip_tokenizer_init=True)
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/meeting", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        with pytest.raises(ValueError, match="vLLM would put its own softmax attention in the place of this checkpoint's linear one"):
            initialize_model(config)
