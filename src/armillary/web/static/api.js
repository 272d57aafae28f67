// Talking to the server: one place that knows the key, the error bodies and how a stream is cut into events.

export class ServerError extends Error {
  constructor(status, message, code, field) {
    super(message);
    this.status = status;
    this.code = code;
    this.field = field;
  }
}

const KEY = "armillary.key";
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not one of our answers: a proxy's page, perhaps */ }
  throw new ServerError(response.status, error.message ?? `the server answered ${response.status}`, error.code, error.param);
}

export const getJson = async (path, signal) => (await call(path, { signal })).json();

/** POSTs JSON; gives the response. */
export const post = (path, body, signal) => call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

export const remove = (path) => call(path, { method: "DELETE" });

/** The objects of a server-sent event stream that ends with `[DONE]`. */
export async function* objects(response) {
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const object = JSON.parse(data);
    if (object.error) throw new ServerError(500, object.error.message, object.error.code, object.error.param);
    yield object;
  }
  throw new ServerError(0, "the connection ended before the answer did");
}

/** The `data:` payloads of a server-sent event stream, however the bytes were cut on the way. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const frames = rest.split(/\r?\n\r?\n/);
      rest = frames.pop();
      for (const frame of frames) {
        const data = frame.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Streams a chat answer; yields OpenAI chunks. Aborting `signal` cancels the request in the engine. */
export async function* chat(body, signal) {
  yield* objects(await post("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal));
}
