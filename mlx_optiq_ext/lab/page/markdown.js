// Markdown as elements. Every piece of text knows where in the reply it stands, so that
// it can be tinted by the tokens that it came from; nothing is ever parsed as HTML.
import { copyButton, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp([
  "(?<ticks>`+)(?<code>[^`]|[^`][\\s\\S]*?[^`])\\k<ticks>(?!`)",
  "\\*\\*(?=\\S)(?<strong>[\\s\\S]*?\\S)\\*\\*(?!\\*)",
  "(?<![\\w*])\\*(?=[^\\s*])(?<em>[^*]*?[^\\s*])\\*(?!\\*)",
  "(?<!\\w)_(?=[^\\s_])(?<under>[^_]*?[^\\s_])_(?!\\w)",
  "~~(?=\\S)(?<del>[\\s\\S]*?\\S)~~",
  "!?\\[(?<label>[^\\]\\n]*)\\]\\((?<url>[^()\\s]*(?:\\([^()\\s]*\\)[^()\\s]*)*)(?:\\s+\"[^\"]*\")?\\)",
  "(?<bare>https?://[^\\s<>()\\[\\]]*[^\\s<>()\\[\\].,;:!?'\"])",
  "\\\\(?<escaped>[!-/:-@[-`{-~])",
].join("|"), "g");

// paint: makes nodes of a text and the place of each of its characters.
export function render(text, paint) {
  let at = 0;
  const lines = text.split("\n").map((line) => {
    const found = { text: line, at };
    at += line.length + 1;
    return found;
  });
  return h("div", { class: "md" }, blocks(lines, paint));
}

const after = (line, number) => ({ text: line.text.slice(number), at: line.at + number });

function blocks(lines, paint) {
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const { text } = lines[i];
    let match;
    let end = i + 1;
    if (!text.trim()) {
      i += 1;
      continue;
    } else if ((match = FENCE.exec(text))) {
      while (end < lines.length && !isClosing(lines[end].text, match[1])) end += 1;
      made.push(code(lines.slice(i + 1, end), match[2].trim(), paint));
      end += 1;
    } else if ((match = HEADING.exec(text))) {
      const content = after(lines[i], text.indexOf(match[2], match[1].length));
      made.push(h(`h${Math.min(match[1].length, 4)}`, {}, inline([{ text: match[2], at: content.at }], paint)));
    } else if (RULE.test(text)) {
      made.push(h("hr"));
    } else if (QUOTE.test(text)) {
      while (end < lines.length && QUOTE.test(lines[end].text)) end += 1;
      made.push(h("blockquote", {}, blocks(lines.slice(i, end).map((line) => after(line, QUOTE.exec(line.text)[0].length)), paint)));
    } else if (ITEM.test(text)) {
      while (end < lines.length && belongs(lines, end, i)) end += 1;
      made.push(list(lines.slice(i, end), paint));
    } else if (text.includes("|") && end < lines.length && TABLE.test(lines[end].text) && lines[end].text.includes("-")) {
      while (end < lines.length && lines[end].text.includes("|")) end += 1;
      made.push(table(lines.slice(i, end), paint));
    } else {
      while (end < lines.length && isParagraph(lines[end].text)) end += 1;
      made.push(h("p", {}, inline(lines.slice(i, end), paint)));
    }
    i = end;
  }
  return made;
}

const isClosing = (text, fence) => text.trim().startsWith(fence) && !text.trim().slice(fence.length).replaceAll(fence[0], "");
const isParagraph = (text) => text.trim() && ![FENCE, HEADING, RULE, QUOTE, ITEM].some((each) => each.test(text));

function belongs(lines, i, start) {
  const { text } = lines[i];
  if (!text.trim()) return i + 1 < lines.length && (ITEM.test(lines[i + 1].text) || /^\s{2,}\S/.test(lines[i + 1].text));
  const isSame = (line) => /\d/.test(ITEM.exec(line)[2]);
  if (ITEM.test(text)) return /^\s{2,}/.test(text) || isSame(text) === isSame(lines[start].text);
  return /^\s{2,}/.test(text) || (lines[i - 1].text.trim() && isParagraph(text));
}

function list(lines, paint) {
  const [, indent, marker] = ITEM.exec(lines[0].text);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line.text);
    if (match && match[1].length <= indent.length + 1) items.push([after(line, match[0].length)]);
    else items.at(-1).push(after(line, Math.min(/^\s*/.exec(line.text)[0].length, indent.length + marker.length + 1)));
  }
  const isOrdered = /\d/.test(marker);
  return h(isOrdered ? "ol" : "ul", isOrdered ? { start: parseInt(marker, 10) } : {}, items.map((item) => {
    const end = item.findIndex((line, i) => i > 0 && !isParagraph(line.text));
    const head = end < 0 ? item : item.slice(0, end);
    const isText = isParagraph(head[0].text);
    return h("li", {}, isText ? inline(head, paint) : [], blocks(isText ? item.slice(head.length) : item, paint));
  }));
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
  const row = (tag) => (line) => h("tr", {}, cells(line).map((cell) => h(tag, {}, inline([cell], paint))));
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, row("th")(lines[0])), h("tbody", {}, lines.slice(2).map(row("td")))));
}

function code(lines, language, paint) {
  const { text, places } = join(lines);
  return h("div", { class: "code" },
    h("header", {}, language.split(/\s/)[0] || "code", copyButton(() => text)),
    h("pre", {}, h("code", {}, paint(text, places))));
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
    if (match.index > done) made.push(...paint(text.slice(done, match.index), places.slice(done, match.index)));
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
  if (snippet !== undefined) return [h("code", {}, paint(...inner(snippet, match.groups.ticks.length)))];
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
