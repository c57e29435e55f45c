"""Try a method on made-up numbers, to catch an option out of range before anything is sampled."""

from __future__ import annotations

import numpy as np
import torch

from ppg_agents.agents.advantages import Turns
from ppg_agents.agents.gradient import Scored
from ppg_agents.agents.methods import Method, Options, resolve
from ppg_agents.alternatives import overlong_penalty
from ppg_agents.credit import full
from ppg_agents.missing import Credits


def try_out(method: Method, options: Options, longest_reply: int = 0) -> None:
    """Compute the method's loss of two tokens and its advantage of two turns.

    Raises:
        ValueError: What the formulas raise for an option out of range.
    """
    zeros, mask = torch.zeros((1, 2)), torch.ones((1, 2), dtype=torch.bool)
    if method.pair_loss:
        resolve(method.pair_loss)(*[zeros] * 4, ~mask, options)
    elif method.learns:
        part = Scored([0], zeros.long(), mask, zeros, zeros, mask, zeros.long())
        resolve(method.loss)(part, zeros + 1, options)
    if method.advantage:
        scores, judged = np.ones((2, 1)), np.ones((2, 1), dtype=np.bool_)
        credits, ones = Credits(scores, judged, ~judged, full(1)), torch.from_numpy(scores)
        resolve(method.advantage)(Turns(credits, ones, ones, torch.from_numpy(judged), [0, 0], ones, ones), options)
    if longest_reply:
        overlong_penalty(
            torch.tensor([float(longest_reply)]), max_length=longest_reply, buffer=options["overlong_buffer"]
        )
