"""Loading a model: what is asked of transformers, bitsandbytes and liger-kernel, and names that lead nowhere."""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.import_utils import is_bnb_4bit_available, is_bnb_available

from ppg_agents.policy import Policy


def test_what_is_asked_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Any:
        asked.update(options)
        return transformers.LlamaForCausalLM.from_pretrained(path)

    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes") as missing:
        Policy.load(quantisation="4bit", device="cuda")
    assert missing.value.name == "bitsandbytes"
    _pretend(monkeypatch, "bitsandbytes")
    with pytest.raises(ValueError, match="expected a CUDA device, got cpu"):
        Policy.load(quantisation="4bit", device="cpu")
    with pytest.raises(ValueError, match="give a rank"):
        Policy.load(quantisation="4bit", lora=None)
    with pytest.raises(ValueError, match="'none' or '4bit', got '8bit'"):
        Policy.load(quantisation="8bit")  # type: ignore[arg-type]
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    policy = Policy.load(quantisation="4bit", device="cuda", dtype=torch.bfloat16)
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["device_map"] == {"": torch.device("cuda")}
    assert asked["trust_remote_code"] is False
    assert policy.parameters()


def test_liger_changes_this_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
        Policy.load(kernels="liger", device="cuda")
    called: list[dict[str, Any]] = []
    _pretend(monkeypatch, "liger_kernel")
    fake = types.ModuleType("liger_kernel.transformers.monkey_patch")
    fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    fake._apply_liger_kernel_to_instance = lambda **options: called.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, *_: self)
    Policy.load(kernels="liger", device="cuda")
    assert called[0].pop("model").config.model_type == "llama"
    assert called == [{"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def _pretend(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let it look as if a package were installed, to everybody but peft, which remembers what it finds."""
    for installed in (is_bnb_available, is_bnb_4bit_available):
        installed()
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: types.SimpleNamespace() if name == package else own(name, *args),
    )


class TestNames:
    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            (
                "/no/such/folder",
                FileNotFoundError,
                "a model folder or a hub name, got '/no/such/folder'.*no such folder",
            ),
            ("nobody/no-such-model", ConnectionError, "not in the local cache, and the hub cannot be reached"),
            ("tyny", ConnectionError, "did you mean 'tiny'"),
        ],
    )
    def test_unknown_model_is_named_at_once(
        self, name: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _unreachable)
        start = time.perf_counter()
        with pytest.raises(error, match=message) as caught:
            Policy.load(name)
        assert time.perf_counter() - start < 15
        assert "\n" not in str(caught.value)

    def test_cached_model_needs_no_hub(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        tiny_llama: Callable[..., Any],
        byte_tokenizer: Callable[..., Any],
    ) -> None:
        snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
        tiny_llama().save_pretrained(snapshot)
        byte_tokenizer().save_pretrained(snapshot)
        (tmp_path / "models--me--mine" / "refs").mkdir()
        (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _unreachable)
        start = time.perf_counter()
        policy = Policy.load("me/mine", device="cpu")
        assert policy.name == "me/mine"
        assert time.perf_counter() - start < 15

    def test_what_the_hub_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        errors = importlib.import_module("huggingface_hub.errors")
        for kind, error, message in (
            ("RepositoryNotFoundError", FileNotFoundError, "the hub has no such model"),
            ("GatedRepoError", PermissionError, "licence"),
            ("RemoteEntryNotFoundError", FileNotFoundError, "no config.json"),
        ):
            raised = getattr(errors, kind).__new__(getattr(errors, kind))
            monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, r=raised, **__: _raise(r))
            with pytest.raises(error, match=message):
                Policy.load("nobody/no-such-model")


def _raise(error: Exception) -> None:
    raise error


def _unreachable(*_: Any, **__: Any) -> None:
    raise OSError("[Errno -2] Name or service not known")
