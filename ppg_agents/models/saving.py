"""Saves a model's weights (only the adapter, if it has one) and its tokenizer in a folder.

Safetensors and JSON only, no pickles. `loading` loads such a folder again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    """Write the PEFT adapter (or, without one, the model) and the tokenizer.

    Args:
        model: A transformers causal LM or a PEFT model around one.
        tokenizer: Its tokenizer.
        name: The base model's name, by which `loading` finds it again.
        folder: Made if it does not exist.
    """
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.base_model_name_or_path = name
        model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" asks the network
    else:
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def read_into(model: Any, folder: Path, device: torch.device) -> None:
    """Read back what `save` wrote, into a model that is already loaded.

    Raises:
        FileNotFoundError: The folder has no weights.
        ValueError: The weights belong to another architecture or another LoRA.
    """
    from safetensors.torch import load_file

    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        state = load_file(folder / "adapter_model.safetensors", device=str(device))
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(f"expected this policy's adapter in {folder}, got other names or shapes")
        set_peft_model_state_dict(model, state)
        return
    state = load_file(folder / "model.safetensors", device=str(device))
    expected = dict(model.named_parameters())
    if set(expected) - set(state):
        raise ValueError(f"expected the weights of this policy in {folder}, got other names")
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(state[key])
