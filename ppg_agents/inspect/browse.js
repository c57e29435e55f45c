// The list, of which only what is in sight exists, and the conversation that was chosen from it.

function drawList() {
  const list = byId("list"),
    first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4),
    last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const nodes = [];
  for (let i = first; i < last; i += 1) {
    const c = conversations[state.shown[i].index],
      lost = c.turns.filter((t) => t.status !== "scored").length;
    const node = el(
      "div",
      {
        class: "option",
        role: "option",
        id: `option-${i}`,
        "aria-selected": String(i === state.chosen),
        "aria-setsize": state.shown.length,
        "aria-posinset": i + 1,
        onclick: () => {
          choose(i);
          byId("list").focus();
        },
      },
      el(
        "span",
        { class: "line" },
        el("b", {}, `#${c.number}`),
        ` ${whenOf(c)}`,
        el("span", { class: "mean" }, el("span", { class: "sr" }, ", mean reward "), score(state.shown[i].mean)),
      ),
      el(
        "span",
        { class: "line small" },
        said(c.persona || "no persona"),
        spark(c),
        lost ? el("span", { class: "chip failed" }, `${lost} failed`) : null,
        c.truncated ? el("span", { class: "chip failed" }, "cut") : null,
      ),
    );
    node.style.transform = `translateY(${i * ROW}px)`;
    nodes.push(node);
  }
  fill(byId("space"), nodes);
  if (state.shown.length) list.setAttribute("aria-activedescendant", `option-${state.chosen}`);
  else list.removeAttribute("aria-activedescendant");
}

// The rewards of a conversation as small bars.
function spark(c) {
  const tall = (reward) => Math.max(1.5, (14 * Math.max(0, reward)) / state.rewardScale).toFixed(1);
  const turns = c.turns.slice(0, 40),
    width = Math.max(2, Math.min(5, Math.floor(80 / (turns.length || 1))));
  const d = turns
    .map((turn, t) => (turn.reward === null ? "" : `M${t * (width + 1)} 14v${-tall(turn.reward)}h${width}V14z`))
    .join("");
  return el(
    "svg",
    { class: "spark", width: turns.length * (width + 1), height: 14, "aria-hidden": "true" },
    el("path", { d }),
  );
}

function choose(i, { focus = null } = {}) {
  state.chosen = Math.max(0, Math.min(state.shown.length - 1, i));
  const list = byId("list"),
    top = state.chosen * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawList();
  drawConversation();
  if (focus) (byId("conversation").querySelector(focus) || list).focus({ preventScroll: false });
}

function open(index) {
  let at = state.shown.findIndex((one) => one.index === index);
  if (at < 0) {
    for (const field of byId("filters").querySelectorAll("input, select")) field.value = "";
    filter(); // not by reset(), whose event filters once more, later, and chooses the first one
    at = state.shown.findIndex((one) => one.index === index);
  }
  choose(at, { focus: "h3" });
}

const chosen = () => (state.shown.length ? conversations[state.shown[state.chosen].index] : null);

function drawConversation() {
  const c = chosen(),
    host = byId("conversation");
  if (!c) {
    fill(host, el("p", { class: "muted" }, byId("count").textContent));
    fill(byId("mask"));
    return;
  }
  state.hits = state.shown[state.chosen].hits;
  const [first] = state.hits || [0];
  state.active = c.turns.length ? (first ?? 0) : null;
  const ending =
    c.partner !== "ok"
      ? `ended by the partner: ${c.partner}`
      : c.truncated
        ? "cut short"
        : c.terminated
          ? "played to its end"
          : "open";
  const list = el("ol", { class: "turns" });
  fill(
    host,
    el(
      "h3",
      { id: "heading", tabindex: "-1" },
      nameOf(c).replace(/^./, (first) => first.toUpperCase()),
      el("span", { class: "muted" }, ` ${state.chosen + 1} of ${state.shown.length}`),
    ),
    state.active
      ? el(
          "button",
          { type: "button", class: "small", onclick: () => activate(state.active, { focus: true }) },
          `Go to turn ${state.active + 1}, the first match`,
        )
      : null,
    el(
      "p",
      { class: "about" },
      c.domain ? [said(c.domain), " · "] : "",
      whenOf(c) && `${whenOf(c)} · `,
      c.held && "not learned from · ",
      "persona ",
      said(c.persona || "not named"),
      ` · ${count(c.turns.length, "turn")} · `,
      el("span", { class: c.truncated || c.partner !== "ok" ? "bad" : "" }, said(ending)),
      ` · mean reward ${score(meanOf(c))}`,
    ),
    c.instruction && el("p", { class: "instruction" }, el("span", { class: "who" }, "Instruction"), said(c.instruction)),
    c.turns.length
      ? list
      : el("p", { class: "muted" }, "No turns: not even the first prompt fitted into the context."),
    el("p", { class: "sum", id: "sum", "aria-live": "polite" }),
  );
  const more = el("button", { type: "button", class: "more", onclick: () => extend() }, "");
  function extend(until = list.children.length + CHUNK) {
    const end = Math.min(c.turns.length, until);
    for (let t = list.children.length; t < end; t += 1) list.append(turnNode(data, state, c, t, t === state.active));
    more.textContent = `Show more turns (${whole.format(c.turns.length - end)} left)`;
    if (end < c.turns.length) list.after(more);
    else more.remove();
    drawCredit();
  }
  drawConversation.reach = (t) => {
    if (t >= list.children.length) extend(t + 20);
  };
  extend(Math.max(CHUNK, (state.active || 0) + 20));
}

function drawCredit() {
  const c = chosen();
  if (!c) return;
  const rewards = rewardsOf(c),
    credits = (state.credits = creditOf(rewards, classOf(c), data.discount));
  const most = creditOf(rewards, data.classes[data.classes.length - 1], data.discount).reduce(
    (a, b) => Math.max(a, b),
    1e-9,
  );
  for (const node of byId("conversation").querySelectorAll(".turn")) {
    const t = Number(node.dataset.turn),
      cell = node.querySelector(".credit"),
      masked = rewards[t] === null;
    cell.dataset.value = String(credits[t]);
    fill(
      cell,
      el("span", { class: "label" }, "credit"),
      el("b", {}, masked ? "–" : score(credits[t])),
      masked ? el("span", { class: "small" }, "masked") : bar(credits[t], most),
    );
  }
  light();
}

// Marks the active turn and the rewards that count for it.
function light() {
  const c = chosen(),
    t = state.active;
  const planning = classOf(c),
    rewards = rewardsOf(c);
  for (const node of byId("conversation").querySelectorAll(".turn")) {
    const l = Number(node.dataset.turn);
    node.classList.toggle("active", l === t);
    node.classList.toggle(
      "counted",
      t !== null && weightOf(planning, t, l) !== 0 && rewards[t] !== null && rewards[l] !== null,
    );
    node.tabIndex = l === t ? 0 : -1;
  }
  fill(
    byId("sum"),
    t === null
      ? ""
      : [
          el("b", {}, `Credit of turn ${t + 1}, ${planning.label}: `),
          sumInWords(rewards, planning, data.discount, state.credits[t], t),
        ],
  );
  fill(byId("mask"), maskNode(data, planning, rewards, t));
}

function activate(t, { focus = false } = {}) {
  const c = chosen();
  if (!c || !c.turns.length) return;
  state.active = Math.max(0, Math.min(c.turns.length - 1, t));
  drawConversation.reach(state.active);
  light();
  if (focus) byId("conversation").querySelector(`[data-turn="${state.active}"]`).focus();
}
