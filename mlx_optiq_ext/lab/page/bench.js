import { button, copyText, download, h, percent, replace, toast } from "./dom.js";
import { chart, legend, picture } from "./charts.js";
import * as storage from "./storage.js";
import { ask, on, order, state } from "./store.js";

const KEY = "lab.bench";
const LAST = "lab.benched"; // the run that was kept last, which may have been deleted since
const MAX_RUNS = 20;
const MAX_SHOWN = 6; // colours
const parts = {};
let runs = read();
let shownIds = new Set(runs.slice(0, 2).map((run) => run.id));

export function make(section) {
  for (const name of ["job", "runs", "charts", "table"]) parts[name] = h("div");
  parts.depth = h(
    "select",
    { id: "bench-depth" },
    [1, 2, 3, 4, 5, 6, 7, 8].map((n) => h("option", { value: n }, n)),
  );
  parts.depth.value = "4";
  parts.tokens = h("input", {
    id: "bench-tokens",
    type: "number",
    min: 2,
    placeholder: "for half a minute",
  });
  parts.pauses = h("input", { type: "checkbox", id: "bench-pauses", checked: true });
  parts.run = button("Run", run, { class: "primary", id: "bench-run" });
  section.append(
    h("h1", {}, "Bench"),
    h(
      "p",
      { class: "dim" },
      "What the loaded model gains on this machine, by mlx-optiq-ext bench: five built-in prompts, plain and with each number of draft tokens.",
    ),
    h(
      "div",
      { class: "card stack" },
      h(
        "div",
        { class: "row" },
        h("label", { for: "bench-depth" }, "Draft tokens up to"),
        h("div", {}, parts.depth),
        h("label", { for: "bench-tokens" }, "Tokens of each answer"),
        h("div", {}, parts.tokens),
        parts.run,
      ),
      h(
        "label",
        { class: "tick" },
        parts.pauses,
        h(
          "span",
          {},
          "Stop the server meanwhile",
          h("small", {}, "It is started again afterwards. Both at once would share the machine."),
        ),
      ),
      parts.job,
    ),
    parts.runs,
    parts.charts,
    parts.table,
  );
  on("bench", () => {
    keep();
    drawJob();
  });
  storage.onChange(KEY, () => {
    runs = read();
    draw();
  });
  draw();
}

// Anything may be in the store; what is no run of a benchmark is passed over.
function read() {
  const found = storage.getJson(KEY);
  return Array.isArray(found) ? found.filter(isRun) : [];
}

function isNumber(value) {
  return typeof value === "number";
}

function isRun(found) {
  const { id, at, model, drafter, result } = found ?? {};
  if (![id, model, drafter].every((each) => typeof each === "string") || !isNumber(at))
    return false;
  return isResult(result);
}

function isResult(result) {
  const depths = Object.values(result?.depths ?? {});
  const areNumbers = (each) =>
    [each?.speed_up, each?.plain_tps, each?.acceptance_rate].every(isNumber) && each.differences;
  return (
    depths.length > 0 &&
    depths.every(areNumbers) &&
    result.machine &&
    Object.values(result.verify_cost ?? []).every(isNumber)
  );
}

function write() {
  const isKept = storage.set(KEY, JSON.stringify(runs));
  if (!isKept) toast("The browser's store is full: runs are kept only until the page is left.");
  draw();
}

async function run() {
  try {
    await ask("/api/bench", {
      max_depth: Number(parts.depth.value),
      tokens: Number(parts.tokens.value) || null,
      pauses: parts.pauses.checked,
    });
  } catch (error) {
    replace(parts.job, h("p", { class: "problem", role: "alert" }, error.message));
  }
}

function drawJob() {
  const job = state.bench;
  const isRunning = job.status === "running";
  parts.run.disabled = isRunning;
  replace(
    parts.job,
    isRunning &&
      h(
        "div",
        {},
        h(
          "div",
          { class: "row spread" },
          h("small", {}, job.lines.at(-1) ?? "Loading the model…"),
          button("Stop", () => order("/api/bench/stop"), { class: "small" }),
        ),
        h("progress", job.progress ? { value: job.progress, max: 1 } : {}),
      ),
    job.status === "failed" &&
      h(
        "div",
        { class: "stack" },
        h("p", { class: "problem" }, `It failed: ${job.problem}`),
        h("pre", {}, job.lines.join("\n")),
      ),
    job.status === "stopped" && h("p", { class: "dim" }, "Stopped."),
  );
}

function keep() {
  const job = state.bench;
  if (job.status !== "done" || !isResult(job.result)) return;
  const id = String(job.started);
  runs = read();
  if (storage.get(LAST) === id || runs.some((each) => each.id === id)) return;
  storage.set(LAST, id);
  runs = [{ id, at: job.started, ...job.about, result: job.result }, ...runs].slice(0, MAX_RUNS);
  shownIds = new Set([id, ...shownIds].slice(0, 2));
  write();
}

const name = (each) =>
  `${each.model.split("/").pop()}, ${each.drafter.split("/").pop()}, ${new Date(each.at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}`;
const chosen = () => runs.filter((each) => shownIds.has(each.id)).slice(0, MAX_SHOWN);
const points = (object, value) =>
  Object.entries(object).map(([key, found]) => [Number(key), value(found)]);

function draw() {
  const seen = chosen();
  replace(
    parts.runs,
    runs.length > 0 &&
      h(
        "div",
        { class: "card stack" },
        h(
          "div",
          { class: "row spread" },
          h("h2", {}, "Runs"),
          h(
            "div",
            { class: "row" },
            button("Copy as Markdown", () => copyText(markdown(chosen())), {
              class: "small",
              id: "bench-copy",
            }),
            button(
              "Save Markdown",
              () => download("bench.md", new Blob([markdown(chosen())], { type: "text/markdown" })),
              { class: "small", id: "bench-markdown" },
            ),
            button("Save PNG", png, { class: "small", id: "bench-png" }),
          ),
        ),
        runs.map((each) =>
          h(
            "div",
            { class: "row" },
            h(
              "label",
              { class: "tick grow" },
              h("input", {
                type: "checkbox",
                checked: shownIds.has(each.id),
                onchange: () => toggle(each.id),
              }),
              h("span", {}, name(each)),
            ),
            h("small", {}, best(each)),
            button(
              "Delete",
              () => {
                runs = read().filter((other) => other.id !== each.id);
                write();
              },
              { class: "small quiet" },
            ),
          ),
        ),
      ),
  );
  const series = (value) =>
    seen.map((each, color) => ({ name: name(each), color, points: value(each.result) }));
  const plots = !seen.length
    ? []
    : [
        [
          "Speed-up by number of draft tokens",
          (r) => [[0, 1], ...points(r.depths, (d) => d.speed_up)],
          {},
        ],
        [
          "Drafts accepted by number of draft tokens",
          (r) => points(r.depths, (d) => d.acceptance_rate),
          { max: 1, format: percent },
        ],
        [
          "Cost of verifying T rows, c(T), over that of one",
          (r) => points(r.verify_cost, (c) => c),
          {},
        ],
      ].map(([title, value, y]) => {
        const lines = series(value);
        const ticks = [...new Set(lines.flatMap((each) => each.points.map(([at]) => at)))];
        return chart({
          title,
          series: lines,
          x: { ticks, format: String },
          y,
          height: 220,
          dots: true,
        });
      });
  parts.shown = plots;
  parts.names = seen.length ? legend(series(() => [])) : [];
  replace(
    parts.charts,
    h(
      "div",
      { class: "grid" },
      plots.map((plot) => h("div", { class: "card" }, plot)),
    ),
    h("p", { class: "legend" }, parts.names),
  );
  replace(
    parts.table,
    seen.map((each) => h("div", { class: "card" }, h("h2", {}, name(each)), table(each.result))),
  );
}

function toggle(id) {
  if (!shownIds.delete(id)) shownIds.add(id);
  draw();
}

function best({ result }) {
  if (!result.best_depth) return "plain decoding is best";
  return `${result.depths[result.best_depth].speed_up.toFixed(2)}x with ${result.best_depth}`;
}

const COLUMNS = ["Draft tokens", "Speed-up", "Tokens/s", "Accepted", "Output"];
const rows = (result) =>
  Object.entries(result.depths).map(([depth, found]) => [
    depth,
    `${found.speed_up.toFixed(2)}x`,
    (found.plain_tps * found.speed_up).toFixed(1),
    percent(found.acceptance_rate),
    Object.keys(found.differences).length ? "different" : "identical",
  ]);

function table(result) {
  const plain = Object.values(result.depths)[0].plain_tps;
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          COLUMNS.map((each) => h("th", { class: "n" }, each)),
        ),
      ),
      h(
        "tbody",
        {},
        [["0", "1.00x", plain.toFixed(1), "", "plain"], ...rows(result)].map((row) =>
          h(
            "tr",
            {},
            row.map((cell) => h("td", { class: "n" }, cell)),
          ),
        ),
      ),
    ),
  );
}

function markdown(list) {
  return list
    .map((each) =>
      [
        `**${name(each)}**`,
        "",
        ...Object.entries(each.result.machine).map(([key, value]) => `- ${key}: ${value}`),
        "",
        `| ${COLUMNS.join(" | ")} |`,
        `|${"---|".repeat(COLUMNS.length)}`,
        ...rows(each.result).map((row) => `| ${row.join(" | ")} |`),
        "",
        `Cost of verifying rows at once, over that of one: ${Object.entries(each.result.verify_cost)
          .map(([n, cost]) => `${n}: ${cost.toFixed(2)}`)
          .join(", ")}`,
        "",
      ].join("\n"),
    )
    .join("\n");
}

async function png() {
  const names = parts.names.map((item) => ({
    name: item.textContent.trim(),
    mark: item.querySelector("path"),
  }));
  download("bench.png", await picture(parts.shown, names));
}
