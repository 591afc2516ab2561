import { button, copyButton, h, percent, replace, toast } from "./dom.js";
import { render } from "./markdown.js";
import { on, state } from "./store.js";
import { stream } from "./stream.js";
import * as kept from "./conversations.js";

const SOURCES = { mtp: "MTP head", assistant: "assistant", draft_model: "draft model", copy: "copied" };
const SAMPLING = { temperature: "Temperature", top_p: "Top-p", top_k: "Top-k", min_p: "Min-p", max_tokens: "Max tokens", seed: "Seed" };
const MAX_TOKENS = 2048;
const RACE_TOKENS = 256;
const SAVE_MS = 400;
const parts = {};
let now = kept.all()[0] ?? kept.create();
let running = null; // { conversation, controller } of the reply that comes

export function make(section) {
  for (const name of ["list", "messages", "panel", "key"]) parts[name] = h("div");
  parts.list.className = "list";
  parts.messages.className = "messages";
  parts.messages.setAttribute("aria-live", "off");
  parts.messages.tabIndex = 0;
  parts.messages.setAttribute("aria-label", "Conversation");
  parts.panel.className = "panel";
  parts.panel.hidden = true;
  parts.key.className = "key";
  parts.title = h("input", { class: "title", placeholder: "New conversation", "aria-label": "Title", onchange: (event) => { now.title = event.target.value; save(); } });
  parts.tint = h("input", { type: "checkbox", id: "tint", checked: localStorage.getItem("lab.tint") !== "off", onchange: tint });
  parts.input = h("textarea", { id: "prompt", rows: 2, placeholder: "Ask something", "aria-label": "Message", onkeydown: key });
  parts.send = button("Send", () => (running ? stop() : send()), { class: "primary", id: "send" });
  parts.race = button("Race", race, { id: "race", title: "The same request without and with speculation, one after the other, greedy unless Settings say otherwise" });
  parts.hint = h("small", { class: "grow dim" });
  section.append(h("div", { class: "talk" }, parts.list, h("div", { class: "thread" },
    h("div", {}, h("div", { class: "bar" }, parts.title, parts.key,
      h("label", { class: "tick" }, parts.tint, "Tint drafts"),
      button("Settings", () => { parts.panel.hidden = !parts.panel.hidden; drawPanel(); }, { class: "small", id: "settings" }),
      button("Delete", forget, { class: "small quiet" })), parts.panel),
    parts.messages,
    h("div", { class: "composer" }, h("div", {}, parts.input, h("div", { class: "row" }, parts.hint, parts.race, parts.send))))));
  section.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) stop(); });
  on("state", drawBar);
  on("models", drawPanel);
  kept.onChange((id) => {
    drawList();
    if (id !== now.id || running?.conversation.id === id) return;
    now = kept.load(id) ?? kept.create();
    drawBar();
    drawMessages();
  });
  tint();
  draw();
}

export function shown(isNow) {
  if (!isNow) return;
  parts.messages.scrollTop = parts.messages.scrollHeight;
  if (matchMedia("(pointer: fine)").matches) parts.input.focus();
}

// ---- what is drawn

function draw() {
  drawList();
  drawBar();
  drawPanel();
  drawMessages();
}

function drawList() {
  replace(parts.list, button("New chat", () => open(kept.create()), { class: "new", id: "new-chat" }),
    kept.all().map((each) => button(each.title || "Untitled", () => open(each), { class: "item", title: each.title, "aria-current": each.id === now.id && "true" })));
}

function drawBar() {
  const server = state.server;
  const isReady = server?.status === "ready";
  const isSpeculative = Boolean(server?.settings?.mtp || server?.settings?.drafter);
  if (document.activeElement !== parts.title) parts.title.value = now.title;
  parts.send.textContent = running ? "Stop" : "Send";
  parts.send.disabled = !running && !isReady;
  parts.race.disabled = Boolean(running) || !isReady || !isSpeculative;
  parts.hint.textContent = isReady ? (isSpeculative ? "" : "Speculation is off: choose a drafter on the Server page.") : "No server is ready.";
  const seen = new Set(now.messages.flatMap((message) => (message.sources ?? []).map(([source]) => source)));
  replace(parts.key, Object.entries(SOURCES).filter(([name]) => seen.has(name)).map(([name, text]) => h("mark", { class: name }, text)));
}

function drawMessages() {
  if (!now.messages.length) {
    replace(parts.messages, h("div", { class: "empty" }, h("h2", {}, "Say something"),
      h("p", {}, "Tokens that came from accepted drafts are tinted.")));
    return;
  }
  replace(parts.messages, now.messages.map(drawMessage));
  parts.messages.scrollTop = parts.messages.scrollHeight;
}

function drawMessage(message, index) {
  const element = h("article", { class: `message ${message.role}`, "data-index": index, "aria-label": { user: "You", assistant: "Reply", tool: "Result" }[message.role] });
  fillMessage(element, message, index);
  return element;
}

function fillMessage(element, message, index) {
  if (message.role === "user") replace(element, h("div", { class: "body" }, message.content), tools(message, index));
  else if (message.role === "tool") replace(element, h("div", { class: "call" }, h("small", {}, "Result of the call"), h("pre", {}, message.content)));
  else if (message.race) replace(element, raced(message), tools(message, index));
  else replace(element, body(message), message.stats && h("div", { class: "stats" }, statsLine(message.stats)), tools(message, index));
}

function body(message) {
  const isRunning = message.state === "streaming" && isLive(message);
  const thoughts = message.reasoning && h("details", { class: "think", open: isRunning && !message.content }, h("summary", {}, isRunning && !message.content ? "Thinking…" : "Thinking"),
    render(message.reasoning, painter(message.thoughts)));
  const text = render(message.content ?? "", painter(message.sources));
  if (isRunning) text.classList.add("caret");
  const isCut = message.state === "cut" || (message.state === "streaming" && !isRunning);
  return h("div", {}, thoughts, text, (message.tool_calls ?? []).filter(Boolean).map((call) => drawCall(call, message, isRunning)),
    message.error && h("p", { class: "problem" }, message.error),
    isCut && h("p", { class: "dim" }, "This reply was cut off: its page was left, or the Lab ended."),
    message.state === "stopped" && h("small", {}, "Stopped."),
    message.finish === "length" && h("small", {}, "The limit of tokens was reached."));
}

const isLive = (message) => running !== null && now.messages.at(-1) === message;

// Makes nodes of a text, each piece in the tint of the tokens that it came from.
function painter(runs = []) {
  const sources = runs.flatMap(([source, number]) => Array(number).fill(source));
  return (text, places) => {
    const nodes = [];
    let start = 0;
    for (let i = 1; i <= text.length; i += 1) {
      const source = sources[places[start]] ?? null;
      if (i < text.length && (sources[places[i]] ?? null) === source) continue;
      const piece = text.slice(start, i);
      nodes.push(source in SOURCES ? h("span", { class: `t ${source}`, title: SOURCES[source] }, piece) : document.createTextNode(piece));
      start = i;
    }
    return nodes;
  };
}

function statsLine({ tokens, speed, first, drafted, accepted, perRound, positions }) {
  const found = [];
  if (speed !== null) found.push([h("b", {}, speed.toFixed(1)), " tok/s"]);
  if (perRound) found.push([h("b", {}, perRound.toFixed(2)), " tokens a round"]);
  if (drafted) found.push([h("b", {}, percent(accepted / drafted)), " of drafts accepted", positions.length > 1 ? ` (by position ${positions.map((each) => (each === null ? "–" : percent(each))).join(", ")})` : ""]);
  if (first !== null) found.push([h("b", {}, first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`), " to the first token"]);
  found.push(`${tokens} tokens`);
  return found.flatMap((each, i) => (i ? [" · ", each] : [each])).flat();
}

function tools(message, index) {
  if (message.state === "streaming" && isLive(message)) return null;
  const isUser = message.role === "user";
  return h("div", { class: "tools" },
    copyButton(() => message.content),
    isUser && button("Edit", () => edit(index), { class: "small quiet" }),
    !isUser && index === now.messages.length - 1 && button("Regenerate", () => { now.messages.length = index; reply(); }, { class: "small quiet" }));
}

function drawCall(call, message, isRunning) {
  const isAnswered = now.messages.some((each) => each.tool_call_id === call.id) || isRunning;
  const result = h("textarea", { rows: 2, "aria-label": "Result of the call", placeholder: "What the tool returns" });
  const answer = () => {
    now.messages.push({ role: "tool", content: result.value, tool_call_id: call.id });
    const isOpen = message.tool_calls.some((each) => !now.messages.some((other) => other.tool_call_id === each.id));
    if (isOpen) { save(); draw(); } else reply();
  };
  return h("div", { class: "call" }, h("div", { class: "row spread" }, h("b", {}, `Call of ${call.function.name}`), copyButton(() => call.function.arguments)),
    h("pre", {}, call.function.arguments), !isAnswered && h("div", { class: "stack" }, result, button("Send the result", answer, { class: "small" })));
}

function edit(index) {
  const message = now.messages[index];
  const text = h("textarea", { rows: 3, value: message.content, "aria-label": "Edit the message" });
  const element = parts.messages.querySelector(`[data-index="${index}"]`);
  const again = () => {
    now.messages.length = index;
    send(text.value);
  };
  replace(element, h("div", { class: "card grow" }, text, h("div", { class: "row" }, button("Send again", again, { class: "primary small", disabled: running !== null }),
    button("Cancel", () => fillMessage(element, message, index), { class: "small" }))));
  text.focus();
}

// ---- settings of the conversation

function drawPanel() {
  if (parts.panel.hidden) return;
  const keep = (name) => (event) => { now[name] = event.target.value; save(); };
  const model = state.models?.find((each) => each.name === state.server?.settings?.model);
  const number = (name) => (event) => { now.sampling[name] = event.target.value === "" ? undefined : Number(event.target.value); save(); };
  const thinking = h("select", { id: "thinking", onchange: keep("thinking") }, [["", "as the model does"], ["on", "on"], ["off", "off"]].map(([value, text]) => h("option", { value }, text)));
  thinking.value = now.thinking;
  replace(parts.panel, h("div", { class: "stack" },
    h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), h("textarea", { id: "system", rows: 2, value: now.system, onchange: keep("system") })),
    h("div", { class: "fields" }, Object.entries(SAMPLING).map(([name, text]) => h("div", { class: "field" }, h("label", { for: `chat-${name}` }, text),
      h("input", { id: `chat-${name}`, type: "number", step: "any", min: 0, value: now.sampling[name] ?? "", placeholder: name === "max_tokens" ? MAX_TOKENS : model?.sampling[name] ?? "default", onchange: number(name) }))),
    h("div", { class: "field" }, h("label", { for: "thinking" }, "Thinking"), thinking)),
    h("div", { class: "field" }, h("label", { for: "tools" }, "Tools ", h("small", {}, "a JSON list of functions, as in OpenAI's API")),
      h("textarea", { id: "tools", rows: 3, value: now.tools, spellcheck: "false", onchange: keep("tools") }))));
}

function tint() {
  localStorage.setItem("lab.tint", parts.tint.checked ? "on" : "off");
  parts.messages.classList.toggle("untinted", !parts.tint.checked);
}

// ---- conversations

function open(conversation) {
  now = running?.conversation.id === conversation.id ? running.conversation : conversation;
  draw();
}

function forget() {
  if (!confirm("Delete this conversation?")) return;
  if (running?.conversation === now) stop();
  kept.remove(now.id);
  now = kept.all()[0] ?? kept.create();
  draw();
}

function save(conversation = now) {
  conversation.at = Date.now();
  if (!kept.save(conversation)) toast("The browser's store is full: delete some conversations.");
}

// A reload or a closed tab keeps all that had come.
addEventListener("pagehide", () => { if (running) save(running.conversation); });

// ---- asking

function key(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running && !parts.send.disabled) send();
}

function stop() {
  running?.controller.abort();
}

function ask(text = parts.input.value) {
  if (!text.trim()) return false;
  if (text === parts.input.value) parts.input.value = "";
  now.title ||= text.trim().slice(0, 60);
  now.messages.push({ role: "user", content: text });
  return true;
}

function send(text) {
  if (ask(text)) reply();
}

function request(conversation, messages) {
  let found;
  try {
    found = conversation.tools.trim() ? JSON.parse(conversation.tools) : undefined;
  } catch {
    throw new Error("The tools of this conversation are not JSON.");
  }
  const thinking = conversation.thinking && { chat_template_kwargs: { enable_thinking: conversation.thinking === "on" } };
  return { messages: kept.messagesFor(conversation, messages), max_tokens: MAX_TOKENS, ...conversation.sampling, tools: found, ...thinking };
}

// Runs something that streams into the last message, which it is given.
async function answer(message, work) {
  const conversation = now;
  const before = [...conversation.messages];
  conversation.messages.push(message);
  const controller = new AbortController();
  running = { conversation, controller };
  draw();
  let isDue = false;
  let saved = 0;
  const changed = () => {
    if (performance.now() - saved > SAVE_MS) { saved = performance.now(); save(conversation); }
    if (isDue) return;
    isDue = true;
    // A tab in the background draws nothing, and is not drawn for.
    requestAnimationFrame(() => { isDue = false; if (conversation === now) drawLast(); });
  };
  try {
    await work(request(conversation, before), changed, controller.signal);
  } catch (error) {
    Object.assign(message, { state: "error", error: error.message });
  }
  running = null;
  save(conversation);
  draw();
}

function reply() {
  const message = { role: "assistant", content: "", state: "streaming" };
  return answer(message, (body, changed, signal) => stream(body, message, changed, signal));
}

function drawLast() {
  const view = parts.messages;
  const isAtEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 60;
  const index = now.messages.length - 1;
  const element = view.querySelector(`[data-index="${index}"]`);
  if (element) fillMessage(element, now.messages[index], index);
  if (isAtEnd) view.scrollTop = view.scrollHeight;
}

// ---- the race

function whyDifferent() {
  if (now.sampling.temperature)
    return "They were sampled: both come from the same distribution, but not from the same random numbers. At temperature 0 they can be compared.";
  return "Where kernels for one row and for several round differently, nearly equal tokens may be swapped: mlx-optiq-ext status says whether they do here.";
}

async function race() {
  if (!ask()) {
    const last = now.messages.findLastIndex((message) => message.role === "user");
    if (last < 0) {
      toast("Write what both are to answer.");
      return;
    }
    now.messages.length = last + 1;
  }
  const lanes = { plain: { state: "waiting" }, speculative: { state: "waiting" } };
  const message = { role: "assistant", content: "", state: "streaming", race: lanes };
  await answer(message, async (body, changed, signal) => {
    // Greedy unless the conversation says otherwise, so that the texts can be compared.
    const shared = { ...body, temperature: body.temperature ?? 0, max_tokens: now.sampling.max_tokens ?? RACE_TOKENS };
    // What is computed once only, of the prompt and by the machine, is not measured.
    await stream({ ...shared, max_tokens: 4 }, {}, () => {}, signal);
    await stream({ ...shared, num_draft_tokens: 0 }, lanes.plain, changed, signal);
    if (lanes.plain.state === "done") await stream(shared, lanes.speculative, changed, signal);
    Object.assign(message, lanes.speculative, { race: lanes, state: lanes.speculative.state === "waiting" ? lanes.plain.state : lanes.speculative.state });
  });
}

function raced(message) {
  const { plain, speculative } = message.race;
  const lane = (title, found) => h("div", { class: "card", "data-lane": title.toLowerCase() }, h("h3", {}, title),
    h("div", { class: "speed" }, found.stats?.total ? found.stats.total.toFixed(1) : "–", h("small", {}, " tok/s, request to last token")),
    h("div", { class: "body" }, found.state === "waiting" ? h("p", { class: "dim" }, "waits for its turn") : body({ ...found, state: found.state === "streaming" && running ? "racing" : found.state })),
    found.stats && found.state !== "streaming" && h("div", { class: "stats" }, statsLine({ ...found.stats, speed: null })));
  return h("div", { class: "race" }, lane("Plain", plain), lane("Speculative", speculative), verdict(plain, speculative));
}

function verdict(plain, speculative) {
  if (plain.state !== "done" || speculative.state !== "done") return null;
  const text = (lane) => `${lane.reasoning}\n${lane.content}\n${JSON.stringify(lane.tool_calls)}`;
  const [one, other] = [text(plain), text(speculative)];
  const ratio = plain.stats.total && speculative.stats.total ? `${(speculative.stats.total / plain.stats.total).toFixed(2)}x as fast. ` : "";
  if (one === other) return h("p", { class: "verdict", id: "verdict-race" }, `${ratio}The texts are identical.`);
  let at = 0;
  while (one[at] === other[at]) at += 1;
  return h("div", { class: "verdict" }, h("p", {}, `${ratio}The texts differ from character ${at} on.`), h("small", {}, whyDifferent()));
}
