// Elements are made here and nowhere from text: what a model writes stays text.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, props = {}, ...children) {
  return fill(set(document.createElement(tag), props), children);
}

export function s(tag, props = {}, ...children) {
  return fill(set(document.createElementNS(SVG, tag), props), children);
}

function set(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

export function fill(element, children) {
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export function replace(element, ...children) {
  element.replaceChildren();
  return fill(element, children);
}

export function button(text, onclick, props = {}) {
  return h("button", { type: "button", onclick, ...props }, text);
}

export function toast(text) {
  const place = document.getElementById("toast");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => place.classList.remove("shown"), 3500);
}

// Lets a screen reader say what comes, a line at a time; begins anew without a text.
export function speak(text = "", isWhole = false) {
  const place = document.getElementById("spoken");
  if (!text) {
    speak.said = 0;
    place.replaceChildren();
    return;
  }
  const end = isWhole ? text.length : text.lastIndexOf("\n") + 1;
  const more = text.slice(speak.said, end).trim();
  if (more) place.append(h("p", {}, more));
  speak.said = Math.max(speak.said, end);
}
speak.said = 0;

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast("The browser does not allow to copy");
  }
}

export function copyButton(textOf, label = "Copy") {
  return button(label, () => copyText(textOf()), { class: "small quiet" });
}

export function download(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export function bytes(number) {
  if (number === null || number === undefined) return "?";
  for (const [size, unit] of [
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ])
    if (number >= size) return `${(number / size).toFixed(1)} ${unit}`;
  return `${number} bytes`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export function ago(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();
