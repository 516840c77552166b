// Requests to the server. The token comes from the part of the address after #, which no browser
// sends anywhere, and is kept for this tab only.

const KEY = "nnmosaic-token";

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(KEY) ?? "";
}

const token = takeToken();
window.addEventListener("hashchange", () => {
  takeToken(); // another address of the same server was pasted into this tab
  location.reload();
});

/** What the server refused; `reason` is a word for code, the message is for people. */
export class ServerError extends Error {
  constructor(message, reason) {
    super(message);
    this.reason = reason;
  }
}

async function request(path, options = {}) {
  const headers = { Authorization: `Bearer ${token}`, ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new ServerError(
      "The server does not answer. Is nnmosaic serve still running in its terminal window? " +
        "As long as it is, nothing is lost: try again.",
      "offline",
    );
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new ServerError(answer.error ?? `The server answered ${response.status}.`, answer.reason);
}

export async function get(path) {
  return (await request(path)).json();
}

export async function getBytes(path) {
  return (await request(path)).arrayBuffer();
}

export async function post(path, message) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(message) })).json();
}

/** Return the bytes of a text in base64 of zlib. */
export async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
