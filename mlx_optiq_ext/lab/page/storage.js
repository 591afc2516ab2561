// The browser's store. What it does not take, because it is full or forbidden, lives as
// long as the page.

const rest = new Map();

export function get(key) {
  if (rest.has(key)) return rest.get(key);
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Says whether the text outlives the page.
export function set(key, text) {
  rest.delete(key);
  try {
    localStorage.setItem(key, text);
    return true;
  } catch {
    rest.set(key, text);
    return false;
  }
}

export function remove(key) {
  rest.delete(key);
  try {
    localStorage.removeItem(key);
  } catch {
    // Where the store is forbidden, it has nothing to remove.
  }
}

export function keys() {
  try {
    return [...new Set([...Object.keys(localStorage), ...rest.keys()])];
  } catch {
    return [...rest.keys()];
  }
}

export function getJson(key) {
  try {
    return JSON.parse(get(key));
  } catch {
    return null;
  }
}

// Tells of changes that other tabs make; the key is null if they clear the store.
export function onChange(prefix, listener) {
  addEventListener("storage", ({ key }) => {
    if (key === null || key.startsWith(prefix)) listener(key);
  });
}
