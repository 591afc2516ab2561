// What the Lab tells, and questions to it.
import { toast } from "./dom.js";

export const state = {
  server: null,
  models: null,
  checks: new Map(),
  flags: [],
  samples: [],
  log: [],
  bench: null,
  download: null,
  isConnected: false,
  ahead: 0, // seconds that the Lab's clock is ahead of the browser's, which may be elsewhere
};

export const labTime = () => Date.now() / 1000 + state.ahead;

const MAX_LINES = 2000;
const MAX_SAMPLES = 600;
const listeners = new Map();

export function on(names, listener) {
  for (const name of names.split(" "))
    listeners.set(name, [...(listeners.get(name) ?? []), listener]);
}

function emit(name) {
  for (const listener of listeners.get(name) ?? []) listener();
}

export const pair = (model, drafter) => `${model}\n${drafter ?? ""}`;

const receive = {
  state(data) {
    state.server = data;
    state.ahead = data.now - Date.now() / 1000;
  },
  models(data) {
    state.models = data;
    state.checks.clear();
  },
  flags(data) {
    state.flags = data;
  },
  check(data) {
    state.checks.set(pair(data.name, data.drafter_name), data);
  },
  lines(data) {
    state.log = data;
  },
  log(data) {
    state.log = [...state.log, ...data].slice(-MAX_LINES);
  },
  samples(data) {
    state.samples = data;
  },
  sample(data) {
    state.samples = [...state.samples, data].slice(-MAX_SAMPLES);
  },
  bench(data) {
    state.bench = data;
  },
  download(data) {
    state.download = data;
  },
};

export function connect() {
  const source = new EventSource("/api/events");
  for (const [name, take] of Object.entries(receive))
    source.addEventListener(name, (event) => {
      take(JSON.parse(event.data));
      emit(name);
    });
  source.onopen = () => {
    state.isConnected = true;
    emit("connection");
  };
  source.onerror = () => {
    state.isConnected = false;
    emit("connection");
  };
}

export async function ask(path, body = {}) {
  const reply = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const text = await reply.text();
  if (!reply.ok) throw new Error(problemIn(text));
  return JSON.parse(text);
}

// Asks for something whose answer is of no interest, or says why it is not done.
export const order = (path) => ask(path).catch((error) => toast(error.message));

export function problemIn(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || "no answer";
  }
}

// What a pair of model and drafter is found to be; asked for if it is not known.
export function check(model, drafter = null) {
  const key = pair(model, drafter);
  if (!state.checks.has(key) && drafter !== null && !check.asked.has(key)) {
    check.asked.add(key);
    ask("/api/check", { model, drafter })
      .catch(() => null)
      .finally(() => check.asked.delete(key));
  }
  return state.checks.get(key);
}
check.asked = new Set();
