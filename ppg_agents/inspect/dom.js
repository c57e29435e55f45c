// Elements out of plain values: texts become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const TAGS = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "title", "desc"]);

function el(tag, attributes, ...children) {
  const node = TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const byId = (id) => document.getElementById(id);
const fill = (node, ...children) => node.replaceChildren(...children.flat(2).filter(Boolean));

// A text out of the run. What is invisible in it was spelled out when the page was written; here it gets its look.
function said(text) {
  const parts = text.split(/(⟨U\+[0-9A-F]{4,6}⟩)/);
  return el(
    "bdi",
    { class: "said" },
    parts.map((part, i) => (i % 2 ? el("span", { class: "code" }, part) : part)),
  );
}

const score = (value, digits = 2) =>
  value === null || value === undefined
    ? "–"
    : value
        .toFixed(digits)
        .replace(/^-(?=[0.]*$)/, "")
        .replace("-", "−");
const range = (low, high) =>
  low === undefined ? "" : low === null || high === null ? " (too few to say)" : ` [${score(low)}, ${score(high)}]`;
const whole = new Intl.NumberFormat("en");
const count = (n, one, many = `${one}s`) => `${whole.format(n)} ${n === 1 ? one : many}`;

function table(caption, head, rows) {
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", {}, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((cell) => el("th", { scope: "col" }, cell)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell)),
          ),
        ),
      ),
    ),
  );
}
