import { ago, bytes, button, clock, copyButton, fill, h, replace, toast } from "./dom.js";
import { adopt, change, decide, form, onChange, settings, wasStarted } from "./form.js";
import {
  drafters,
  drawDownload,
  drawModels,
  drawTags,
  filesOf,
  makeModels,
  markChosen,
} from "./models.js";
import { ask, check, labTime, on, order, state } from "./store.js";

const SAMPLING = { temperature: "Temperature", top_p: "Top-p", top_k: "Top-k", min_p: "Min-p" };
const RUNS = ["starting", "ready", "silent", "waiting", "stopping"];
const parts = {};
let isAsking = false; // whether a server may be started

export function make(section) {
  for (const name of ["now", "drafter", "verdict", "sampling", "flags", "command", "go"])
    parts[name] = h("div");
  const starting = h(
    "div",
    { class: "card stack" },
    h("div", {}, h("h2", {}, "Start"), parts.command),
    parts.go,
  );
  const speculation = h(
    "div",
    { class: "card" },
    h("h2", {}, "Speculation"),
    h("div", { class: "stack" }, parts.drafter, parts.verdict),
  );
  const sampling = h("div", { class: "card" }, h("h2", {}, "Sampling"), parts.sampling);
  section.append(
    h("h1", {}, "Server"),
    h("p", { class: "dim" }, "One model at a time, with the drafter of your choice."),
    parts.now,
    h(
      "div",
      { class: "columns" },
      h("div", {}, makeModels(), starting),
      h("div", {}, speculation, sampling, h("div", { class: "card stack" }, parts.flags)),
    ),
  );
  makeControls();
  makeGo();
  listen();
  setInterval(() => {
    for (const tick of parts.ticks ?? []) tick();
  }, 1000);
}

function listen() {
  onChange(() => {
    parts.problem = null;
    fillControls();
    drawAll();
  });
  on("state", () => {
    adopt();
    fillControls();
    drawNow();
    drawGo();
  });
  on("models", () => {
    adopt();
    drawModels();
    fillControls();
    drawAll();
  });
  on("check", () => {
    if (decide()) {
      fillControls();
      drawAll();
    }
    drawTags();
    drawVerdict();
  });
  on("flags", makeFlags);
  on("download", drawDownload);
}

function drawAll() {
  drawVerdict();
  drawSampling();
  drawCommand();
  drawGo();
}

// Text that changes with time; the elements around it stay, so that they can be used.
function ticking(textOf) {
  const node = document.createTextNode("");
  const tick = () => {
    node.data = textOf(labTime());
  };
  tick();
  parts.ticks.push(tick);
  return node;
}

// ---- what runs

function drawNow() {
  const server = state.server;
  if (!server) return;
  const name = server.settings?.model;
  const title = {
    stopped: "No server is running",
    starting: `Loading ${name}`,
    ready: name,
    silent: `${name} does not answer`,
    stopping: `Stopping ${name}`,
    waiting: `${name} ended and is started again`,
    failed: `${name} does not run`,
  }[server.status];
  parts.ticks = [];
  if (server.status === "starting" && drawNow.pid === server.pid && server.pid) {
    parts.progress.replaceChildren(...loading(server));
    return;
  }
  drawNow.pid = server.status === "starting" ? server.pid : null;
  parts.progress = h("div");
  const canStop = RUNS.includes(server.status) && server.status !== "stopping";
  replace(
    parts.now,
    h(
      "div",
      { class: "card now", "data-status": server.status, id: "now" },
      h(
        "div",
        { class: "row spread" },
        h("h2", {}, h("i", { class: "dot" }), title),
        canStop && button("Stop", () => order("/api/stop"), { id: "stop" }),
      ),
      server.status === "stopped" && h("p", { class: "dim" }, "Choose a model below and start it."),
      server.status === "starting" && fill(parts.progress, loading(server)),
      server.status === "waiting" &&
        h(
          "p",
          {},
          ticking((now) => `Attempt ${server.num_restarts + 1} in ${ago(server.retry_at - now)}.`),
        ),
      server.problem && h("p", { class: "problem" }, server.problem),
      server.last_lines.length > 0 &&
        h("pre", { "aria-label": "Last lines of the log" }, server.last_lines.join("\n")),
      ["ready", "silent"].includes(server.status) && facts(server),
    ),
  );
}

function loading(server) {
  const share =
    server.memory_bytes && server.expected_bytes
      ? Math.min(server.memory_bytes / server.expected_bytes, 1)
      : undefined;
  const isBig = server.expected_bytes > 5e8; // the interpreter itself needs some
  const memory = server.memory_bytes
    ? ` · ${bytes(server.memory_bytes)} of memory, weights of ${bytes(server.expected_bytes)}`
    : "";
  return [
    h("progress", { "aria-label": "Loading", ...(isBig && share && { value: share, max: 1 }) }),
    h(
      "small",
      {},
      ticking((now) => `${ago(now - server.since)}${memory}`),
    ),
  ];
}

function facts(server) {
  const { settings } = server;
  const named = [settings.mtp && "MTP head", settings.drafter, copies(settings) && "copying"];
  const drafter = named.filter(Boolean).join(" and ") || "none";
  const number = settings.num_draft_tokens ?? "auto";
  const rows = {
    Drafter: drafter,
    "Draft tokens": drafter === "none" ? "0" : number,
    Since: ticking((now) => `${clock(server.since - state.ahead)} (${ago(now - server.since)})`),
    Address: h(
      "span",
      { class: "row" },
      h("code", {}, `${server.url}/v1`),
      copyButton(() => `${server.url}/v1`),
    ),
  };
  return h(
    "dl",
    { class: "facts" },
    Object.entries(rows).map(([name, value]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value)),
    ),
  );
}

// ---- speculation

function makeControls() {
  const number = (name) => (event) =>
    change({ [name]: event.target.value === "" ? null : Number(event.target.value) });
  parts.mtp = h("input", {
    type: "checkbox",
    id: "mtp",
    onchange: (event) =>
      change({ mtp: event.target.checked, drafter: event.target.checked ? null : form.drafter }),
  });
  parts.pick = h("select", {
    id: "drafter",
    onchange: (event) => {
      change(event.target.value ? { drafter: event.target.value, mtp: false } : { drafter: null });
    },
  });
  parts.number = h(
    "select",
    {
      id: "number",
      onchange: (event) =>
        change({
          num_draft_tokens: event.target.value === "auto" ? "auto" : Number(event.target.value),
        }),
    },
    h("option", { value: "auto" }, "auto"),
    [1, 2, 3, 4, 5, 6, 7, 8].map((n) => h("option", { value: n }, n)),
  );
  parts.vocab = h("input", {
    type: "number",
    min: 1,
    id: "vocab",
    placeholder: "all tokens",
    onchange: number("draft_vocab"),
  });
  replace(
    parts.drafter,
    h(
      "div",
      { class: "stack" },
      h(
        "label",
        { class: "tick" },
        parts.mtp,
        h(
          "span",
          {},
          "MTP head",
          h("small", {}, "The model drafts with a head in its own weights."),
        ),
      ),
      h("div", { class: "field" }, h("label", { for: "drafter" }, "Drafter"), parts.pick),
      h(
        "div",
        { class: "fields" },
        h("div", { class: "field" }, h("label", { for: "number" }, "Draft tokens"), parts.number),
        h("div", { class: "field" }, h("label", { for: "vocab" }, "Draft vocabulary"), parts.vocab),
      ),
    ),
  );
  parts.fields = Object.fromEntries(
    Object.keys(SAMPLING).map((name) => [
      name,
      h("input", {
        type: "number",
        step: "any",
        min: 0,
        id: `sampling-${name}`,
        onchange: (event) =>
          change({
            sampling: {
              ...form.sampling,
              [name]: event.target.value === "" ? null : Number(event.target.value),
            },
          }),
      }),
    ]),
  );
  parts.recommended = h("input", {
    type: "checkbox",
    id: "recommended",
    onchange: (event) => change({ recommended: event.target.checked }),
  });
  parts.recommendation = h("small");
  replace(
    parts.sampling,
    h(
      "div",
      { class: "stack" },
      h(
        "label",
        { class: "tick" },
        parts.recommended,
        h("span", {}, "As the model recommends", parts.recommendation),
      ),
      h(
        "div",
        { class: "fields" },
        Object.entries(SAMPLING).map(([name, text]) =>
          h(
            "div",
            { class: "field" },
            h("label", { for: `sampling-${name}` }, text),
            parts.fields[name],
          ),
        ),
      ),
    ),
  );
  parts.port = h("input", {
    type: "number",
    id: "port",
    min: 1024,
    max: 65535,
    onchange: number("port"),
  });
  parts.key = h("input", {
    id: "key",
    placeholder: "none",
    autocomplete: "off",
    spellcheck: "false",
    onchange: (event) => change({ api_key: event.target.value }),
  });
  parts.origins = h("input", {
    id: "origins",
    placeholder: "none",
    autocomplete: "off",
    spellcheck: "false",
    onchange: (event) => change({ origins: event.target.value.replaceAll(" ", "") }),
  });
  makeFlags();
}

function makeFlags() {
  parts.flagInputs = {};
  const one = (flag) => {
    const give = (value) => change({ flags: { ...form.flags, [flag.name]: value } });
    const id = `flag${flag.name}`;
    const input =
      flag.value === null
        ? h("input", { type: "checkbox", id, onchange: (event) => give(event.target.checked) })
        : flag.choices.length
          ? h(
              "select",
              { id, onchange: (event) => give(event.target.value) },
              h("option", { value: "" }, "default"),
              flag.choices.map((each) => h("option", {}, each)),
            )
          : h("input", {
              id,
              placeholder: "default",
              onchange: (event) => give(event.target.value.trim()),
            });
    parts.flagInputs[flag.name] = input;
    if (flag.value === null)
      return h(
        "label",
        { class: "tick" },
        input,
        h("span", {}, h("code", {}, flag.name), h("small", {}, flag.text)),
      );
    return h(
      "div",
      { class: "field" },
      h("label", { for: id }, h("code", {}, flag.name)),
      input,
      h("small", {}, flag.text),
    );
  };
  const isOpen = parts.flags.querySelector("details")?.open;
  replace(
    parts.flags,
    h(
      "div",
      { class: "fields" },
      h("div", { class: "field" }, h("label", { for: "port" }, "Port"), parts.port),
      h("div", { class: "field" }, h("label", { for: "key" }, "API key"), parts.key),
      h(
        "div",
        { class: "field" },
        h("label", { for: "origins" }, "Web pages that may ask"),
        parts.origins,
      ),
    ),
    state.flags.length > 0 &&
      h(
        "details",
        { open: isOpen },
        h("summary", {}, "More of the server's flags"),
        h("div", { class: "stack" }, state.flags.map(one)),
      ),
  );
  fillControls();
}

function fillControls() {
  parts.mtp.checked = form.mtp;
  parts.number.value = String(form.num_draft_tokens ?? "auto");
  drawDrafters();
  for (const [input, value] of [
    [parts.vocab, form.draft_vocab],
    [parts.port, form.port],
    [parts.key, form.api_key],
    [parts.origins, form.origins],
    ...Object.entries(parts.fields).map(([name, each]) => [each, form.sampling?.[name]]),
  ])
    if (document.activeElement !== input) input.value = value ?? "";
  for (const [name, input] of Object.entries(parts.flagInputs ?? {})) {
    const value = form.flags?.[name];
    if (input.type === "checkbox") input.checked = value === true;
    else if (document.activeElement !== input) input.value = value ?? "";
  }
  markChosen();
}

function drawDrafters() {
  const likely = drafters(form.model);
  const option = (model) =>
    h(
      "option",
      { value: model.name },
      model.kind === "model" ? model.name : `${model.name} (${model.kind})`,
    );
  const others = (state.models ?? []).filter(
    (each) => each.name !== form.model && !likely.includes(each),
  );
  const key = JSON.stringify([form.model, likely.map((m) => m.name), others.map((m) => m.name)]);
  if (drawDrafters.key !== key) {
    drawDrafters.key = key;
    replace(
      parts.pick,
      h("option", { value: "" }, "none"),
      likely.map(option),
      others.length > 0 && h("optgroup", { label: "Other families" }, others.map(option)),
    );
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
    return [
      h(
        "p",
        { class: "note bad" },
        h("b", {}, "Will not be started. "),
        found.problem,
        found.to_do && found.to_do !== found.problem ? ` ${found.to_do}` : "",
      ),
    ];
  const { drafter, memory } = found;
  const place = drafter.files ? ` in ${filesOf(drafter)}` : "";
  const perToken = memory.drafter_bytes_per_token
    ? `, ${bytes(memory.drafter_bytes_per_token * 1000)} more for each 1000 tokens`
    : "";
  const device = memory.device_bytes ? ` of ${bytes(memory.device_bytes)} here` : "";
  return [
    h(
      "p",
      { class: "note good" },
      h("b", {}, `${drafter.kind} found, it fits.`),
      place && ` It is${place}.`,
      h("br"),
      h(
        "small",
        {},
        `Memory: model ${bytes(memory.model_bytes)}, drafter ${bytes(memory.drafter_bytes)}${perToken}${device}.`,
      ),
    ),
  ];
}

const copies = (settings) => settings.flags?.["--prompt-lookup"] === true;

function off(own) {
  if (copies(form))
    return [
      h(
        "p",
        { class: "note good" },
        h("b", {}, "Copying only. "),
        "What followed the last tokens before is drafted; no drafter is used.",
      ),
    ];
  const fits = drafters(form.model).filter(
    (each) => each.kind === "assistant" && check(form.model, each.name)?.works,
  );
  const use = fits.map((each) =>
    button(`Use ${each.name}`, () => change({ drafter: each.name, mtp: false }), {
      class: "small",
    }),
  );
  if (!own) return [h("p", { class: "note" }, "doctor is looking at it…")];
  if (own.works)
    return [
      h(
        "p",
        { class: "note" },
        h("b", {}, "Speculation is off. "),
        "An MTP head was found: tick it.",
      ),
      h(
        "div",
        {},
        button("Use the MTP head", () => change({ mtp: true, drafter: null }), { class: "small" }),
      ),
    ];
  if (use.length)
    return [
      h(
        "p",
        { class: "note" },
        h("b", {}, "Speculation is off. "),
        "An assistant that fits is here:",
      ),
      h("div", {}, use),
    ];
  return [h("p", { class: "note" }, h("b", {}, "Speculation is off. "), own.to_do ?? own.problem)];
}

function drawSampling() {
  const model = state.models?.find((each) => each.name === form.model);
  if (!model) return;
  const isImplied = form.mtp || form.drafter !== null;
  const names = { ...SAMPLING, repetition_penalty: "repetition penalty" };
  const listed = Object.entries(model.sampling)
    .map(([name, value]) => `${names[name].toLowerCase()} ${value}`)
    .join(", ");
  const text = model.is_greedy
    ? "greedy, no sampling"
    : listed || "nothing: its generation_config.json says nothing";
  parts.recommendation.textContent = `${model.name.split("/").pop()} recommends ${text}.${isImplied ? " A drafter implies it." : ""}`;
  parts.recommended.checked = form.recommended || isImplied;
  for (const [name, input] of Object.entries(parts.fields)) {
    const value = parts.recommended.checked ? model.sampling[name] : undefined;
    input.placeholder = value === undefined ? "default" : `${value} recommended`;
  }
}

// ---- the command line, and starting it

async function drawCommand() {
  const number = (drawCommand.number = (drawCommand.number ?? 0) + 1);
  if (!form.model) return;
  let content;
  try {
    const { command } = await ask("/api/command", settings());
    content = h(
      "div",
      { class: "command" },
      h("pre", { id: "command", "aria-label": "Command line" }, command),
      copyButton(() => command),
    );
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
  parts.start.disabled = !form.model || !state.server;
  // A button that is disabled loses the focus.
  parts.start.setAttribute("aria-disabled", String(isAsking));
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
  if (isAsking) return;
  isAsking = true;
  drawGo();
  try {
    await ask("/api/start", settings());
    wasStarted();
    parts.problem = null;
    document.getElementById("page").scrollTo({ top: 0, behavior: "smooth" });
  } catch (error) {
    parts.problem = error.message;
  }
  isAsking = false;
  drawGo();
}
