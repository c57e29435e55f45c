// One conversation: its lines, tokens, rewards, and the credit that a policy class gives each reply.

const CHUNK = 60; // turns that are built at once
const CELLS = 40; // turns that the picture of the mask shows
const LEVELS = [0.05, 0.35, 1, 2, 4]; // nats: limits between the shades

// The weight with which a policy class counts reward l for reply t; 0: it does not count.
function weightOf({ ends, weights }, t, l) {
  if (l < t || l >= ends[t]) return 0;
  return weights ? weights[t][l - t] : 1;
}

// Credit of reply t: the rewards that count for it, each discounted by its distance; a turn without a score gives none
// and gets none.
function creditOf(rewards, planning, discount) {
  return rewards.map((own, t) => {
    if (own === null) return 0;
    const end = Math.min(planning.ends[t], rewards.length);
    let sum = 0;
    for (let l = t, left = 1; l < end; l += 1, left *= discount)
      if (rewards[l] !== null) sum += weightOf(planning, t, l) * left * rewards[l];
    return sum;
  });
}

const short = (weight) => String(Number(weight.toPrecision(3)));
const rewardsOf = (conversation) => conversation.turns.map((turn) => turn.reward);
const meanOf = (conversation) => {
  const judged = rewardsOf(conversation).filter((r) => r !== null);
  return judged.length ? judged.reduce((a, b) => a + b, 0) / judged.length : null;
};

// "r3 + r4 + r5 = 0.30 + 0.50 + 0.50 = 1.30", shortened in the middle.
function sumInWords(rewards, planning, discount, credit, t) {
  const all = rewards.map((_, l) => l).filter((l) => weightOf(planning, t, l) !== 0),
    judged = all.filter((l) => rewards[l] !== null);
  if (rewards[t] === null) return "has no score: the turn is masked and gets no credit";
  const weight = (l) => (weightOf(planning, t, l) === 1 ? "" : `${short(weightOf(planning, t, l))}·`);
  const factor = (l) =>
    weight(l) + (discount === 1 || l === t ? "" : `${discount}${l - t > 1 ? `^${l - t}` : ""}·`);
  const list = judged.length > 7 ? [...judged.slice(0, 4), null, ...judged.slice(-2)] : judged;
  const names = list.map((l) => (l === null ? "…" : `${factor(l)}r${l + 1}`)).join(" + ");
  const values = list.map((l) => (l === null ? "…" : factor(l) + score(rewards[l]))).join(" + ");
  const total = score(credit),
    lost = all.length - judged.length;
  const left = lost ? ` (${count(lost, "reward")} without a score left out)` : "";
  if (!judged.length) return `= ${total}: no reward counts for it${left}`;
  return judged.length > 1 || factor(judged[0]) ? `= ${names} = ${values} = ${total}${left}` : `= ${names} = ${total}${left}`;
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
function maskNode(data, planning, rewards, active) {
  const n = rewards.length || data.n,
    from = Math.max(0, Math.min((active ?? 0) - CELLS / 2, n - CELLS)),
    m = Math.min(n, CELLS);
  const cell = m <= 12 ? 18 : Math.max(5, Math.floor(216 / m)),
    side = m * cell,
    pad = 18;
  const { ends, weights, label } = planning,
    rows = Array.from({ length: m }, (_, i) => from + i),
    counted = (t) => rows.filter((l) => weightOf(planning, t, l) !== 0),
    place = (i) => pad + (i - from) * cell + 1,
    square = (t, l, w) => `M${place(l)} ${place(t)}h${w * cell - 2}v${cell - 2}h${2 - w * cell}z`,
    most = weights ? weights.flat().reduce((a, w) => Math.max(a, Math.abs(w)), 0) : 1;
  // Rows in one piece where all that counts counts once; else every reward by itself, as dark as its weight is large.
  const cells = (shown, on) =>
    weights
      ? shown.flatMap((t) =>
          counted(t).map((l) => {
            const weight = weightOf(planning, t, l);
            return el("path", {
              class: `cells${on}${weight < 0 ? " against" : ""}`,
              "fill-opacity": 0.15 + (0.85 * Math.abs(weight)) / most,
              d: square(t, l, 1),
            });
          }),
        )
      : [el("path", { class: `cells${on}`, d: shown.map((t) => square(t, t, counted(t).length)).join("") })];
  const inWords = (t) => {
    if (!weights) return `rewards ${t + 1} to ${Math.min(ends[t], n)}`;
    const list = counted(t).map((l) => `${l + 1} (weight ${short(weightOf(planning, t, l))})`);
    return list.length ? `rewards ${list.join(", ")}` : "no reward";
  };
  const svg = el("svg", {
    viewBox: `0 0 ${side + pad + 2} ${side + pad + 2}`,
    width: side + pad + 2,
    height: side + pad + 2,
    role: "img",
    "aria-label": `Mask of ${label}: ${rows
      .slice(0, 12)
      .map((t) => `reply ${t + 1} counts ${inWords(t)}`)
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
  svg.append(...cells(rows, ""));
  if (active !== null && active < n) svg.append(...cells([active], " on"));
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
      weights ? ", the darker the more" : "",
      n > m ? ` (turns ${from + 1} to ${from + m} of ${n})` : "",
    ),
    svg,
  ];
}
