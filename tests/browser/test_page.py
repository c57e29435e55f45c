"""A run's page in a real browser: hostile texts stay texts, credit is what numpy says, keys and 10,000 turns work."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppg_agents.config import TrainConfig
from ppg_agents.credit import PolicyClass, credit
from ppg_agents.inspect.page import write_page
from ppg_agents.inspect.text import visible
from ppg_agents.runs import Run
from ppg_agents.trajectory import Trajectory, Turn, to_json

HOSTILE = (
    "<script>pwned('script')</script><img src=x onerror=\"pwned('img')\"><svg onload=\"pwned('svg')\">"
    "</script><!--<script>pwned('comment')</script>-->"
    '<iframe srcdoc="<script>parent.pwned(1)</script>"></iframe>'
    "<a href=\"javascript:pwned('link')\">javascript:pwned('text')</a><style>*{display:none}</style>"
    "<base href=//evil.example><link rel=stylesheet href=//evil.example/x.css></bdi></li></template>"
    "' onfocus=pwned(1) autofocus x=' \" ${pwned(2)} {{data}} \u202eelif\u2066 \u200b\x00 \ud800 \u2028 &lt;b&gt;"
)


def turn(reward: float, *, status: str = "scored", said: str = "Hello.", tokens: int = 3, version: int = 0) -> Turn:
    verdict = {"status": status, "score": None, "rationale": said, "kind": "truth" if said == "Hello." else said}
    ids, log_probs = tuple(range(5, 5 + tokens)), tuple(-0.7 * i for i in range(tokens))
    return Turn(said, said, (1, 2, 3), ids, log_probs, reward, verdict, version)


def conversation(*turns: Turn, persona: str = "p", said: str = "Be P.", **fields: Any) -> Trajectory:
    whole = {"domain": "chatting", "seed": 0, "terminated": True, "truncated": False, **fields}
    return Trajectory(instruction=said, persona=persona, turns=turns, **whole)


def make_run(folder: Path, *conversations: Trajectory, **settings: Any) -> Run:
    run = Run.create(folder, TrainConfig(**{"batch": 2, "model": "tiny", **settings}))
    lines = [json.dumps(json.loads(to_json(one))) for one in conversations]  # ASCII: lone surrogates can be written
    run.trajectories_file.write_text("\n".join(lines) + "\n")
    for i in range(3):
        run.append_metrics({"iteration": i + 1, "consistency": 0.4 + 0.1 * i})
    result = {
        "persona_consistency": 0.4,
        "ci95": [0.3, 0.5],
        "per_turn": [0.4, None],
        "per_turn_ci95": [[0.1, 0.6]] * 2,
    }
    run.write_evaluation("before", {"iteration": 0, "reachable": 0.9, **result})
    run.write_evaluation("after", {"iteration": 3, "reachable": 0.9, **result})
    return run


class Watched:
    """A page, and all that it should not do."""

    def __init__(self, page: Any) -> None:
        self.page, self.wrong = page, []
        self.pwned: list[str] = []
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: self.wrong.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error {error}"))
        page.on("request", lambda request: self.wrong.append(f"request {request.url}"))
        page.on("requestfailed", lambda request: self.wrong.append(f"refused {request.url} {request.failure}"))
        page.expose_function("pwned", lambda *what: self.pwned.append(str(what)))

    def open(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        asked, self.wrong[:] = list(self.wrong), []
        assert asked == [f"request {path.as_uri()}"]
        return self.page


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    seen = Watched(context.new_page())
    yield seen
    context.close()
    assert seen.wrong == []
    assert seen.pwned == []


@pytest.fixture
def shown(tmp_path: Path, watched: Watched) -> Callable[..., Any]:
    """Return a function that makes a run of conversations and opens its page."""

    def show(*conversations: Trajectory, most: int = 20_000, **settings: Any) -> Any:
        run = make_run(tmp_path / "run", *conversations, **settings)
        return watched.open(write_page(run.folder, conversations=most))

    return show


def ordinary() -> list[Trajectory]:
    """Return six conversations of three iterations, with every kind of failure."""
    lost = [turn(math.nan, status=status) for status in ("timeout", "unparsed", "refused", "error")]
    return [
        conversation(turn(0.5), turn(0.25), turn(1.0), turn(0.125), turn(0.75), persona="early and late"),
        conversation(turn(0.5), *lost, persona="unlucky"),
        conversation(turn(0.375, said="A word to find."), persona="short"),
        conversation(turn(0.0), turn(0.5), persona="cut", truncated=True, terminated=False, partner_status="role_flip"),
        conversation(turn(1.0), turn(1.0), turn(0.875), persona="early and late"),
        conversation(persona="empty", truncated=True, terminated=False),
    ]


def test_hostile_texts_are_seen_and_nothing_runs(tmp_path: Path, watched: Watched) -> None:
    bad = turn(0.5, said=HOSTILE), turn(math.nan, status=HOSTILE, said=HOSTILE)
    both = [
        conversation(*bad, persona=HOSTILE, said=HOSTILE, domain=HOSTILE, partner_status=HOSTILE, truncated=True)
    ] * 4
    run = make_run(tmp_path / "a <b>run", *both, domain=HOSTILE.encode("utf-8", "replace").decode().replace("\x00", ""))
    run.write_evaluation("after <script>pwned(3)</script>", {"iteration": 2, "persona_consistency": 0.5})
    page = watched.open(write_page(run.folder, conversations=10))
    for view in ("every", "plain", "shaded"):
        page.locator(f"#view input[value={view}]").check(force=True)
        for row in ("partner", "persona"):
            assert page.locator(f"[data-turn='0'] .{row} .said").first.text_content() == visible(HOSTILE)
    assert page.locator("[data-turn='0'] .judge .said").all_text_contents() == [visible(HOSTILE)] * 2
    assert page.locator(".conversation .instruction .said").text_content() == visible(HOSTILE)
    assert page.locator("[data-turn='1'] .chip.failed").text_content() == "no score: " + visible(HOSTILE)
    assert page.locator("bdi.said").evaluate_all(
        "all => all.every(one => getComputedStyle(one).unicodeBidi === 'isolate')"
    )
    page.locator("#query").fill("<script>pwned('script')")
    page.locator("#domain").select_option(index=1)
    page.locator("#verdict").select_option(index=1)
    for details in page.locator("details").all():
        details.evaluate("one => { one.open = true; }")
    assert "⟨U+202E⟩" in page.locator("#pair").inner_text()
    assert (
        page.locator("script, style, base, link, iframe, img, template").count() == 3
    )  # its own style, data and script
    assert page.evaluate("window.__pwned === undefined")


def test_what_is_injected_all_the_same_cannot_run(shown: Callable[..., Any], watched: Watched) -> None:
    page = shown(*ordinary())
    assert (
        page.evaluate(
            "(() => { try { document.body.innerHTML += '<b>'; return 'set'; } catch (e) { return e.name; } })()"
        )
        == "TypeError"
    )
    page.evaluate("""() => {
        const image = document.createElement('img');
        image.setAttribute('src', 'https://evil.example/x.png');
        document.body.append(image);
        const link = document.createElement('a');
        link.setAttribute('href', 'javascript:pwned(1)');
        document.body.append(link);
        link.click();
    }""")
    page.wait_for_timeout(150)
    said = "\n".join(watched.wrong)
    assert "TrustedHTML" in said
    assert "Running the JavaScript URL violates" in said or "Refused to run the JavaScript URL" in said
    assert "refused https://evil.example/x.png csp" in said
    watched.wrong.clear()


WEIGHTS = np.triu(np.outer([1, 0.5, -1, 0, 2], [1, 0, 0.25, 1, 0.5]))


@pytest.mark.parametrize(("written", "classes"), [("3-step", 6), (WEIGHTS, 7)], ids=["3-step", "weights"])
def test_the_class_switch_shows_the_credit_that_numpy_computes(
    shown: Callable[..., Any], written: object, classes: int
) -> None:
    conversations, own = ordinary(), PolicyClass.parse(written)
    page = shown(*conversations, discount=0.9, policy_class=own)
    labels = page.locator("#classes .pill").all_inner_texts()
    assert page.locator("#classes input:checked").locator("xpath=..").inner_text() == f"{own} (this run)"
    n = 5
    for i, label in enumerate(labels):
        page.locator("#classes input").nth(i).check(force=True)
        mask = (own if label.endswith(" (this run)") else PolicyClass.parse(label)).mask(n)
        for k, one in enumerate(conversations):
            page.locator("#list").evaluate("(list, at) => { list.scrollTop = 58 * at; }", k)
            page.locator(f"#option-{k}").click()
            rewards = np.full((1, n), np.nan)
            rewards[0, : len(one.turns)] = [t.reward for t in one.turns]
            expected = credit(rewards, mask, np.isfinite(rewards), 0.9)[0, : len(one.turns)]
            cells = page.locator(".turn .credit")
            got = [float(value) for value in cells.evaluate_all("all => all.map(one => one.dataset.value)")]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
            said = [f"{value:.2f}" if np.isfinite(r) else "–" for value, r in zip(expected, rewards[0], strict=False)]
            rounded = [text.replace("−", "-") for text in cells.locator("b").all_inner_texts()]
            assert all(a == b or abs(float(a) - float(b)) < 0.011 for a, b in zip(rounded, said, strict=True))
    assert len(labels) == classes


def test_pointing_at_a_turn_marks_the_rewards_it_is_credited_with(shown: Callable[..., Any]) -> None:
    page = shown(*ordinary(), policy_class="3-step")
    page.locator("[data-turn='1']").hover()
    marked = "all => all.map(one => Number(one.dataset.turn))"
    assert page.locator(".turn.counted").evaluate_all(marked) == [1, 2, 3]
    assert page.locator("#sum").inner_text() == "Credit of turn 2, 3-step: = r2 + r3 + r4 = 0.25 + 1.00 + 0.13 = 1.38"
    page.locator("#option-1").click()
    page.locator("[data-turn='0']").hover()
    assert page.locator(".turn.counted").evaluate_all(marked) == [0]
    assert "2 rewards without a score left out" in page.locator("#sum").inner_text()
    page.locator("[data-turn='2']").hover()
    assert "masked" in page.locator("#sum").inner_text()


FILTERS = (
    ({"#verdict": "failed"}, "1 of 6 conversations, 4 turns"),
    ({"#verdict": "status:refused"}, "1 of 6 conversations, 1 turn"),
    ({"#verdict": "status:refused", "#turn": "1"}, "No conversation matches; clear a filter."),
    ({"#verdict": "cut"}, "2 of 6 conversations, 2 turns"),
    ({"#verdict": "partner:role_flip"}, "1 of 6 conversations, 2 turns"),
    ({"#turn": "3"}, "3 of 6 conversations, 3 turns"),
    ({"#iteration": "3"}, "2 of 6 conversations, 3 turns"),
    ({"#query": "WORD to f"}, "1 of 6 conversations, 1 turn"),
    ({"#query": "unlucky"}, "1 of 6 conversations, 5 turns"),
)


def test_filters(shown: Callable[..., Any]) -> None:
    from playwright.sync_api import expect

    page = shown(*ordinary())
    count = page.locator("#count")
    assert count.get_attribute("aria-live") == "polite"
    for choice, expected in FILTERS:
        expect(count).to_have_text("6 of 6 conversations, 16 turns")
        for field, value in choice.items():
            if field == "#query":
                page.locator(field).fill(value)
            else:
                page.locator(field).select_option(value=value)
        expect(count).to_have_text(expected)
        page.locator("#filters button").click()


def test_open_shows_a_conversation_that_a_filter_hides_and_stays_there(shown: Callable[..., Any]) -> None:
    from playwright.sync_api import expect

    page = shown(*ordinary())
    page.locator("#turn").select_option(value="4")
    page.locator("#query").fill("unlucky")
    expect(page.locator("#count")).to_have_text("1 of 6 conversations, 1 turn")
    page.get_by_role("button", name="Open conversation 5").click()
    page.wait_for_timeout(150)  # what is filtered later would have been by now
    assert page.locator("#heading").inner_text().startswith("Conversation 5")
    assert page.evaluate("document.activeElement.id") == "heading"
    assert [page.locator(field).input_value() for field in ("#turn", "#query", "#order")] == ["", "", ""]
    expect(page.locator("#count")).to_have_text("6 of 6 conversations, 16 turns")


def test_held_out_personas_stand_side_by_side_before_and_after(tmp_path: Path, watched: Watched) -> None:
    from playwright.sync_api import expect

    run = make_run(tmp_path / "run", *ordinary())
    for iteration, rewards in ((0, (0.25, 0.5, 1.0)), (3, (1.0, 0.5, 0.75))):
        run.write_held_out(iteration, [conversation(turn(r), persona=f"h{i}", seed=i) for i, r in enumerate(rewards)])
    page = watched.open(write_page(run.folder, conversations=50))
    pair = page.locator("#pair")
    assert pair.locator("h3").all_inner_texts() == ["Before: iteration 0", "After: iteration 3"]
    assert pair.locator("option").all_inner_texts() == ["h0 (0.25 → 1.00)", "h1 (0.50 → 0.50)", "h2 (1.00 → 0.75)"]
    assert "Of 3 held-out conversations: 1 better, 1 equal, 1 worse, mean change +0.17." in pair.inner_text()
    pair.get_by_role("button", name="Next").click()
    pair.get_by_role("button", name="Open held-out conversation 2, after").click()
    expect(page.locator("#heading")).to_contain_text("Held-out conversation 2")
    assert "held out, after · not learned from" in page.locator(".about").inner_text()
    assert "all 6" in page.locator("#cards").inner_text()
    expect(page.locator("#count")).to_have_text("12 of 12 conversations, 22 turns")
    page.locator("#from").select_option(value="=after")
    expect(page.locator("#count")).to_have_text("3 of 12 conversations, 3 turns")
    page.locator("#from").select_option(value="=")
    page.locator("#iteration").select_option(value="3")
    expect(page.locator("#count")).to_have_text("2 of 12 conversations, 3 turns")


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ("ppg", "Before learning, a baseline (batch-mean) is subtracted from the credit."),
        ("grpo", "The agent grpo forms its own advantage from this credit (docs/agents.md)."),
        ("sft", "The agent sft reads no credit (docs/agents.md)"),
    ],
)
def test_the_page_says_what_the_agent_makes_of_the_credit(shown: Callable[..., Any], agent: str, said: str) -> None:
    page = shown(*ordinary(), agent=agent)
    assert said in page.locator("#baseline").inner_text()
    assert (said in page.locator("#lead").inner_text()) is (agent != "ppg")
    assert ("a baseline" in page.locator("#baseline").inner_text()) is (agent == "ppg")
    assert ("Policy class" in page.locator("#cards").inner_text()) is (agent != "sft")
    assert (page.get_by_text("(this run)").count() == 1) is (agent != "sft")


def test_everything_can_be_reached_and_done_with_keys(shown: Callable[..., Any]) -> None:
    page = shown(*ordinary())
    names, focus = (
        [],
        """() => {
        const on = document.activeElement, style = getComputedStyle(on), near = on.nextElementSibling;
        const ring = style.outlineStyle !== 'none' || (near && getComputedStyle(near).outlineStyle !== 'none');
        return [on === document.body ? 'end' : on.id || on.className || on.name || on.tagName, ring];
    }""",
    )
    for _ in range(60):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(focus)
        if name == "end":
            break
        names.append(name)
        assert ring, name
    for wanted in (
        "skip",
        "theme",
        "query",
        "verdict",
        "domain",
        "turn",
        "iteration",
        "order",
        "list",
        "policy",
        "view",
        "keys",
    ):
        assert wanted in names, wanted
    assert any(name.startswith("turn") and "active" in name for name in names)
    heading, active = page.locator("#heading"), "document.activeElement.dataset.turn"
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    assert heading.inner_text().startswith("Conversation 2")
    assert page.locator("#list").get_attribute("aria-activedescendant") == "option-1"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.evaluate(active) == "0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(active) == "2"
    page.keyboard.press("p")
    assert page.locator("#classes input:checked").input_value() == "0"  # from the last class round to the first
    assert page.locator("#sum").inner_text() == "Credit of turn 3, greedy: = r3 = 1.00"
    page.keyboard.press("j")
    assert heading.inner_text().startswith("Conversation 2")
    assert page.evaluate("document.activeElement.id") == "heading"
    page.keyboard.press("k")
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert heading.inner_text().startswith("Conversation 1")
    assert page.locator("#query").input_value() == "jk"
    page.locator("#filters button").click()
    page.locator("#keys").uncheck()
    page.keyboard.press("j")
    assert heading.inner_text().startswith("Conversation 1")


def test_landmarks_and_names(shown: Callable[..., Any]) -> None:
    page = shown(*ordinary())
    for role, name in (
        ("banner", None),
        ("main", None),
        ("contentinfo", None),
        ("search", "Filter the conversations"),
        ("navigation", "Sections"),
        ("listbox", "Conversations"),
        ("complementary", "Policy class and token shading"),
        ("article", "Conversation 1 1 of 6"),
    ):
        assert page.get_by_role(role, name=name).count() == 1, role
    assert page.get_by_role("heading", level=1).count() == 1
    unnamed = page.locator("input, select, button").evaluate_all(
        "all => all.filter(one => !(one.labels && one.labels.length) && !one.textContent.trim()).length"
    )
    assert unnamed == 0
    assert page.get_by_role("img").count() >= 3
    assert page.locator("svg[role=img]").evaluate_all(
        "all => all.every(one => one.getAttribute('aria-label').length > 20)"
    )


CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8").strip().removesuffix(";")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_texts_can_be_read_in_both_themes_and_nothing_overflows(
    shown: Callable[..., Any], scheme: str, width: int
) -> None:
    page = shown(*ordinary())
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    for view in ("shaded", "every"):
        page.locator(f"#view input[value={view}]").check(force=True)
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    other = {"light": "dark", "dark": "light"}[scheme]
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").select_option(other)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


ACTIONS = {
    "switch the class": "document.querySelector('#classes input').click()",
    "filter by turn": "(find('#turn').value = '2', find('#turn').dispatchEvent(new Event('input', {bubbles: true})))",
    "filter by text": "(find('#query').value = 'hello', find('#filters').requestSubmit())",
    "scroll the list": "(find('#list').scrollTop = 20000)",
    "next conversation": "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))",
    "every token": "find('#view input[value=every]').click()",
}
TIMED = """async () => {
    const find = (what) => document.querySelector(what), began = performance.now();
    act();
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    return (performance.now() - began) / 1000;
}"""


@pytest.mark.parametrize(("count", "each"), [(1_000, 10), (10, 1_000)])
def test_ten_thousand_turns_stay_smooth(tmp_path: Path, watched: Watched, count: int, each: int) -> None:
    run = make_run(tmp_path / "run")
    rewards = np.random.default_rng(0).random(each).round(2)
    line = to_json(conversation(*(turn(float(r), tokens=12) for r in rewards), persona="met twice"))
    run.trajectories_file.write_text(f"{line}\n" * count)
    path = write_page(run.folder, conversations=count)
    began = time.perf_counter()
    page = watched.open(path)
    page.locator(".turn").first.wait_for()
    seconds = {"load": time.perf_counter() - began}
    for name, act in ACTIONS.items():
        seconds[name] = page.evaluate(TIMED.replace("act()", act))
    print({name: round(value, 3) for name, value in seconds.items()}, f"{path.stat().st_size / 1e6:.1f} MB")
    assert seconds.pop("load") < 10
    assert max(seconds.values()) < 1.5
    assert page.evaluate("document.querySelectorAll('*').length") < 25_000
