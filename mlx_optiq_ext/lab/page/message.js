// One message of a conversation, as elements. Those of a reply are kept while it comes, so
// that what is selected, opened or focused in it stays so.
import { button, copyButton, h, percent, replace } from "./dom.js";
import { render } from "./markdown.js";

export const SOURCES = {
  mtp: "MTP head",
  assistant: "assistant",
  draft_model: "draft model",
  prompt_lookup: "copied from the context",
};
const LABELS = { user: "You", assistant: "Reply", tool: "Result" };

// page: what the conversation around it says: isLive, isElsewhere, isAnswered and answer
// of a call, and race. Returns the element, with an `update` for when more has come.
export function drawMessage(message, index, page, tools) {
  const element = h("article", {
    class: `message ${message.role}`,
    "data-index": index,
    "aria-label": LABELS[message.role],
  });
  const content = contentOf(message, page);
  const stats = h("div", { class: "stats", hidden: true });
  const row = h("div");
  element.append(content, stats, row);
  element.update = () => {
    content.update?.();
    stats.hidden = message.role !== "assistant" || Boolean(message.race) || !message.stats;
    if (!stats.hidden) replace(stats, statsLine(message.stats));
    replace(row, tools(message, index));
  };
  element.update();
  return element;
}

function contentOf(message, page) {
  if (message.role === "user") return h("div", { class: "body" }, message.content);
  if (message.role === "tool") return result(message);
  return message.race ? page.race(message) : drawBody(message, page);
}

const result = (message) =>
  h("div", { class: "call" }, h("small", {}, "Result of the call"), h("pre", {}, message.content));

export function drawBody(message, page) {
  const thoughts = drawThoughts(message);
  const text = h("div", { class: "md" });
  const calls = h("div");
  const notes = h("div");
  const element = h("div", {}, text, calls, notes);
  let keys = null;
  element.update = () => {
    const isRunning = page.isLive(message);
    if (message.reasoning && !thoughts.isConnected) element.prepend(thoughts);
    thoughts.update(isRunning);
    render(text, message.content ?? "", painter(message.sources));
    text.classList.toggle("caret", isRunning);
    const all = (message.tool_calls ?? []).filter(Boolean);
    const found = JSON.stringify([all, all.map(page.isAnswered), isRunning]);
    if (found !== keys)
      replace(
        calls,
        all.map((call) => drawCall(call, message, page)),
      );
    keys = found;
    replace(notes, notesOf(message, page));
  };
  element.update();
  return element;
}

function drawThoughts(message) {
  const summary = h("summary");
  const text = h("div", { class: "md" });
  const element = h("details", { class: "think" }, summary, text);
  let wasThinking = null;
  element.update = (isRunning) => {
    if (!message.reasoning) return;
    const isThinking = isRunning && !message.content;
    // It is opened and closed once, and then as the reader wants it.
    if (isThinking !== wasThinking) element.open = isThinking;
    wasThinking = isThinking;
    summary.textContent = isThinking ? "Thinking…" : "Thinking";
    render(text, message.reasoning, painter(message.thoughts));
  };
  return element;
}

function notesOf(message, page) {
  const isOpen = message.state === "streaming" && !page.isLive(message);
  if (message.error) return h("p", { class: "problem" }, message.error);
  if (isOpen && page.isElsewhere()) return h("p", { class: "dim" }, "It comes in another tab.");
  if (isOpen || message.state === "cut")
    return h("p", { class: "dim" }, "This reply was cut off: its page was left, or the Lab ended.");
  if (message.state === "stopped") return h("small", {}, "Stopped.");
  return message.finish === "length" && h("small", {}, "The limit of tokens was reached.");
}

function drawCall(call, message, page) {
  const { name, arguments: given } = call.function;
  const text = h("textarea", {
    rows: 2,
    "aria-label": "Result of the call",
    placeholder: "What the tool returns",
  });
  const send = button("Send the result", () => page.answer(call, message, text.value), {
    class: "small",
  });
  const isOpen = !page.isAnswered(call) && !page.isLive(message);
  return h(
    "div",
    { class: "call" },
    h(
      "div",
      { class: "row spread" },
      h("b", {}, `Call of ${name}`),
      copyButton(() => String(given)),
    ),
    h("pre", {}, String(given)),
    isOpen && h("div", { class: "stack" }, text, send),
  );
}

// Makes nodes of a text, each piece in the tint of the tokens that it came from.
function painter(runs = []) {
  const sources = runs.flatMap(([source, number]) => Array(number).fill(source));
  return (text, places) => {
    const nodes = [];
    let start = 0;
    for (let i = 1; i <= text.length; i += 1) {
      const source = sources[places[start]] ?? null;
      if (i < text.length && (sources[places[i]] ?? null) === source) continue;
      nodes.push(paint(text.slice(start, i), source));
      start = i;
    }
    return nodes;
  };
}

function paint(text, source) {
  if (!Object.hasOwn(SOURCES, source)) return document.createTextNode(text);
  return h("span", { class: `t ${source}`, title: SOURCES[source] }, text);
}

export function statsLine({ tokens, speed, first, drafted, accepted, perRound, positions }) {
  const found = [];
  if (speed !== null) found.push([h("b", {}, speed.toFixed(1)), " tok/s"]);
  if (perRound) found.push([h("b", {}, perRound.toFixed(2)), " tokens a round"]);
  if (drafted) {
    const each = positions.map((share) => (share === null ? "–" : percent(share))).join(", ");
    const where = positions.length > 1 ? ` (by position ${each})` : "";
    found.push([h("b", {}, percent(accepted / drafted)), ` of drafts accepted${where}`]);
  }
  if (first !== null) found.push([h("b", {}, duration(first)), " to the first token"]);
  found.push([`${tokens} tokens`]);
  return found.flatMap((each, i) => (i ? [" · ", ...each] : each));
}

const duration = (seconds) =>
  seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
