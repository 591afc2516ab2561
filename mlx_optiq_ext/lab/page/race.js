// The same request without and with speculation, side by side.
import { h, replace } from "./dom.js";
import { drawBody, statsLine } from "./message.js";
import { stream } from "./stream.js";

const MAX_TOKENS = 256;
const SAMPLED =
  "They were sampled: both come from the same distribution, but not from the same random " +
  "numbers. At temperature 0, or with a seed, they can be compared.";
const ROUNDED =
  "Where kernels for one row and for several round differently, nearly equal tokens may be " +
  "swapped: mlx-optiq-ext status says whether they do here.";

export const newRace = () => ({ plain: { state: "waiting" }, speculative: { state: "waiting" } });

export async function run(message, body, sampling, changed, signal) {
  const { plain, speculative } = message.race;
  // Greedy unless the conversation says otherwise, so that the texts can be compared.
  const temperature = body.temperature ?? 0;
  const shared = { ...body, temperature, max_tokens: sampling.max_tokens ?? MAX_TOKENS };
  message.isSampled = temperature > 0 && body.seed === undefined;
  // What is computed once only, of the prompt and by the machine, is not measured.
  await stream({ ...shared, max_tokens: 4 }, {}, () => {}, signal);
  await stream({ ...shared, num_draft_tokens: 0 }, plain, changed, signal);
  if (plain.state === "done") await stream(shared, speculative, changed, signal);
  const last = speculative.state === "waiting" ? plain : speculative;
  Object.assign(message, last, { race: message.race });
}

export function drawRace(message, page) {
  const { plain, speculative } = message.race;
  const isLive = (lane) => lane.state === "streaming" && page.isLive(message);
  const around = { ...page, isLive };
  const lanes = [drawLane("Plain", plain, around), drawLane("Speculative", speculative, around)];
  const end = h("div", { class: "verdict" });
  const element = h("div", { class: "race" }, lanes, end);
  element.update = () => {
    for (const lane of lanes) lane.update();
    replace(end, verdict(message));
  };
  element.update();
  return element;
}

function drawLane(title, found, page) {
  const speed = h("div", { class: "speed" });
  const body = h("div", { class: "body" });
  const stats = h("div", { class: "stats" });
  const element = h(
    "div",
    { class: "card", "data-lane": title.toLowerCase() },
    h("h3", {}, title),
    speed,
    body,
    stats,
  );
  let text = null;
  element.update = () => {
    const total = found.stats?.total;
    replace(speed, total ? total.toFixed(1) : "–", h("small", {}, " tok/s, request to last token"));
    if (found.state === "waiting") replace(body, h("p", { class: "dim" }, "waits for its turn"));
    else if (text === null) replace(body, (text = drawBody(found, page)));
    text?.update();
    const isOver = found.stats && found.state !== "streaming";
    replace(stats, isOver ? statsLine({ ...found.stats, speed: null }) : []);
  };
  return element;
}

function verdict({ race: { plain, speculative }, isSampled }) {
  if (plain.state !== "done" || speculative.state !== "done") return null;
  const text = (lane) => `${lane.reasoning}\n${lane.content}\n${JSON.stringify(lane.tool_calls)}`;
  const [one, other] = [text(plain), text(speculative)];
  const ratio = speculative.stats.total / plain.stats.total;
  const speed = Number.isFinite(ratio) ? `${ratio.toFixed(2)}x as fast. ` : "";
  if (one === other) return h("p", { id: "verdict-race" }, `${speed}The texts are identical.`);
  let at = 0;
  while (one[at] === other[at]) at += 1;
  return [
    h("p", { id: "verdict-race" }, `${speed}The texts differ from character ${at} on.`),
    h("small", {}, isSampled ? SAMPLED : ROUNDED),
  ];
}
