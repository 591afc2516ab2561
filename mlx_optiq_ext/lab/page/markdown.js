// Markdown as elements. Every piece of text knows where in the reply it stands, so that
// it can be tinted by the tokens that it came from; nothing is ever parsed as HTML.
import { copyButton, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(?=\S)/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 12; // of quotes and lists in each other
// What is between two marks is bounded: where the second one is missing, a reply without
// end would otherwise be searched again from each first one.
const INLINE = new RegExp(
  [
    "(?<ticks>`{1,9})(?<code>[^`]|[^`][\\s\\S]{0,999}?[^`])\\k<ticks>(?!`)",
    "\\*\\*(?=\\S)(?<strong>[\\s\\S]{0,999}?\\S)\\*\\*(?!\\*)",
    "(?<![\\w*])\\*(?=[^\\s*])(?<em>[^*]{0,999}?[^\\s*])\\*(?!\\*)",
    "(?<!\\w)_(?=[^\\s_])(?<under>[^_]{0,999}?[^\\s_])_(?!\\w)",
    "~~(?=\\S)(?<del>[\\s\\S]{0,999}?\\S)~~",
    '!?\\[(?<label>[^\\]\\n]{0,999})\\]\\((?<url>[^()\\s]{0,999}(?:\\([^()\\s]{0,999}\\)[^()\\s]{0,999}){0,9})(?:\\s+"[^"]{0,999}")?\\)',
    "(?<bare>https?://[^\\s<>()\\[\\]]*[^\\s<>()\\[\\].,;:!?'\"])",
    "\\\\(?<escaped>[!-/:-@[-`{-~])",
  ].join("|"),
  "g",
);

// Shows a text in an element, which keeps those of its children that would be the same.
// paint: makes nodes of a text and the place of each of its characters.
export function render(element, text, paint) {
  const lines = linesOf(text);
  let number = 0;
  for (const { from, to, make } of sections(lines)) {
    const start = lines[from].at;
    const end = to < lines.length ? lines[to].at : text.length;
    const source = `${start} ${text.slice(start, end)}`;
    const old = element.children[number];
    number += 1;
    if (old?.source === source) continue;
    const made = make(lines.slice(from, to), paint, 0);
    made.source = source;
    if (old) old.replaceWith(made);
    else element.append(made);
  }
  while (element.children.length > number) element.lastChild.remove();
}

function linesOf(text) {
  let at = 0;
  return text.split("\n").map((line) => {
    const found = { text: line, at };
    at += line.length + 1;
    return found;
  });
}

const after = (line, number) => ({ text: line.text.slice(number), at: line.at + number });

function blocks(lines, paint, depth) {
  if (depth > MAX_DEPTH) return [paragraph(lines, paint)];
  return sections(lines).map(({ from, to, make }) => make(lines.slice(from, to), paint, depth));
}

// Where each block begins and ends, and what makes it.
function sections(lines) {
  const found = [];
  let from = 0;
  while (from < lines.length) {
    if (!lines[from].text.trim()) {
      from += 1;
      continue;
    }
    const [make, isPart] = KINDS.find(([, , begins]) => begins(lines, from));
    let to = from + 1;
    while (to < lines.length && isPart(lines, to, from)) to += 1;
    found.push({ from, to, make });
    from = to;
  }
  return found;
}

// What makes a block, whether a line belongs to the one that began at another, and
// whether one begins.
const KINDS = [
  [fenced, isInFence, (lines, i) => FENCE.test(lines[i].text)],
  [heading, () => false, (lines, i) => HEADING.test(lines[i].text)],
  [() => h("hr"), () => false, (lines, i) => RULE.test(lines[i].text)],
  [quote, (lines, i) => QUOTE.test(lines[i].text), (lines, i) => QUOTE.test(lines[i].text)],
  [list, belongs, (lines, i) => ITEM.test(lines[i].text)],
  [table, (lines, i) => lines[i].text.includes("|"), isTable],
  [paragraph, (lines, i) => isParagraph(lines[i].text), () => true],
];

function isInFence(lines, i, start) {
  const [, fence] = FENCE.exec(lines[start].text);
  return i === start + 1 || !isClosing(lines[i - 1].text, fence);
}

function isTable(lines, i) {
  const next = lines[i + 1]?.text ?? "";
  return lines[i].text.includes("|") && next.includes("-") && TABLE.test(next);
}

function fenced(lines, paint) {
  const [, fence, language] = FENCE.exec(lines[0].text);
  const isClosed = lines.length > 1 && isClosing(lines.at(-1).text, fence);
  return code(lines.slice(1, isClosed ? -1 : undefined), language.trim(), paint);
}

function heading(lines, paint) {
  const [mark, marks] = HEADING.exec(lines[0].text);
  const content = after(lines[0], mark.length);
  content.text = content.text.trimEnd();
  const closing = /^(.*\s)?#{1,6}$/.exec(content.text);
  if (closing) content.text = (closing[1] ?? "").trimEnd();
  return h(`h${Math.min(marks.length, 4)}`, {}, inline([content], paint));
}

function quote(lines, paint, depth) {
  const inner = lines.map((line) => after(line, QUOTE.exec(line.text)[0].length));
  return h("blockquote", {}, blocks(inner, paint, depth + 1));
}

function paragraph(lines, paint) {
  return h("p", {}, inline(lines, paint));
}

const isClosing = (text, fence) =>
  text.trim().startsWith(fence) && !text.trim().slice(fence.length).replaceAll(fence[0], "");
const isParagraph = (text) =>
  text.trim() && ![FENCE, HEADING, RULE, QUOTE, ITEM].some((each) => each.test(text));

function belongs(lines, i, start) {
  const { text } = lines[i];
  if (!text.trim())
    return (
      i + 1 < lines.length && (ITEM.test(lines[i + 1].text) || /^\s{2,}\S/.test(lines[i + 1].text))
    );
  const isSame = (line) => /\d/.test(ITEM.exec(line)[2]);
  if (ITEM.test(text)) return /^\s{2,}/.test(text) || isSame(text) === isSame(lines[start].text);
  return /^\s{2,}/.test(text) || (lines[i - 1].text.trim() && isParagraph(text));
}

function list(lines, paint, depth) {
  const [, indent, marker] = ITEM.exec(lines[0].text);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line.text);
    if (match && match[1].length <= indent.length + 1) items.push([after(line, match[0].length)]);
    else
      items
        .at(-1)
        .push(
          after(
            line,
            Math.min(/^\s*/.exec(line.text)[0].length, indent.length + marker.length + 1),
          ),
        );
  }
  const isOrdered = /\d/.test(marker);
  return h(
    isOrdered ? "ol" : "ul",
    isOrdered ? { start: parseInt(marker, 10) } : {},
    items.map((item) => {
      const end = item.findIndex((line, i) => i > 0 && !isParagraph(line.text));
      const head = end < 0 ? item : item.slice(0, end);
      const isText = isParagraph(head[0].text);
      return h(
        "li",
        {},
        isText ? inline(head, paint) : [],
        blocks(isText ? item.slice(head.length) : item, paint, depth + 1),
      );
    }),
  );
}

function table(lines, paint) {
  const cells = (line) => {
    const found = [];
    const pattern = /\|?((?:\\.|[^|\\])*)/gy;
    let match;
    while ((match = pattern.exec(line.text)) && match[0]) {
      const start = match.index + match[0].length - match[1].length;
      const trimmed = match[1].trim();
      found.push({ text: trimmed, at: line.at + start + match[1].indexOf(trimmed) });
    }
    if (!line.text.trimStart().startsWith("|")) return found;
    return found.filter((cell, i) => cell.text || (i > 0 && i < found.length - 1));
  };
  const row = (tag) => (line) =>
    h(
      "tr",
      {},
      cells(line).map((cell) => h(tag, {}, inline([cell], paint))),
    );
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h("thead", {}, row("th")(lines[0])),
      h("tbody", {}, lines.slice(2).map(row("td"))),
    ),
  );
}

function code(lines, language, paint) {
  const { text, places } = join(lines);
  return h(
    "div",
    { class: "code" },
    h(
      "header",
      {},
      language.split(/\s/)[0] || "code",
      copyButton(() => text),
    ),
    h("pre", {}, h("code", {}, paint(text, places))),
  );
}

function join(lines) {
  const places = [];
  lines.forEach((line, i) => {
    if (i > 0) places.push(line.at - 1);
    for (let j = 0; j < line.text.length; j += 1) places.push(line.at + j);
  });
  return { text: lines.map((line) => line.text).join("\n"), places };
}

function inline(lines, paint) {
  const { text, places } = join(lines);
  return spans(text, places, paint);
}

function spans(text, places, paint) {
  const made = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > done)
      made.push(...paint(text.slice(done, match.index), places.slice(done, match.index)));
    made.push(...span(match, places, paint));
    done = match.index + match[0].length;
  }
  if (done < text.length) made.push(...paint(text.slice(done), places.slice(done)));
  return made;
}

function span(match, places, paint) {
  const { code: snippet, strong, em, under, del, label, url, bare, escaped } = match.groups;
  const inner = (text, offset) => {
    const start = match.index + offset;
    return [text, places.slice(start, start + text.length)];
  };
  if (snippet !== undefined)
    return [h("code", {}, paint(...inner(snippet, match.groups.ticks.length)))];
  if (strong !== undefined) return [h("strong", {}, spans(...inner(strong, 2), paint))];
  if (em !== undefined) return [h("em", {}, spans(...inner(em, 1), paint))];
  if (under !== undefined) return [h("em", {}, spans(...inner(under, 1), paint))];
  if (del !== undefined) return [h("del", {}, spans(...inner(del, 2), paint))];
  if (escaped !== undefined) return paint(...inner(escaped, 1));
  if (bare !== undefined) return [link(bare, paint(...inner(bare, 0)))];
  return [link(url, paint(...inner(label, match[0].indexOf("[") + 1)))];
}

function link(url, children) {
  if (!/^(https?|mailto):/i.test(url)) return h("span", {}, children);
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
