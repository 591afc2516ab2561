import { bytes, clock, h, percent, replace } from "./dom.js";
import { chart, legend, short } from "./charts.js";
import { on, state } from "./store.js";

const SECONDS = 300;
const WINDOW = 10; // samples that acceptance is taken over
const NUM_REQUESTS = 50;
const NUM_LINES = 400;
const MAX_POSITIONS = 6;
const parts = {};
let isShown = false;

export function make(section) {
  for (const name of ["plots", "requests", "log"]) parts[name] = h("div");
  parts.filter = h("input", {
    type: "search",
    placeholder: "Filter the log",
    "aria-label": "Filter the log",
    oninput: drawLog,
  });
  parts.plots.className = "grid";
  section.append(
    h("h1", {}, "Live"),
    h("p", { class: "dim" }, "What the server measures of itself, once a second."),
    parts.plots,
    h("div", { class: "card" }, h("h2", {}, "Requests"), parts.requests),
    h(
      "div",
      { class: "card stack" },
      h("div", { class: "row spread" }, h("h2", {}, "Log"), h("div", {}, parts.filter)),
      parts.log,
    ),
  );
  on("sample samples state", plotSoon);
  on("log lines", logSoon);
}

export function shown(isNow) {
  isShown = isNow;
  if (isShown) {
    plot();
    drawRequests();
    drawLog();
  }
}

// Draws at the next frame, however often something changes until then.
function soon(draw) {
  let isDue = false;
  return () => {
    if (isDue || !isShown) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      draw();
    });
  };
}

const plotSoon = soon(plot);
const logSoon = soon(() => {
  drawRequests();
  drawLog();
});

const at = (list, i) => list[i] ?? 0;

function plot() {
  const { samples } = state;
  const last = samples.at(-1);
  if (!last) {
    replace(
      parts.plots,
      h("p", { class: "dim" }, "Nothing yet: the plots begin when a server is ready."),
    );
    return;
  }
  const age = Math.min(Math.max(last.time - samples[0].time, 60), SECONDS);
  const x = {
    min: -age,
    max: 0,
    format: (value) => (value ? `${Math.round(-value)} s ago` : "now"),
  };
  const since = (sample) => sample.time - last.time;
  const steps = samples
    .slice(1)
    .map((sample, i) => [samples[i], sample])
    .filter(([, sample]) => since(sample) >= -SECONDS);
  const rate = (from, to) => (to.generated - from.generated) / Math.max(to.time - from.time, 0.1);
  const speeds = steps.map(([from, to]) => [since(to), rate(from, to)]);
  const depths = steps.map(([from, to]) => [since(to), depth(from, to)]);
  const one = (name, color, points) => [{ name, color, points }];
  const acceptance = positions(samples, since);
  const cached = steps.map(([, sample]) => [
    since(sample),
    sample.prompt ? sample.cached / sample.prompt : null,
  ]);
  const memory = last.arrays ? "arrays" : "memory";
  const latest = (points) => points.findLast(([, value]) => value !== null)?.[1];
  const shares = { min: 0, max: 1, format: percent };
  replace(
    parts.plots,
    card("Tokens a second", latest(speeds)?.toFixed(1) ?? "0", one("", 0, speeds), x),
    card(
      "Accepted, by position",
      acceptance.length
        ? acceptance
            .map((each) => (latest(each.points) === undefined ? "–" : percent(latest(each.points))))
            .join(" · ")
        : "–",
      acceptance,
      x,
      shares,
    ),
    card(
      "Chosen depth",
      latest(depths) === undefined ? "–" : latest(depths).toFixed(2),
      one("", 4, depths),
      x,
    ),
    card(
      "Requests",
      String(last.running + last.waiting),
      [
        { name: "running", color: 0, points: steps.map(([, to]) => [since(to), to.running]) },
        { name: "waiting", color: 2, points: steps.map(([, to]) => [since(to), to.waiting]) },
      ],
      x,
    ),
    card(
      "Prompt from the cache",
      last.prompt ? percent(last.cached / last.prompt) : "–",
      one("", 1, cached),
      x,
      shares,
    ),
    card(
      "Memory",
      bytes(last[memory]),
      [
        {
          name: last.peak ? `arrays, at most ${bytes(last.peak)}` : "arrays",
          color: 5,
          points: steps.map(([, to]) => [since(to), to.arrays]),
        },
        { name: "process", color: 3, points: steps.map(([, to]) => [since(to), to.memory]) },
      ],
      x,
      { format: (value) => (value ? bytes(value).replace(".0", "") : "0") },
    ),
  );
}

function card(title, value, series, x, y = {}) {
  const named = series.filter((each) => each.name);
  return h(
    "div",
    { class: "card plot" },
    h("h3", {}, title, h("b", {}, value)),
    chart({ label: title, series, x, y: { format: short, ...y } }),
    named.length > 0 && h("div", { class: "legend" }, legend(named)),
  );
}

function depth(from, to) {
  const calls = to.calls.map((number, i) => number - at(from.calls, i));
  const total = calls.reduce((sum, number) => sum + number, 0);
  return total > 0 ? calls.reduce((sum, number, i) => sum + number * i, 0) / total : null;
}

function positions(samples, since) {
  const number = Math.min(samples.at(-1).drafted.length, MAX_POSITIONS);
  return Array.from({ length: number }, (_, position) => ({
    name: `position ${position + 1}`,
    color: position,
    points: samples
      .map((sample, i) => {
        const before = samples[Math.max(0, i - WINDOW)];
        const drafted = at(sample.drafted, position) - at(before.drafted, position);
        return [
          since(sample),
          drafted > 0
            ? (at(sample.accepted, position) - at(before.accepted, position)) / drafted
            : null,
        ];
      })
      .filter(([time]) => time >= -SECONDS),
  }));
}

function drawRequests() {
  const rows = state.log
    .filter((line) => line.request)
    .slice(-NUM_REQUESTS)
    .reverse();
  const running = state.samples.at(-1)?.running ?? 0;
  if (!rows.length) {
    replace(
      parts.requests,
      h("p", { class: "dim" }, running ? `${running} running, none has ended yet.` : "None yet."),
    );
    return;
  }
  const names = [
    "Ended",
    "Route",
    "Status",
    "Prompt",
    "Cached",
    "Generated",
    "Tokens/s",
    "Drafted",
    "Accepted",
  ];
  replace(
    parts.requests,
    h(
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
            names.map((name, i) => h("th", { class: i > 1 && "n" }, name)),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map(({ time, request: r }) =>
            h(
              "tr",
              {},
              h("td", {}, clock(time)),
              h("td", {}, r.route),
              [
                r.status,
                r.prompt,
                r.cached,
                r.generated,
                r.speed.toFixed(1),
                r.drafted,
                r.drafted ? percent(r.accepted / r.drafted) : "–",
              ].map((value) => h("td", { class: "n" }, String(value))),
            ),
          ),
        ),
      ),
    ),
  );
}

function drawLog() {
  const wanted = parts.filter.value.toLowerCase();
  const lines = state.log
    .filter((line) => line.text.toLowerCase().includes(wanted))
    .slice(-NUM_LINES);
  let view = parts.log.firstChild;
  if (!view) {
    view = h("pre", { id: "log", tabindex: "0", "aria-label": "Log" });
    parts.log.append(view);
  }
  const isAtEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 30;
  const text = lines.map((line) => line.text).join("\n") || "Nothing to show.";
  if (view.textContent !== text) view.textContent = text;
  if (isAtEnd) view.scrollTop = view.scrollHeight;
}
