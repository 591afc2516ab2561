// What the user wants served.
import { check, state } from "./store.js";

const NEW = {
  model: null,
  mtp: false,
  drafter: null,
  num_draft_tokens: "auto",
  draft_vocab: null,
  recommended: true,
  sampling: {},
  port: 8080,
  api_key: "",
  origins: "",
  flags: {},
};
export let form = { ...NEW };
let isChanged = false; // by the user, since it was last what runs
let isDecided = false; // whether a drafter is used with this model
const listeners = [];

export const onChange = (listener) => listeners.push(listener);

// The form shows what runs until the user changes something.
export function adopt() {
  const settings = state.server?.settings;
  if (!isChanged && settings) {
    form = { ...NEW, ...settings };
    isDecided = true;
  }
  const first = state.models?.find((model) => model.kind === "model");
  if (form.model === null && first) choose(first.name);
}

// Settings of one model are not taken to another.
export function choose(name) {
  form = { ...form, model: name, mtp: false, drafter: null, sampling: {}, draft_vocab: null };
  isDecided = false;
  decide();
}

// A head that is there is used, unless the user wants it otherwise. Says whether that was
// decided now.
export function decide() {
  if (isDecided || form.model === null || !check(form.model)) return false;
  form.mtp = check(form.model).works;
  isDecided = true;
  return true;
}

export function change(changes) {
  isChanged = true;
  if ("mtp" in changes || "drafter" in changes) isDecided = true;
  form = { ...form, ...changes };
  for (const listener of listeners) listener();
}

export function wasStarted() {
  isChanged = false;
}

export function settings() {
  const isGiven = ([, value]) => value !== null && value !== "" && value !== false;
  const given = (object) => Object.fromEntries(Object.entries(object ?? {}).filter(isGiven));
  return { ...form, sampling: given(form.sampling), flags: given(form.flags) };
}
