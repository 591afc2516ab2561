// Conversations, each kept in the browser under a key of its own so that two tabs do not
// overwrite each other's.

const PREFIX = "lab.chat.";

export function all() {
  const found = [];
  for (let i = 0; i < localStorage.length; i += 1) {
    const key = localStorage.key(i);
    if (key.startsWith(PREFIX)) found.push(parse(localStorage.getItem(key)));
  }
  return found.filter(Boolean).sort((a, b) => b.at - a.at);
}

function parse(text) {
  try {
    const found = JSON.parse(text);
    // A reply that nobody reads any more was cut off by closing or reloading its page.
    return Array.isArray(found?.messages) ? found : null;
  } catch {
    return null;
  }
}

export const load = (id) => parse(localStorage.getItem(PREFIX + id));

export function create() {
  return { id: crypto.randomUUID(), title: "", at: Date.now(), system: "", thinking: "", tools: "", sampling: {}, messages: [] };
}

export function save(conversation) {
  if (!conversation.messages.length) return true;
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false; // The browser's store is full.
  }
}

export const remove = (id) => localStorage.removeItem(PREFIX + id);

export function onChange(listener) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) listener(event.key?.slice(PREFIX.length));
  });
}

// What the server is sent of a conversation.
export function messagesFor(conversation, messages = conversation.messages) {
  const sent = messages.filter((message) => message.state !== "error").map(({ role, content, tool_calls, tool_call_id }) => ({
    role, content, ...(tool_calls?.length && { tool_calls }), ...(tool_call_id && { tool_call_id }),
  }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...sent] : sent;
}
