// The top of the page: what was run, how it went, and what failed.

function overview() {
  fill(
    byId("title"),
    said(data.name),
    el(
      "span",
      {},
      data.about.map((part) => said(part)),
    ),
  );
  document.title = `${data.name} · conversations`;
  const who = data.offline ? "a logged speaker in the role of a persona" : "the model in the role of a persona";
  fill(
    byId("lead"),
    el(
      "p",
      {},
      `Every conversation below was held between a partner and ${who}; a judge gave each reply a reward. `,
      "The credit of the reply at turn t is the sum of the rewards that the policy class lets count for it: ",
      "point at a turn, or walk there with the arrow keys, and the rewards R",
      el("sub", {}, "t"),
      " that it is credited with light up.",
      data.agent_note ? ` ${data.agent_note}` : "",
    ),
  );
  fill(
    byId("notes"),
    data.notes.map((note) => el("li", {}, said(note))),
  );
  const before = data.evaluations.find((e) => e.when === "before"),
    after = data.evaluations.find((e) => e.when === "after");
  const c = data.counts,
    lost = c.statuses.filter(([name]) => name !== "scored").reduce((sum, [, n]) => sum + n, 0);
  const learned = conversations.filter((one) => !one.held),
    played = conversations.length - learned.length;
  const card = (name, value, more) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}, value), el("span", {}, more)));
  const key = data.offline ? "weighted_token_log_prob" : "persona_consistency";
  const held = [before, after].filter(Boolean),
    change =
      held.length === 2
        ? `${score(before[key], data.offline ? 2 : 3)} → ${score(after[key], data.offline ? 2 : 3)}`
        : held.length
          ? score(held[0][key], 3)
          : null;
  fill(
    byId("cards"),
    change &&
      card(
        data.offline ? "Log-prob of held-out replies" : "Consistency, held-out personas",
        change,
        held.map((e) => `${e.when}${range(...(e.ci95 || []))}`).join(", "),
      ),
    data.own !== null &&
      card(
        "Policy class",
        data.auto ? `auto, now ${data.classes[data.own].label}` : data.classes[data.own].label,
        `discount ${data.discount}, ${data.baseline ? `baseline ${data.baseline}` : "advantage of the agent's own"}`,
      ),
    card(
      "Conversations shown",
      learned.length === c.conversations
        ? `all ${whole.format(c.conversations)}`
        : `${whole.format(learned.length)} of ${whole.format(c.conversations)}`,
      `${count(
        learned.reduce((sum, one) => sum + one.turns.length, 0),
        "turn",
      )} of ${whole.format(c.turns)}${played ? `; and ${played} held out` : ""}`,
    ),
    card(
      "Replies without a score",
      c.turns ? `${whole.format(lost)} (${((100 * lost) / c.turns).toFixed(1)}%)` : "–",
      "masked: neither learned from nor counted",
    ),
  );
  drawCharts(data, byId("charts"));
  if (!byId("charts").children.length && data.kind === "run")
    byId("charts").append(el("p", { class: "muted" }, "No iteration and no held-out evaluation is stored yet."));
  if (data.kind === "run" && !data.evaluations.length)
    byId("charts").append(el("p", { class: "muted" }, "The run has no held-out evaluation."));
  if (data.facts.length)
    byId("facts").append(
      el(
        "dl",
        { class: "grid" },
        data.facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, said(v)))),
      ),
      table(
        "All settings",
        ["setting", "value"],
        data.settings.map(([k, v]) => [k, said(v)]),
      ),
    );
  else byId("facts").remove();
  const whys = [
    ...c.statuses.map(([name, n]) => [said(`verdict: ${name}`), count(n, "reply", "replies")]),
    ...c.partners.map(([name, n]) => [said(`partner: ${name}`), count(n, "conversation")]),
    ["cut short", count(c.truncated, "conversation")],
    ["without a turn: the first prompt did not fit", count(c.empty, "conversation")],
  ];
  byId("failures").append(
    table("Verdicts and endings of all conversations, shown or not", ["what", "how many"], whys),
  );
}
