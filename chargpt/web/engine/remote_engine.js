// The page's side of the engine: a model that computes on the server that the page came from.

const POLL_MS = 3000; // between two looks at a run that may be training
const UNCHANGED = 304;
const LOADING = 202; // the models are not loaded yet
const LOADING_MS = 500;
const KEY = "chargpt-key"; // of the session storage: gone when the tab is closed

/** The server wants an API key, or another one. */
export class KeyError extends Error {}

/** Has the interface of `LocalEngine`. */
export class RemoteEngine {
  /**
   * Asks the server about a model.
   * @param {string|null} model its name; null: the first one of the server
   * @returns {Promise<RemoteEngine>}
   */
  static async open(model) {
    const engine = new RemoteEngine(model);
    while (!(await engine.refresh())) await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
    return engine;
  }

  /** Use `open`. */
  constructor(model) {
    this.model = model;
    /** The JSON of the page. */
    this.facts = null;
    this.state = null; // ETag of the facts
    this.stopWriting = () => {};
  }

  /** Where the model computes, as a sentence for the page. */
  get where() {
    return "It runs on the server of this page, which receives what you write.";
  }

  /** See `LocalEngine.write`. */
  async write({ ids, from, n, settings, signal, onRecords }) {
    if (signal?.aborted) return "stopped";
    this.stopWriting();
    const stopper = new AbortController();
    const stop = () => stopper.abort();
    this.stopWriting = stop;
    signal?.addEventListener("abort", stop);
    try {
      const task = { model: this.model, ids, from, n, settings };
      const answer = await this.ask("write", task, stopper.signal);
      for await (const lines of linesOf(answer.body)) {
        if (stopper.signal.aborted) return "stopped";
        const messages = lines.map((line) => JSON.parse(line));
        const records = messages.filter((message) => "index" in message);
        if (records.length) onRecords(records);
        const end = messages.find((message) => !("index" in message));
        if (end?.error) throw new Error(end.error);
        if (end) return end.reason;
      }
      throw new Error("the server ended the text early: is it stopping? Press Write to try again");
    } catch (error) {
      if (stopper.signal.aborted) return "stopped";
      throw error;
    } finally {
      signal?.removeEventListener("abort", stop);
    }
  }

  /** See `LocalEngine.inspect`. */
  async inspect({ ids, index, first }) {
    const answer = await this.ask("inspect", {
      model: this.model,
      ids: ids.slice(first, index),
      first,
    });
    return answer.json();
  }

  /** There is nothing to compare: the server computes with the model itself. */
  async selfTest() {
    return null;
  }

  /**
   * Reads the facts again.
   * @returns {Promise<boolean>} whether they have changed
   */
  async refresh() {
    const query = this.model === null ? "" : `?model=${encodeURIComponent(this.model)}`;
    const headers = this.state === null ? {} : { "If-None-Match": this.state };
    const answer = await send(`page/facts${query}`, { headers }, [UNCHANGED]);
    if (answer.status === UNCHANGED || answer.status === LOADING) return false;
    this.facts = await answer.json();
    this.model = this.facts.name;
    this.state = answer.headers.get("ETag");
    return true;
  }

  /**
   * Looks every few seconds whether the facts have changed, as they do while a run is training.
   * @param {() => void} onChange
   * @param {(error: Error|null) => void} onTrouble null: it is over
   */
  async watch(onChange, onTrouble) {
    for (let failed = false; ;) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      if (document.hidden) continue;
      try {
        const changed = await this.refresh();
        if (failed) onTrouble(null);
        failed = false;
        if (changed) onChange();
      } catch (error) {
        failed = true;
        onTrouble(error);
      }
    }
  }

  ask(what, details, signal) {
    return send(`page/${what}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(details),
      signal,
    });
  }
}

/** Keeps the API key until the tab is closed. */
export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Sends a request with the API key; a status that is not expected is an error for a person to read. */
async function send(path, { headers, ...options }, expected = []) {
  const key = sessionStorage.getItem(KEY);
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Error("the server does not answer: is it running? Press Write to try again", { cause: error });
  }
  if (answer.ok || expected.includes(answer.status)) return answer;
  if (answer.status === 401) throw new KeyError("the server wants an API key: reload the page to give it");
  if (answer.status === 429) throw new Error("the server is busy: press Write in a few seconds");
  throw new Error(await reasonOf(answer));
}

/** Returns what the server says about an error, in the shape of the API. */
async function reasonOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answers with status ${answer.status}`;
  }
}

/** Yields the whole lines of a body, those that arrive together as one array. */
async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (lines.length) yield lines;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
