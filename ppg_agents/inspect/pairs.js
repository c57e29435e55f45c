// One persona before and after, side by side: a held-out one in two evaluations, or, where a run keeps none, one that was
// met early and late in training.

function comparison() {
  const host = byId("pair"),
    list = data.pairs,
    held = data.changes !== null;
  const [former, latter] = held ? ["Before", "After"] : ["Early", "Late"];
  if (!list.length) {
    const why = data.offline
      ? "Logged dialogues were learned from: the model itself has said none of these lines."
      : "No persona was met both early and late, so there is no like to put beside like.";
    fill(host, el("p", { class: "muted" }, why));
    return;
  }
  let at = 0;
  const body = el("div", {
    class: "beside",
    tabindex: "0",
    role: "region",
    "aria-label": `The same persona, ${former.toLowerCase()} and ${latter.toLowerCase()}, side by side`,
  });
  const pick = el(
    "select",
    { onchange: () => draw(pick.selectedIndex) },
    list.map(([a, b]) =>
      el("option", {}, `${conversations[a].persona} (${[a, b].map((i) => score(meanOf(conversations[i]))).join(" → ")})`),
    ),
  );
  const step = (by) => draw((at + by + list.length) % list.length);
  function draw(i) {
    pick.selectedIndex = at = i;
    const both = list[i].map((index) => conversations[index]),
      when = (c) => (c.iteration === null ? `line ${c.number}` : `iteration ${c.iteration}`);
    const turns = Math.max(...both.map((c) => c.turns.length));
    fill(
      body,
      both.map((c, k) =>
        el(
          "div",
          { class: `head ${k ? "after" : "before"}` },
          el("h3", {}, k ? latter : former, `: ${when(c)}`),
          el(
            "p",
            {},
            `mean reward ${score(meanOf(c))} · ${count(c.turns.length, "turn")} `,
            el(
              "button",
              { type: "button", onclick: () => open(list[i][k]) },
              "Open",
              el("span", { class: "sr" }, ` ${nameOf(c)}${held ? `, ${c.held}` : ""}`),
            ),
          ),
        ),
      ),
    );
    let built = 0;
    const more = el("button", { type: "button", class: "more", onclick: () => extend() });
    function extend() {
      const end = Math.min(turns, built + CHUNK);
      more.remove();
      for (; built < end; built += 1) body.append(...both.map((c, k) => cell(c, k, built)));
      more.textContent = `Show more turns (${turns - end} left)`;
      if (end < turns) body.append(more);
      credits();
    }
    function credits() {
      const sums = both.map((c) => creditOf(rewardsOf(c), classOf(c), data.discount));
      for (const node of body.querySelectorAll("[data-at]")) {
        const [k, t] = node.dataset.at.split(" "),
          masked = both[k].turns[t].reward === null;
        node.textContent = masked ? "masked" : `credit ${score(sums[k][t])}`;
      }
      fill(
        by,
        held ? heldWords() : `${count(list.length, "persona")}, those met farthest apart first. `,
        state.policy === "own" ? "Credit by the class chosen then." : `Credit by ${classOf(both[0]).label}.`,
      );
    }
    comparison.draw = () => draw(at);
    comparison.credits = credits;
    extend();
    fill(words, "Persona ", said(both[0].persona), both[0].instruction && [": ", said(both[0].instruction)]);
  }
  function cell(c, k, t) {
    const turn = c.turns[t];
    if (!turn) return el("div", { class: "cell none" }, t === c.turns.length ? "ended" : "");
    return el(
      "div",
      { class: `cell ${k ? "after" : "before"}` },
      el("span", { class: "number" }, el("span", { class: "sr" }, `${k ? latter : former}, turn `), String(t + 1)),
      el(
        "div",
        {},
        el("p", { class: "partner" }, said(turn.message)),
        el("p", {}, replyNode(data, turn, state.view === "plain" ? "plain" : "shaded")),
      ),
      el(
        "p",
        { class: "figures" },
        el("b", {}, score(turn.reward)),
        el(
          "span",
          { class: "chip" + (turn.status === "scored" ? "" : " failed") },
          said(turn.status === "scored" ? turn.kind || "scored" : turn.status),
        ),
        el("span", { class: "small", "data-at": `${k} ${t}` }),
      ),
    );
  }
  const words = el("p", { class: "instruction" }),
    by = el("span", { class: "small" });
  fill(
    host,
    el(
      "div",
      { class: "filters" },
      el("label", {}, `The same persona, ${former.toLowerCase()} and ${latter.toLowerCase()} `, pick),
      el("button", { type: "button", onclick: () => step(-1) }, "Previous"),
      el("button", { type: "button", onclick: () => step(1) }, "Next"),
      by,
    ),
    words,
    body,
  );
  draw(0);
}

// What became of all held-out pairs, shown or not.
function heldWords() {
  const { pairs, mean, up, same, down } = data.changes;
  if (!pairs) return "No held-out conversation was judged both times. ";
  const change = `${mean > 0 ? "+" : ""}${score(mean)}`;
  return `Of ${count(pairs, "held-out conversation")}: ${up} better, ${same} equal, ${down} worse, mean change ${change}. `;
}
