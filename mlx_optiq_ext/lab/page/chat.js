import * as conversations from "./conversations.js";
import { button, copyButton, h, replace, speak, toast } from "./dom.js";
import { SOURCES, drawMessage } from "./message.js";
import * as race from "./race.js";
import * as storage from "./storage.js";
import { on, state } from "./store.js";
import { stream } from "./stream.js";

const SAMPLING = {
  temperature: "Temperature",
  top_p: "Top-p",
  top_k: "Top-k",
  min_p: "Min-p",
  max_tokens: "Max tokens",
  seed: "Seed",
};
const THINKING = { "": "as the model does", on: "on", off: "off" };
const TOOLS = "a JSON list of functions, as in OpenAI's API";
const RACE =
  "The same request without and with speculation, one after the other, greedy unless " +
  "Settings say otherwise";
const TINT = "lab.tint";
const MAX_TOKENS = 2048;
const MAX_TITLE = 60;
const SAVE_MS = 1000;
// A reply that takes long to draw is drawn so seldom that the page can still be used.
const REST = 4;
const parts = {};
let now = conversations.all()[0] ?? conversations.create();
let running = null; // { conversation, message, controller } of the reply that comes
let editing = null; // { id, index, element } of the message that is edited
let isElsewhere = false; // whether another tab is answered in this conversation

const around = {
  isLive: (message) => running !== null && running.message === message,
  isElsewhere: () => isElsewhere,
  isAnswered: (call) => now.messages.some((message) => message.tool_call_id === call.id),
  answer,
  race: (message) => race.drawRace(message, around),
};

export function make(section) {
  makeParts();
  const settings = () => {
    parts.panel.hidden = !parts.panel.hidden;
    parts.settings.setAttribute("aria-expanded", String(!parts.panel.hidden));
    drawPanel();
  };
  parts.settings = button("Settings", settings, {
    class: "small",
    id: "settings",
    "aria-expanded": "false",
  });
  const bar = h(
    "div",
    { class: "bar" },
    parts.title,
    parts.key,
    h("label", { class: "tick" }, parts.tint, "Tint drafts"),
    parts.settings,
    button("Delete", forget, { class: "small quiet" }),
  );
  const row = h("div", { class: "row" }, parts.hint, parts.race, parts.send);
  const composer = h("div", { class: "composer" }, h("div", {}, parts.input, row));
  const thread = h(
    "div",
    { class: "thread" },
    h("div", {}, bar, parts.panel),
    parts.messages,
    composer,
  );
  section.append(h("div", { class: "talk" }, parts.list, thread));
  section.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  on("state", drawBar);
  on("models", drawPanel);
  conversations.onChange(changedElsewhere);
  tint();
  open(now);
}

function makeParts() {
  parts.list = h("div", { class: "list", role: "group", "aria-label": "Conversations" });
  parts.messages = h("div", {
    class: "messages",
    tabindex: 0,
    role: "region",
    "aria-label": "Conversation",
  });
  parts.panel = h("div", { class: "panel", hidden: true });
  parts.key = h("div", { class: "key" });
  const rename = (event) => {
    now.title = event.target.value;
    save();
    drawList();
  };
  parts.title = h("input", {
    class: "title",
    placeholder: "New conversation",
    "aria-label": "Title",
    onchange: rename,
  });
  parts.tint = h("input", {
    type: "checkbox",
    id: "tint",
    checked: storage.get(TINT) !== "off",
    onchange: tint,
  });
  parts.input = h("textarea", {
    id: "prompt",
    rows: 2,
    placeholder: "Ask something",
    "aria-label": "Message",
    onkeydown: key,
  });
  parts.send = button("Send", () => (running ? stop() : send()), { class: "primary", id: "send" });
  parts.race = button("Race", startRace, { id: "race", title: RACE });
  parts.hint = h("small", { class: "grow dim", role: "status" });
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
  const item = (each) =>
    button(each.title || "Untitled", () => open(each), {
      class: "item",
      title: each.title,
      "aria-current": each.id === now.id && "true",
    });
  const begin = button("New chat", () => open(conversations.create()), {
    class: "new",
    id: "new-chat",
  });
  const had = parts.list.contains(document.activeElement);
  replace(parts.list, begin, conversations.all().map(item));
  if (had) (parts.list.querySelector("[aria-current]") ?? begin).focus();
}

function drawBar() {
  const server = state.server;
  const isReady = server?.status === "ready";
  const { mtp, drafter, flags } = server?.settings ?? {};
  const isSpeculative = Boolean(mtp || drafter || flags?.["--prompt-lookup"]);
  if (document.activeElement !== parts.title) parts.title.value = now.title;
  parts.send.textContent = running ? "Stop" : "Send";
  parts.send.disabled = !running && !isReady;
  parts.race.disabled = Boolean(running) || !isReady || !isSpeculative;
  const off = isSpeculative ? "" : "Speculation is off: choose a drafter on the Server page.";
  const hint = isReady ? off : "No server is ready.";
  if (parts.hint.textContent !== hint) parts.hint.textContent = hint;
  const seen = new Set(now.messages.flatMap(sourcesIn));
  const marks = Object.entries(SOURCES).filter(([name]) => seen.has(name));
  replace(
    parts.key,
    marks.map(([name, text]) => h("mark", { class: name }, text)),
  );
}

function sourcesIn(message) {
  const lanes = message.race ? [message.race.plain, message.race.speculative] : [message];
  return lanes.flatMap((lane) => (lane.sources ?? []).map(([source]) => source));
}

function drawMessages() {
  if (!now.messages.length) {
    replace(
      parts.messages,
      h(
        "div",
        { class: "empty" },
        h("h2", {}, "Say something"),
        h("p", {}, "Tokens that came from accepted drafts are tinted."),
      ),
    );
    return;
  }
  replace(parts.messages, now.messages.map(drawOne));
  parts.messages.scrollTop = parts.messages.scrollHeight;
}

function drawOne(message, index) {
  // What is being written into an editor outlives what is drawn around it.
  if (editing?.id === now.id && editing.index === index) return editing.element;
  return drawMessage(message, index, around, tools);
}

function drawLast() {
  const view = parts.messages;
  const isAtEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 60;
  view.lastElementChild?.update?.();
  if (isAtEnd) view.scrollTop = view.scrollHeight;
}

function tools(message, index) {
  if (around.isLive(message) || message.role === "tool") return [];
  const isUser = message.role === "user";
  const isLast = index === now.messages.length - 1;
  return h(
    "div",
    { class: "tools" },
    copyButton(() => message.content),
    isUser && button("Edit", () => edit(index), { class: "small quiet" }),
    !isUser && isLast && button("Regenerate", () => regenerate(index), { class: "small quiet" }),
  );
}

function edit(index) {
  const message = now.messages[index];
  const text = h("textarea", { rows: 3, value: message.content, "aria-label": "Edit the message" });
  const again = () => {
    if (running) {
      toast("A reply is coming: stop it first.");
      return;
    }
    editing = null;
    exclusively(() => {
      now.messages.length = index;
      return ask(text.value) && reply();
    });
  };
  const cancel = () => {
    editing = null;
    drawMessages();
  };
  const row = h(
    "div",
    { class: "row" },
    button("Send again", again, { class: "primary small" }),
    button("Cancel", cancel, { class: "small" }),
  );
  const element = h(
    "article",
    { class: "message user" },
    h("div", { class: "card grow" }, text, row),
  );
  if (editing) cancel();
  editing = { id: now.id, index, element };
  parts.messages.children[index].replaceWith(element);
  text.focus();
}

// ---- settings of the conversation

function drawPanel() {
  if (parts.panel.hidden || parts.panel.contains(document.activeElement)) return;
  replace(
    parts.panel,
    h(
      "div",
      { class: "stack" },
      field("system", "System prompt", area("system", 2)),
      h(
        "div",
        { class: "fields" },
        Object.entries(SAMPLING).map(([name, text]) => field(`chat-${name}`, text, number(name))),
        field("thinking", "Thinking", thinking()),
      ),
      field("tools", ["Tools ", h("small", {}, TOOLS)], area("tools", 3)),
    ),
  );
}

const field = (id, label, input) =>
  h("div", { class: "field" }, h("label", { for: id }, label), input);

function keep(name) {
  return (event) => {
    now[name] = event.target.value;
    save();
  };
}

const area = (name, rows) =>
  h("textarea", { id: name, rows, value: now[name], spellcheck: "false", onchange: keep(name) });

function number(name) {
  const model = state.models?.find((each) => each.name === state.server?.settings?.model);
  const usual = name === "max_tokens" ? MAX_TOKENS : (model?.sampling[name] ?? "default");
  const change = (event) => {
    const { value } = event.target;
    now.sampling[name] = value === "" ? undefined : Number(value);
    save();
  };
  return h("input", {
    id: `chat-${name}`,
    type: "number",
    step: "any",
    min: 0,
    value: now.sampling[name] ?? "",
    placeholder: usual,
    onchange: change,
  });
}

function thinking() {
  const options = Object.entries(THINKING).map(([value, text]) => h("option", { value }, text));
  const select = h("select", { id: "thinking", onchange: keep("thinking") }, options);
  select.value = now.thinking;
  return select;
}

function tint() {
  storage.set(TINT, parts.tint.checked ? "on" : "off");
  parts.messages.classList.toggle("untinted", !parts.tint.checked);
}

// ---- conversations

function open(conversation) {
  now = running?.conversation.id === conversation.id ? running.conversation : conversation;
  isElsewhere = false;
  draw();
  lookElsewhere();
}

function forget() {
  if (!confirm("Delete this conversation?")) return;
  if (running?.conversation === now) stop();
  conversations.remove(now.id);
  now.isForgotten = true;
  open(conversations.all()[0] ?? conversations.create());
}

function save(conversation = now) {
  if (conversation.isForgotten) return;
  conversation.at = Date.now();
  if (conversations.save(conversation)) return;
  toast("The browser's store is full: this is kept only until the page is left.");
}

function changedElsewhere(id) {
  drawList();
  if (id !== now.id || running?.conversation.id === id) return;
  now = conversations.load(id) ?? conversations.create();
  drawBar();
  drawMessages();
  lookElsewhere();
}

// A reply that has not ended and does not come here is cut off, or comes in another tab.
async function lookElsewhere() {
  const { id } = now;
  if (now.messages.at(-1)?.state !== "streaming" || running?.conversation === now) return;
  const was = isElsewhere;
  isElsewhere = await conversations.isBusy(id);
  if (id === now.id && isElsewhere !== was) drawLast();
  if (!isElsewhere || was) return;
  await conversations.untilFree(id);
  isElsewhere = false;
  if (id === now.id) changedElsewhere(id);
}

// A reload or a closed tab keeps all that had come.
addEventListener("pagehide", () => {
  if (running) save(running.conversation);
});

// ---- asking

function key(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running && !parts.send.disabled) send();
}

function stop() {
  running?.controller.abort();
}

function ask(text) {
  if (!text.trim()) return false;
  if (text === parts.input.value) parts.input.value = "";
  now.title ||= [...text.trim()].slice(0, MAX_TITLE).join("");
  now.messages.push({ role: "user", content: text });
  return true;
}

const send = () => exclusively(() => ask(parts.input.value) && reply());

function regenerate(index) {
  return exclusively(() => {
    now.messages.length = index;
    return reply();
  });
}

// Gives a call its result, and goes on when all calls have theirs.
function answer(call, message, result) {
  return exclusively(() => {
    now.messages.push({ role: "tool", content: result, tool_call_id: call.id });
    if (message.tool_calls.every(around.isAnswered)) return reply();
    save();
    return drawMessages();
  });
}

// Only one reply comes in a tab, and only one tab is answered in a conversation.
async function exclusively(work) {
  if (running) return;
  running = { conversation: now, message: null, controller: new AbortController() };
  drawBar();
  let isAlone = true;
  try {
    isAlone = await conversations.alone(now.id, work);
  } finally {
    running = null;
    drawBar();
    drawLast();
  }
  if (!isAlone) toast("Another tab is answered in this conversation.");
}

function request(conversation, messages) {
  const { sampling } = conversation;
  const found = {
    messages: conversations.messagesFor(conversation, messages),
    max_tokens: MAX_TOKENS,
    ...sampling,
  };
  if (conversation.tools.trim()) found.tools = toolsOf(conversation);
  if (conversation.thinking)
    found.chat_template_kwargs = { enable_thinking: conversation.thinking === "on" };
  return found;
}

function toolsOf(conversation) {
  try {
    return JSON.parse(conversation.tools);
  } catch {
    throw new Error("The tools of this conversation are not JSON.");
  }
}

// Runs something that streams into a new message.
async function streamInto(message, work) {
  const { conversation, controller } = running;
  const before = [...conversation.messages];
  conversation.messages.push(message);
  running.message = message;
  draw();
  speak();
  try {
    const body = request(conversation, before);
    await work(body, follow(conversation, message), controller.signal);
  } catch (error) {
    Object.assign(message, { state: "error", error: error.message });
  }
  running.message = null;
  save(conversation);
  if (conversation === now) drawLast();
  drawList();
  speak(message.error ?? message.content, true);
}

// Saves and draws what has come, now and then.
function follow(conversation, message) {
  let isDue = false;
  let saved = 0;
  let drawn = 0;
  const drawIt = () => {
    const began = performance.now();
    if (conversation === now) drawLast();
    speak(message.content);
    drawn = performance.now() + REST * (performance.now() - began);
    isDue = false;
  };
  return () => {
    if (performance.now() - saved > SAVE_MS) {
      saved = performance.now();
      save(conversation);
    }
    if (isDue) return;
    isDue = true;
    // A tab in the background draws nothing, and is not drawn for.
    const rest = Math.max(0, drawn - performance.now());
    setTimeout(() => requestAnimationFrame(drawIt), rest);
  };
}

function reply() {
  const message = { role: "assistant", content: "", reasoning: "", state: "streaming" };
  return streamInto(message, (body, changed, signal) => stream(body, message, changed, signal));
}

// ---- the race

function startRace() {
  return exclusively(() => {
    const last = now.messages.findLastIndex((message) => message.role === "user");
    if (!ask(parts.input.value)) {
      if (last < 0) return toast("Write what both are to answer.");
      now.messages.length = last + 1;
    }
    const { sampling } = now;
    const message = { role: "assistant", content: "", state: "streaming", race: race.newRace() };
    return streamInto(message, (body, changed, signal) =>
      race.run(message, body, sampling, changed, signal),
    );
  });
}
