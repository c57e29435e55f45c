// The panel beside the conversation, the keys, and the start.

function panel() {
  const radio = (name, value, text, checked, change) =>
    el(
      "label",
      { class: "pill" },
      el("input", { type: "radio", name, value, checked, onchange: change }),
      el("span", {}, text),
    );
  const pick = (policy) => () => {
    state.policy = policy;
    drawCredit();
    if (comparison.credits) comparison.credits();
  };
  fill(
    byId("classes"),
    el("legend", {}, "Policy class"),
    data.auto ? radio("policy", "own", "as chosen then", true, pick("own")) : null,
    data.classes.map((one, i) =>
      radio(
        "policy",
        i,
        i === data.own && !data.auto ? `${one.label} (this run)` : one.label,
        state.policy === i,
        pick(i),
      ),
    ),
  );
  const steps = [
    data.discount === 1 ? "Rewards are not discounted." : `A reward d turns later counts ${data.discount}^d.`,
    data.baseline === "none"
      ? "No baseline is subtracted."
      : data.baseline
        ? `Before learning, a baseline (${data.baseline}) is subtracted from the credit.`
        : "",
    data.agent_note,
    "A reply without a score is masked.",
  ];
  byId("baseline").textContent = steps.filter(Boolean).join(" ");
  if (!conversations.some((c) => c.turns.some((turn) => turn.tokens.length))) {
    byId("view").remove();
    byId("shades").remove();
    return;
  }
  const view = (value) => () => {
    state.view = value;
    const at = state.active;
    drawConversation();
    activate(at ?? 0);
    if (comparison.draw) comparison.draw();
  };
  fill(
    byId("view"),
    el("legend", {}, "Lines"),
    radio("view", "shaded", "replies shaded", true, view("shaded")),
    radio("view", "every", "every token", false, view("every")),
    radio("view", "plain", "plain", false, view("plain")),
  );
  const limits = ["certain", ...LEVELS.map((limit) => `p < ${Math.round(100 * Math.exp(-limit))}%`)];
  fill(
    byId("shades"),
    el("p", { class: "small" }, "Trained tokens, by the probability with which they were sampled:"),
    el(
      "p",
      { class: "key" },
      limits.map((text, i) => el("span", { class: `token trained p${i}` }, text)),
    ),
    el("p", { class: "key" }, el("span", { class: "token untrained" }, "prompt and partner: not trained")),
  );
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const on = event.target,
    inList = on === byId("list"),
    turn = on.closest && on.closest(".turn");
  const move = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity }[event.key];
  if ((inList || turn === on) && move !== undefined) {
    event.preventDefault();
    if (inList) choose(move === -Infinity ? 0 : move === Infinity ? state.shown.length - 1 : state.chosen + move);
    else
      activate(move === -Infinity ? 0 : move === Infinity ? chosen().turns.length - 1 : state.active + move, {
        focus: true,
      });
    return;
  }
  if (inList && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    activate(state.active ?? 0, { focus: true });
  }
  const typing = on.matches && on.matches("input:not([type=radio]):not([type=checkbox]), select, textarea");
  if (typing || !byId("keys").checked) return;
  if (event.key === "j" || event.key === "k")
    choose(state.chosen + (event.key === "j" ? 1 : -1), { focus: inList ? null : "h3" });
  else if (event.key === "p") {
    const all = [...byId("classes").querySelectorAll("input")],
      next = all[(all.findIndex((one) => one.checked) + 1) % all.length];
    next.click();
  } else if (event.key === "/") byId("query").focus();
  else return;
  event.preventDefault();
}

function wire() {
  let waiting = 0;
  const later = () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  };
  byId("filters").addEventListener("input", (event) => {
    if (event.target.id === "query") later();
    else filter();
  });
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    filter();
  });
  byId("list").addEventListener("scroll", () => requestAnimationFrame(drawList), { passive: true });
  new ResizeObserver(drawList).observe(byId("list"));
  const at = (event) => {
    const node = event.target.closest(".turn");
    if (node && Number(node.dataset.turn) !== state.active) activate(Number(node.dataset.turn));
  };
  for (const kind of ["pointerover", "focusin"]) byId("conversation").addEventListener(kind, at);
  document.addEventListener("keydown", keys);
  byId("theme").addEventListener("change", (event) => {
    document.documentElement.dataset.theme = event.target.value;
  });
}

overview();
comparison();
options();
panel();
wire();
filter();
