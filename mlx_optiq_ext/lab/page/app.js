import { h, replace } from "./dom.js";
import * as storage from "./storage.js";
import { connect, on, state } from "./store.js";
import * as server from "./server.js";
import * as chat from "./chat.js";
import * as live from "./live.js";
import * as bench from "./bench.js";

const PAGES = { server, chat, live, bench };
const THEME = "lab.theme";
const WORDS = {
  stopped: "Stopped",
  starting: "Loading",
  ready: "Ready",
  silent: "Silent",
  stopping: "Stopping",
  waiting: "Restarting",
  failed: "Failed",
};

function show() {
  const wanted = location.hash.slice(1);
  if (wanted === "page") return; // The link that skips to the page leaves it as it is.
  const name = Object.hasOwn(PAGES, wanted) ? wanted : "server";
  for (const [each, page] of Object.entries(PAGES)) {
    const section = document.getElementById(each);
    const link = document.querySelector(`nav a[href="#${each}"]`);
    section.hidden = each !== name;
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    page.shown?.(each === name);
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · Lab`;
}

function pill() {
  const found = state.server;
  if (!found) return;
  const model = found.settings?.model ?? "no model";
  const element = document.getElementById("pill");
  const name = model.split("/").pop();
  // What has not changed is not said again by a screen reader.
  if (element.dataset.status === found.status && element.title === model) return;
  element.dataset.status = found.status;
  element.title = model;
  const text = h("span", {}, h("b", {}, WORDS[found.status]), h("small", {}, name));
  replace(element, h("i", { class: "dot" }), text);
}

function lost() {
  const banner = document.getElementById("lost");
  banner.hidden = state.isConnected;
  banner.textContent =
    "The Lab does not answer. If it was closed, start it again and open the new address.";
}

function theme() {
  const root = document.documentElement;
  const isDark =
    getComputedStyle(root).colorScheme === "dark" ||
    (root.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = isDark ? "light" : "dark";
  storage.set(THEME, root.dataset.theme);
}

const kept = storage.get(THEME);
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
document.getElementById("theme").addEventListener("click", theme);
for (const [name, page] of Object.entries(PAGES)) page.make(document.getElementById(name));
addEventListener("hashchange", show);
on("state", pill);
on("connection", lost);
show();
connect();
