import { h, replace } from "./dom.js";
import { connect, on, state } from "./store.js";
import * as server from "./server.js";
import * as chat from "./chat.js";
import * as live from "./live.js";
import * as bench from "./bench.js";

const PAGES = { server, chat, live, bench };
const WORDS = {
  stopped: "Stopped", starting: "Loading", ready: "Ready",
  stopping: "Stopping", waiting: "Restarting", failed: "Failed",
};

function show() {
  const name = location.hash.slice(1) in PAGES ? location.hash.slice(1) : "server";
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
  element.dataset.status = found.status;
  replace(element, h("i", { class: "dot" }), h("span", {}, h("b", {}, WORDS[found.status]), h("small", {}, model.split("/").pop())));
}

function lost() {
  const banner = document.getElementById("lost");
  banner.hidden = state.isConnected;
  banner.textContent = "The Lab does not answer. If it was closed, start it again and open the new address.";
}

function theme() {
  const root = document.documentElement;
  const isDark = getComputedStyle(root).colorScheme === "dark" ||
    (root.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("lab.theme", root.dataset.theme);
}

const kept = localStorage.getItem("lab.theme");
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
document.getElementById("theme").addEventListener("click", theme);
for (const [name, page] of Object.entries(PAGES)) page.make(document.getElementById(name));
addEventListener("hashchange", show);
on("state", pill);
on("connection", lost);
show();
connect();
