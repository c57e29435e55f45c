"""A person at the terminal: a stranger to the persona unless told, and what is typed is what is said."""

from __future__ import annotations

import io

import numpy as np
import pytest

from ppg_gym.conversation import Conversation
from ppg_gym.domain.cast import personas
from ppg_gym.partners import Said
from ppg_gym.partners.console import ConsolePartner


@pytest.mark.parametrize("show", [True, False])
def test_the_persona_is_shown_once_and_only_where_asked_for(
    show: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    persona = personas("chatting", "held-out")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    partner = ConsolePartner("chatting", {"show_persona": show})
    begun = Conversation(persona)
    assert partner.speak([begun], [np.random.default_rng()]) == [Said("Hello")]
    later = begun.add("partner", "Hello").add("policy", "Hi")
    assert partner.speak([later], [np.random.default_rng()]) == [Said("", "ended")]
    shown = capfd.readouterr()
    assert shown.err == (f"[{persona.id}] {persona.instruction}\n" if show else "")
    assert shown.out == "you> you> \n", "after the end of input, the next text has a line of its own"


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['show_persona'\]: expected true or false, got 'yes'"):
        ConsolePartner("chatting", {"show_persona": "yes"})
    with pytest.raises(ValueError, match=r"got \['show'\]"):
        ConsolePartner("chatting", {"show": True})
