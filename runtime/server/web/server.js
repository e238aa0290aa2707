// The server: requests with its key, what it refuses, and streamed answers as events.

const KEY = "edgeprune-key";
const $ = (id) => document.getElementById(id);

export class Refusal extends Error {
  // `param`: the field of the request that is wrong, if the server names one.
  constructor(message, param) {
    super(message);
    this.param = param ?? null;
  }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

export async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (response.status === 401) {
    await askForKey(sessionStorage.getItem(KEY) !== null);
    return call(path, options);
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Refusal(told.error?.message ?? `The server answered with status ${response.status}.`, told.error?.param);
  }
  return response;
}

let asking = null; // one dialog for all who wait for the key

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    $("key-text").textContent = wrong ? "That key is not accepted here." : "It is kept until you close this tab.";
    $("key").value = "";
    $("key-dialog").addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    $("key-dialog").showModal();
  });
  return asking;
}

export async function* ask(body, signal) {
  const sent = { method: "POST", body: JSON.stringify(body), signal, headers: { "content-type": "application/json" } };
  const response = await call("/v1/chat/completions", sent);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) {
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) {
          throw new Refusal(chunk.error.message, chunk.error.param);
        }
        yield chunk;
      }
    }
  }
}
