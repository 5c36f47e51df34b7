// The page's side of the engine: a model that computes in this browser, in a worker.

/** The text of a data block of the page. */
function block(id) {
  return document.getElementById(id).textContent;
}

export class LocalEngine {
  /** Where the model computes, as a sentence for the page. */
  get where() {
    return "It runs in this page, on your device: nothing is sent anywhere.";
  }

  /**
   * Reads the model in the page and starts the worker.
   * @param {{simd?: boolean}} options simd: use WebAssembly where it works
   * @returns {Promise<LocalEngine>}
   */
  static async open({ simd = true } = {}) {
    const source = new Blob([block("worker")], { type: "text/javascript" });
    const url = URL.createObjectURL(source); // a page opened as a file cannot load another one
    const engine = new LocalEngine(JSON.parse(block("facts")), new Worker(url));
    try {
      const { facts } = engine;
      engine.backend = await engine.ask("open", { facts, weights: block("weights"), simd });
    } finally {
      URL.revokeObjectURL(url);
    }
    return engine;
  }

  /** Use `open`. */
  constructor(facts, worker) {
    /** The JSON of the page. */
    this.facts = facts;
    this.worker = worker;
    this.jobs = new Map(); // number → what to do with its messages
    this.started = 0;
    this.stopWriting = () => {};
    this.broken = null; // why the worker cannot do any more jobs
    worker.onmessage = ({ data }) => this.receive(data);
    worker.onerror = (event) => this.fail(event.message || "the worker could not start");
  }

  /**
   * Continues a text. Reports a record for each given character from index `from` on, then for each
   * new one. Without end-of-text in the vocabulary, a given first character has no record.
   *
   * Only one text is written at a time: a new one stops the one before. After a stop, no more
   * records arrive.
   * @param {object} task
   * @param {number[]} task.ids the whole text so far
   * @param {number} task.from index of the first character to report
   * @param {number} task.n characters to write
   * @param {Settings} task.settings
   * @param {AbortSignal} [task.signal]
   * @param {(records: CharacterRecord[]) => void} task.onRecords
   * @returns {Promise<"length" | "end_of_text" | "stopped">}
   */
  async write({ ids, from, n, settings, signal, onRecords }) {
    if (signal?.aborted) return "stopped";
    this.stopWriting();
    let stopped = false;
    const report = (records) => stopped || onRecords(records);
    const job = this.started;
    const end = this.ask("write", { ids, from, n, settings }, report);
    const stop = () => {
      stopped = true;
      this.worker.postMessage({ job, kind: "stop" });
    };
    this.stopWriting = stop;
    signal?.addEventListener("abort", stop);
    try {
      const reason = await end;
      return stopped ? "stopped" : reason;
    } finally {
      signal?.removeEventListener("abort", stop);
    }
  }

  /**
   * Returns how the character at `index` was predicted: T tokens of context, C = d_model. Odds are
   * the likeliest 12 tokens, `{ids, p}`.
   *
   * - context: token ids, (T,); it begins with end-of-text if the model read that.
   * - embedding: token, position and sum, (C,) each, of the context's last token.
   * - lens0: odds if the model ended after the embedding; odds: its prediction.
   * - layers: attention, from the last token to each of the context, (T,) per head; lens, the odds
   *   if the model ended after this layer; attentionNorm and feedForwardNorm, the size of each
   *   update as a share of the residual stream's.
   * @param {{ids: number[], index: number, first: number}} question first: as in the record
   */
  inspect({ ids, index, first }) {
    return this.ask("inspect", { ids, index, first });
  }

  /**
   * Compares this browser's logits with those that Python computed, and measures the speed.
   * @returns {Promise<{largestDifference: number, tolerance: number, passed: boolean,
   *   where: string, charactersPerSecond: number, backend: "wasm simd" | "javascript"} | null>}
   *   null: the engine is the trained model itself
   */
  selfTest() {
    return this.ask("selfTest", {});
  }

  /** Starts a job of the worker; resolves to its result. */
  ask(kind, details, onRecords = () => {}) {
    const job = this.started++;
    return new Promise((resolve, reject) => {
      if (this.broken) throw new Error(this.broken);
      this.jobs.set(job, { resolve, reject, onRecords });
      this.worker.postMessage({ job, kind, details });
    });
  }

  receive({ job, records, result, error }) {
    const { resolve, reject, onRecords } = this.jobs.get(job);
    if (records) return onRecords(records);
    this.jobs.delete(job);
    return error === undefined ? resolve(result) : reject(new Error(error));
  }

  /** Ends all jobs, because the worker is broken. */
  fail(message) {
    this.broken = message;
    for (const { reject } of this.jobs.values()) reject(new Error(message));
    this.jobs.clear();
  }
}
