"""Loading: what is refused, and why."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kernel import plain_kernel
from tiny_model import tiny_loaded, tiny_model, tiny_tokenizer
from transformers import AutoConfig

from eloquent.errors import ConfigurationError
from eloquent_server.engine import layouts, loader
from eloquent_server.engine.linear import PrepackedLinear
from eloquent_server.engine.loader import load, prepare, refuse_unsupported
from eloquent_server.engine.paged import PAGE_TOKENS, Kernel, PagedCache, flash_attention


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_directory_is_loaded(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(directory, "mine", device="cpu")
    assert loaded.name == "mine"
    assert loaded.context_tokens == tiny_model().config.max_position_embeddings
    assert loaded.end_tokens == {tiny_tokenizer().eos_token_id}
    assert isinstance(loaded.model.lm_head, PrepackedLinear)
    assert not loaded.model.training
    assert capfd.readouterr() == ("", "")


def test_unknown_device(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="auto, cpu or cuda"):
        load(directory, "mine", device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        load(directory, "mine", device="cuda")


def test_damaged_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="could not be loaded"):
        load(tmp_path, "mine", device="cpu")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "short"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'),
    ],
)
def test_a_damaged_file(directory: Path, tmp_path: Path, file: str, content: str) -> None:
    copied = shutil.copytree(directory, tmp_path / "copy")
    (copied / file).write_text(content)
    with pytest.raises(ConfigurationError, match="could not be loaded"):
        load(copied, "mine", device="cpu")


@pytest.mark.parametrize(
    ("model_type", "settings", "problem"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding-window"),
        ("gemma2", {}, "soft-capped"),
        ("gpt_oss", {}, "sinks"),
        ("t5", {}, "encoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"depend on the text's length \(dynamic\)",
        ),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_unsupported_architectures(model_type: str, settings: dict[str, Any], problem: str) -> None:
    if "layer_types" in settings:
        settings = {**settings, "num_hidden_layers": 2}
    with pytest.raises(ConfigurationError, match=problem):
        refuse_unsupported(AutoConfig.for_model(model_type, **settings), "it")


@pytest.mark.parametrize(
    ("argument", "feature"),
    [
        ({"sliding_window": 4096}, "sliding-window"),
        ({"softcap": 50.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_that_asks_for_more_than_we_have_is_named(
    argument: dict[str, Any], feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration may not tell, but each layer's call does."""
    model = copy.deepcopy(tiny_model())
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def demanding(*args: Any, **inputs: Any) -> Any:
        more = argument if "eloquent_plan" in inputs else {}
        return forward(*args, **inputs, **more)

    monkeypatch.setattr(attention, "forward", demanding)
    with pytest.raises(ConfigurationError, match=feature):
        prepare(model, tiny_tokenizer(), "demanding")


def test_fingerprints_tell_weights_apart() -> None:
    model = copy.deepcopy(tiny_model())
    first = prepare(model, tiny_tokenizer(), "a").fingerprint
    assert prepare(copy.deepcopy(tiny_model()), tiny_tokenizer(), "b").fingerprint == first
    model.model.layers[1].self_attn.q_proj.weight.data *= 1.001
    assert prepare(model, tiny_tokenizer(), "a").fingerprint != first


def test_keys_stored_by_another_forward_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    now = prepare(tiny_model(), tiny_tokenizer(), "a").fingerprint
    monkeypatch.setattr(loader, "_FORWARD_VERSION", 1)
    assert prepare(tiny_model(), tiny_tokenizer(), "a").fingerprint != now


def on_pages(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loader try models as on CUDA, with this kernel, on the CPU."""

    def layout(shape: Any, device: torch.device, *, rows: int, row_tokens: int) -> PagedCache:
        return PagedCache(shape, pages=rows, device=device, rows=rows, kernel=kernel)

    monkeypatch.setattr(loader, "layout_for", layout)


def test_a_model_is_tried_on_the_layout_that_its_device_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_pages(plain_kernel, monkeypatch)
    prepare(copy.deepcopy(tiny_model()), tiny_tokenizer(), "tiny")
    # As on a GPU that torch's kernel does not support.
    on_pages(flash_attention, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"its forward fails .*flash_attention"):
        prepare(copy.deepcopy(tiny_model()), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize(("most_pages", "pages"), [(None, 4), (3.5, 3), (9, 4)])
def test_the_pool_of_pages_on_cuda_is_bounded(
    most_pages: float | None, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(layouts, "PagedCache", lambda shape, *, pages, **_: made.append(pages))
    shape = tiny_loaded().kv
    most = None if most_pages is None else int(most_pages * PAGE_TOKENS * shape.token_bytes)
    cuda = torch.device("cuda")
    layouts.layout_for(shape, cuda, rows=2, row_tokens=PAGE_TOKENS + 1, most_bytes=most)
    assert made == [pages]


def test_a_base_model_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template"):
        prepare(tiny_model(), tokenizer, "base")


def test_a_model_that_ignores_the_cache_is_refused() -> None:
    model = copy.deepcopy(tiny_model())
    forward = model.forward

    def forgetful(**inputs: Any) -> Any:
        inputs.pop("eloquent_plan", None)
        return forward(**inputs)

    model.forward = forgetful
    with pytest.raises(ConfigurationError, match="logits through the engine's cache differ"):
        prepare(model, tiny_tokenizer(), "forgetful")
