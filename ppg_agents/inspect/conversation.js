// One conversation: its lines, tokens, rewards, and the credit that a policy class gives each reply.

const CHUNK = 60; // turns that are built at once
const CELLS = 40; // turns that the picture of the mask shows
const LEVELS = [0.05, 0.35, 1, 2, 4]; // nats: limits between the shades

// Credit of reply t: the rewards that count for it, each discounted by its distance; a turn without a score gives none
// and gets none.
function creditOf(rewards, ends, discount) {
  return rewards.map((own, t) => {
    if (own === null) return 0;
    const end = Math.min(ends[t], rewards.length);
    let sum = 0;
    for (let l = t, weight = 1; l < end; l += 1, weight *= discount)
      if (rewards[l] !== null) sum += weight * rewards[l];
    return sum;
  });
}

const rewardsOf = (conversation) => conversation.turns.map((turn) => turn.reward);
const meanOf = (conversation) => {
  const judged = rewardsOf(conversation).filter((r) => r !== null);
  return judged.length ? judged.reduce((a, b) => a + b, 0) / judged.length : null;
};

// "r3 + r4 + r5 = 0.30 + 0.50 + 0.50 = 1.30", shortened in the middle.
function sumInWords(rewards, ends, discount, credit, t) {
  const all = Array.from({ length: Math.min(ends[t], rewards.length) - t }, (_, i) => t + i),
    judged = all.filter((l) => rewards[l] !== null);
  if (rewards[t] === null) return "has no score: the turn is masked and gets no credit";
  const factor = (l) => (discount === 1 || l === t ? "" : `${discount}${l - t > 1 ? `^${l - t}` : ""}·`);
  const list = judged.length > 7 ? [...judged.slice(0, 4), null, ...judged.slice(-2)] : judged;
  const names = list.map((l) => (l === null ? "…" : `${factor(l)}r${l + 1}`)).join(" + ");
  const values = list.map((l) => (l === null ? "…" : factor(l) + score(rewards[l]))).join(" + ");
  const total = score(credit),
    lost = all.length - judged.length;
  const left = lost ? ` (${count(lost, "reward")} without a score left out)` : "";
  return judged.length > 1 ? `= ${names} = ${values} = ${total}${left}` : `= ${names} = ${total}${left}`;
}

function bar(value, most) {
  const node = el("span", { class: "meter", "aria-hidden": "true" });
  node.style.setProperty("--share", String(Math.max(0, Math.min(1, value / most))));
  return node;
}

function shade(log) {
  if (log === null) return "unknown";
  return `p${LEVELS.filter((limit) => log / 1000 > limit).length}`;
}

const pieceOf = (data, id) => (data.tokens ? (data.tokens[id] ?? `⟨${id}⟩`) : `${id}`);
const chance = (log) => {
  const p = Math.exp(-log / 1000);
  return p > 0.9995 ? "> 99.9%" : p < 0.001 ? "< 0.1%" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`;
};

function token(data, id, log, trained) {
  const text = pieceOf(data, id),
    control = data.control.includes(id);
  const words = !trained
    ? "not trained"
    : log === null
      ? "trained; log-prob unknown"
      : `trained; log-prob ${score(-log / 1000, 3)}, p ${chance(log)}`;
  const kind = [
    "token",
    trained ? `trained ${shade(log)}` : "untrained",
    control && "control",
    !data.tokens && "number",
  ];
  const node = el("bdi", {
    class: kind.filter(Boolean).join(" "),
    title: `${JSON.stringify(text)} (${id}): ${words}`,
  });
  for (const [i, line] of text.split("\n").entries()) node.append(...(i ? ["↵", el("br")] : []), line);
  return node;
}

function replyNode(data, turn, view) {
  if (view === "plain" || !turn.inline || view === "every")
    return turn.reply ? said(turn.reply) : el("i", { class: "muted" }, "nothing was said");
  return el(
    "bdi",
    { class: "said tokens" },
    turn.tokens.map((id, i) => token(data, id, turn.logs[i], true)),
  );
}

function tokenRow(data, turn, view) {
  const every = view === "every",
    own = view === "shaded" && !turn.inline;
  if (!turn.tokens.length || !(every || own)) return null;
  return el(
    "p",
    { class: "row tokens" },
    el("span", { class: "who" }, every ? "All tokens" : "Tokens"),
    el(
      "span",
      { class: "stream" },
      every ? turn.prompt.map((id) => token(data, id, null, false)) : [],
      turn.tokens.map((id, i) => token(data, id, turn.logs[i], true)),
    ),
  );
}

function tokenWords(data, turn) {
  if (!turn.tokens.length) return null;
  const known = turn.logs.filter((log) => log !== null);
  let words = `${turn.tokens.length} of ${count(turn.tokens.length + turn.prompt.length, "token")} trained`;
  if (known.length) {
    const worst = turn.logs.indexOf(Math.max(...known));
    words += ` · mean log-prob ${score(-known.reduce((a, b) => a + b, 0) / known.length / 1000)}`;
    return [
      `${words} · `,
      el(
        "span",
        { class: "least" },
        "least likely ",
        el("bdi", { class: "token" }, pieceOf(data, turn.tokens[worst]).replaceAll("\n", "↵")),
        ` ${chance(turn.logs[worst])}`,
      ),
    ];
  }
  return [`${words} · log-probs unknown`];
}

function turnNode(data, state, conversation, t, active) {
  const turn = conversation.turns[t],
    failed = turn.status !== "scored";
  const verdict = failed ? turn.status : turn.kind || "scored";
  return el(
    "li",
    {
      class: `turn${state.hits && state.hits.has(t) ? " hit" : ""}`,
      "data-turn": t,
      tabindex: active ? "0" : "-1",
      "aria-describedby": "sum",
    },
    el("span", { class: "number" }, el("span", { class: "sr" }, "Turn "), String(t + 1)),
    el(
      "div",
      { class: "lines" },
      el(
        "p",
        { class: "row partner" },
        el("span", { class: "who" }, "Partner"),
        turn.message ? said(turn.message) : el("i", { class: "muted" }, "says nothing; the persona opens"),
      ),
      el("p", { class: "row persona" }, el("span", { class: "who" }, "Persona"), replyNode(data, turn, state.view)),
      tokenRow(data, turn, state.view),
      el(
        "p",
        { class: "row judge" },
        el("span", { class: "who" }, "Judge"),
        el(
          "span",
          {},
          el("span", { class: `chip ${failed ? "failed" : ""}` }, failed ? "no score: " : "", said(verdict)),
          " ",
          turn.why ? said(turn.why) : "",
        ),
      ),
      state.view === "plain"
        ? null
        : el("p", { class: "row foot" }, el("span", { class: "who" }), el("span", {}, tokenWords(data, turn))),
    ),
    el(
      "div",
      { class: "value reward" },
      el("span", { class: "label" }, "reward"),
      el("b", {}, score(turn.reward)),
      turn.reward === null ? null : bar(turn.reward, state.rewardScale),
    ),
    el("div", { class: "value credit" }, el("span", { class: "label" }, "credit"), el("b", {})),
  );
}

// The mask as a picture: a row for every reply, a column for every reward, filled where it counts.
function maskNode(data, ends, label, rewards, active) {
  const n = rewards.length || data.n,
    from = Math.max(0, Math.min((active ?? 0) - CELLS / 2, n - CELLS)),
    m = Math.min(n, CELLS);
  const cell = m <= 12 ? 18 : Math.max(5, Math.floor(216 / m)),
    side = m * cell,
    pad = 18;
  const d = (rows) =>
    rows
      .map((t) => {
        const end = Math.min(ends[t], from + m) - Math.max(t, from);
        const at = pad + (t - from) * cell + 1;
        return end > 0 ? `M${at} ${at}h${end * cell - 2}v${cell - 2}h${2 - end * cell}z` : "";
      })
      .join("");
  const rows = Array.from({ length: m }, (_, i) => from + i);
  const svg = el("svg", {
    viewBox: `0 0 ${side + pad + 2} ${side + pad + 2}`,
    width: side + pad + 2,
    height: side + pad + 2,
    role: "img",
    "aria-label": `Mask of ${label}: ${rows
      .slice(0, 12)
      .map((t) => `reply ${t + 1} counts rewards ${t + 1} to ${Math.min(ends[t], n)}`)
      .join(", ")}`,
  });
  svg.append(el("rect", { class: "field", x: pad, y: pad, width: side, height: side }));
  svg.append(
    el("path", {
      class: "lines",
      d: Array.from(
        { length: m + 1 },
        (_, i) => `M${pad} ${pad + i * cell}h${side}M${pad + i * cell} ${pad}v${side}`,
      ).join(""),
    }),
  );
  svg.append(el("path", { class: "cells", d: d(rows) }));
  if (active !== null && active < n) svg.append(el("path", { class: "cells on", d: d([active]) }));
  for (const t of rows)
    if (rewards.length && rewards[t] === null)
      svg.append(el("rect", { class: "lost", x: pad + (t - from) * cell, y: pad, width: cell, height: side }));
  for (const t of rows.filter((v) => m <= 12 || (v + 1) % 5 === 0)) {
    const at = pad + (t - from + 0.5) * cell;
    svg.append(
      el("text", { x: at, y: pad - 6, "text-anchor": "middle" }, String(t + 1)),
      el("text", { x: pad - 5, y: at + 3.5, "text-anchor": "end" }, String(t + 1)),
    );
  }
  return [
    el(
      "figcaption",
      {},
      "Row t: the rewards that count for reply t",
      n > m ? ` (turns ${from + 1} to ${from + m} of ${n})` : "",
    ),
    svg,
  ];
}
