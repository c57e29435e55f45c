// What the page knows: the data, read once, and what is looked at.

const data = JSON.parse(byId("data").textContent);
const ROW = 58; // height of a conversation in the list, as in the style sheet
const conversations = data.conversations;
const state = {
  shown: [],
  chosen: 0,
  active: null,
  hits: null,
  view: "shaded",
  policy: data.auto ? "own" : (data.own ?? data.classes.length - 1),
  rewardScale: conversations.reduce((most, c) => rewardsOf(c).reduce((a, b) => Math.max(a, b ?? 0), most), 1),
};

// When a conversation was held: learned from in an iteration, or played to evaluate.
const whenOf = (c) => (c.held ? `held out, ${c.held}` : c.iteration === null ? "" : `iteration ${c.iteration}`);
const nameOf = (c) => `${c.held ? "held-out conversation" : "conversation"} ${c.number}`;
const classOf = (conversation) => data.classes[state.policy === "own" ? conversation.own : state.policy];
