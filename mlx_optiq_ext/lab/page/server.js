import { ago, bytes, button, clock, copyButton, fill, h, replace, toast } from "./dom.js";
import { ask, check, labTime, on, order, state } from "./store.js";

const SAMPLING = { temperature: "Temperature", top_p: "Top-p", top_k: "Top-k", min_p: "Min-p" };
const NEW = {
  model: null, mtp: false, drafter: null, num_draft_tokens: "auto", draft_vocab: null,
  recommended: true, sampling: {}, port: 8080, api_key: "", origins: "", flags: {},
};
const RUNS = ["starting", "ready", "silent", "waiting", "stopping"];
const parts = {};
let form = { ...NEW };
let isChanged = false; // by the user, since it was last what runs
let isDecided = false; // whether a drafter is used with this model
let isAsking = false; // whether a server may be started

export function make(section) {
  for (const name of ["now", "models", "drafter", "verdict", "sampling", "flags", "command", "go", "get"])
    parts[name] = h("div");
  parts.filter = h("input", { type: "search", placeholder: "Filter models", "aria-label": "Filter models", oninput: drawModels });
  section.append(
    h("h1", {}, "Server"),
    h("p", { class: "dim" }, "One model at a time, with the drafter of your choice."),
    parts.now,
    h("div", { class: "columns" },
      h("div", {},
        h("div", { class: "card" },
          h("div", { class: "row spread" }, h("h2", {}, "Model"),
            button("Look again", () => order("/api/models"), { class: "small quiet" })),
          h("div", { class: "stack" }, parts.filter, parts.models, parts.get)),
        h("div", { class: "card stack" }, h("div", {}, h("h2", {}, "Start"), parts.command), parts.go)),
      h("div", {},
        h("div", { class: "card" }, h("h2", {}, "Speculation"), h("div", { class: "stack" }, parts.drafter, parts.verdict)),
        h("div", { class: "card" }, h("h2", {}, "Sampling"), parts.sampling),
        h("div", { class: "card stack" }, parts.flags))));
  makeControls();
  makeGet();
  makeGo();
  on("state", () => { adopt(); drawNow(); drawGo(); });
  on("models", () => { adopt(); drawModels(); drawDrafters(); drawAll(); });
  on("check", () => { if (isOpen()) { decide(); fillControls(); drawAll(); } drawTags(); drawVerdict(); });
  on("flags", makeFlags);
  on("download", drawDownload);
  setInterval(() => { for (const tick of parts.ticks ?? []) tick(); }, 1000);
}

// Text that changes with time; the elements around it stay, so that they can be used.
function ticking(textOf) {
  const node = document.createTextNode("");
  const tick = () => { node.data = textOf(labTime()); };
  tick();
  parts.ticks.push(tick);
  return node;
}

// The form shows what runs until the user changes something.
function adopt() {
  const settings = state.server?.settings;
  if (!isChanged && settings) {
    form = { ...NEW, ...settings };
    isDecided = true;
  }
  if (form.model === null && state.models?.length) choose(firstModel());
  fillControls();
}

function firstModel() {
  return state.models.find((model) => model.kind === "model")?.name ?? null;
}

function choose(name) {
  // Settings of one model are not taken to another.
  form = { ...form, model: name, mtp: false, drafter: null, sampling: {}, draft_vocab: null };
  isDecided = false;
  decide();
}

const isOpen = () => !isDecided && form.model !== null && check(form.model);

// A head that is there is used, unless the user wants it otherwise.
function decide() {
  if (!isOpen()) return;
  form.mtp = check(form.model).works;
  isDecided = true;
}

function change(changes) {
  isChanged = true;
  parts.problem = null;
  form = { ...form, ...changes };
  fillControls();
  drawAll();
}

function drawAll() {
  drawVerdict();
  drawSampling();
  drawCommand();
  drawGo();
}

// ---- what runs

function drawNow() {
  const server = state.server;
  if (!server) return;
  const name = server.settings?.model;
  const title = {
    stopped: "No server is running", starting: `Loading ${name}`, ready: name, silent: `${name} does not answer`,
    stopping: `Stopping ${name}`, waiting: `${name} ended and is started again`, failed: `${name} does not run`,
  }[server.status];
  parts.ticks = [];
  if (server.status === "starting" && drawNow.pid === server.pid && server.pid) {
    parts.progress.replaceChildren(...loading(server));
    return;
  }
  drawNow.pid = server.status === "starting" ? server.pid : null;
  parts.progress = h("div");
  const canStop = RUNS.includes(server.status) && server.status !== "stopping";
  replace(parts.now, h("div", { class: "card now", "data-status": server.status, id: "now" },
    h("div", { class: "row spread" },
      h("h2", {}, h("i", { class: "dot" }), title),
      canStop && button("Stop", () => order("/api/stop"), { id: "stop" })),
    server.status === "stopped" && h("p", { class: "dim" }, "Choose a model below and start it."),
    server.status === "starting" && fill(parts.progress, loading(server)),
    server.status === "waiting" && h("p", {}, ticking((now) => `Attempt ${server.num_restarts + 1} in ${ago(server.retry_at - now)}.`)),
    server.problem && h("p", { class: "problem" }, server.problem),
    server.last_lines.length > 0 && h("pre", { "aria-label": "Last lines of the log" }, server.last_lines.join("\n")),
    ["ready", "silent"].includes(server.status) && facts(server)));
}

function loading(server) {
  const share = server.memory_bytes && server.expected_bytes ? Math.min(server.memory_bytes / server.expected_bytes, 1) : undefined;
  const isBig = server.expected_bytes > 5e8; // the interpreter itself needs some
  const memory = server.memory_bytes ? ` · ${bytes(server.memory_bytes)} of memory, weights of ${bytes(server.expected_bytes)}` : "";
  return [h("progress", { "aria-label": "Loading", ...(isBig && share && { value: share, max: 1 }) }),
    h("small", {}, ticking((now) => `${ago(now - server.since)}${memory}`))];
}

function facts(server) {
  const { settings } = server;
  const drafter = settings.mtp ? "MTP head" : settings.drafter ?? "none";
  const number = settings.num_draft_tokens ?? "auto";
  const rows = {
    Drafter: drafter,
    "Draft tokens": drafter === "none" ? "0" : number,
    Since: ticking((now) => `${clock(server.since - state.ahead)} (${ago(now - server.since)})`),
    Address: h("span", { class: "row" }, h("code", {}, `${server.url}/v1`), copyButton(() => `${server.url}/v1`)),
  };
  return h("dl", { class: "facts" }, Object.entries(rows).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// ---- models

function drawModels() {
  if (!state.models) return;
  const wanted = parts.filter.value.toLowerCase();
  const models = state.models.filter((model) => model.kind === "model");
  parts.filter.hidden = models.length < 8;
  parts.tags = new Map();
  replace(parts.models, h("div", { class: "models", role: "radiogroup", "aria-label": "Model" },
    models.filter((model) => model.name.toLowerCase().includes(wanted)).map(modelRow)));
  drawTags();
}

function drawTags() {
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
  return h("label", { class: "model", "data-name": model.name },
    h("input", { type: "radio", name: "model", checked: form.model === model.name, onchange: () => { choose(model.name); change({}); } }),
    h("span", {}, h("span", {}, model.name, " ", tag),
      details));
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
  ].filter(Boolean).join(" · ");
}

const filesOf = (drafter) =>
  drafter.files.map((file) => file.split("/").slice(-2).join("/")).join(", ");

function headTag(model, found) {
  if (!found) return h("span", { class: "tag" }, "looking…");
  if (found.works) return h("span", { class: "tag good" }, "MTP head");
  if (drafters(model.name).some((each) => each.kind === "assistant" && check(model.name, each.name)?.works))
    return h("span", { class: "tag good" }, "assistant");
  return found.model ? h("span", { class: "tag" }, "no head") : h("span", { class: "tag bad" }, "cannot be read");
}

// Those of the same family first: others cannot fit.
function drafters(name) {
  const model = state.models?.find((each) => each.name === name);
  const family = model?.model_type.split(/[_.]/)[0].replace(/\d.*$/, "");
  return (state.models ?? []).filter((each) => each.name !== name && each.model_type.startsWith(family ?? "?"));
}

function makeGet() {
  const name = h("input", { placeholder: "ORG/NAME", "aria-label": "Id on the Hub", spellcheck: "false" });
  parts.downloads = h("div");
  const get = (event) => {
    event.preventDefault();
    ask("/api/download", { repo_id: name.value.trim() }).catch((error) => replace(parts.downloads, h("p", { class: "problem" }, error.message)));
  };
  replace(parts.get, h("details", {}, h("summary", {}, "Get one from the Hub"),
    h("form", { class: "row", onsubmit: get }, h("div", { class: "grow" }, name), h("button", {}, "Download")), parts.downloads));
}

function drawDownload() {
  const job = state.download;
  if (!job) return;
  parts.get.firstChild.open = true;
  const isRunning = job.status === "running";
  replace(parts.downloads,
    h("div", { class: "row spread" }, h("small", {}, `${job.about.repo_id}: ${job.status}`),
      isRunning && button("Stop", () => order("/api/download/stop"), { class: "small" })),
    isRunning && h("progress", {}),
    job.problem && h("p", { class: "problem" }, job.problem),
    job.lines.length > 0 && h("pre", {}, job.lines.slice(-6).join("\n")));
}

// ---- speculation

function makeControls() {
  const number = (name) => (event) => change({ [name]: event.target.value === "" ? null : Number(event.target.value) });
  parts.mtp = h("input", { type: "checkbox", id: "mtp", onchange: (event) => { isDecided = true; change({ mtp: event.target.checked, drafter: event.target.checked ? null : form.drafter }); } });
  parts.pick = h("select", { id: "drafter", onchange: (event) => { isDecided = true; change(event.target.value ? { drafter: event.target.value, mtp: false } : { drafter: null }); } });
  parts.number = h("select", { id: "number", onchange: (event) => change({ num_draft_tokens: event.target.value === "auto" ? "auto" : Number(event.target.value) }) },
    h("option", { value: "auto" }, "auto"), [1, 2, 3, 4, 5, 6, 7, 8].map((n) => h("option", { value: n }, n)));
  parts.vocab = h("input", { type: "number", min: 1, id: "vocab", placeholder: "all tokens", onchange: number("draft_vocab") });
  replace(parts.drafter, h("div", { class: "stack" },
    h("label", { class: "tick" }, parts.mtp, h("span", {}, "MTP head", h("small", {}, "The model drafts with a head in its own weights."))),
    h("div", { class: "field" }, h("label", { for: "drafter" }, "Drafter"), parts.pick),
    h("div", { class: "fields" },
      h("div", { class: "field" }, h("label", { for: "number" }, "Draft tokens"), parts.number),
      h("div", { class: "field" }, h("label", { for: "vocab" }, "Draft vocabulary"), parts.vocab))));
  parts.fields = Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, h("input", {
    type: "number", step: "any", min: 0, id: `sampling-${name}`,
    onchange: (event) => change({ sampling: { ...form.sampling, [name]: event.target.value === "" ? null : Number(event.target.value) } }),
  })]));
  parts.recommended = h("input", { type: "checkbox", id: "recommended", onchange: (event) => change({ recommended: event.target.checked }) });
  parts.recommendation = h("small");
  replace(parts.sampling, h("div", { class: "stack" },
    h("label", { class: "tick" }, parts.recommended, h("span", {}, "As the model recommends", parts.recommendation)),
    h("div", { class: "fields" }, Object.entries(SAMPLING).map(([name, text]) =>
      h("div", { class: "field" }, h("label", { for: `sampling-${name}` }, text), parts.fields[name])))));
  parts.port = h("input", { type: "number", id: "port", min: 1024, max: 65535, onchange: number("port") });
  parts.key = h("input", { id: "key", placeholder: "none", autocomplete: "off", spellcheck: "false", onchange: (event) => change({ api_key: event.target.value }) });
  parts.origins = h("input", { id: "origins", placeholder: "none", autocomplete: "off", spellcheck: "false", onchange: (event) => change({ origins: event.target.value.replaceAll(" ", "") }) });
  makeFlags();
}

function makeFlags() {
  parts.flagInputs = {};
  const one = (flag) => {
    const give = (value) => change({ flags: { ...form.flags, [flag.name]: value } });
    const id = `flag${flag.name}`;
    const input = flag.value === null ? h("input", { type: "checkbox", id, onchange: (event) => give(event.target.checked) })
      : flag.choices.length ? h("select", { id, onchange: (event) => give(event.target.value) }, h("option", { value: "" }, "default"), flag.choices.map((each) => h("option", {}, each)))
        : h("input", { id, placeholder: "default", onchange: (event) => give(event.target.value.trim()) });
    parts.flagInputs[flag.name] = input;
    if (flag.value === null) return h("label", { class: "tick" }, input, h("span", {}, h("code", {}, flag.name), h("small", {}, flag.text)));
    return h("div", { class: "field" }, h("label", { for: id }, h("code", {}, flag.name)), input, h("small", {}, flag.text));
  };
  const isOpen = parts.flags.querySelector("details")?.open;
  replace(parts.flags,
    h("div", { class: "fields" },
      h("div", { class: "field" }, h("label", { for: "port" }, "Port"), parts.port),
      h("div", { class: "field" }, h("label", { for: "key" }, "API key"), parts.key),
      h("div", { class: "field" }, h("label", { for: "origins" }, "Web pages that may ask"), parts.origins)),
    state.flags.length > 0 && h("details", { open: isOpen }, h("summary", {}, "More of the server's flags"), h("div", { class: "stack" }, state.flags.map(one))));
  fillControls();
}

function fillControls() {
  parts.mtp.checked = form.mtp;
  parts.number.value = String(form.num_draft_tokens ?? "auto");
  drawDrafters();
  for (const [input, value] of [[parts.vocab, form.draft_vocab], [parts.port, form.port], [parts.key, form.api_key], [parts.origins, form.origins],
    ...Object.entries(parts.fields).map(([name, each]) => [each, form.sampling?.[name]])])
    if (document.activeElement !== input) input.value = value ?? "";
  for (const [name, input] of Object.entries(parts.flagInputs ?? {})) {
    const value = form.flags?.[name];
    if (input.type === "checkbox") input.checked = value === true;
    else if (document.activeElement !== input) input.value = value ?? "";
  }
  for (const radio of parts.models.querySelectorAll("input[type=radio]"))
    radio.checked = radio.closest(".model").dataset.name === form.model;
}

function drawDrafters() {
  const likely = drafters(form.model);
  const option = (model) => h("option", { value: model.name }, model.kind === "model" ? model.name : `${model.name} (${model.kind})`);
  const others = (state.models ?? []).filter((each) => each.name !== form.model && !likely.includes(each));
  const key = JSON.stringify([form.model, likely.map((m) => m.name), others.map((m) => m.name)]);
  if (drawDrafters.key !== key) {
    drawDrafters.key = key;
    replace(parts.pick, h("option", { value: "" }, "none"), likely.map(option),
      others.length > 0 && h("optgroup", { label: "Other families" }, others.map(option)));
  }
  parts.pick.value = form.drafter ?? "";
}

// The one line that says what doctor found, why speculation is off, and what to do.
function drawVerdict() {
  if (!form.model) return;
  const own = check(form.model);
  const isOn = form.mtp || form.drafter !== null;
  const found = isOn ? check(form.model, form.drafter) : own;
  const content = isOn ? asked(found) : off(own);
  const text = content.map((each) => each.textContent).join("");
  // What has not changed is not said again by a screen reader.
  if (parts.verdict.firstChild?.textContent === text) return;
  const verdict = h("div", { id: "verdict", class: "stack", "aria-live": "polite" }, content);
  replace(parts.verdict, verdict);
}

function asked(found) {
  if (!found) return [h("p", { class: "note" }, "doctor is looking at it…")];
  if (!found.works)
    return [h("p", { class: "note bad" }, h("b", {}, "Will not be started. "), found.problem, found.to_do && found.to_do !== found.problem ? ` ${found.to_do}` : "")];
  const { drafter, memory } = found;
  const place = drafter.files ? ` in ${filesOf(drafter)}` : "";
  const perToken = memory.drafter_bytes_per_token ? `, ${bytes(memory.drafter_bytes_per_token * 1000)} more for each 1000 tokens` : "";
  const device = memory.device_bytes ? ` of ${bytes(memory.device_bytes)} here` : "";
  return [h("p", { class: "note good" }, h("b", {}, `${drafter.kind} found, it fits.`), place && ` It is${place}.`,
    h("br"), h("small", {}, `Memory: model ${bytes(memory.model_bytes)}, drafter ${bytes(memory.drafter_bytes)}${perToken}${device}.`))];
}

function off(own) {
  const fits = drafters(form.model).filter((each) => each.kind === "assistant" && check(form.model, each.name)?.works);
  const use = fits.map((each) => button(`Use ${each.name}`, () => change({ drafter: each.name, mtp: false }), { class: "small" }));
  if (!own) return [h("p", { class: "note" }, "doctor is looking at it…")];
  if (own.works) return [h("p", { class: "note" }, h("b", {}, "Speculation is off. "), "An MTP head was found: tick it."),
    h("div", {}, button("Use the MTP head", () => change({ mtp: true, drafter: null }), { class: "small" }))];
  if (use.length) return [h("p", { class: "note" }, h("b", {}, "Speculation is off. "), "An assistant that fits is here:"), h("div", {}, use)];
  return [h("p", { class: "note" }, h("b", {}, "Speculation is off. "), own.to_do ?? own.problem)];
}

function drawSampling() {
  const model = state.models?.find((each) => each.name === form.model);
  if (!model) return;
  const isImplied = form.mtp || form.drafter !== null;
  const names = { ...SAMPLING, repetition_penalty: "repetition penalty" };
  const listed = Object.entries(model.sampling).map(([name, value]) => `${names[name].toLowerCase()} ${value}`).join(", ");
  const text = model.is_greedy ? "greedy, no sampling" : listed || "nothing: its generation_config.json says nothing";
  parts.recommendation.textContent = `${model.name.split("/").pop()} recommends ${text}.${isImplied ? " A drafter implies it." : ""}`;
  parts.recommended.checked = form.recommended || isImplied;
  for (const [name, input] of Object.entries(parts.fields)) {
    const value = parts.recommended.checked ? model.sampling[name] : undefined;
    input.placeholder = value === undefined ? "default" : `${value} recommended`;
  }
}

// ---- the command line, and starting it

function settings() {
  const { sampling, flags } = form;
  const given = (object) => Object.fromEntries(Object.entries(object ?? {}).filter(([, value]) => value !== null && value !== "" && value !== false));
  return { ...form, sampling: given(sampling), flags: given(flags) };
}

async function drawCommand() {
  const number = (drawCommand.number = (drawCommand.number ?? 0) + 1);
  if (!form.model) return;
  let content;
  try {
    const { command } = await ask("/api/command", settings());
    content = h("div", { class: "command" }, h("pre", { id: "command", "aria-label": "Command line" }, command), copyButton(() => command));
  } catch (error) {
    content = h("p", { class: "problem", id: "command" }, error.message);
  }
  if (number === drawCommand.number) replace(parts.command, content);
}

function makeGo() {
  parts.refusal = h("p", { class: "problem", role: "alert", id: "refusal", hidden: true });
  parts.free = button("Take a free port", takeFreePort, { class: "small", hidden: true });
  parts.start = button("Start", start, { class: "primary", id: "start" });
  replace(parts.go, parts.refusal, parts.free, parts.start);
}

function drawGo() {
  const { problem } = parts;
  parts.refusal.hidden = !problem;
  parts.refusal.textContent = problem ?? "";
  parts.free.hidden = !problem?.includes("port ");
  parts.start.textContent = isAsking ? "Checking…" : startText();
  parts.start.disabled = isAsking || !form.model || !state.server;
}

function startText() {
  const { server } = state;
  if (!RUNS.includes(server?.status)) return "Start";
  return server.settings?.model === form.model ? "Apply and restart" : "Switch";
}

async function takeFreePort() {
  try {
    change({ port: (await ask("/api/free-port")).port });
  } catch (error) {
    toast(error.message);
  }
}

async function start() {
  isAsking = true;
  drawGo();
  try {
    await ask("/api/start", settings());
    isChanged = false;
    parts.problem = null;
    document.getElementById("page").scrollTo({ top: 0, behavior: "smooth" });
  } catch (error) {
    parts.problem = error.message;
  }
  isAsking = false;
  drawGo();
}
