"""A converted bfloat16 checkpoint trains over two processes as over one: DDP, FSDP1 and FSDP2, on CPUs."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_tokens
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM

from hf_linattn import LinAttnConfig, parameter_groups
from hf_linattn.models import config_class_for

STEPS = 3


def converted():
    options = LinAttnConfig(learnable=True, decay="head").to_dict()
    torch.manual_seed(0)
    config = config_class_for("llama")(**{**tiny_config("llama", layers=2).to_diff_dict(), "linattn": options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def wrapped_by_ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def wrapped_by_fsdp1(model):
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def wrapped_by_fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def wrapped_by_fsdp2_with_checkpointing(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return wrapped_by_fsdp2(model.train())


WRAPPERS = [wrapped_by_ddp, wrapped_by_fsdp1, wrapped_by_fsdp2, wrapped_by_fsdp2_with_checkpointing]


def train(model, ids):
    optimizer, losses = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.1)), []
    for _ in range(STEPS):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for wrap in WRAPPERS:
        losses = train(wrap(converted()), tiny_tokens(4).chunk(2)[rank])
        dist.all_reduce(losses)
        found[wrap.__name__] = losses / 2
    if rank == 0:
        torch.save(found, f"{folder}/losses")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    mp.start_processes(work, (str(folder),), nprocs=2, start_method="fork")  # spared two imports of everything
    return torch.load(folder / "losses"), train(converted(), tiny_tokens(4))


@pytest.mark.parametrize("wrapper", [wrap.__name__ for wrap in WRAPPERS])
def test_two_processes_learn_what_one_does(losses, wrapper):
    two, one = losses
    torch.testing.assert_close(two[wrapper], one, atol=0.01, rtol=0)  # bfloat16 sums in another order: 0.002
    assert one[0] - one[1] > 0.3


def test_parameters_have_one_dtype_and_what_was_learned_is_saved(tmp_path):
    model = converted()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    train(model, tiny_tokens(4))
    model.save_pretrained(tmp_path)
    saved, again = load_file(tmp_path / "model.safetensors"), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    learned = [name for name in saved if name.endswith("_offset")]
    assert len(learned) == 4 and all(saved[name].abs().max() > 0.05 for name in learned)
    assert all(torch.equal(again[name], saved[name]) for name in saved)
