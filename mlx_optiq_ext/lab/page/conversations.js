// Conversations, each kept in the browser under a key of its own so that two tabs do not
// overwrite each other's. A tab that is answered in one holds a lock on it.
import * as storage from "./storage.js";

const PREFIX = "lab.chat.";
const TEXTS = ["title", "system", "thinking", "tools"];
const ROLES = ["user", "assistant", "tool"];

export function all() {
  const found = storage.keys().filter((key) => key.startsWith(PREFIX));
  return found
    .map((key) => load(key.slice(PREFIX.length)))
    .filter(Boolean)
    .sort((a, b) => b.at - a.at);
}

// Null if there is none, or what is there is none: anything may be in the store.
export function load(id) {
  const found = storage.getJson(PREFIX + id);
  if (!Array.isArray(found?.messages)) return null;
  const made = { ...create(), id, messages: found.messages.filter(isMessage).map(read) };
  for (const name of TEXTS) if (typeof found[name] === "string") made[name] = found[name];
  if (typeof found.at === "number") made.at = found.at;
  if (isObject(found.sampling)) made.sampling = found.sampling;
  return made;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isMessage = (value) => isObject(value) && ROLES.includes(value.role);
const list = (value, isOne) => (Array.isArray(value) ? value.filter(isOne) : []);

function read(message) {
  const lanes = message.race;
  const isRace = isObject(lanes?.plain) && isObject(lanes?.speculative);
  const race = isRace
    ? { plain: reply(lanes.plain), speculative: reply(lanes.speculative) }
    : undefined;
  return { ...message, ...reply(message), race };
}

function reply(found) {
  return {
    ...found,
    content: String(found.content ?? ""),
    reasoning: String(found.reasoning ?? ""),
    tool_calls: list(found.tool_calls, (call) => isObject(call?.function)),
    sources: list(found.sources, isRun),
    thoughts: list(found.thoughts, isRun),
    stats: Array.isArray(found.stats?.positions) ? found.stats : null,
  };
}

const isRun = (run) => Array.isArray(run) && Number.isInteger(run[1]) && run[1] > 0 && run[1] < 1e7;

export function create() {
  return {
    id: crypto.randomUUID(),
    title: "",
    at: Date.now(),
    system: "",
    thinking: "",
    tools: "",
    sampling: {},
    messages: [],
  };
}

export function save(conversation) {
  if (!conversation.messages.length) return true;
  return storage.set(PREFIX + conversation.id, JSON.stringify(conversation));
}

export const remove = (id) => storage.remove(PREFIX + id);

export function onChange(listener) {
  storage.onChange(PREFIX, (key) => listener(key?.slice(PREFIX.length)));
}

// Does some work while no other tab is answered in the conversation; says if it did not.
export function alone(id, work) {
  const options = { ifAvailable: true };
  return navigator.locks.request(PREFIX + id, options, async (lock) => {
    if (lock) await work();
    return lock !== null;
  });
}

// Whether a tab is being answered in the conversation.
export async function isBusy(id) {
  const { held } = await navigator.locks.query();
  return held.some((lock) => lock.name === PREFIX + id);
}

export const untilFree = (id) => navigator.locks.request(PREFIX + id, () => {});

// What the server is sent of a conversation.
export function messagesFor(conversation, messages = conversation.messages) {
  const sent = messages
    .filter((message) => message.state !== "error")
    .map(({ role, content, tool_calls, tool_call_id }) => ({
      role,
      content,
      ...(tool_calls?.length && { tool_calls }),
      ...(tool_call_id && { tool_call_id }),
    }));
  if (!conversation.system.trim()) return sent;
  return [{ role: "system", content: conversation.system }, ...sent];
}
