// The models of this machine, with what doctor found, and how to get more.
import { button, bytes, h, replace } from "./dom.js";
import { change, choose, form } from "./form.js";
import { ask, check, order, state } from "./store.js";

const MANY = 8; // models, from which on they can be filtered
const NUM_LINES = 6; // of the log of a download
const parts = {};

export function makeModels() {
  parts.models = h("div");
  parts.downloads = h("div");
  parts.filter = h("input", {
    type: "search",
    placeholder: "Filter models",
    "aria-label": "Filter models",
    oninput: drawModels,
  });
  const again = button("Look again", () => order("/api/models"), { class: "small quiet" });
  return h(
    "div",
    { class: "card" },
    h("div", { class: "row spread" }, h("h2", {}, "Model"), again),
    h("div", { class: "stack" }, parts.filter, parts.models, makeGet()),
  );
}

export function markChosen() {
  for (const radio of parts.models.querySelectorAll("input[type=radio]"))
    radio.checked = radio.closest(".model").dataset.name === form.model;
}

export function drawModels() {
  if (!state.models) return;
  const wanted = parts.filter.value.toLowerCase();
  const models = state.models.filter((model) => model.kind === "model");
  parts.filter.hidden = models.length < MANY;
  parts.tags = new Map();
  replace(
    parts.models,
    h(
      "div",
      { class: "models", role: "radiogroup", "aria-label": "Model" },
      models.filter((model) => model.name.toLowerCase().includes(wanted)).map(modelRow),
    ),
  );
  drawTags();
}

export function drawTags() {
  for (const [model, { tag, details }] of parts.tags ?? []) {
    const found = check(model.name);
    replace(tag, headTag(model, found));
    replace(details, detailsOf(model, found));
  }
}

function modelRow(model) {
  const tag = h("span");
  const details = h("small");
  parts.tags.set(model, { tag, details });
  return h(
    "label",
    { class: "model", "data-name": model.name },
    h("input", {
      type: "radio",
      name: "model",
      checked: form.model === model.name,
      onchange: () => {
        choose(model.name);
        change({});
      },
    }),
    h("span", {}, h("span", {}, model.name, " ", tag), details),
  );
}

// What doctor found, in one line: the memory that is expected and where the head is.
function detailsOf(model, found) {
  const { drafter, memory } = found ?? {};
  const expected = memory ? memory.model_bytes + memory.drafter_bytes : found?.model?.num_bytes;
  return [
    model.model_type,
    `${bytes(model.num_bytes)} on disk`,
    model.bits && `${model.bits} bits`,
    expected && `${bytes(expected)} of memory`,
    drafter?.files?.length && `head in ${filesOf(drafter)}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

export const filesOf = (drafter) =>
  drafter.files.map((file) => file.split("/").slice(-2).join("/")).join(", ");

function headTag(model, found) {
  if (!found) return h("span", { class: "tag" }, "looking…");
  if (found.works) return h("span", { class: "tag good" }, "MTP head");
  if (
    drafters(model.name).some(
      (each) => each.kind === "assistant" && check(model.name, each.name)?.works,
    )
  )
    return h("span", { class: "tag good" }, "assistant");
  return found.model
    ? h("span", { class: "tag" }, "no head")
    : h("span", { class: "tag bad" }, "cannot be read");
}

// Those of the same family first: others cannot fit.
export function drafters(name) {
  const model = state.models?.find((each) => each.name === name);
  const family = model?.model_type.split(/[_.]/)[0].replace(/\d.*$/, "");
  return (state.models ?? []).filter(
    (each) => each.name !== name && each.model_type.startsWith(family ?? "?"),
  );
}

function makeGet() {
  const name = h("input", {
    placeholder: "ORG/NAME",
    "aria-label": "Id on the Hub",
    spellcheck: "false",
  });
  const get = (event) => {
    event.preventDefault();
    ask("/api/download", { repo_id: name.value.trim() }).catch((error) =>
      replace(parts.downloads, h("p", { class: "problem" }, error.message)),
    );
  };
  const form = h(
    "form",
    { class: "row", onsubmit: get },
    h("div", { class: "grow" }, name),
    h("button", {}, "Download"),
  );
  parts.get = h("details", {}, h("summary", {}, "Get one from the Hub"), form, parts.downloads);
  return parts.get;
}

export function drawDownload() {
  const job = state.download;
  if (!job) return;
  parts.get.open = true;
  const isRunning = job.status === "running";
  replace(
    parts.downloads,
    h(
      "div",
      { class: "row spread" },
      h("small", {}, `${job.about.repo_id}: ${job.status}`),
      isRunning && button("Stop", () => order("/api/download/stop"), { class: "small" }),
    ),
    isRunning && h("progress", {}),
    job.problem && h("p", { class: "problem" }, job.problem),
    job.lines.length > 0 && h("pre", {}, job.lines.slice(-NUM_LINES).join("\n")),
  );
}
