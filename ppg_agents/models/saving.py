"""A model's weights in a folder: its adapter where it has one, else all of them; and its tokenizer beside them.

Safetensors and JSON alone, no pickles. What is in such a folder is found and loaded anew by `loading`.
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
        name: Of the base model, under which `loading` finds it again.
        folder: Made when it is not there.
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
    """Read back what `save` wrote, into the weights of a model that is loaded.

    Raises:
        FileNotFoundError: No weights in the folder.
        ValueError: They belong to another architecture or another LoRA.
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
