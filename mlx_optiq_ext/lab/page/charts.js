// Small plots, drawn as SVG; colours come from the style sheet.
import { s } from "./dom.js";

const LEFT = 48;
const RIGHT = 12;
const BOTTOM = 24;

// series: [{ name, color: 0 to 5, points: [[x, y or null], ...] }]
export function chart({
  title,
  series,
  label,
  x = {},
  y = {},
  width = 360,
  height = 170,
  dots = false,
}) {
  const top = title ? 30 : 10;
  const all = series.flatMap((each) => each.points).filter(([, value]) => value !== null);
  const xs = all.map(([at]) => at);
  const low = { x: x.min ?? Math.min(...xs, Infinity), y: y.min ?? 0 };
  const high = {
    x: x.max ?? Math.max(...xs, -Infinity),
    y: y.max ?? nice(Math.max(...all.map(([, value]) => value), 0)),
  };
  if (!Number.isFinite(low.x)) Object.assign(low, { x: 0 });
  if (!Number.isFinite(high.x) || high.x <= low.x) high.x = low.x + 1;
  const across = (at) => LEFT + ((at - low.x) / (high.x - low.x)) * (width - LEFT - RIGHT);
  const up = (value) =>
    height -
    BOTTOM -
    ((Math.min(value, high.y) - low.y) / (high.y - low.y)) * (height - BOTTOM - top);
  const root = s(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": label ?? title,
    },
    s("rect", { class: "back", width, height }),
    title && s("text", { class: "title", x: 8, y: 18 }, title),
  );
  for (const value of [low.y, (low.y + high.y) / 2, high.y])
    root.append(
      s("path", { class: "axis", d: `M${LEFT} ${up(value)}H${width - RIGHT}` }),
      s(
        "text",
        { x: LEFT - 6, y: up(value) + 4, "text-anchor": "end" },
        (y.format ?? short)(value),
      ),
    );
  for (const at of x.ticks ?? [low.x, high.x])
    root.append(
      s(
        "text",
        {
          x: across(at),
          y: height - 6,
          "text-anchor": dots ? "middle" : at === high.x ? "end" : "start",
        },
        (x.format ?? short)(at),
      ),
    );
  for (const { points, color } of series) {
    root.append(s("path", { class: `series c${color}`, d: line(points, across, up) }));
    if (dots)
      for (const [at, value] of points)
        if (value !== null)
          root.append(
            s("circle", { class: `point c${color}`, cx: across(at), cy: up(value), r: 3.5 }),
          );
  }
  return root;
}

function line(points, across, up) {
  let isDown = false;
  return points
    .map(([at, value]) => {
      if (value === null) {
        isDown = false;
        return "";
      }
      const part = `${isDown ? "L" : "M"}${across(at).toFixed(1)} ${up(value).toFixed(1)}`;
      isDown = true;
      return part;
    })
    .join("");
}

function nice(value) {
  if (value <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((each) => each * size).find((each) => each >= value) ?? 10 * size;
}

export const short = (value) =>
  Math.abs(value) >= 1000
    ? `${+(value / 1000).toFixed(1)}k`
    : String(+value.toFixed(value < 10 ? 2 : 0));

export function legend(series) {
  return series.map(({ name, color }) => {
    const mark = s(
      "svg",
      { viewBox: "0 0 12 12", "aria-hidden": "true" },
      s("path", { class: `c${color}`, d: "M0 6H12" }),
    );
    const item = document.createElement("span");
    item.append(mark, ` ${name}`);
    return item;
  });
}

const STYLES = [
  "fill",
  "stroke",
  "stroke-width",
  "stroke-linecap",
  "stroke-linejoin",
  "font-size",
  "font-family",
  "font-weight",
];

// The charts below each other as one picture.
export async function picture(charts, names) {
  const sizes = charts.map((each) => each.viewBox.baseVal);
  const width = Math.max(...sizes.map((size) => size.width));
  const lineHeight = 20;
  const height = sizes.reduce((sum, size) => sum + size.height, 0) + names.length * lineHeight + 12;
  const canvas = Object.assign(document.createElement("canvas"), {
    width: width * 2,
    height: height * 2,
  });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = resolved(charts[0].querySelector(".back"), "fill");
  context.fillRect(0, 0, width, height);
  let top = 0;
  for (const [i, each] of charts.entries()) {
    context.drawImage(await image(each), 0, top, sizes[i].width, sizes[i].height);
    top += sizes[i].height;
  }
  context.font = "12px system-ui, sans-serif";
  for (const { name, mark } of names) {
    top += lineHeight;
    context.fillStyle = resolved(mark, "stroke");
    context.fillText(`● ${name}`, 10, top);
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const resolved = (element, name) => getComputedStyle(element).getPropertyValue(name);

async function image(chartElement) {
  const clone = chartElement.cloneNode(true);
  const originals = chartElement.querySelectorAll("*");
  clone.querySelectorAll("*").forEach((element, i) => {
    for (const name of STYLES) element.setAttribute(name, resolved(originals[i], name));
  });
  const { width, height } = chartElement.viewBox.baseVal;
  clone.setAttribute("width", width * 2);
  clone.setAttribute("height", height * 2);
  clone.setAttribute("fill", "none");
  const found = new Image();
  found.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(clone))}`;
  await found.decode();
  return found;
}
