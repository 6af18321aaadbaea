import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def forks_can_run_backward_passes():
    """The first backward pass starts a thread for each device there is, a fake one too (torch 2.11), and then no fork can run one."""
    if not torch.cuda.is_available():
        torch.zeros((), requires_grad=True).backward()


@pytest.fixture(scope="session", autouse=True)
def own_tokens(tmp_path_factory):
    """Text is tokenized into a cache of the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_LINATTN_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(autouse=True)
def large_memory_is_given_back():
    """Processes that test on one GPU share its memory, and PyTorch keeps for its own process what a test of many tokens took."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
