// Pictures of numbers, drawn for the width there is; the same numbers stand below each as a table.

function chart(host, spec) {
  const legend = el(
    "ul",
    { class: "legend" },
    spec.series.map((s) => el("li", { class: s.tone }, mark(s), s.name)),
  );
  const box = el("div", { class: "plot" });
  const numbers = el("details", {}, el("summary", {}, "Numbers"), table(spec.title, spec.head, spec.rows));
  host.append(el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, spec.title), legend), box, numbers));
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width && width !== drawn) fill(box, plot(spec, (drawn = width)));
  }).observe(box);
}

function mark(series) {
  const shape = series.kind === "line" ? el("path", { d: "M0 6H16", class: "stroke" }) : dot(series.shape, 8, 6);
  return el("svg", { width: 16, height: 12, "aria-hidden": "true" }, shape);
}

function dot(shape, x, y) {
  if (shape === "diamond")
    return el("path", { class: "dot", d: `M${x} ${y - 5.5}L${x + 5.5} ${y}L${x} ${y + 5.5}L${x - 5.5} ${y}Z` });
  return el("circle", { class: "dot", cx: x, cy: y, r: 4.5 });
}

function ticks(low, high, most, whole) {
  const rough = (high - low) / most || 1,
    power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

function plot(spec, width) {
  const height = 250,
    left = 44,
    right = 12,
    top = 10,
    bottom = 40;
  const [x0, x1] = spec.x.range,
    [y0, y1] = spec.y.range;
  const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (v) => height - bottom - ((v - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const svg = el("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `${spec.title}. ${spec.words}`,
  });
  const digits = y1 - y0 > 3 ? 0 : y1 - y0 > 0.5 ? 1 : y1 - y0 > 0.05 ? 2 : 4;
  for (const v of ticks(y0, y1, 5)) {
    svg.append(el("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    svg.append(el("text", { class: "tick", x: left - 8, y: y(v) + 4, "text-anchor": "end" }, score(v, digits)));
  }
  for (const v of ticks(x0, x1, Math.max(2, Math.min(10, width / 60)), true).filter((t) => t >= spec.x.first)) {
    svg.append(el("text", { class: "tick", x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, String(v)));
  }
  svg.append(el("line", { class: "axis", x1: left, x2: width - right, y1: y(y0), y2: y(y0) }));
  svg.append(
    el(
      "text",
      { class: "tick", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" },
      spec.x.label,
    ),
  );
  if (spec.rule) {
    const at = y(spec.rule.value);
    svg.append(el("line", { class: "rule", x1: left, x2: width - right, y1: at, y2: at }));
    svg.append(el("text", { class: "tick", x: left + 14, y: at < top + 14 ? at + 15 : at - 6 }, spec.rule.name));
  }
  for (const s of spec.series) {
    const group = el("g", { class: s.tone });
    const points = s.points.filter((p) => p[1] !== null);
    if (s.kind === "line" || s.joined) {
      const d = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      group.append(el("path", { class: s.joined ? "stroke thin" : "stroke", d }));
    }
    if (s.kind !== "line") {
      for (const [px, py, low, high] of points) {
        const at = x(px) + (s.shift || 0);
        if (low !== null && low !== undefined) {
          group.append(
            el("path", {
              class: "stroke thin",
              d: `M${at} ${y(low)}V${y(high)}M${at - 3} ${y(low)}h6M${at - 3} ${y(high)}h6`,
            }),
          );
        }
        group.append(dot(s.shape, at, y(py)));
      }
    }
    svg.append(group);
  }
  return svg;
}

// The mean over about a tenth of a series around each point, as in curve.png.
function smooth(points) {
  const half = Math.max(Math.floor(points.length / 20), 1);
  return points.map(([at], i) => {
    const near = points.slice(Math.max(0, i - half), i + half + 1);
    return [at, near.reduce((sum, p) => sum + p[1], 0) / near.length];
  });
}

function drawCharts(data, host) {
  const held = data.evaluations,
    tones = ["before", "after"];
  const tone = (e) => (e.when === "before" ? "before" : "after");
  const points = data.metrics.points,
    key = data.offline ? "weighted_token_log_prob" : "persona_consistency";
  const measured = held.filter((e) => e[key] !== null && e[key] !== undefined);
  if (points.length || measured.length) {
    const values = [
      ...points.map((p) => p[1]),
      ...measured.flatMap((e) => [e[key], ...(e.ci95 || []).filter((v) => v !== null)]),
    ];
    const bounds = data.offline
      ? [Math.min(...values), Math.max(...values, Math.min(...values) + 0.1)]
      : [Math.min(0, ...values), Math.max(1, ...values)];
    const last = Math.max(1, ...points.map((p) => p[0]), ...measured.map((e) => e.iteration || 0));
    const best = held.map((e) => e.reachable).find((v) => v !== null && v !== undefined);
    const name = data.offline ? "reward-weighted log-prob per token" : "consistency (judge’s mean score)";
    chart(host, {
      title: data.offline ? "Likelihood of the logged replies" : "Consistency while learning",
      words: measured.map((e) => `held out, ${e.when}: ${score(e[key])}`).join("; "),
      x: { range: [0, last], first: 0, label: data.offline ? "step" : "iteration" },
      y: { range: bounds },
      rule: best === undefined ? null : { value: best, name: `reachable ${score(best)}` },
      series: [
        ...(points.length
          ? [
              { kind: "line", name: "training personas, each step", tone: "raw", points },
              { kind: "line", name: "smoothed", tone: "line", points: smooth(points) },
            ]
          : []),
        ...tones
          .filter((t) => measured.some((e) => tone(e) === t))
          .map((t) => ({
            kind: "dots",
            tone: t,
            shape: t === "after" ? "diamond" : "circle",
            name: t === "before" ? "held out, before" : "held out, later",
            points: measured.filter((e) => tone(e) === t).map((e) => [e.iteration || 0, e[key], ...(e.ci95 || [])]),
          })),
      ],
      head: ["iteration", "personas", name, "95% interval"],
      rows: [
        ...points.map((p) => [String(p[0]), "training", score(p[1], 3), ""]),
        ...measured.map((e) => [
          String(e.iteration || 0),
          `held out, ${e.when}`,
          score(e[key], 3),
          range(...(e.ci95 || [])) || "–",
        ]),
      ],
    });
  }
  const shown = held.filter((e) => (e.per_turn || []).length && (e.when === "before" || e.when === "after"));
  if (shown.length) {
    const n = Math.max(...shown.map((e) => e.per_turn.length)),
      each = (e, t) => (e.per_turn_ci95 || [])[t] || [];
    chart(host, {
      title: "Reward of each turn, held-out personas",
      words: shown.map((e) => `${e.when}: ${e.per_turn.map((v) => score(v)).join(", ")}`).join("; "),
      x: { range: [0.5, n + 0.5], first: 1, label: "turn" },
      y: { range: [0, 1] },
      series: shown.map((e) => ({
        kind: "dots",
        joined: true,
        tone: tone(e),
        shape: e.when === "after" ? "diamond" : "circle",
        name: `${e.when}, 95% interval`,
        shift: n > 25 ? 0 : e.when === "after" ? 4 : -4,
        points: e.per_turn.map((v, t) => [t + 1, v, ...each(e, t)]),
      })),
      head: ["turn", ...shown.map((e) => e.when)],
      rows: Array.from({ length: n }, (_, t) => [
        String(t + 1),
        ...shown.map((e) => score(e.per_turn[t]) + range(...each(e, t))),
      ]),
    });
  }
  for (const { name, points: some } of data.watched) {
    const highest = Math.max(...some.map((p) => p[1]), 1e-6);
    chart(host, {
      title: name[0].toUpperCase() + name.slice(1),
      words: `from ${score(some[0][1], 3)} to ${score(some.at(-1)[1], 3)}`,
      x: { range: [0, Math.max(1, some.at(-1)[0])], first: 0, label: data.offline ? "step" : "iteration" },
      y: { range: [0, highest] },
      series: [{ kind: "line", name: data.offline ? "each step" : "each iteration", tone: "line", points: some }],
      head: ["iteration", name],
      rows: some.map((p) => [String(p[0]), score(p[1], 3)]),
    });
  }
  if (data.offline) {
    const files = [...new Set(held.flatMap((e) => Object.keys(e.per_file || {})))];
    if (files.length) {
      const cell = (e, file) => score(((e.per_file || {})[file] || {}).weighted_token_log_prob, 3);
      host.append(
        table(
          "Reward-weighted log-prob per token, held-out personas of each file",
          ["file", ...held.map((e) => e.when)],
          files.map((file) => [file, ...held.map((e) => cell(e, file))]),
        ),
      );
    }
  }
}
