// The playground: asks this server and nobody else. Without a document (in tests) only the functions are defined.

const KEY_NAME = "zif-api-key";
const POLL_MS = 2000;
const MAX_EVENT_CHARACTERS = 4 * 1024 * 1024;

// Server-sent events from text that arrives in pieces, cut anywhere (HTML Standard, 9.2.6).
export class EventReader {
  #rest = "";
  #data = [];
  #name = "";

  push(text) {
    const events = [];
    this.#rest += text;
    if (this.#rest.length > MAX_EVENT_CHARACTERS) {
      throw new Error("the server sent an event that is too long");
    }
    // A carriage return at the end may be the first half of a line break.
    const lines = this.#rest.replace(/\r\n|\r(?!$)/g, "\n").split("\n");
    this.#rest = lines.pop();
    for (const line of lines) {
      const event = this.#read(line);
      if (event) events.push(event);
    }
    return events;
  }

  #read(line) {
    if (line === "") {
      const event = this.#data.length ? { name: this.#name || "message", data: this.#data.join("\n") } : null;
      this.#data = [];
      this.#name = "";
      return event;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "event") this.#name = value;
    return null;
  }
}

// What one event of a stream adds: text, reasoning, tool calls, and counts where it has them.
export function pieceOf(data) {
  const value = JSON.parse(data);
  if (value.error) throw new Error(value.error.message || "the server failed");
  const choice = (value.choices || [])[0] || {};
  const delta = choice.delta || {};
  const calls = (delta.tool_calls || []).map((call) => call.function || {});
  return {
    text: delta.content || choice.text || "",
    reasoning: delta.reasoning_content || delta.reasoning || "",
    calls: calls.map((call) => (call.name ? `\n${call.name} ` : "") + (call.arguments || "")).join(""),
    finish: choice.finish_reason || null,
    numTokens: value.usage ? value.usage.completion_tokens : null,
  };
}

// The request of a mode. Empty options are left out: then the model's own defaults count.
export function requestOf(mode, model, messages, options) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (options[name] !== "" && options[name] !== undefined) body[name] = Number(options[name]);
  }
  if (mode === "completion") {
    return { path: "/v1/completions", body: { ...body, prompt: messages[messages.length - 1].content } };
  }
  const system = options.system ? [{ role: "system", content: options.system }] : [];
  return { path: "/v1/chat/completions", body: { ...body, messages: [...system, ...messages] } };
}

// Tokens per second between the first token and the last; null before there are two.
export function rateOf(numTokens, firstMs, lastMs) {
  return numTokens > 1 && lastMs > firstMs ? ((numTokens - 1) * 1000) / (lastMs - firstMs) : null;
}

export async function problemOf(response) {
  try {
    const value = await response.json();
    return value.error.message || `the server answered ${response.status}`;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* eventsOf(body) {
  const reader = new EventReader();
  const decoder = new TextDecoder();
  const source = body.getReader();
  for (;;) {
    const { done, value } = await source.read();
    yield* reader.push(decoder.decode(value, { stream: !done }));
    if (done) return;
  }
}

class Page {
  #messages = [];
  #model = "";
  #running = null;

  constructor() {
    this.composer = find("composer");
    find("key").value = sessionStorage.getItem(KEY_NAME) || "";
    this.composer.addEventListener("submit", (event) => this.#submit(event));
    find("key-form").addEventListener("submit", (event) => this.#keepKey(event));
    find("key").addEventListener("change", (event) => this.#keepKey(event));
    find("stop").addEventListener("click", () => this.#stop());
    find("clear").addEventListener("click", () => this.#clear());
    find("prompt").addEventListener("keydown", (event) => this.#onKey(event));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#stop());
    for (const input of document.getElementsByName("mode")) {
      input.addEventListener("change", () => this.#clear());
    }
    this.#connect();
    this.#poll();
  }

  get #mode() {
    return document.querySelector('input[name="mode"]:checked').value;
  }

  #headers() {
    const key = find("key").value.trim();
    return key ? { authorization: `Bearer ${key}` } : {};
  }

  #keepKey(event) {
    event.preventDefault();
    const key = find("key").value.trim();
    if (key) sessionStorage.setItem(KEY_NAME, key);
    else sessionStorage.removeItem(KEY_NAME);
    this.#connect();
  }

  async #connect() {
    try {
      const response = await fetch("/v1/models", { headers: this.#headers() });
      if (!response.ok) throw new Error(await problemOf(response));
      this.#model = (await response.json()).data[0].id;
      show("model", this.#model);
      this.#tell("");
    } catch (error) {
      show("model", "not connected");
      this.#tell(error.message);
    }
  }

  async #poll() {
    try {
      if (!document.hidden) await this.#readLoad();
    } catch {
      for (const id of ["running", "waiting", "usage"]) show(id, "–");
    }
    setTimeout(() => this.#poll(), POLL_MS);
  }

  async #readLoad() {
    const response = await fetch("/load", { headers: this.#headers() });
    if (!response.ok) throw new Error("no numbers");
    const load = await response.json();
    show("running", load.num_requests_running ?? "–");
    show("waiting", load.num_requests_waiting ?? "–");
    show("usage", load.kv_cache_usage === null ? "–" : `${(load.kv_cache_usage * 100).toFixed(1)} %`);
    find("usage-meter").value = load.kv_cache_usage ?? 0;
    if (!this.#model) this.#connect();
  }

  #onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.composer.requestSubmit();
    }
  }

  async #submit(event) {
    event.preventDefault();
    const prompt = find("prompt");
    if (this.#running || !prompt.value) return;
    if (this.#mode === "completion") this.#messages = [];
    this.#messages.push({ role: "user", content: prompt.value });
    this.#add("user", prompt.value);
    prompt.value = "";
    this.#tell("");
    this.#running = new AbortController();
    this.#setBusy(true);
    try {
      await this.#answer();
    } catch (error) {
      if (error.name !== "AbortError") this.#tell(error.message);
    } finally {
      this.#running = null;
      this.#setBusy(false);
      find("prompt").focus();
    }
  }

  async #answer() {
    const { path, body } = requestOf(this.#mode, this.#model, this.#messages, options());
    const askedMs = performance.now();
    const response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json", ...this.#headers() },
      body: JSON.stringify(body),
      signal: this.#running.signal,
    });
    if (!response.ok) {
      this.#messages.pop();
      throw new Error(await problemOf(response));
    }
    const message = this.#add("assistant", "");
    try {
      await this.#read(response.body, message, askedMs);
    } finally {
      this.#messages.push({ role: "assistant", content: message.text.textContent });
    }
  }

  async #read(body, message, askedMs) {
    let numTokens = 0;
    let firstMs = 0;
    for await (const event of eventsOf(body)) {
      if (event.data === "[DONE]") break;
      const piece = pieceOf(event.data);
      const nowMs = performance.now();
      if (piece.text || piece.reasoning || piece.calls) {
        numTokens += 1;
        firstMs ||= nowMs;
        append(message, piece);
      }
      // The exact count comes at the end; until then a piece counts as a token.
      numTokens = piece.numTokens ?? numTokens;
      if (piece.finish && piece.finish !== "stop") message.note.textContent = `ended by ${piece.finish}`;
      this.#count(numTokens, askedMs, firstMs, nowMs);
    }
  }

  #count(numTokens, askedMs, firstMs, nowMs) {
    const rate = rateOf(numTokens, firstMs, nowMs);
    show("tokens", numTokens);
    show("rate", rate === null ? "–" : rate.toFixed(1));
    show("first", firstMs ? `${Math.round(firstMs - askedMs)} ms` : "–");
  }

  #add(role, text) {
    const box = document.createElement("article");
    box.className = `message ${role}`;
    const parts = { reasoning: make("p", "reasoning"), text: make("p", "text"), note: make("p", "note") };
    box.setAttribute("aria-label", role);
    box.append(parts.reasoning, parts.text, parts.note);
    parts.text.textContent = text;
    find("log").append(box);
    box.scrollIntoView({ block: "end" });
    return { box, ...parts };
  }

  #setBusy(busy) {
    find("send").disabled = busy;
    find("stop").disabled = !busy;
    find("log").setAttribute("aria-busy", String(busy));
  }

  #stop() {
    if (this.#running) this.#running.abort();
  }

  #clear() {
    this.#stop();
    this.#messages = [];
    find("log").replaceChildren();
    document.body.dataset.mode = this.#mode;
    this.#tell("");
    find("prompt").focus();
  }

  #tell(problem) {
    const place = find("problem");
    place.textContent = problem;
    place.hidden = !problem;
  }
}

function append(message, piece) {
  const log = find("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  message.reasoning.append(piece.reasoning);
  message.text.append(piece.text + piece.calls);
  if (follows) log.scrollTop = log.scrollHeight;
}

function options() {
  const ids = ["system", "temperature", "top_p", "max_tokens", "seed"];
  return Object.fromEntries(ids.map((id) => [id, find(id).value]));
}

function find(id) {
  return document.getElementById(id);
}

function show(id, value) {
  find(id).textContent = value;
}

function make(tag, name) {
  const element = document.createElement(tag);
  element.className = name;
  return element;
}

if (typeof document !== "undefined") new Page();
