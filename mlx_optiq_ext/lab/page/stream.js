// One reply of the server, as it comes.
import { problemIn } from "./store.js";

// Which characters came from which drafter: runs of [source, number of characters].
export class Runs {
  constructor(runs = []) {
    this.runs = runs;
  }

  add(source, number) {
    const last = this.runs.at(-1);
    if (!number) return;
    if (last && last[0] === source) last[1] += number;
    else this.runs.push([source, number]);
  }
}

// The tokens that were announced and whose text has not come yet.
class Pending {
  text = "";
  sources = [];

  push(tokens) {
    for (const { text, source } of tokens) {
      this.text += text;
      for (let i = 0; i < text.length; i += 1) this.sources.push(source);
    }
  }

  // The text of tokens may have markers around it, of thinking or of a call.
  take(text, runs) {
    const start = this.text.indexOf(text);
    if (start < 0) {
      runs.add(null, text.length);
      return;
    }
    for (const source of this.sources.slice(start, start + text.length)) runs.add(source, 1);
    this.text = this.text.slice(start + text.length);
    this.sources = this.sources.slice(start + text.length);
  }
}

// Asks, and keeps what has come so far in `reply`; calls `changed` whenever it changes.
export async function stream(request, reply, changed, signal) {
  Object.assign(reply, {
    content: "",
    reasoning: "",
    tool_calls: [],
    sources: [],
    thoughts: [],
    stats: null,
    error: null,
    state: "streaming",
  });
  const began = performance.now();
  const times = { first: null, last: null };
  const pending = new Pending();
  try {
    const answer = await fetch("/api/chat", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal,
    });
    if (!answer.ok) throw new Error(problemIn(await answer.text()));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      take(event, reply, pending, times);
      reply.stats = stats(reply, times, began);
      changed();
    }
    reply.state = "done";
  } catch (error) {
    // What the network raises is no error of the server: the page or the Lab is left.
    const isCut = error instanceof TypeError && reply.content + reply.reasoning !== "";
    reply.state = signal.aborted ? "stopped" : isCut ? "cut" : "error";
    if (reply.state === "error") reply.error = error.message;
  }
  reply.stats = stats(reply, times, began);
  changed();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part
        .split("\n")
        .filter((each) => each.startsWith("data:"))
        .map((each) => each.slice(5).trim())
        .join("");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(event, reply, pending, times) {
  if (event.token_sources) {
    pending.push(event.token_sources);
    reply.hasSources = true;
  }
  const delta = event.choices?.[0]?.delta ?? {};
  const thought = delta.reasoning ?? delta.reasoning_content;
  if (thought) {
    reply.reasoning += thought;
    pending.take(thought, new Runs(reply.thoughts));
  }
  if (delta.content) {
    reply.content += delta.content;
    pending.take(delta.content, new Runs(reply.sources));
  }
  for (const call of delta.tool_calls ?? []) addCall(reply.tool_calls, call);
  if (thought || delta.content || delta.tool_calls?.length) {
    times.last = performance.now();
    times.first ??= times.last;
    times.chunks = (times.chunks ?? 0) + 1;
  }
  if (event.choices?.[0]?.finish_reason) reply.finish = event.choices[0].finish_reason;
  if (event.usage) times.usage = event.usage;
  if (event.timings) times.timings = event.timings;
}

function addCall(calls, part) {
  const index = part.index ?? calls.length;
  const call = (calls[index] ??= {
    id: part.id ?? `call_${index}`,
    type: "function",
    function: { name: "", arguments: "" },
  });
  if (part.id) call.id = part.id;
  call.function.name += part.function?.name ?? "";
  const more = part.function?.arguments ?? "";
  call.function.arguments += typeof more === "string" ? more : JSON.stringify(more);
}

function stats(reply, times, began) {
  const tokens = times.usage?.completion_tokens ?? times.chunks ?? 0;
  const seconds = (times.last - times.first) / 1000;
  const timings = times.timings ?? {};
  const drafted = timings.draft_n_per_position ?? [];
  return {
    tokens,
    speed: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
    // Pieces may reach a busy browser together, which cannot make this too high.
    total: tokens && times.last > began ? tokens / ((times.last - began) / 1000) : null,
    first: times.first === null ? null : (times.first - began) / 1000,
    drafted: timings.draft_n ?? null,
    accepted: timings.draft_n_accepted ?? null,
    perRound: timings.draft_rounds ? 1 + timings.draft_n_accepted / timings.draft_rounds : null,
    positions: drafted.map((number, i) =>
      number ? timings.draft_n_accepted_per_position[i] / number : null,
    ),
  };
}
