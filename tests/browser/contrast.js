() => {
  const parse = (text) => {
    const v = text.match(/[\d.]+/g).map(Number);
    return [v[0], v[1], v[2], v[3] ?? 1];
  };
  const over = (top, under) =>
    top
      .slice(0, 3)
      .map((c, i) => c * top[3] + under[i] * (1 - top[3]))
      .concat(1);
  const light = (c) =>
    c
      .slice(0, 3)
      .map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
      .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const chain = [];
    for (let n = node; n; n = n.parentElement) chain.unshift(parse(getComputedStyle(n).backgroundColor));
    return chain.reduce((a, b) => over(b, a), [255, 255, 255, 1]);
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (
      !walker.currentNode.data.trim() ||
      ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION", "OPTGROUP"].includes(node.tagName) ||
      !node.getClientRects().length
    )
      continue;
    const style = getComputedStyle(node),
      ink = node.closest("svg") ? style.fill : style.color;
    const under = behind(node),
      a = light(over(parse(ink), under)),
      b = light(under),
      ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${walker.currentNode.data.slice(0, 30)} ${ratio.toFixed(2)} ${node.className}`);
  }
  return poor;
};
