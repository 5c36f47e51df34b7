// The worker's side of the engine: does the jobs that arrive as messages, so that the page never
// waits. `local_engine.js` is the other side. Each message has the number of its job.

import { GPT2 } from "./gpt2.js";
import { WASM } from "./products.js";
import { Reader } from "./reader.js";
import { selfTest } from "./self_test.js";
import { Tokenizer } from "./tokenizer.js";
import { fromBase64 } from "./weights.js";
import { Writer } from "./writer.js";

const BATCH_MS = 16; // records of this time are sent together: a page shows 60 images per second

let reader, writer, expected;
const texts = new Map(); // job → { stop, end } of each text that is being written

const JOBS = {
  /** Decodes the model. Must be the first job, and be finished before the next one. */
  open({ facts, weights, simd }) {
    const { config, characters, end_of_text_id, tensors, self_test } = facts;
    const model = new GPT2(config, tensors, fromBase64(weights), simd ? fromBase64(WASM) : null);
    reader = new Reader(model);
    writer = new Writer(reader, new Tokenizer(characters, end_of_text_id), config.block_size);
    expected = self_test;
    return model.backend;
  },

  write(task, job) {
    const stop = new AbortController();
    const end = write(task, job, stop.signal).finally(() => texts.delete(job));
    texts.set(job, { stop, end });
    return end;
  },

  inspect(question) {
    return writer.inspect(question);
  },

  selfTest() {
    return selfTest(reader, writer, expected, idle);
  },
};

/** Writes, and sends records in batches. Returns why the text ended. */
async function write(task, job, signal) {
  const batch = new Batch(job);
  const text = writer.write(task, signal);
  try {
    for (;;) {
      const { value, done } = await text.next();
      if (done) return value;
      batch.add(value);
    }
  } catch (error) {
    if (signal.aborted) return "stopped";
    throw error;
  } finally {
    batch.send();
  }
}

/** Resolves when no text is being written. */
async function idle() {
  while (texts.size > 0) await Promise.allSettled([...texts.values()].map(({ end }) => end));
}

/** Records that wait to be sent. */
class Batch {
  constructor(job) {
    this.job = job;
    this.records = [];
    this.sent = performance.now();
  }

  add(record) {
    this.records.push(record);
    if (performance.now() - this.sent >= BATCH_MS) this.send();
  }

  send() {
    if (this.records.length > 0) postMessage({ job: this.job, records: this.records });
    this.records = [];
    this.sent = performance.now();
  }
}

onmessage = async ({ data: { job, kind, details } }) => {
  if (kind === "stop") {
    texts.get(job)?.stop.abort();
    return;
  }
  try {
    postMessage({ job, result: await JOBS[kind](details, job) });
  } catch (error) {
    postMessage({ job, error: String(error?.message ?? error) });
  }
};
