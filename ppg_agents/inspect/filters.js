// What is looked for among the conversations.

function options() {
  const turns = conversations.flatMap((c) => c.turns),
    tally = (values) =>
      [...values.reduce((m, v) => m.set(v, (m.get(v) || 0) + 1), new Map())].sort((a, b) => b[1] - a[1]);
  const option = (value, text) => el("option", { value }, text);
  const group = (label, rows) =>
    rows.length &&
    el(
      "optgroup",
      { label },
      rows.map(([value, text]) => option(value, text)),
    );
  const statuses = tally(turns.map((t) => t.status)),
    kinds = tally(turns.map((t) => t.kind).filter(Boolean)),
    faults = tally(conversations.map((c) => c.partner).filter((p) => p !== "ok"));
  const failed = turns.filter((t) => t.status !== "scored").length,
    cut = conversations.filter((c) => c.truncated).length;
  fill(
    byId("verdict"),
    option("", "all"),
    group("Judge", [
      ...statuses.map(([s, n]) => [`status:${s}`, `${s} (${n})`]),
      ["failed", `any failure (${failed})`],
    ]),
    group(
      "Kind of reply",
      kinds.map(([k, n]) => [`kind:${k}`, `${k} (${n})`]),
    ),
    group("Ending", [
      ["cut", `cut short (${cut})`],
      ["partner", `partner failed (${faults.reduce((sum, [, n]) => sum + n, 0)})`],
      ...faults.map(([f, n]) => [`partner:${f}`, `partner: ${f} (${n})`]),
    ]),
  );
  fill(
    byId("domain"),
    option("", "all"),
    tally(conversations.map((c) => c.domain)).map(([d, n]) => option(`=${d}`, `${d || "not named"} (${n})`)),
  );
  fill(
    byId("turn"),
    option("", "all"),
    Array.from(
      {
        length: Math.min(
          500,
          conversations.reduce((most, c) => Math.max(most, c.turns.length), 0),
        ),
      },
      (_, t) => option(String(t + 1), String(t + 1)),
    ),
  );
  const sources = tally(conversations.map((c) => c.held));
  fill(
    byId("from"),
    option("", "all"),
    sources.map(([held, n]) => option(`=${held}`, `${held ? `held out, ${held}` : "learned from"} (${n})`)),
  );
  byId("from").parentElement.hidden = sources.length < 2;
  const trained = conversations.filter((c) => !c.held && c.iteration !== null);
  const iterations = [...new Set(trained.map((c) => c.iteration))].sort((a, b) => a - b);
  fill(
    byId("iteration"),
    option("", "all"),
    iterations.map((i) => option(String(i), String(i))),
  );
  byId("iteration").parentElement.hidden = !iterations.length;
}

const haystack = (turn) =>
  (turn.search ??= `${turn.message}\n${turn.reply}\n${turn.why}\n${turn.kind}\n${turn.status}`.toLowerCase());

function filter() {
  const [query, verdict, domain, turn, from, iteration, order] = [
    "query",
    "verdict",
    "domain",
    "turn",
    "from",
    "iteration",
    "order",
  ].map((id) => byId(id).value);
  const text = query.trim().toLowerCase(),
    [what, ...rest] = verdict.split(":"),
    name = rest.join(":");
  const ending = { cut: (c) => c.truncated, partner: (c) => (name ? c.partner === name : c.partner !== "ok") }[what];
  const judged = {
    status: (t) => t.status === name,
    kind: (t) => t.kind === name,
    failed: (t) => t.status !== "scored",
  }[what];
  state.shown = [];
  let turns = 0;
  for (const [index, c] of conversations.entries()) {
    if (from && c.held !== from.slice(1)) continue;
    if (iteration && (c.held || String(c.iteration) !== iteration)) continue;
    if (domain && c.domain !== domain.slice(1)) continue;
    if (ending && !ending(c)) continue;
    const role = text && `${c.persona}\n${c.instruction}`.toLowerCase().includes(text);
    let hits = null;
    if (text || judged || turn) {
      hits = new Set();
      for (const [t, one] of c.turns.entries()) {
        if (
          (!turn || String(t + 1) === turn) &&
          (!judged || judged(one)) &&
          (!text || role || haystack(one).includes(text))
        )
          hits.add(t);
      }
      if (!hits.size && !(role && !judged && !turn)) continue;
      if (role && !judged && !turn) hits = null;
    }
    turns += hits ? hits.size : c.turns.length;
    state.shown.push({ index, hits, mean: meanOf(c) });
  }
  const far = order === "low" ? Infinity : -Infinity,
    sign = order === "low" ? 1 : -1;
  if (order) state.shown.sort((a, b) => sign * ((a.mean ?? far) - (b.mean ?? far)) || a.index - b.index);
  byId("count").textContent = state.shown.length
    ? `${whole.format(state.shown.length)} of ${count(conversations.length, "conversation")}, ${count(turns, "turn")}`
    : conversations.length
      ? "No conversation matches; clear a filter."
      : "There is no conversation to show.";
  byId("space").style.height = `${state.shown.length * ROW}px`;
  byId("list").scrollTop = 0;
  choose(0);
}
